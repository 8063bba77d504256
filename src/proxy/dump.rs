//! One dump: a CRIU run connected to `streamer-capture.sock`, from its first request to the cache's
//! acknowledgement.

use std::cell::Cell;
use std::fmt::Display;
use std::pin::pin;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tracing::Instrument;

use crate::config::ProxySettings;
use crate::control::model::{SnapshotState, Withdrawn};
use crate::control::new_attempt;
use crate::criu::capture::{Capture, Outcome};
use crate::criu::images::{INVENTORY, may_be_lent};
use crate::daemon::journal;
use crate::daemon::sessions::Peer;
use crate::sys::clock::now_ms;

use super::Proxy;
use super::copy::Copy;
use super::failure::Failure;
use super::forward::Forward;
use super::freeze::Freeze;
use super::hooks::Waited;
use super::records::Record;
use super::requests::{Request, Requests};
use super::upload::{Upload, lost};
use crate::sys::ends::Source;
use crate::sys::held::Held;
use crate::sys::pipe::PipeReader;

/// Which snapshot a dump becomes, and where it goes.
#[derive(Debug, Clone)]
pub struct Target {
    /// The snapshot's id.
    pub id: String,
    /// The cache, `HOST:PORT`.
    pub cache: String,
    /// The snapshot in which its images have pages.
    pub parent: Option<String>,
    /// Its record, if a directory was opened for it.
    pub record: Option<Rc<Record>>,
    /// Whether its bytes are those of files, and stay what they are until the cache has them.
    pub of_files: bool,
}

impl Target {
    /// A new snapshot for a dump through the shared socket, which names none: the id says who took
    /// it, when, and which CRIU.
    pub fn fresh(host: &str, peer: Peer, cache: String) -> Target {
        Target { id: fresh_id(host, peer.pid), cache, parent: None, record: None, of_files: false }
    }
}

/// An id for a dump that names none: no two are alike, not even those of one `peer` in one millisecond.
pub(super) fn fresh_id(host: &str, peer: impl Display) -> String {
    static LAST: AtomicU64 = AtomicU64::new(0);
    let at = now_ms().max(LAST.load(Ordering::Relaxed) + 1);
    LAST.store(at, Ordering::Relaxed);
    format!("{host}-{at}-{peer}")
}

/// Serves one dump. Returns whether the snapshot is at the cache. Whatever fails ends this session
/// only, and towards the source: CRIU's pipes are closed, its dump fails, the process runs on.
pub async fn serve(proxy: &Proxy, socket: UnixStream, peer: Peer, target: Target) -> bool {
    let _session = proxy.sessions.enter();
    let span = tracing::error_span!("dump", criu_peer = %peer);
    async {
        let settings = proxy.settings();
        let mut requests = Requests::read_from(socket, &settings.sessions);
        // A peer that only connects makes no snapshot.
        let stopped = async {
            match &target.record {
                Some(record) => record.stopped().await,
                None => std::future::pending().await,
            }
        };
        let first = tokio::select! {
            first = timeout(settings.sessions.stall_timeout, requests.next()) => first.ok().flatten(),
            _ = stopped => None,
        };
        let Some(first) = first else {
            tracing::debug!(criu_snapshot = target.id, "{peer} made no request");
            return false;
        };
        let Some(record) = target
            .record
            .clone()
            .or_else(|| proxy.records.add(&target.id, &target.cache, SnapshotState::Receiving))
        else {
            let (message_id, id) = (journal::SNAPSHOT_REFUSED, target.id.as_str());
            let criu_reason = "one of that id is being sent already";
            tracing::warn!(
                message_id,
                criu_snapshot = id,
                criu_reason,
                "snapshot {id} is refused: {criu_reason}"
            );
            return false;
        };
        record.begin();
        let started = Instant::now();
        let waited = proxy.hooks.begin(peer.pid);
        let (asked, budget) = (requests.asked().clone(), proxy.budget.clone());
        let dump = Dump {
            proxy,
            settings,
            target: &target,
            record: &record,
            written: Rc::new(Cell::new(started)),
            freeze: Rc::new(Freeze::new(requests.socket(), asked, budget)),
            waited: &waited,
            lent: Cell::new(false),
            attempt: match record.attempt() {
                0 if !target.of_files => new_attempt(),
                given => given,
            },
            all_said: Cell::new(false),
        };
        let result = dump.run(first, requests).await;
        let why = result.as_ref().err().map(ToString::to_string);
        record.end(why.clone());
        waited.end(why.map_or_else(|| Ok(record.info()), Err));
        tell(&record, result.as_ref().err(), started);
        result.is_ok()
    }
    .instrument(span)
    .await
}

