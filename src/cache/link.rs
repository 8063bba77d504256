//! One link: a proxy connected over TCP, from its preface to its end. Its snapshots come in any
//! interleaving; what one of them does wrong damages that one, what the peer does wrong ends the
//! link, and damages those that were under way.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::{interval, timeout};
use tracing::Instrument;

use crate::config::CacheSettings;
use crate::daemon::journal;
use crate::daemon::sessions::Session;
use crate::store::{Image, Key, Store};
use crate::sys::clock::host_name;
use crate::wire::frame::BadFrame;
use crate::wire::lane::{self, LaneError, Reader, Writer};
use crate::wire::message::{KeepAlive, Message, SnapshotAck, Welcome};
use crate::wire::receiver::{Action, Limits, Receiver, Violation};

use super::Cache;

/// A peer is gone when it was silent for this many keep-alive intervals.
const SILENT_INTERVALS: u32 = 3;
/// The pipe through which payload passes, in bytes: more than an unprivileged user is granted is
/// not asked for.
const PIPE: usize = 1 << 20;
/// Snapshots under way at once on one link.
const SNAPSHOTS: usize = 1024;
/// Answers that a peer has not read yet.
const ANSWERS: usize = 4 * SNAPSHOTS;
/// How long a peer may take to hear why its link ends.
const FAREWELL: Duration = Duration::from_secs(1);

