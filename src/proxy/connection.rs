//! A link that is up: the snapshots that share it, and the two tasks that speak on it.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet};
use std::rc::Rc;
use std::time::Duration;

use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::time::error::Elapsed;
use tokio::time::timeout;

use super::outgoing::{Command, send};
use super::regions::{Answered, Regions};
use super::upload::{Fate, Told, Upload};
use crate::config::LinkSettings;
use crate::criu::pages::{PageRange, Space};
use crate::wire::lane::{LaneError, Reader, Writer};
use crate::wire::message::{
    MEMORY_MAY_HAVE_CHANGED, Message, Outcome, REGIONS_MAX, RegionRequest, WITHDRAW, Welcome,
};
use crate::wire::sender::{Said, said};
use crate::wire::spaces::pages_request;

/// How many commands may wait for the lane. Each image has at most one chunk under way.
const QUEUE: usize = 64;

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
}

/// How a connection ended.
#[derive(Debug)]
pub(super) struct Over {
    /// Why.
    pub(super) why: String,
    /// Whether the cache broke the protocol.
    pub(super) fault: bool,
}

impl Over {
    pub(super) fn ended(why: impl Into<String>) -> Over {
        Over { why: why.into(), fault: false }
    }

    fn fault(why: impl Into<String>) -> Over {
        Over { why: why.into(), fault: true }
    }
}

impl From<LaneError> for Over {
    fn from(error: LaneError) -> Over {
        Over { why: error.to_string(), fault: error.is_fault() }
    }
}

/// A link that is up. Snapshots share it.
#[derive(Debug)]
pub struct Connection {
    commands: mpsc::Sender<Command>,
    waiting: RefCell<Waiting>,
    next: Cell<u32>,
    regions: Regions,
    withdrawals: RefCell<HashMap<u32, oneshot::Sender<Outcome>>>,
    /// Whether the cache knows withdrawals.
    next_withdrawal: Cell<u32>,
    withdraws: Cell<bool>,
    closed: Cell<bool>,
    /// Whether the cache keeps of a snapshot that its memory may have changed.
    keeps_marks: Cell<bool>,
    /// How much the cache has said, without its `KEEP_ALIVE`.
    answers: Cell<u64>,
    /// An answer is overdue, and no other has come meanwhile.
    unanswered: Notify,
}

impl Connection {
    /// A connection, and the work of its two directions: it ends with the reason for which the
    /// connection is over.
    pub(super) fn start(
        reader: Reader,
        writer: Writer,
        settings: &LinkSettings,
    ) -> (Rc<Connection>, impl Future<Output = Over> + 'static) {
        let (connection, queue) = Connection::new(QUEUE);
        let (owe, owed) = mpsc::channel(REGIONS_MAX);
        let shared = connection.clone();
        let settings = settings.clone();
        let over = async move {
            tokio::select! {
                over = receive(reader, &shared, owe) => over,
                over = send(writer, queue, owed, &settings) => over,
                () = shared.unanswered.notified() => {
                    let limit = settings.ack_timeout;
                    Over::ended(format!("the cache has answered nothing for {limit:?}"))
                }
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
            regions: Regions::default(),
            withdrawals: RefCell::default(),
            next_withdrawal: Cell::new(0),
            withdraws: Cell::new(false),
            closed: Cell::new(false),
            keeps_marks: Cell::new(false),
            answers: Cell::new(0),
            unanswered: Notify::new(),
        });
        (connection, queue)
    }

    /// Begins a snapshot. One that is `named` is kept for those who ask for it by its id.
    pub async fn begin(self: &Rc<Self>, id: &str, named: bool) -> Upload {
        self.begin_child(id, None, named, 0).await
    }

    /// The same for one whose images have pages in another snapshot, or that belongs to an attempt to move a
    /// process.
    pub(super) async fn begin_child(
        self: &Rc<Self>,
        id: &str,
        parent: Option<&str>,
        named: bool,
        attempt: u64,
    ) -> Upload {
        let (id, parent) = (id.to_owned(), parent.map(str::to_owned));
        self.begin_with(|snapshot| Command::Begin { snapshot, id, parent, named, attempt }).await
    }

    /// Begins a round of a snapshot's pages, see [`round`](super::round).
    pub(super) async fn begin_round(
        self: &Rc<Self>,
        id: &str,
        parent: Option<&str>,
        attempt: u64,
    ) -> Upload {
        let (id, parent) = (id.to_owned(), parent.map(str::to_owned));
        self.begin_with(|snapshot| Command::BeginRound { snapshot, id, parent, attempt }).await
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
    ) -> Option<Answered> {
        let (snapshot_id, name) = (snapshot_id.to_owned(), name.to_owned());
        let ask = |request| RegionRequest { request, snapshot_id, name, offset, len };
        self.ask(|request| Message::RegionRequest(ask(request))).await
    }

