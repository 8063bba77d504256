//! A link that is up: the snapshots that share it, and the two tasks that speak on it.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet};
use std::io;
use std::rc::Rc;
use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio::time::{interval, timeout};

use super::upload::{Chunk, Fate, Told, Upload};
use crate::config::LinkSettings;
use crate::criu::pages::{Run, Space};
use crate::sys::ends::Source;
use crate::wire::lane::{LaneError, Reader, Writer};
use crate::wire::message::{KeepAlive, Message, PagesForget, REGIONS_MAX, Region, RegionRequest};
use crate::wire::sender::{Said, Sender, said};

/// How many commands may wait for the lane. Each image has at most one chunk under way.
const QUEUE: usize = 64;

/// What the lane is told to do next.
#[derive(Debug)]
pub(super) enum Command {
    Begin {
        snapshot: u32,
        id: String,
        parent: Option<String>,
        named: bool,
    },
    BeginRound {
        snapshot: u32,
        id: String,
        parent: Option<String>,
    },
    Space {
        snapshot: u32,
        space: Space,
    },
    Pages {
        snapshot: u32,
        run: Run,
    },
    /// At most `len` bytes of the pages that were announced last.
    PageData {
        snapshot: u32,
        source: Rc<Source>,
        len: usize,
        moved: oneshot::Sender<io::Result<Chunk>>,
    },
    List {
        snapshot: u32,
        list: String,
    },
    BeginImage {
        snapshot: u32,
        image: u32,
        name: String,
        append: bool,
    },
    Chunk {
        snapshot: u32,
        image: u32,
        source: Rc<Source>,
        moved: oneshot::Sender<io::Result<Chunk>>,
    },
    EndImage {
        snapshot: u32,
        image: u32,
    },
    End {
        snapshot: u32,
        partial: bool,
    },
    Abort {
        snapshot: u32,
        reason: String,
    },
    Region(RegionRequest),
    Forget {
        id: String,
    },
}

/// Those who wait for what the cache says.
#[derive(Debug, Default)]
struct Waiting {
    /// What becomes of each snapshot.
    fates: HashMap<u32, watch::Sender<Fate>>,
    /// How often the cache said that it is ready for a snapshot.
    ready: HashMap<u32, watch::Sender<u64>>,
    /// The page spaces that a round's parent has.
    spaces: HashMap<u32, HashSet<Space>>,
    /// The images whose writers want to know.
    images: HashMap<(u32, u32), mpsc::UnboundedSender<Told>>,
    regions: HashMap<u32, Asked>,
}

/// A region that was asked for. It counts until the cache has answered, whether or not somebody still
/// waits for it.
#[derive(Debug)]
struct Asked {
    answer: oneshot::Sender<(Region, Vec<u8>)>,
    _counts: OwnedSemaphorePermit,
}

/// A link that is up. Snapshots share it.
#[derive(Debug)]
pub struct Connection {
    commands: mpsc::Sender<Command>,
    waiting: RefCell<Waiting>,
    next: Cell<u32>,
    next_region: Cell<u32>,
    regions: Arc<Semaphore>,
    closed: Cell<bool>,
}

impl Connection {
    /// A connection, and the work of its two directions: it ends with the reason for which the
    /// connection is over.
    pub(super) fn start(
        reader: Reader,
        writer: Writer,
        settings: &LinkSettings,
    ) -> (Rc<Connection>, impl Future<Output = String> + 'static) {
        let (connection, queue) = Connection::new(QUEUE);
        let shared = connection.clone();
        let settings = settings.clone();
        let over = async move {
            tokio::select! {
                why = receive(reader, &shared) => why,
                why = send(writer, queue, &settings) => why,
            }
        };
        (connection, over)
    }

    /// A connection, and what it is told to do, of which so much may wait.
    pub(super) fn new(queue: usize) -> (Rc<Connection>, mpsc::Receiver<Command>) {
        let (commands, queue) = mpsc::channel(queue);
        let connection = Rc::new(Connection {
            commands,
            waiting: RefCell::default(),
            next: Cell::new(0),
            next_region: Cell::new(0),
            regions: Arc::new(Semaphore::new(REGIONS_MAX)),
            closed: Cell::new(false),
        });
        (connection, queue)
    }

