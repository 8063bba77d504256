//! One restore: a CRIU run connected to `streamer-serve.sock`, from its first request to its end.

use std::collections::BTreeSet;
use std::io;
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::task::{JoinError, JoinSet};
use tokio::time::timeout;
use tracing::Instrument;

use crate::config::CacheSettings;
use crate::criu::images::INVENTORY;
use crate::criu::pages::is_pages_image;
use crate::criu::stream::{HELD_BY_RESTORE, RESTORE_FAILED, decode_request, encode_reply};
use crate::daemon::journal;
use crate::daemon::sessions::{BadSession, Peer, Session, closed, read_request, receive_pipe};
use crate::metrics::refusals::Reason;
use crate::store::{Claim, Image, Images, Key, Permission, State, Unavailable};
use crate::sys::ends::Sink;
use crate::sys::pipe::PipeWriter;

use super::Cache;
use super::fill::{Fill, Reading};

/// A restore for which nothing came for so long is told of.
const WAITS_LONG: Duration = Duration::from_secs(2);

/// Which snapshot a restore gets.
#[derive(Debug, Clone, Copy)]
pub(super) enum Source {
    /// The oldest that no restore has taken: the shared socket.
    Oldest,
    /// The one that a directory was opened for, and what it may have although it is another's.
    Named(Key, Permission),
    /// One that somebody only looks at: reading it does not count as taking it.
    Look(Key),
}

/// Why a restore failed. The peer is in the log line's fields.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    /// CRIU, or what speaks in its place, broke the protocol.
    #[error("{0}")]
    Session(#[from] BadSession),
    /// There is nothing to serve an image with. Its pipe must not just be closed: that would look
    /// like the image's end.
    #[error("image {name} cannot be served: {cause}")]
    Image {
        /// The image.
        name: String,
        /// What the kernel said.
        cause: io::Error,
    },
    /// It went away while it waited.
    #[error("the peer left while it waited for its snapshot")]
    Left,
    /// It has waited for long enough.
    #[error("no snapshot came for it within {0:?} (store.restore-wait)")]
    NothingCame(Duration),
    /// It does not read its images to their end.
    #[error("images {names} were not read for {waited:?}")]
    Stalled {
        /// The images.
        names: String,
        /// sessions.stall-timeout.
        waited: Duration,
    },
    /// There is no such snapshot to be had.
    #[error("{0}")]
    Unavailable(#[from] Unavailable),
    /// It does not take the answer.
    #[error("the peer does not take the answer to its request: {0}")]
    Reply(io::Error),
}

impl Failure {
    /// Why, if the peer is to blame.
    pub(super) fn reason(&self) -> Option<Reason> {
        match self {
            Failure::Session(bad) => Some(bad.into()),
            Failure::Reply(_) => Some(Reason::Protocol),
            Failure::Stalled { .. } => Some(Reason::Stalled),
            Failure::Left
            | Failure::Unavailable(_)
            | Failure::Image { .. }
            | Failure::NothingCame(_) => None,
        }
    }
}

/// What a restore has read.
#[derive(Debug, Default)]
struct Read {
    images: u64,
    bytes: u64,
}

/// What has become of a restore whose session has ended in order.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    /// It asked for nothing, or only looked.
    Nothing,
    /// It said that it has succeeded.
    Succeeded,
    /// It said that it has failed.
    Failed,
    /// It went away without saying what it was to say.
    Silent,
    /// CRIU has read all pages. The stream tells no more.
    Read,
    /// CRIU has not read these images of pages to their end, without which no restore succeeds.
    Unread(Vec<String>),
}

impl Outcome {
    /// Whether the snapshot counts as taken: where nobody can tell, a process may run.
    fn takes(&self) -> bool {
        match self {
            Outcome::Succeeded | Outcome::Silent | Outcome::Read => true,
            Outcome::Nothing | Outcome::Failed | Outcome::Unread(_) => false,
        }
    }
}

