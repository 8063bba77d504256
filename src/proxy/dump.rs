//! One dump: a CRIU run connected to `streamer-capture.sock`, from its first request to the cache's
//! acknowledgement.

use std::cell::Cell;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tracing::Instrument;

use crate::config::{ProxySettings, SessionSettings};
use crate::control::model::SnapshotState;
use crate::criu::capture::{Capture, Fault, Outcome};
use crate::criu::stream::{BadRequest, decode_request};
use crate::daemon::journal;
use crate::daemon::sessions::{BadSession, Peer, read_request, receive_descriptor};
use crate::sys::clock::now_ms;
use crate::sys::pipe::{DEFAULT_CAPACITY, NotThatEnd, PipeReader};

use super::Proxy;
use super::connection::{Chunk, Fate, Upload};
use super::records::Record;

/// Which snapshot a dump becomes, and where it goes.
#[derive(Debug, Clone)]
pub struct Target {
    /// The snapshot's id.
    pub id: String,
    /// The cache, `HOST:PORT`.
    pub cache: String,
    /// Its record, if a directory was opened for it.
    pub record: Option<Rc<Record>>,
}

impl Target {
    /// A new snapshot for a dump through the shared socket, which names none: the id says who took
    /// it, when, and which CRIU.
    pub fn fresh(host: &str, peer: Peer, cache: String) -> Target {
        // No two are alike, not even those of one process in one millisecond.
        static LAST: AtomicU64 = AtomicU64::new(0);
        let at = now_ms().max(LAST.load(Ordering::Relaxed) + 1);
        LAST.store(at, Ordering::Relaxed);
        Target { id: format!("{host}-{at}-{}", peer.pid), cache, record: None }
    }
}

