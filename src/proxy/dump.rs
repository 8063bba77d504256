//! One dump: a CRIU run connected to `streamer-capture.sock`, from its first request to the cache's
//! acknowledgement.

use std::cell::Cell;
use std::fmt::Display;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use tokio::net::UnixStream;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tracing::Instrument;

use crate::config::ProxySettings;
use crate::control::model::SnapshotState;
use crate::criu::capture::{Capture, Outcome};
use crate::daemon::journal;
use crate::daemon::sessions::Peer;
use crate::sys::clock::now_ms;

use super::Proxy;
use super::failure::Failure;
use super::forward::Forward;
use super::records::Record;
use super::requests::{Request, Requests};
use super::upload::{Upload, lost};
use crate::sys::ends::Source;

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
}

impl Target {
    /// A new snapshot for a dump through the shared socket, which names none: the id says who took
    /// it, when, and which CRIU.
    pub fn fresh(host: &str, peer: Peer, cache: String) -> Target {
        Target { id: fresh_id(host, peer.pid), cache, parent: None, record: None }
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
        let mut dump = Dump {
            proxy,
            settings,
            target: &target,
            record: &record,
            written: Rc::new(Cell::new(started)),
        };
        let result = dump.run(first, requests).await;
        record.end(result.as_ref().err().map(ToString::to_string));
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
}

impl Dump<'_> {
    async fn run(&mut self, first: Request, requests: Requests) -> Result<(), Failure> {
        // What is wrong from the start needs no link.
        let first = first?;
        let upload = self.connect().await?;
        let result = async {
            self.capture(&upload, Ok(first), requests).await?;
            self.finish(&upload).await
        }
        .await;
        if let Err(failure) = &result {
            upload.abort(&failure.to_string()).await;
        }
        result
    }

    /// Until there is a link to the cache, CRIU's first image waits in its pipe.
    async fn connect(&self) -> Result<Rc<Upload>, Failure> {
        let connect = self.proxy.links.connect(&self.target.cache, &self.settings);
        let connection = tokio::select! {
            connection = connect => connection.map_err(Failure::Lost)?,
            reason = self.record.stopped() => return Err(Failure::Stopped(reason)),
        };
        let Target { id, parent, .. } = self.target;
        Ok(Rc::new(connection.begin_child(id, parent.as_deref(), false).await))
    }

    /// Takes requests until CRIU closes the socket, and images until each has ended.
    async fn capture(
        &self,
        upload: &Rc<Upload>,
        first: Request,
        mut requests: Requests,
    ) -> Result<(), Failure> {
        let mut capture = Capture::default();
        let mut images: JoinSet<Result<String, Failure>> = JoinSet::new();
        self.open(upload, &mut capture, &mut images, first).await?;
        let mut connected = true;
        while connected || !images.is_empty() {
            tokio::select! {
                // The link's end is the cause of whatever fails with it.
                biased;
                fate = upload.fate() => return Err(lost(fate)),
                request = requests.next(), if connected => match request {
                    Some(request) => self.open(upload, &mut capture, &mut images, request).await?,
                    None => connected = false,
                },
                Some(ended) = images.join_next() => match ended {
                    Ok(name) => capture.ended(&name?),
                    Err(error) => return Err(Failure::Stopped(error.to_string())),
                },
                reason = self.record.stopped() => return Err(Failure::Stopped(reason)),
            }
        }
        match capture.outcome() {
            Outcome::Complete => Ok(()),
            Outcome::Failed(why) => Err(Failure::Incomplete(why)),
        }
    }

    /// CRIU opens an image: its pipe is read by a task of its own.
    async fn open(
        &self,
        upload: &Rc<Upload>,
        capture: &mut Capture,
        images: &mut JoinSet<Result<String, Failure>>,
        request: Request,
    ) -> Result<(), Failure> {
        let (name, pipe) = request?;
        capture.open(&name)?;
        self.record.begin_image(&name, false);
        self.written.set(Instant::now());
        let image = upload.begin_image(&name, false).await;
        let forward = Forward {
            upload: upload.clone(),
            image,
            name,
            source: Rc::new(Source::Pipe(pipe)),
            record: self.record.clone(),
            records: self.proxy.records.clone(),
            written: self.written.clone(),
            stall_timeout: self.settings.sessions.stall_timeout,
            pipe_size: usize::try_from(self.settings.sessions.pipe_size).unwrap_or(usize::MAX),
        };
        images.spawn_local(forward.run());
        Ok(())
    }

    /// All was sent: waits for the cache's word.
    async fn finish(&self, upload: &Upload) -> Result<(), Failure> {
        self.record.all_sent();
        let limit = self.settings.link.ack_timeout;
        tokio::select! {
            finished = upload.finish(false, limit) => finished,
            reason = self.record.stopped() => Err(Failure::Stopped(reason)),
        }
    }
}