/// Serves one restore, which may have its claim already; returns whether it has taken its snapshot. A failure ends this
/// session only: CRIU sees its socket closed.
pub(super) async fn serve(
    cache: &Cache,
    socket: UnixStream,
    peer: Peer,
    source: Source,
    claim: Option<Claim>,
) -> bool {
    let _session = cache.restores.enter();
    let span = tracing::error_span!("restore", criu_peer = %peer);
    let settings = cache.settings();
    async {
        let started = Instant::now();
        let mut restore = Restore {
            cache,
            settings,
            socket,
            peer,
            claim,
            images: None,
            pipes: JoinSet::new(),
            serving: None,
            served_since: None,
            reading: Rc::default(),
            sent: Read::default(),
            read: BTreeSet::new(),
            holds: false,
            has_failed: false,
            warned: false,
        };
        if let Err(failure) = restore.run(source).await {
            if let Some(reason) = failure.reason() {
                cache.figures.refusals.count(reason);
            }
            tell_failed(peer, restore.claim.as_ref(), &failure);
            return false;
        }
        let outcome = restore.outcome(source);
        let Some(claim) = &restore.claim else { return false };
        if outcome.takes() {
            claim.taken();
            if let Some(since) = restore.served_since {
                cache.figures.restores.observe(since.elapsed());
            }
        } else if outcome == Outcome::Failed {
            claim.failed();
        }
        tell(peer, claim, &outcome, &restore.sent, started);
        if outcome.takes() {
            // Whoever waits for the end of the session relies on that, whatever becomes of the cache.
            cache.keeping.follow().await;
        }
        outcome.takes()
    }
    .instrument(span)
    .await
}

fn tell_failed(peer: Peer, claim: Option<&Claim>, failure: &Failure) {
    let criu_snapshot = claim.and_then(Claim::id);
    let message_id = match failure {
        // Nobody's fault: it may come again.
        Failure::Left => {
            tracing::info!(criu_snapshot, "a restore by {peer} ended: {failure}");
            return;
        }
        Failure::Session(_) => journal::PROTOCOL_ERROR,
        _ => journal::RESTORE_FAILED,
    };
    tracing::warn!(
        message_id,
        criu_snapshot,
        criu_reason = %failure,
        "a restore by {peer} ended: {failure}"
    );
}

fn tell(peer: Peer, claim: &Claim, outcome: &Outcome, sent: &Read, started: Instant) {
    let id = claim.id().unwrap_or_default();
    let (criu_bytes, criu_images) = (sent.bytes, sent.images);
    let criu_seconds = started.elapsed().as_secs_f64();
    match outcome {
        Outcome::Nothing => {}
        Outcome::Read => tracing::info!(
            message_id = journal::SNAPSHOT_TAKEN,
            criu_snapshot = id,
            criu_bytes,
            criu_images,
            criu_seconds,
            "snapshot {id} taken: {criu_bytes} bytes of {criu_images} images read, {criu_seconds:.2} s"
        ),
        Outcome::Succeeded => tracing::info!(
            message_id = journal::SNAPSHOT_TAKEN,
            criu_snapshot = id,
            criu_seconds,
            "snapshot {id} taken: its restore has succeeded, {criu_seconds:.2} s"
        ),
        Outcome::Silent => {
            let criu_reason = "it has gone without a word, and its process may run";
            tracing::warn!(
                message_id = journal::RESTORE_FAILED,
                criu_snapshot = id,
                criu_reason,
                "a restore by {peer} ended: {criu_reason}"
            );
            tracing::info!(
                message_id = journal::SNAPSHOT_TAKEN,
                criu_snapshot = id,
                criu_seconds,
                "snapshot {id} counts as taken, {criu_seconds:.2} s"
            );
        }
        Outcome::Failed => {
            let criu_reason = "its restore has said so";
            let state = if claim.is_taken() {
                "taken, as before, since another restore may have succeeded"
            } else {
                "whole and may be restored"
            };
            tracing::warn!(
                message_id = journal::RESTORE_FAILED,
                criu_snapshot = id,
                criu_reason,
                "a restore by {peer} has failed: snapshot {id} is {state}"
            );
        }
        Outcome::Unread(images) => {
            let criu_reason = format!("it has not read {} to the end", images.join(", "));
            tracing::warn!(
                message_id = journal::RESTORE_FAILED,
                criu_snapshot = id,
                criu_reason,
                "a restore by {peer} ended, and snapshot {id} is not taken: {criu_reason}"
            );
        }
    }
}