/// Why a link ends.
#[derive(Debug, thiserror::Error)]
enum Over {
    /// The connection failed or ended, or what came on it was no frame.
    #[error("{0}")]
    Lane(#[from] LaneError),
    /// The peer broke the order of messages.
    #[error("the peer broke the protocol: {0}")]
    Violation(#[from] Violation),
    /// The peer said goodbye.
    #[error("the peer ended it: {0}")]
    Goodbye(String),
    /// The peer may not connect, or did not introduce itself.
    #[error("{0}")]
    Refused(String),
}

impl Over {
    /// Whether the peer is to blame, and is told.
    fn is_fault(&self) -> bool {
        match self {
            Over::Violation(_) | Over::Refused(_) => true,
            Over::Lane(error) => matches!(error, LaneError::Frame(_) | LaneError::Message(_)),
            Over::Goodbye(_) => false,
        }
    }
}

/// Serves one link until it ends.
pub(super) async fn serve(cache: &Cache, stream: TcpStream, address: SocketAddr) {
    let span = tracing::info_span!("link", criu_peer = %address);
    async {
        let settings = cache.settings();
        let patience = settings.link.keep_alive * SILENT_INTERVALS;
        let (mut reader, mut writer) = match lane::split(stream, PIPE, patience) {
            Ok(halves) => halves,
            Err(error) => {
                tracing::warn!("a link from {address} cannot be served: {error}");
                return;
            }
        };
        let name = match welcome(&settings, &mut reader, &mut writer, address).await {
            Ok(name) => name,
            Err(over) => {
                farewell(&mut writer, &over).await;
                let message_id = journal::PEER_REFUSED;
                tracing::warn!(message_id, "a link from {address} is refused: {over}");
                return;
            }
        };
        let peer = format!("{name} ({address})");
        let _up = cache.links.add(&peer);
        tracing::info!(message_id = journal::LINK_UP, "link from {peer} is up");
        run(cache, &settings, reader, writer, &peer).await;
    }
    .instrument(span)
    .await;
}

/// The handshake. Returns the peer's name for itself.
async fn welcome(
    settings: &CacheSettings,
    reader: &mut Reader,
    writer: &mut Writer,
    address: SocketAddr,
) -> Result<String, Over> {
    let limit = settings.link.hello_timeout;
    let greeting = async {
        // Ours goes first whatever comes, so that a peer of another version can say so.
        writer.send_preface().await.map_err(LaneError::from)?;
        reader.receive_preface().await?;
        let (message, _) = reader.receive().await?;
        let Message::Hello(hello) = message else {
            let kind = message.kind().as_str_name();
            return Err(Over::Refused(format!("a {kind} instead of a HELLO")));
        };
        if !address.ip().is_loopback() && !settings.insecure {
            return Err(Over::Refused(
                "plaintext from another host; set `insecure = true` in the cache's configuration \
                 to allow it on a network that you trust"
                    .to_owned(),
            ));
        }
        let welcome = Welcome { name: host_name(), features: Vec::new() };
        writer.send(&Message::Welcome(welcome)).await.map_err(LaneError::from)?;
        Ok(printable(&hello.name))
    };
    timeout(limit, greeting)
        .await
        .unwrap_or_else(|_| Err(Over::Refused(format!("no HELLO within {limit:?}"))))
}

/// A name from the network, as it may stand in a log line.
fn printable(name: &str) -> String {
    let safe = |c: &char| c.is_ascii_alphanumeric() || "._-".contains(*c);
    name.chars().filter(safe).take(64).collect()
}

/// Tells the peer why, if it is to blame; it may be gone.
async fn farewell(writer: &mut Writer, over: &Over) {
    if over.is_fault() {
        // A peer that does not speak the protocol is not spoken to.
        if matches!(over, Over::Lane(LaneError::Frame(BadFrame::Preface(_)))) {
            return;
        }
        let goodbye = Message::goodbye(&over.to_string());
        let _ = timeout(FAREWELL, writer.send(&goodbye)).await;
    }
}

/// Everything after the handshake.
async fn run(cache: &Cache, settings: &CacheSettings, reader: Reader, writer: Writer, peer: &str) {
    let (replies, queue) = mpsc::channel(ANSWERS);
    let limits = Limits { images: settings.store.max_images, snapshots: SNAPSHOTS };
    let mut incoming = Incoming {
        cache,
        store: &cache.store,
        peer,
        receiver: Receiver::new(limits),
        snapshots: HashMap::new(),
        replies,
        deaf: false,
    };
    let mut answers = Answers { writer, queue, keep_alive: settings.link.keep_alive };
    let over = tokio::select! {
        over = incoming.receive(reader) => over,
        over = answers.send() => over,
    };
    let lost = incoming.abandon(&format!("the link from {peer} ended: {over}"));
    let message_id = journal::LINK_LOST;
    if over.is_fault() {
        tracing::warn!(message_id = journal::PEER_REFUSED, "link from {peer} ended: {over}");
        if timeout(FAREWELL, answers.flush()).await.is_ok() {
            farewell(&mut answers.writer, &over).await;
        }
    } else if lost > 0 {
        tracing::warn!(message_id, "link from {peer} lost with {lost} snapshots under way: {over}");
    } else {
        tracing::info!(message_id, "idle link from {peer} ended: {over}");
    }
}

/// The outgoing direction: acknowledgements, aborts, and a sign of life now and then. It goes on
/// while the incoming direction waits for the quota.
struct Answers {
    writer: Writer,
    queue: mpsc::Receiver<Message>,
    keep_alive: Duration,
}

impl Answers {
    async fn send(&mut self) -> Over {
        let mut pulse = interval(self.keep_alive);
        loop {
            let message = tokio::select! {
                Some(message) = self.queue.recv() => message,
                _ = pulse.tick() => Message::KeepAlive(KeepAlive {}),
            };
            if let Err(error) = self.writer.send(&message).await {
                return Over::Lane(error.into());
            }
        }
    }

    /// What was to be said before the end.
    async fn flush(&mut self) {
        while let Ok(message) = self.queue.try_recv() {
            if self.writer.send(&message).await.is_err() {
                return;
            }
        }
    }
}

/// The incoming direction.
struct Incoming<'a> {
    cache: &'a Cache,
    store: &'a Store,
    peer: &'a str,
    receiver: Receiver,
    snapshots: HashMap<u32, Arriving>,
    replies: mpsc::Sender<Message>,
    /// Whether an answer had to be left out: the peer does not read.
    deaf: bool,
}

/// A snapshot under way.
struct Arriving {
    id: String,
    key: Key,
    images: HashMap<u32, Rc<Image>>,
    started: Instant,
    _busy: Session,
}

impl Incoming<'_> {
    async fn receive(&mut self, mut reader: Reader) -> Over {
        loop {
            let received = match reader.receive().await {
                Ok(received) => received,
                Err(error) => return error.into(),
            };
            if let Err(over) = self.act(&mut reader, received).await {
                return over;
            }
            if self.deaf {
                return Over::Refused(format!("it leaves {ANSWERS} answers unread"));
            }
        }
    }

    async fn act(
        &mut self,
        reader: &mut Reader,
        (message, len): (Message, usize),
    ) -> Result<(), Over> {
        match self.receiver.receive(message, len)? {
            Action::Nothing => {}
            Action::Begin { snapshot, id } => self.begin(snapshot, id),
            Action::BeginImage { snapshot, image, name } => {
                self.begin_image(snapshot, image, &name);
            }
            Action::Append { snapshot, image } => {
                return self.append(reader, snapshot, image, len).await;
            }
            Action::Discard => reader.discard(len).await?,
            Action::EndImage { snapshot, image } => {
                let arriving = self.snapshots.get_mut(&snapshot);
                if let Some(image) = arriving.and_then(|arriving| arriving.images.remove(&image)) {
                    image.end();
                }
            }
            Action::Complete { snapshot, images, bytes } => self.complete(snapshot, images, bytes),
            Action::Damaged { snapshot, reason, by_peer } => {
                self.fail(snapshot, &reason, !by_peer);
            }
            Action::Goodbye(reason) => return Err(Over::Goodbye(reason)),
        }
        Ok(())
    }