    /// Begins a snapshot. One that is `named` is kept for those who ask for it by its id.
    pub async fn begin(self: &Rc<Self>, id: &str, named: bool) -> Upload {
        self.begin_child(id, None, named).await
    }

    /// The same for one whose images have pages in another snapshot.
    pub(super) async fn begin_child(
        self: &Rc<Self>,
        id: &str,
        parent: Option<&str>,
        named: bool,
    ) -> Upload {
        let (id, parent) = (id.to_owned(), parent.map(str::to_owned));
        self.begin_with(|snapshot| Command::Begin { snapshot, id, parent, named }).await
    }

    /// Begins a round of a snapshot's pages, see [`round`](super::round).
    pub(super) async fn begin_round(self: &Rc<Self>, id: &str, parent: Option<&str>) -> Upload {
        let (id, parent) = (id.to_owned(), parent.map(str::to_owned));
        self.begin_with(|snapshot| Command::BeginRound { snapshot, id, parent }).await
    }

    async fn begin_with(self: &Rc<Self>, command: impl FnOnce(u32) -> Command) -> Upload {
        let place = self.place().await;
        let snapshot = self.next.replace(self.next.get().wrapping_add(1));
        let (fate_sender, ready_sender) = (watch::Sender::new(Fate::Open), watch::Sender::new(0));
        let (fate, ready) = (fate_sender.subscribe(), ready_sender.subscribe());
        // Without a place nobody will ever tell what becomes of it, and the senders go.
        if let Some(place) = place {
            let mut waiting = self.waiting.borrow_mut();
            waiting.fates.insert(snapshot, fate_sender);
            waiting.ready.insert(snapshot, ready_sender);
            place.send(command(snapshot));
        }
        Upload::new(self.clone(), snapshot, fate, ready)
    }

    /// Asks for a part of an image that the cache has, when not too many others are asked for. `None`
    /// when the link breaks meanwhile.
    pub async fn region(
        &self,
        snapshot_id: &str,
        name: &str,
        offset: u64,
        len: u32,
    ) -> Option<(Region, Vec<u8>)> {
        let counts = self.regions.clone().acquire_owned().await.ok()?;
        let request = self.next_region.replace(self.next_region.get().wrapping_add(1));
        let (sender, answer) = oneshot::channel();
        let asked = Asked { answer: sender, _counts: counts };
        self.waiting.borrow_mut().regions.insert(request, asked);
        let (snapshot_id, name) = (snapshot_id.to_owned(), name.to_owned());
        self.tell(Command::Region(RegionRequest { request, snapshot_id, name, offset, len })).await;
        if self.is_closed() {
            return None;
        }
        answer.await.ok()
    }

    /// Nobody goes on with a snapshot: the cache need not hold pages of it.
    pub async fn forget_pages(&self, id: &str) {
        self.tell(Command::Forget { id: id.to_owned() }).await;
    }

    /// Whether it is over.
    pub fn is_closed(&self) -> bool {
        self.closed.get()
    }

    /// Every snapshot under way is lost; returns how many.
    pub(super) fn close(&self, why: &str) -> usize {
        self.closed.set(true);
        self.regions.close();
        let waiting = std::mem::take(&mut *self.waiting.borrow_mut());
        for fate in waiting.fates.values() {
            settle(fate, Fate::Lost(why.to_owned()));
        }
        waiting.fates.len()
    }

    pub(super) fn settle(&self, snapshot: u32, outcome: Fate) {
        if let Some(fate) = self.waiting.borrow_mut().fates.remove(&snapshot) {
            settle(&fate, outcome);
        }
    }

    /// What the cache says of an image from now on.
    pub(super) fn watch_image(&self, snapshot: u32, image: u32) -> mpsc::UnboundedReceiver<Told> {
        let (sender, told) = mpsc::unbounded_channel();
        self.waiting.borrow_mut().images.insert((snapshot, image), sender);
        told
    }