struct Restore<'a> {
    cache: &'a Cache,
    settings: Rc<CacheSettings>,
    socket: UnixStream,
    peer: Peer,
    claim: Option<Claim>,
    /// Even if the snapshot is dropped they stay until the restore ends, which may read them by other ways,
    /// too (a view).
    images: Option<Rc<Images>>,
    pipes: JoinSet<Result<(Rc<Image>, u64), Failure>>,
    /// Held once it has its snapshot: from then on the daemon's end waits for it.
    serving: Option<Session>,
    /// When it was.
    served_since: Option<Instant>,
    reading: Rc<Reading>,
    sent: Read,
    /// Images that were read to their end.
    read: BTreeSet<String>,
    /// It holds the snapshot for somebody who reads the images elsewhere, and says what becomes of that.
    holds: bool,
    /// It has said that it has failed.
    has_failed: bool,
    /// Whether it was said that it should have been restored from a view.
    warned: bool,
}

impl Restore<'_> {
    async fn run(&mut self, source: Source) -> Result<(), Failure> {
        let patience = self.settings.sessions.request_timeout;
        while let Some(request) = read_request(&mut self.socket, patience).await? {
            let name = decode_request(&request).map_err(BadSession::from)?;
            let images = self.images(source).await?;
            if !matches!(source, Source::Look(_)) && images.contains_key(&name) {
                self.warn_if_view_is_needed(&name);
            }
            self.answer(&images, &name, patience).await?;
        }
        self.finish().await
    }

    /// The snapshot's images, once it is whole. CRIU waits for an image that is not there yet, and
    /// may only be told that there is none when nothing more can come.
    async fn images(&mut self, source: Source) -> Result<Rc<Images>, Failure> {
        let wait = async {
            let limit = self.settings.store.restore_wait;
            let claim = wait_for(self.cache, source, self.claim.take(), self.peer, limit).await?;
            let images = claim.images().await;
            Ok::<_, Failure>((claim, images))
        };
        let (claim, images) = tokio::select! {
            claimed = wait => claimed?,
            () = closed(&self.socket) => return Err(Failure::Left),
        };
        if self.serving.is_none() {
            self.serving = Some(self.cache.serving.enter());
            self.served_since = Some(Instant::now());
        }
        self.claim = Some(claim);
        let images = images?;
        self.images = Some(images.clone());
        Ok(images)
    }

    /// Says once that CRIU restores through the stream what it does not get right from a pipe. A restore from a view
    /// has a session, too, but reads the inventory at most.
    fn warn_if_view_is_needed(&mut self, name: &str) {
        if self.warned || name == INVENTORY {
            return;
        }
        self.warned = true;
        let Some(claim) = &self.claim else { return };
        if let (Some(id), Some(criu_reason)) = (claim.id(), claim.needs_view()) {
            tracing::warn!(
                message_id = journal::VIEW_NEEDED,
                criu_snapshot = id,
                criu_reason,
                "snapshot {id} is restored through the stream and needs a view: {criu_reason}"
            );
        }
    }

    async fn answer(
        &mut self,
        images: &Images,
        name: &str,
        patience: Duration,
    ) -> Result<(), Failure> {
        match name {
            HELD_BY_RESTORE => self.holds = true,
            RESTORE_FAILED => self.has_failed = true,
            _ => {}
        }
        let image = images.get(name);
        let reply = encode_reply(image.is_some());
        match timeout(patience, self.socket.write_all(&reply)).await {
            Err(_) => return Err(BadSession::Late(patience).into()),
            Ok(written) => written.map_err(Failure::Reply)?,
        }
        let Some(image) = image else {
            tracing::trace!("there is no image {name}");
            return Ok(());
        };
        let pipe = receive_pipe(&self.socket, name, patience, PipeWriter::adopt).await?;
        let pipe_size = usize::try_from(self.settings.sessions.pipe_size).unwrap_or(usize::MAX);
        let served = |cause| Failure::Image { name: name.to_owned(), cause };
        let fill = Fill::begin(Sink::Pipe(pipe), image.clone(), pipe_size, &self.reading)
            .map_err(served)?;
        self.sent.images += 1;
        let image = image.clone();
        self.pipes.spawn_local(async move { Ok((image, fill.run().await?)) });
        while let Some(filled) = self.pipes.try_join_next() {
            self.count(filled)?;
        }
        Ok(())
    }

    /// CRIU has closed the socket; its tasks may still read from their pipes. One that stops
    /// reading is given up after a while: nobody can tell it from one that has gone.
    async fn finish(&mut self) -> Result<(), Failure> {
        let limit = self.settings.sessions.stall_timeout;
        let mut seen = self.reading.bytes.get();
        loop {
            match timeout(limit, self.pipes.join_next()).await {
                Ok(Some(filled)) => self.count(filled)?,
                Ok(None) => return Ok(()),
                Err(_) if self.reading.bytes.get() > seen => seen = self.reading.bytes.get(),
                Err(_) => {
                    let open = self.reading.open.borrow();
                    let names = open.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
                    return Err(Failure::Stalled { names, waited: limit });
                }
            }
        }
    }

    fn count(
        &mut self,
        filled: Result<Result<(Rc<Image>, u64), Failure>, JoinError>,
    ) -> Result<(), Failure> {
        // A task that is not there any more has moved nothing.
        let Ok(filled) = filled else { return Ok(()) };
        let (image, bytes) = filled?;
        if bytes == image.len() {
            self.read.insert(image.name().to_owned());
        }
        self.sent.bytes += bytes;
        self.cache.served.set(self.cache.served.get() + bytes);
        Ok(())
    }

    /// What has become of it, as far as its session tells, which has ended in order.
    fn outcome(&self, source: Source) -> Outcome {
        let read_something = self.sent.images > 0;
        if matches!(source, Source::Look(_)) {
            Outcome::Nothing
        } else if self.has_failed {
            Outcome::Failed
        } else if self.holds {
            if read_something { Outcome::Succeeded } else { Outcome::Silent }
        } else if read_something {
            let unread = self.unread();
            if unread.is_empty() { Outcome::Read } else { Outcome::Unread(unread) }
        } else {
            Outcome::Nothing
        }
    }

    /// The images of pages that were not read to their end.
    fn unread(&self) -> Vec<String> {
        let images = self.images.iter().flat_map(|images| images.values());
        let unread = images.filter(|image| {
            is_pages_image(image.name()) && !image.is_empty() && !self.read.contains(image.name())
        });
        unread.map(|image| image.name().to_owned()).collect()
    }
}