/// The one line that the journal gets for a snapshot.
pub(super) fn tell(record: &Record, failure: Option<&Failure>, started: Instant) {
    let info = record.info();
    let criu_seconds = started.elapsed().as_secs_f64();
    let (criu_bytes, criu_images) = (info.bytes, info.images);
    match failure {
        None => tracing::info!(
            message_id = journal::SNAPSHOT_SENT,
            criu_snapshot = info.id,
            criu_bytes,
            criu_images,
            criu_seconds,
            "snapshot {} sent to {}: {criu_bytes} bytes in {criu_images} images, {criu_seconds:.2} s",
            info.id,
            info.peer,
        ),
        Some(failure) => tracing::warn!(
            message_id = journal::SNAPSHOT_DAMAGED,
            criu_snapshot = info.id,
            criu_image = failure.image(),
            criu_reason = %failure,
            criu_bytes,
            criu_images,
            criu_seconds,
            "snapshot {} damaged after {criu_bytes} bytes in {criu_images} images: {failure}",
            info.id,
        ),
    }
}

/// A dump under way.
struct Dump<'a> {
    proxy: &'a Proxy,
    settings: Rc<ProxySettings>,
    target: &'a Target,
    record: &'a Rc<Record>,
    /// When CRIU last wrote to any image.
    written: Rc<Cell<Instant>>,
    freeze: Rc<Freeze>,
    /// For CRIU's action script.
    waited: &'a Waited,
    /// Whether pages are sent without being copied first, because CRIU will wait.
    lent: Cell<bool>,
    /// Names this dump, so that the cache can give it up, and nothing else, also when it has all of it.
    attempt: u64,
    /// Whether the cache may have all of it.
    all_said: Cell<bool>,
}

/// The snapshot on its way, once there is a link.
type Coming = watch::Receiver<Option<Rc<Upload>>>;