/// Why a dump failed. The peer, the snapshot and the image are in the log line's fields.
#[derive(Debug, thiserror::Error)]
enum Failure {
    /// CRIU, or what speaks in its place, broke the protocol.
    #[error("{0}")]
    Session(#[from] BadSession),
    /// Its request cannot be understood.
    #[error("{0}")]
    Request(#[from] BadRequest),
    /// It passed no usable descriptor with a request.
    #[error("image {name}: {cause}")]
    Descriptor {
        /// The image.
        name: String,
        /// What came instead.
        cause: BadSession,
    },
    /// It broke the protocol's order.
    #[error("{0}")]
    Fault(#[from] Fault),
    /// It passed something else than the read end of a pipe.
    #[error("image {name}: {cause}")]
    Pipe {
        /// The image.
        name: String,
        /// What it was.
        cause: NotThatEnd,
    },
    /// It stopped writing an image, or its pipe failed.
    #[error("image {name}: {cause}")]
    Image {
        /// The image.
        name: String,
        /// What happened.
        cause: String,
    },
    /// It closed the session before it had written all.
    #[error("{0}")]
    Incomplete(String),
    /// The operator or the end of the daemon stopped it.
    #[error("{0}")]
    Stopped(String),
    /// The cache or the link to it failed.
    #[error("{0}")]
    Lost(String),
}

impl Failure {
    /// The image that it concerns, if it is one.
    fn image(&self) -> Option<&str> {
        match self {
            Failure::Pipe { name, .. }
            | Failure::Image { name, .. }
            | Failure::Fault(Fault::OpenedTwice(name)) => Some(name),
            _ => None,
        }
    }
}

/// Serves one dump. Returns whether the snapshot is at the cache. Whatever fails ends this session
/// only, and towards the source: CRIU's pipes are closed, its dump fails, the process runs on.
pub async fn serve(proxy: &Proxy, socket: UnixStream, peer: Peer, target: Target) -> bool {
    let _session = proxy.sessions.enter();
    let span = tracing::info_span!("dump", criu_snapshot = target.id, criu_peer = %peer);
    async {
        let settings = proxy.settings();
        let mut requests = Requests::read_from(socket, &settings.sessions);
        // A peer that only connects makes no snapshot.
        let first = timeout(settings.sessions.stall_timeout, requests.next()).await;
        let Ok(Some(first)) = first else {
            tracing::debug!("{peer} made no request");
            return false;
        };
        let Some(record) = target
            .record
            .clone()
            .or_else(|| proxy.records.add(&target.id, &target.cache, SnapshotState::Receiving))
        else {
            tracing::warn!("a snapshot {} is being sent already", target.id);
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
        tell(&record, &result, started);
        result.is_ok()
    }
    .instrument(span)
    .await
}

/// The one line that the journal gets for a snapshot.
fn tell(record: &Record, result: &Result<(), Failure>, started: Instant) {
    let info = record.info();
    let criu_seconds = started.elapsed().as_secs_f64();
    let (criu_bytes, criu_images) = (info.bytes, info.images);
    match result {
        Ok(()) => tracing::info!(
            message_id = journal::SNAPSHOT_SENT,
            criu_bytes,
            criu_images,
            criu_seconds,
            "snapshot {} sent to {}: {criu_bytes} bytes in {criu_images} images, {criu_seconds:.2} s",
            info.id,
            info.peer,
        ),
        Err(failure) => tracing::warn!(
            message_id = journal::SNAPSHOT_DAMAGED,
            criu_image = failure.image(),
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

/// An image that CRIU opens, and the pipe that it passed.
type Request = Result<(String, OwnedFd), Failure>;

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
        Ok(Rc::new(connection.begin(&self.target.id).await))
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
        let (name, descriptor) = request?;
        capture.open(&name)?;
        let pipe = PipeReader::adopt(descriptor)
            .map_err(|cause| Failure::Pipe { name: name.clone(), cause })?;
        self.record.begin_image(&name);
        self.written.set(Instant::now());
        let image = upload.begin_image(&name).await;
        let forward = Forward {
            upload: upload.clone(),
            image,
            name,
            pipe: Rc::new(pipe),
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
        upload.end().await;
        let limit = self.settings.link.ack_timeout;
        let fate = tokio::select! {
            fate = timeout(limit, upload.fate()) => fate,
            reason = self.record.stopped() => return Err(Failure::Stopped(reason)),
        };
        match fate {
            Err(_) => Err(Failure::Lost(format!("no acknowledgement within {limit:?}"))),
            Ok(Fate::Acknowledged { images, bytes }) => {
                let sent = self.record.info();
                if (images, bytes) == (sent.images, sent.bytes) {
                    return Ok(());
                }
                Err(Failure::Lost(format!(
                    "the cache acknowledged {images} images with {bytes} bytes, {} with {} were sent",
                    sent.images, sent.bytes
                )))
            }
            Ok(fate) => Err(lost(fate)),
        }
    }
}

fn lost(fate: Fate) -> Failure {
    Failure::Lost(match fate {
        Fate::Lost(reason) => reason,
        Fate::Open | Fate::Acknowledged { .. } => "the cache acknowledged it too early".to_owned(),
    })
}

/// One image on its way from CRIU's pipe to the link.
struct Forward {
    upload: Rc<Upload>,
    image: u32,
    name: String,
    pipe: Rc<PipeReader>,
    record: Rc<Record>,
    records: Rc<super::records::Records>,
    /// CRIU keeps images open that it does not write to, while it writes others.
    written: Rc<Cell<Instant>>,
    stall_timeout: Duration,
    pipe_size: usize,
}

impl Forward {
    async fn run(self) -> Result<String, Failure> {
        match self.forward().await {
            Ok(()) => Ok(self.name),
            Err(cause) => Err(Failure::Image { name: self.name, cause }),
        }
    }

    async fn forward(&self) -> Result<(), String> {
        let mut grown = false;
        loop {
            match timeout(self.stall_timeout, self.pipe.readable()).await {
                Err(_) if self.written.get().elapsed() < self.stall_timeout => continue,
                Err(_) => return Err(format!("nothing was written for {:?}", self.stall_timeout)),
                Ok(ready) => ready.map_err(said)?,
            }
            match self.upload.chunk(self.image, &self.pipe).await.map_err(said)? {
                Chunk::NotYet => {}
                Chunk::End => break,
                Chunk::Moved(bytes) => {
                    self.written.set(Instant::now());
                    self.record.sent(&self.name, bytes);
                    self.records.sent(bytes);
                    // Only the pipes that were full are worth the memory that the kernel grants.
                    if !grown && bytes >= DEFAULT_CAPACITY as u64 {
                        self.pipe.grow(self.pipe_size);
                        grown = true;
                    }
                }
            }
        }
        self.record.end_image(&self.name);
        self.upload.end_image(self.image).await;
        Ok(())
    }
}

#[allow(clippy::needless_pass_by_value)] // for map_err
fn said(error: io::Error) -> String {
    error.to_string()
}

/// The image that a request opens, and the descriptor that comes after it.
async fn opened(socket: &UnixStream, request: &[u8], patience: Duration) -> Request {
    let name = decode_request(request)?;
    match receive_descriptor(socket, patience).await {
        Ok(descriptor) => Ok((name, descriptor)),
        Err(cause) => Err(Failure::Descriptor { name, cause }),
    }
}

/// CRIU's requests, read by a task of their own so that waiting for the next can be given up at any
/// point without losing a part of it.
struct Requests {
    requests: mpsc::Receiver<Request>,
    _reader: JoinSet<()>,
}

impl Requests {
    fn read_from(mut socket: UnixStream, settings: &SessionSettings) -> Requests {
        let patience = settings.request_timeout;
        // A descriptor is only received when its image can be begun.
        let (sender, requests) = mpsc::channel(1);
        let mut reader = JoinSet::new();
        reader.spawn_local(async move {
            loop {
                let request = match read_request(&mut socket, patience).await {
                    Ok(None) => return,
                    Ok(Some(request)) => opened(&socket, &request, patience).await,
                    Err(error) => Err(error.into()),
                };
                let over = request.is_err();
                if sender.send(request).await.is_err() || over {
                    return;
                }
            }
        });
        Requests { requests, _reader: reader }
    }

    /// The next request with its descriptor; `None` when CRIU has closed the socket.
    async fn next(&mut self) -> Option<Request> {
        self.requests.recv().await
    }
}