    /// The page spaces that a round's parent has, once the cache is ready for the round.
    pub(super) fn take_spaces(&self, snapshot: u32) -> HashSet<Space> {
        self.waiting.borrow_mut().spaces.remove(&snapshot).unwrap_or_default()
    }

    /// Nobody waits for word of a snapshot any more.
    pub(super) fn forget(&self, snapshot: u32) {
        let mut waiting = self.waiting.borrow_mut();
        waiting.fates.remove(&snapshot);
        waiting.ready.remove(&snapshot);
        waiting.spaces.remove(&snapshot);
        waiting.images.retain(|(of, _), _| *of != snapshot);
    }

    /// Has the lane do something. On a connection that has broken it goes nowhere.
    pub(super) async fn tell(&self, command: Command) {
        let _ = self.commands.send(command).await;
    }

    /// A place in the queue, for a command with a number. Those have to come in order, and who waits
    /// for a place may be overtaken: the number is chosen when the place is there. `None` on a
    /// connection that has broken.
    pub(super) async fn place(&self) -> Option<mpsc::Permit<'_, Command>> {
        self.commands.reserve().await.ok()
    }

    /// Has the lane do something without waiting, for those that cannot.
    pub(super) fn try_tell(&self, command: Command) {
        let _ = self.commands.try_send(command);
    }

    fn hear(&self, said: Said) -> Result<(), String> {
        let mut waiting = self.waiting.borrow_mut();
        match said {
            Said::Nothing | Said::Region(_) => {}
            Said::Spaces { snapshot, spaces } => {
                if waiting.fates.contains_key(&snapshot) {
                    waiting.spaces.entry(snapshot).or_default().extend(spaces);
                }
            }
            Said::Ready { snapshot } => {
                if let Some(ready) = waiting.ready.get(&snapshot) {
                    ready.send_modify(|times| *times += 1);
                }
            }
            Said::ImageReady { snapshot, image } => {
                if let Some(told) = waiting.images.get(&(snapshot, image)) {
                    let _ = told.send(Told::Ready);
                }
            }
            Said::ImageAcknowledged { snapshot, image } => {
                if let Some(told) = waiting.images.remove(&(snapshot, image)) {
                    let _ = told.send(Told::Acknowledged);
                }
            }
            Said::Acknowledged { snapshot, images, bytes } => {
                drop(waiting);
                self.settle(snapshot, Fate::Acknowledged { images, bytes });
            }
            Said::Refused { snapshot, reason } => {
                drop(waiting);
                self.settle(snapshot, Fate::Lost(format!("the cache gave it up: {reason}")));
            }
            Said::Goodbye(reason) => return Err(format!("the cache ended it: {reason}")),
        }
        Ok(())
    }

    /// A region has come: who asked for it gets it, if they are still there.
    fn deliver(&self, region: Region, bytes: Vec<u8>) {
        let asked = self.waiting.borrow_mut().regions.remove(&region.request);
        let _ = asked.map(|asked| asked.answer.send((region, bytes)));
    }
}

fn settle(fate: &watch::Sender<Fate>, outcome: Fate) {
    fate.send_if_modified(|fate| {
        let open = *fate == Fate::Open;
        if open {
            *fate = outcome;
        }
        open
    });
}

/// The receiving task. Returns why the connection is over.
async fn receive(mut reader: Reader, connection: &Connection) -> String {
    loop {
        if let Err(why) = receive_one(&mut reader, connection).await {
            return why;
        }
    }
}

async fn receive_one(reader: &mut Reader, connection: &Connection) -> Result<(), String> {
    let text = |error: LaneError| error.to_string();
    let (message, len) = reader.receive().await.map_err(text)?;
    match said(message).map_err(|error| format!("the cache broke the protocol: {error}"))? {
        Said::Region(region) => {
            let bytes = reader.payload_to_memory(len).await.map_err(text)?;
            connection.deliver(region, bytes);
            Ok(())
        }
        said => connection.hear(said),
    }
}