    fn begin(&mut self, snapshot: u32, id: String) {
        match self.store.begin(&id, self.peer) {
            Ok(key) => {
                let (images, started) = (HashMap::new(), Instant::now());
                let busy = self.cache.links.busy.enter();
                let arriving = Arriving { id, key, images, started, _busy: busy };
                self.snapshots.insert(snapshot, arriving);
            }
            Err(refused) => {
                let message_id = journal::SNAPSHOT_DAMAGED;
                tracing::warn!(
                    message_id,
                    criu_snapshot = id,
                    "snapshot {id} is refused: {refused}"
                );
                self.give_up(snapshot, &refused.to_string());
            }
        }
    }

    fn begin_image(&mut self, snapshot: u32, image: u32, name: &str) {
        let Some(arriving) = self.snapshots.get_mut(&snapshot) else { return };
        match self.store.begin_image(arriving.key, name) {
            Ok(begun) => drop(arriving.images.insert(image, begun)),
            Err(refused) => self.fail(snapshot, &refused.to_string(), true),
        }
    }

    /// Payload: charged, then spliced into the image's memfd.
    async fn append(
        &mut self,
        reader: &mut Reader,
        snapshot: u32,
        image: u32,
        len: usize,
    ) -> Result<(), Over> {
        let image = self.snapshots.get(&snapshot).and_then(|arriving| {
            self.store.is_receiving(arriving.key).then(|| arriving.images.get(&image)).flatten()
        });
        let (Some(image), Some(arriving)) = (image.cloned(), self.snapshots.get(&snapshot)) else {
            self.fail(snapshot, "it was dropped by the operator", true);
            return Ok(reader.discard(len).await?);
        };
        // While it waits for room, nobody else looks whether it is still wanted, and still comes.
        let charged = tokio::select! {
            biased;
            charged = self.store.charge(arriving.key, &image, len as u64) => {
                charged.map_err(|exhausted| format!("image {}: {exhausted}", image.name()))
            }
            () = self.store.gone(arriving.key) => Err("it was dropped by the operator".to_owned()),
            () = reader.hung_up() => return Err(LaneError::Torn.into()),
        };
        if let Err(reason) = charged {
            self.fail(snapshot, &reason, true);
            return Ok(reader.discard(len).await?);
        }
        let mut offset = image.len();
        reader.payload_to_file(image.as_fd(), &mut offset, len).await?;
        image.grown_to(offset);
        self.store.received(len as u64);
        Ok(())
    }

    fn complete(&mut self, snapshot: u32, images: u64, bytes: u64) {
        let Some(arriving) = self.snapshots.remove(&snapshot) else { return };
        let Arriving { id, key, started, .. } = arriving;
        let seconds = started.elapsed().as_secs_f64();
        match self.store.complete(key) {
            Ok(_) => {
                tracing::info!(
                    message_id = journal::SNAPSHOT_WHOLE,
                    criu_snapshot = id,
                    criu_bytes = bytes,
                    criu_images = images,
                    criu_seconds = seconds,
                    "snapshot {id} is whole: {bytes} bytes in {images} images, {seconds:.2} s"
                );
                let ack = SnapshotAck { snapshot, images, bytes };
                self.answer(Message::SnapshotAck(ack));
            }
            Err(reason) => {
                self.tell_damaged(&id, &reason);
                self.give_up(snapshot, &reason);
            }
        }
    }

    /// A snapshot under way is damaged; the peer is told unless it said so itself.
    fn fail(&mut self, snapshot: u32, reason: &str, tell: bool) {
        if let Some(arriving) = self.snapshots.remove(&snapshot) {
            self.store.fail(arriving.key, reason);
            self.tell_damaged(&arriving.id, reason);
        } else {
            let message_id = journal::SNAPSHOT_DAMAGED;
            tracing::warn!(
                message_id,
                "snapshot number {snapshot} from {} is refused: {reason}",
                self.peer
            );
        }
        if tell {
            self.give_up(snapshot, reason);
        }
    }

    fn give_up(&mut self, snapshot: u32, reason: &str) {
        self.receiver.give_up(snapshot);
        self.answer(Message::abort(snapshot, reason));
    }

    fn answer(&mut self, answer: Message) {
        self.deaf |= self.replies.try_send(answer).is_err();
    }

    fn tell_damaged(&self, id: &str, reason: &str) {
        let message_id = journal::SNAPSHOT_DAMAGED;
        let criu_snapshot = id;
        tracing::warn!(
            message_id,
            criu_snapshot,
            "snapshot {id} from {} damaged: {reason}",
            self.peer
        );
    }

    /// The link is over: what was under way is damaged. Returns how many snapshots that were.
    fn abandon(&mut self, reason: &str) -> usize {
        let under_way: Vec<u32> = self.snapshots.keys().copied().collect();
        for snapshot in &under_way {
            self.fail(*snapshot, reason, false);
        }
        under_way.len()
    }
}