/// Gets a claim on a snapshot that comes or is there. One that does not come for some time is told of, and in the end
/// given up.
async fn wait_for(
    cache: &Cache,
    source: Source,
    given: Option<Claim>,
    peer: Peer,
    limit: Duration,
) -> Result<Claim, Failure> {
    let mut begun = std::pin::pin!(async {
        let claim = match given {
            Some(claim) => claim,
            None => claim(cache, source).await?,
        };
        claim.begun().await;
        Ok::<_, Unavailable>(claim)
    });
    let soon = limit.min(WAITS_LONG);
    if let Ok(claim) = timeout(soon, begun.as_mut()).await {
        return Ok(claim?);
    }
    if limit > soon {
        tell_waits(cache, source, peer, limit);
    }
    match timeout(limit.saturating_sub(soon), begun).await {
        Ok(claim) => Ok(claim?),
        Err(_) => Err(Failure::NothingCame(limit)),
    }
}

fn tell_waits(cache: &Cache, source: Source, peer: Peer, limit: Duration) {
    let what = match source {
        Source::Named(key, _) | Source::Look(key) => {
            format!("snapshot {}", cache.store.id(key).unwrap_or_default())
        }
        Source::Oldest => {
            "a snapshot that is not kept for another and that no restore has taken".to_owned()
        }
    };
    let mut damaged = None;
    cache.store.for_each(|snapshot| {
        if matches!(snapshot.state, State::Damaged { .. }) {
            damaged = Some(snapshot.id.clone());
        }
    });
    let damaged = damaged.map_or_else(String::new, |id| format!("; snapshot {id} is damaged"));
    let criu_reason = format!("nothing came for {WAITS_LONG:?}{damaged}");
    tracing::info!(
        message_id = journal::RESTORE_WAITS,
        criu_reason,
        "a restore by {peer} waits for {what}, until {limit:?} (store.restore-wait) are over: {criu_reason}"
    );
}

async fn claim(cache: &Cache, source: Source) -> Result<Claim, Unavailable> {
    match source {
        Source::Named(key, permission) => cache.store.claim(key, permission),
        Source::Look(key) => Ok(cache.store.peek(key)),
        Source::Oldest => loop {
            let mut changed = cache.store.watch();
            if let Some(claim) = cache.store.claim_oldest() {
                return Ok(claim);
            }
            // The store is there as long as the cache is.
            let _ = changed.changed().await;
        },
    }
}