/// The sending task: one command after the other, so that frames never mix. Returns why the
/// connection is over.
async fn send(
    mut writer: Writer,
    mut queue: mpsc::Receiver<Command>,
    settings: &LinkSettings,
) -> String {
    let mut sender = Sender::default();
    let mut pulse = interval(settings.keep_alive);
    let max_chunk = usize::try_from(settings.max_chunk).unwrap_or(usize::MAX);
    loop {
        let command = tokio::select! {
            command = queue.recv() => match command {
                Some(command) => Some(command),
                None => return "nobody uses it any more".to_owned(),
            },
            _ = pulse.tick() => None,
        };
        let sent = async {
            match command {
                Some(command) => obey(command, &mut sender, &mut writer, max_chunk).await,
                None => writer.send(&Message::KeepAlive(KeepAlive {})).await,
            }
        };
        // A cache that waits for its quota reads nothing for a while; one that never reads again
        // must not hold CRIU's process frozen.
        match timeout(settings.ack_timeout, sent).await {
            Err(_) => return format!("the cache has read nothing for {:?}", settings.ack_timeout),
            Ok(Err(error)) => return error.to_string(),
            Ok(Ok(())) => {}
        }
    }
}

async fn obey(
    command: Command,
    sender: &mut Sender,
    writer: &mut Writer,
    max_chunk: usize,
) -> io::Result<()> {
    let message = match command {
        Command::Begin { snapshot, id, parent, named } => {
            Some(sender.begin_child(snapshot, &id, parent.as_deref(), named))
        }
        Command::BeginRound { snapshot, id, parent } => {
            Some(sender.begin_round(snapshot, &id, parent.as_deref()))
        }
        Command::Space { snapshot, space } => sender.space(snapshot, space),
        Command::Pages { snapshot, run } => sender.pages(snapshot, run),
        Command::List { snapshot, list } => sender.list(snapshot, &list),
        Command::BeginImage { snapshot, image, name, append } => {
            sender.begin_image(snapshot, image, &name, append)
        }
        Command::EndImage { snapshot, image } => sender.end_image(snapshot, image),
        Command::End { snapshot, partial } => sender.end(snapshot, partial),
        Command::Region(request) => Some(Message::RegionRequest(request)),
        Command::Forget { id } => Some(Message::PagesForget(PagesForget { id })),
        Command::Abort { snapshot, reason } => sender.abort(snapshot, &reason),
        Command::Chunk { snapshot, image, source, moved } => {
            let data = |len| sender.data(snapshot, image, len);
            let outcome = forward(&source, max_chunk, data, writer).await?;
            // An image that has gone does not want to know.
            let _ = moved.send(outcome);
            None
        }
        Command::PageData { snapshot, source, len, moved } => {
            let data = |len| sender.page_data(snapshot, len);
            let outcome = forward(&source, len.min(max_chunk), data, writer).await?;
            let _ = moved.send(outcome);
            None
        }
    };
    match message {
        Some(message) => writer.send(&message).await,
        None => Ok(()),
    }
}

/// Moves what has come, at most `max` bytes, as the payload of `message`, which is given their number. The
/// outer error is the link's, the inner one the source's.
async fn forward(
    source: &Source,
    max: usize,
    message: impl FnOnce(usize) -> Option<Message>,
    writer: &mut Writer,
) -> io::Result<io::Result<Chunk>> {
    // Into the lane's own pipe first: then the length is known, nobody else can take the bytes
    // away, and CRIU has room for the next while these are sent.
    let len = match source.transfer_to(writer.payload(), max) {
        Ok(0) => return Ok(Ok(Chunk::End)),
        Ok(len) => len,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Ok(Chunk::NotYet)),
        Err(error) => return Ok(Err(error)),
    };
    let Some(message) = message(len) else {
        writer.drop_payload()?;
        return Ok(Err(io::ErrorKind::ConnectionAborted.into()));
    };
    writer.send_payload(&message, len).await?;
    Ok(Ok(Chunk::Moved(len as u64)))
}
