//! One restore: a CRIU run connected to `streamer-serve.sock`, from its first request to its end.

use std::io;
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::task::{JoinError, JoinSet};
use tokio::time::timeout;
use tracing::Instrument;

use crate::config::CacheSettings;
use crate::criu::stream::{decode_request, encode_reply};
use crate::daemon::journal;
use crate::daemon::sessions::{BadSession, Peer, Session, closed, read_request, receive_pipe};
use crate::metrics::refusals::Reason;
use crate::store::{Claim, Images, Key, Unavailable};
use crate::sys::ends::Sink;
use crate::sys::pipe::PipeWriter;

use super::Cache;
use super::fill::{Fill, Reading};

/// Which snapshot a restore gets.
#[derive(Debug, Clone, Copy)]
pub(super) enum Source {
    /// The oldest that no restore has taken: the shared socket.
    Oldest,
    /// The one that a directory was opened for.
    Named(Key),
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
            Failure::Left | Failure::Unavailable(_) | Failure::Image { .. } => None,
        }
    }
}

/// What a restore has read.
#[derive(Debug, Default)]
struct Read {
    images: u64,
    bytes: u64,
}

/// Serves one restore; returns whether it has taken its snapshot. A failure ends this session only:
/// CRIU sees its socket closed.
pub(super) async fn serve(cache: &Cache, socket: UnixStream, peer: Peer, source: Source) -> bool {
    let _session = cache.restores.enter();
    let span = tracing::error_span!("restore", criu_peer = %peer);
    let settings = cache.settings();
    async {
        let started = Instant::now();
        let mut restore = Restore {
            cache,
            settings,
            socket,
            claim: None,
            images: None,
            pipes: JoinSet::new(),
            serving: None,
            served_since: None,
            reading: Rc::default(),
            sent: Read::default(),
        };
        if let Err(failure) = restore.run(source).await {
            if let Some(reason) = failure.reason() {
                cache.figures.refusals.count(reason);
            }
            tell_failed(peer, restore.claim.as_ref(), &failure);
            return false;
        }
        let taken = !matches!(source, Source::Look(_)) && restore.sent.images > 0;
        if let (Some(claim), true) = (&restore.claim, taken) {
            claim.taken();
            if let Some(since) = restore.served_since {
                cache.figures.restores.observe(since.elapsed());
            }
            tell_taken(claim, &restore.sent, started);
        }
        taken
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

fn tell_taken(claim: &Claim, sent: &Read, started: Instant) {
    let id = claim.id().unwrap_or_default();
    let (criu_bytes, criu_images) = (sent.bytes, sent.images);
    let criu_seconds = started.elapsed().as_secs_f64();
    tracing::info!(
        message_id = journal::SNAPSHOT_TAKEN,
        criu_snapshot = id,
        criu_bytes,
        criu_images,
        criu_seconds,
        "snapshot {id} taken: {criu_bytes} bytes of {criu_images} images read, {criu_seconds:.2} s"
    );
}

struct Restore<'a> {
    cache: &'a Cache,
    settings: Rc<CacheSettings>,
    socket: UnixStream,
    claim: Option<Claim>,
    /// Even if the snapshot is dropped they stay until the restore ends, which may read them by other ways,
    /// too (a view).
    images: Option<Rc<Images>>,
    pipes: JoinSet<Result<u64, Failure>>,
    /// Held once it has its snapshot: from then on the daemon's end waits for it.
    serving: Option<Session>,
    /// When it was.
    served_since: Option<Instant>,
    reading: Rc<Reading>,
    sent: Read,
}

impl Restore<'_> {
    async fn run(&mut self, source: Source) -> Result<(), Failure> {
        let patience = self.settings.sessions.request_timeout;
        while let Some(request) = read_request(&mut self.socket, patience).await? {
            let name = decode_request(&request).map_err(BadSession::from)?;
            let images = self.images(source).await?;
            self.answer(&images, &name, patience).await?;
        }
        self.finish().await
    }

    /// The snapshot's images, once it is whole. CRIU waits for an image that is not there yet, and
    /// may only be told that there is none when nothing more can come.
    async fn images(&mut self, source: Source) -> Result<Rc<Images>, Failure> {
        let wait = async {
            let claim = match self.claim.take() {
                Some(claim) => claim,
                None => claim(self.cache, source).await,
            };
            let images = claim.images().await;
            (claim, images)
        };
        let (claim, images) = tokio::select! {
            claimed = wait => claimed,
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

    async fn answer(
        &mut self,
        images: &Images,
        name: &str,
        patience: Duration,
    ) -> Result<(), Failure> {
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
        self.pipes.spawn_local(fill.run());
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

    fn count(&mut self, filled: Result<Result<u64, Failure>, JoinError>) -> Result<(), Failure> {
        // A task that is not there any more has moved nothing.
        let bytes = filled.unwrap_or(Ok(0))?;
        self.sent.bytes += bytes;
        self.cache.served.set(self.cache.served.get() + bytes);
        Ok(())
    }
}

async fn claim(cache: &Cache, source: Source) -> Claim {
    match source {
        Source::Named(key) => cache.store.claim(key),
        Source::Look(key) => cache.store.peek(key),
        Source::Oldest => loop {
            let mut changed = cache.store.watch();
            if let Some(claim) = cache.store.claim_oldest() {
                return claim;
            }
            // The store is there as long as the cache is.
            let _ = changed.changed().await;
        },
    }
}