impl Dump<'_> {
    async fn run(&self, first: Request, requests: Requests) -> Result<(), Failure> {
        // What is wrong from the start needs no link.
        let first = first?;
        let (connected, coming) = watch::channel(None);
        let mut captured = pin!(self.capture(&coming, Ok(first), requests));
        // Images are opened while there is no link yet; what CRIU writes waits in its pipes.
        let upload = tokio::select! {
            upload = self.connect() => upload?,
            captured = &mut captured => {
                // Nothing can end well before it is sent.
                return captured.and(Err(Failure::Incomplete("it was not sent".to_owned())));
            }
        };
        connected.send_replace(Some(upload.clone()));
        let result = async {
            tokio::select! {
                // The link's end is the cause of whatever fails with it.
                biased;
                fate = upload.fate() => return Err(lost(fate)),
                captured = captured => captured?,
            }
            self.finish(&upload).await
        }
        .await;
        match result {
            Ok(()) => Ok(()),
            Err(failure) => {
                upload.abort(&failure.to_string()).await;
                // CRIU lets its process go on, as its action script has not heard that the cache has it.
                let runs_on = self.waited.is_asked() && self.attempt != 0;
                if runs_on && self.all_said.get() {
                    return Err(self.withdraw(&failure).await);
                }
                Err(failure)
            }
        }
    }

    /// The cache may have everything, or be about to: it is to give that up. Returns why the dump fails, and what is
    /// known of the cache's copy.
    async fn withdraw(&self, failure: &Failure) -> Failure {
        let Target { id, cache, .. } = self.target;
        let reason = format!("its dump failed, and the process runs on at the source: {failure}");
        let copy = match self.proxy.withdraw_at_cache(id, self.attempt, &reason, cache).await {
            Ok(Withdrawn::Withdrawn) => "the cache has dropped its copy".to_owned(),
            Ok(Withdrawn::Unknown) => "the cache has no copy".to_owned(),
            Ok(Withdrawn::Taken) => format!(
                "a restore has taken snapshot {id}: the process may run twice, and one of the two has to go"
            ),
            Ok(Withdrawn::Unsaid) => not_known(id, "its version cannot say"),
            Err(why) => not_known(id, &why),
        };
        Failure::Stopped(format!("{failure}; {copy}"))
    }

    async fn connect(&self) -> Result<Rc<Upload>, Failure> {
        let connect = self.proxy.links.connect(&self.target.cache, &self.settings);
        let connection = tokio::select! {
            connection = connect => connection.map_err(Failure::Lost)?,
            stopped = self.stopped() => return Err(stopped),
        };
        let Target { id, parent, .. } = self.target;
        Ok(Rc::new(connection.begin_child(id, parent.as_deref(), false, self.attempt).await))
    }

    /// Somebody does not want the snapshot any more.
    async fn stopped(&self) -> Failure {
        tokio::select! {
            reason = self.record.stopped() => Failure::Stopped(reason),
            reason = self.waited.given_up() => Failure::Stopped(reason),
        }
    }

    /// Takes requests until CRIU closes the socket, or waits in its action script, and images until each has ended.
    async fn capture(
        &self,
        coming: &Coming,
        first: Request,
        mut requests: Requests,
    ) -> Result<(), Failure> {
        let mut capture = Capture::default();
        let mut images: JoinSet<Result<String, Failure>> = JoinSet::new();
        self.open(coming, &mut capture, &mut images, first)?;
        let (mut connected, mut asked) = (true, false);
        loop {
            let all_asked_for = !connected || (asked && requests.are_all_read());
            if all_asked_for && images.is_empty() {
                break;
            }
            tokio::select! {
                biased;
                request = requests.next(), if connected => match request {
                    Some(request) => self.open(coming, &mut capture, &mut images, request)?,
                    None => connected = false,
                },
                Some(ended) = images.join_next() => match ended {
                    Ok(name) => capture.ended(&name?),
                    Err(error) => return Err(Failure::Stopped(error.to_string())),
                },
                () = self.waited.asked(), if !asked => asked = true,
                stopped = self.stopped() => return Err(stopped),
            }
        }
        match capture.outcome() {
            Outcome::Complete => Ok(()),
            Outcome::Failed(why) => Err(Failure::Incomplete(why)),
        }
    }

    /// CRIU opens an image: its pipe is read by a task of its own. Nothing here waits for the link.
    fn open(
        &self,
        coming: &Coming,
        capture: &mut Capture,
        images: &mut JoinSet<Result<String, Failure>>,
        request: Request,
    ) -> Result<(), Failure> {
        let (name, pipe) = request?;
        capture.open(&name)?;
        self.record.begin_image(&name, false);
        self.written.set(Instant::now());
        if name == INVENTORY {
            self.freeze.last_opened(|| pipe.is_closed())?;
        } else {
            self.freeze.opened()?;
        }
        let source = self.source(&name, pipe)?;
        let copying = match &source {
            Source::Held(held) => {
                let (copying, mut coming) = (self.copying(&name, held), coming.clone());
                // Without a link the dump fails in the end, which it can only as long as CRIU waits in it.
                Some(async move {
                    if coming.wait_for(Option::is_some).await.is_ok() {
                        copying.await;
                    }
                })
            }
            _ => None,
        };
        let (record, records) = (self.record.clone(), self.proxy.records.clone());
        let (written, settings) = (self.written.clone(), self.settings.clone());
        let mut coming = coming.clone();
        images.spawn_local(async move {
            let forward = async {
                // Who connects lets this task go when there is no link.
                let Ok(upload) = coming.wait_for(Option::is_some).await.map(|up| up.clone()) else {
                    return std::future::pending().await;
                };
                let Some(upload) = upload else { return std::future::pending().await };
                let image = upload.begin_image(&name, false).await;
                let source = Rc::new(source);
                let (stall_timeout, pipe_size) =
                    (settings.sessions.stall_timeout, pipe_size(&settings));
                let forward = Forward {
                    upload,
                    image,
                    name,
                    source,
                    record,
                    records,
                    written,
                    stall_timeout,
                    pipe_size,
                };
                forward.run().await
            };
            match copying {
                Some(copying) => {
                    let (mut forward, mut copying) = (pin!(forward), pin!(copying));
                    tokio::select! {
                        forwarded = &mut forward => forwarded,
                        () = &mut copying => forward.await,
                    }
                }
                None => forward.await,
            }
        });
        Ok(())
    }

    /// What an image is sent from. CRIU may lend what it writes, which has to be copied at once unless CRIU waits until
    /// the cache has copied it.
    fn source(&self, name: &str, pipe: PipeReader) -> Result<Source, Failure> {
        let pipe = Source::Pipe(pipe);
        if self.target.of_files || !may_be_lent(name) {
            return Ok(pipe);
        }
        if self.waited.is_expected() {
            self.lent.set(true);
            return Ok(pipe);
        }
        let held = Held::new(name, pipe, self.freeze.budget()).map_err(|error| Failure::Image {
            name: name.to_owned(),
            cause: format!("it cannot be copied: {error}"),
        })?;
        Ok(Source::Held(Rc::new(held)))
    }

    fn copying(&self, name: &str, held: &Rc<Held>) -> impl Future<Output = ()> + use<> {
        self.freeze.copies(name, held);
        let copy = Copy {
            held: held.clone(),
            written: self.written.clone(),
            stall_timeout: self.settings.sessions.stall_timeout,
            pipe_size: pipe_size(&self.settings),
        };
        let freeze = self.freeze.clone();
        async move { copy.run(freeze.budget(), || freeze.copied()).await }
    }

    /// All was sent: waits for the cache's word.
    async fn finish(&self, upload: &Upload) -> Result<(), Failure> {
        self.record.all_sent();
        // CRIU waits now, or it has ended or thawed the process already.
        let changed = !self.waited.is_asked() && (self.lent.get() || self.freeze.is_late());
        if changed {
            self.tell_changed(upload);
        }
        let limit = self.settings.link.ack_timeout;
        self.all_said.set(true);
        tokio::select! {
            finished = upload.finish_marked(changed, limit) => finished,
            stopped = self.stopped() => Err(stopped),
        }
    }

    fn tell_changed(&self, upload: &Upload) {
        self.record.mark_memory();
        let (message_id, id) = (journal::MEMORY_MAY_HAVE_CHANGED, &self.target.id);
        let cache = if upload.connection.keeps_marks() {
            "the cache gives it to no restore without --accept-changed-memory"
        } else {
            "the cache is of a version that does not know of this, and gives it to any restore"
        };
        let why = if self.lent.get() {
            "criu-imagectl hook was announced for CRIU's pre-dump and did not wait at its post-dump"
        } else {
            "it was copied too late; give criu dump --action-script criu-imagectl"
        };
        tracing::warn!(
            message_id,
            criu_snapshot = id,
            criu_reason = why,
            "the memory in snapshot {id} may have changed before it was copied: {why}; {cache}"
        );
    }
}

fn not_known(id: &str, why: &str) -> String {
    format!(
        "whether the cache has it is not known: {why}; on the destination host: criu-imagectl --cache show {id}; if it \
         is whole: criu-imagectl --cache drop {id}"
    )
}

fn pipe_size(settings: &ProxySettings) -> usize {
    usize::try_from(settings.sessions.pipe_size).unwrap_or(usize::MAX)
}