    /// Asks for pages that the cache has, likewise.
    pub(super) async fn pages(
        &self,
        snapshot_id: &str,
        space: Space,
        range: PageRange,
    ) -> Option<Answered> {
        self.ask(|request| pages_request(request, snapshot_id, space, range)).await
    }

    async fn ask(&self, message: impl FnOnce(u32) -> Message) -> Option<Answered> {
        let (request, answer) = self.regions.begin().await?;
        self.tell(Command::Say(message(request))).await;
        if self.is_closed() {
            return None;
        }
        answer.await.ok()
    }

    /// Whether the cache knows [withdrawals](Self::withdraw).
    pub(super) fn withdraws(&self) -> bool {
        self.withdraws.get()
    }

    /// An attempt to move a process has failed: has the cache give up what came of it. `None` when the link breaks
    /// before the cache has answered.
    pub(super) async fn withdraw(&self, id: &str, attempt: u64, reason: &str) -> Option<Outcome> {
        let request = self.next_withdrawal.replace(self.next_withdrawal.get().wrapping_add(1));
        let (sender, answer) = oneshot::channel();
        self.withdrawals.borrow_mut().insert(request, sender);
        self.tell(Command::Say(Message::withdraw(request, id, attempt, reason))).await;
        if self.is_closed() {
            return None;
        }
        answer.await.ok()
    }

    /// Nobody goes on with a snapshot: the cache need not hold pages of it.
    pub async fn forget_pages(&self, id: &str) {
        self.tell(Command::Forget { id: id.to_owned() }).await;
    }

    /// The cache has said what it can do.
    pub(super) fn heard(&self, welcome: &Welcome) {
        let names = |feature: &str| welcome.features.iter().any(|name| name == feature);
        self.keeps_marks.set(names(MEMORY_MAY_HAVE_CHANGED));
        self.withdraws.set(names(WITHDRAW));
    }

    /// Whether the cache keeps of a snapshot that its memory may have changed.
    pub(super) fn keeps_marks(&self) -> bool {
        self.keeps_marks.get()
    }

    /// Waits for an answer of the cache, for `link.ack-timeout`. A cache that answers nobody for that long is
    /// stuck, though it may say `KEEP_ALIVE`: the link ends, and who needs one next gets another. One that waits
    /// for its quota gives up before that, and says so.
    pub(super) async fn within<T>(
        &self,
        limit: Duration,
        answer: impl Future<Output = T>,
    ) -> Result<T, Elapsed> {
        let before = self.answers.get();
        let answer = timeout(limit, answer).await;
        if answer.is_err() && self.answers.get() == before {
            self.unanswered.notify_one();
        }
        answer
    }

    /// Whether it is over.
    pub fn is_closed(&self) -> bool {
        self.closed.get()
    }

    /// Every snapshot under way is lost; returns how many.
    pub(super) fn close(&self, why: &str) -> usize {
        self.closed.set(true);
        self.regions.close();
        self.withdrawals.borrow_mut().clear();
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

    fn hear(&self, said: Said) -> Result<(), Over> {
        let mut waiting = self.waiting.borrow_mut();
        match said {
            Said::Nothing | Said::Region(_) | Said::Request { .. } => {}
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
            Said::Withdrawn { request, outcome } => {
                let asked = self.withdrawals.borrow_mut().remove(&request);
                // Who asked may have given up.
                let _ = asked.map(|asked| asked.send(outcome));
            }
            Said::Goodbye(reason) => {
                return Err(Over::ended(format!("the cache ended it: {reason}")));
            }
        }
        Ok(())
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
async fn receive(mut reader: Reader, connection: &Connection, owe: mpsc::Sender<u32>) -> Over {
    loop {
        if let Err(over) = receive_one(&mut reader, connection, &owe).await {
            return over;
        }
    }
}

async fn receive_one(
    reader: &mut Reader,
    connection: &Connection,
    owe: &mpsc::Sender<u32>,
) -> Result<(), Over> {
    let (message, len) = reader.receive().await?;
    let said =
        said(message).map_err(|bad| Over::fault(format!("the cache broke the protocol: {bad}")))?;
    if !matches!(said, Said::Nothing) {
        connection.answers.set(connection.answers.get() + 1);
    }
    match said {
        Said::Region(region) => {
            let bytes = reader.payload_to_memory(len).await?;
            connection.regions.deliver(region, bytes);
            Ok(())
        }
        Said::Request { request } => owe.try_send(request).map_err(|_| {
            Over::fault(format!("the cache waits for more than {REGIONS_MAX} regions at once"))
        }),
        said => connection.hear(said),
    }
}
