//! What was sent, and what is being sent, for `criu-imagectl` and the status line. A record of a
//! snapshot that has ended keeps its counts, not its list of images.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use tokio::sync::{Notify, watch};

use crate::control::model::{Image, Snapshot, SnapshotState};
use crate::metrics::durations::Durations;
use crate::sys::clock::now_ms;
use crate::timeline::{Phase, PhaseName, Timeline};

/// Ended snapshots that are listed, beside those for which a socket is open; older ones are forgotten.
const KEPT: usize = 256;

/// Sockets that may be open for snapshots at once. What awaits a dump is not forgotten, so it is bounded here.
const SOCKETS_MAX: usize = 1024;

/// Every snapshot that the proxy knows, oldest first.
#[derive(Debug, Default)]
pub struct Records {
    by_age: RefCell<BTreeMap<u64, Rc<Record>>>,
    next: Cell<u64>,
    total: Cell<u64>,
    tally: Rc<Tally>,
}

/// How many snapshots there are in each state.
#[derive(Debug, Default, Clone, Copy)]
pub struct StateCounts {
    /// A socket is open for them.
    pub awaited: u64,
    /// Being sent.
    pub receiving: u64,
    /// The cache holds rounds of their pages.
    pub paged: u64,
    /// Acknowledged by the cache.
    pub whole: u64,
    /// Failed.
    pub damaged: u64,
}

impl StateCounts {
    /// By the states' names.
    pub fn by_state(self) -> [(&'static str, u64); 5] {
        let StateCounts { awaited, receiving, paged, whole, damaged } = self;
        let names = ["awaited", "receiving", "paged", "whole", "damaged"];
        let counts = [awaited, receiving, paged, whole, damaged];
        std::array::from_fn(|state| (names[state], counts[state]))
    }
}

/// What has ended since the start, for scrapes.
#[derive(Debug, Default)]
pub struct Tally {
    /// Snapshots that the cache has acknowledged, and those that failed.
    pub ended: Outcomes,
    /// Rounds, the same.
    pub rounds: Outcomes,
    /// How long dumps took that the cache has acknowledged.
    pub dumps: DumpDurations,
    /// How long rounds took.
    pub round_durations: Durations,
}

impl Tally {
    fn count_round(&self, phases: &[Phase], well: bool) {
        self.rounds.count(well);
        let last = phases.iter().rev().find(|phase| phase.name == PhaseName::Round);
        if let (Some(round), true) = (last, well) {
            self.round_durations.observe(between(round.begun_ms, round.ended_ms));
        }
    }

    fn count_end(&self, phases: &[Phase], well: bool, streamed: bool) {
        self.ended.count(well);
        let Some(acknowledged) = phases.last().filter(|_| well) else { return };
        let begun = |name| phases.iter().rev().find(|phase| phase.name == name);
        let begun = [PhaseName::Round, PhaseName::Dump].into_iter().filter_map(begun);
        if let Some(begun_ms) = begun.map(|phase| phase.begun_ms).min() {
            let DumpDurations { stream, remote } = &self.dumps;
            let durations = if streamed { stream } else { remote };
            durations.observe(between(begun_ms, acknowledged.ended_ms));
        }
    }
}

fn between(begun_ms: u64, ended_ms: u64) -> Duration {
    Duration::from_millis(ended_ms.saturating_sub(begun_ms))
}

/// How many ended well, and how many did not.
#[derive(Debug, Default)]
pub struct Outcomes([Cell<u64>; 2]);

impl Outcomes {
    fn count(&self, well: bool) {
        let count = &self.0[usize::from(!well)];
        count.set(count.get() + 1);
    }

    /// By names for the one and the other.
    pub fn by_outcome(&self, names: [&'static str; 2]) -> [(&'static str, u64); 2] {
        std::array::from_fn(|outcome| (names[outcome], self.0[outcome].get()))
    }
}

/// Durations by the protocol that the images came by.
#[derive(Debug, Default)]
pub struct DumpDurations {
    stream: Durations,
    remote: Durations,
}

impl DumpDurations {
    /// By the protocols' names.
    pub fn by_protocol(&self) -> [(&'static str, &Durations); 2] {
        [("stream", &self.stream), ("remote", &self.remote)]
    }
}

/// One snapshot.
#[derive(Debug)]
pub struct Record {
    info: RefCell<Snapshot>,
    images: RefCell<BTreeMap<String, Image>>,
    timeline: RefCell<Timeline>,
    /// Whether images are coming; rounds of pages change no state then.
    dumping: Cell<bool>,
    /// Whether a round of pages has begun.
    begun: Cell<bool>,
    /// Whether the cache may hold pages of it, from rounds of this record or of one before.
    left: Cell<bool>,
    /// Whether its images come by the stream protocol; else by the remote one.
    streamed: Cell<bool>,
    /// The attempt to move a process that it belongs to, 0 for none.
    attempt: Cell<u64>,
    tally: Rc<Tally>,
    /// How many sockets are open for it, which were handed over for its images or its pages.
    sockets: Rc<Cell<usize>>,
    stop: watch::Sender<Option<String>>,
    ended: Notify,
}

/// A socket that is open for a snapshot, until it is dropped.
#[derive(Debug)]
pub struct OpenSocket(Rc<Cell<usize>>);

impl Drop for OpenSocket {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

impl Records {
    /// Lists a snapshot, in the place of an ended one of the same id. `None` when one of that id is
    /// still awaited or being sent.
    pub fn add(&self, id: &str, peer: &str, state: SnapshotState) -> Option<Rc<Record>> {
        let mut records = self.by_age.borrow_mut();
        if records.values().any(|record| record.is(id) && !record.has_ended()) {
            return None;
        }
        records.retain(|_, record| {
            let replaced = record.is(id);
            if replaced {
                // A directory may still be open for it.
                record.stop("it was replaced");
            }
            !replaced
        });
        let info = Snapshot {
            id: id.to_owned(),
            state,
            reason: String::new(),
            peer: peer.to_owned(),
            images: 0,
            bytes: 0,
            begun_ms: now_ms(),
            ended_ms: 0,
            needs_view: String::new(),
            memory_may_have_changed: None,
        };
        let mut timeline = Timeline::default();
        if state == SnapshotState::Receiving {
            timeline.begin(PhaseName::Dump);
        }
        let record = Rc::new(Record {
            info: RefCell::new(info),
            images: RefCell::default(),
            timeline: RefCell::new(timeline),
            dumping: Cell::new(state == SnapshotState::Receiving),
            begun: Cell::new(false),
            left: Cell::new(false),
            streamed: Cell::new(false),
            attempt: Cell::new(0),
            tally: self.tally.clone(),
            sockets: Rc::default(),
            stop: watch::Sender::new(None),
            ended: Notify::new(),
        });
        records.insert(self.next.replace(self.next.get() + 1), record.clone());
        Some(record)
    }

    /// Counts bytes sent.
    pub fn sent(&self, bytes: u64) {
        self.total.set(self.total.get() + bytes);
    }

    /// Bytes sent since the start.
    pub fn total(&self) -> u64 {
        self.total.get()
    }

    /// Every snapshot, oldest first.
    pub fn list(&self) -> Vec<Snapshot> {
        self.by_age.borrow().values().map(|record| record.info()).collect()
    }

    /// The snapshot of that id.
    pub fn find(&self, id: &str) -> Option<Rc<Record>> {
        self.by_age.borrow().values().find(|record| record.is(id)).cloned()
    }

    /// Forgets a snapshot.
    pub fn remove(&self, record: &Rc<Record>) {
        self.by_age.borrow_mut().retain(|_, other| !Rc::ptr_eq(other, record));
    }

    /// A socket that was opened for a snapshot is gone. Forgets the snapshot if nothing has come of it, and
    /// no other socket is open for it: there may be one for its images and one for its pages.
    pub fn await_no_more(&self, record: &Rc<Record>) {
        if record.state() == SnapshotState::Awaited && record.sockets.get() == 0 {
            self.remove(record);
        }
    }

    /// Counts a socket that is opened for a snapshot. The error says why there can be none.
    pub fn open_socket(&self, record: &Rc<Record>) -> Result<OpenSocket, String> {
        let open: usize = self.by_age.borrow().values().map(|record| record.sockets.get()).sum();
        if open >= SOCKETS_MAX {
            return Err(format!(
                "{SOCKETS_MAX} sockets are open for snapshots that await a dump or a round of pages, \
                 the most that a proxy has: drop snapshots that are no longer wanted"
            ));
        }
        record.sockets.set(record.sockets.get() + 1);
        Ok(OpenSocket(record.sockets.clone()))
    }

    /// Forgets the oldest of those that have ended, beyond what is kept. One for which a socket is open still
    /// awaits something: another try of a dump that failed, or the next round.
    pub fn forget_old(&self) {
        let mut records = self.by_age.borrow_mut();
        let is_over = |record: &Record| record.has_ended() && record.sockets.get() == 0;
        let over = records.values().filter(|record| is_over(record)).count();
        let mut surplus = over.saturating_sub(KEPT);
        records.retain(|_, record| {
            let forget = surplus > 0 && is_over(record);
            surplus -= usize::from(forget);
            !forget
        });
    }

    /// Nothing that is under way is finished.
    pub fn abandon(&self, reason: &str) {
        self.by_age.borrow().values().for_each(|record| record.stop(reason));
    }

    /// Those that are being sent, or a round of which is.
    pub fn under_way(&self) -> Vec<Rc<Record>> {
        let records = self.by_age.borrow();
        let sent = |record: &&Rc<Record>| record.state() == SnapshotState::Receiving;
        records.values().filter(sent).cloned().collect()
    }

    /// What has ended since the start.
    pub fn tally(&self) -> &Tally {
        &self.tally
    }

    /// How many snapshots there are in each state.
    pub fn counts(&self) -> StateCounts {
        let mut counts = StateCounts::default();
        for record in self.by_age.borrow().values() {
            match record.state() {
                SnapshotState::Awaited => counts.awaited += 1,
                SnapshotState::Receiving => counts.receiving += 1,
                SnapshotState::Paged => counts.paged += 1,
                SnapshotState::Whole => counts.whole += 1,
                SnapshotState::Damaged => counts.damaged += 1,
                // Only a cache hears of it.
                SnapshotState::Taken => {}
            }
        }
        counts
    }
}

impl Record {
    /// The snapshot as it is now.
    pub fn info(&self) -> Snapshot {
        self.info.borrow().clone()
    }

    /// Its images, while it is being sent.
    pub fn images(&self) -> Vec<Image> {
        self.images.borrow().values().cloned().collect()
    }

    /// Its state.
    pub fn state(&self) -> SnapshotState {
        self.info.borrow().state
    }

    /// A dump has come for it.
    pub fn begin(&self) {
        let mut info = self.info.borrow_mut();
        *info = Snapshot {
            state: SnapshotState::Receiving,
            reason: String::new(),
            images: 0,
            bytes: 0,
            begun_ms: now_ms(),
            ended_ms: 0,
            memory_may_have_changed: None,
            ..info.clone()
        };
        self.images.borrow_mut().clear();
        self.dumping.set(true);
        self.streamed.set(true);
        let mut timeline = self.timeline.borrow_mut();
        timeline.leave(PhaseName::Dump);
        timeline.begin(PhaseName::Dump);
    }

    /// CRIU has handed over all that it had.
    pub fn all_sent(&self) {
        let mut timeline = self.timeline.borrow_mut();
        timeline.end(PhaseName::Dump, self.info.borrow().bytes, false);
        timeline.begin(PhaseName::Acknowledgement);
    }

    /// The memory in it may have changed before it was copied.
    pub fn mark_memory(&self) {
        self.info.borrow_mut().memory_may_have_changed = Some(true);
    }

    /// When what happened.
    pub fn timeline(&self) -> Vec<Phase> {
        self.timeline.borrow().phases().to_vec()
    }

    /// Whether images of it are coming, and not only pages.
    pub fn is_dumping(&self) -> bool {
        self.dumping.get()
    }

    /// A round of its pages has come. Returns the state that it was in.
    pub fn begin_round(&self) -> SnapshotState {
        self.begun.set(true);
        self.left.set(true);
        self.timeline.borrow_mut().begin(PhaseName::Round);
        let before = self.state();
        let dumping = self.dumping.get();
        let state = if dumping { before } else { SnapshotState::Receiving };
        let mut info = self.info.borrow_mut();
        *info = Snapshot { state, reason: String::new(), ..info.clone() };
        before
    }

    /// The round had nothing in it.
    pub fn leave_round(&self, before: SnapshotState) {
        self.info.borrow_mut().state = before;
        self.timeline.borrow_mut().leave(PhaseName::Round);
    }

    /// The round has ended: the cache holds its pages, so many bytes, or it failed and why.
    pub fn end_round(&self, bytes: u64, failure: Option<String>) {
        let mut timeline = self.timeline.borrow_mut();
        timeline.end(PhaseName::Round, bytes, failure.is_some());
        self.tally.count_round(timeline.phases(), failure.is_none());
        drop(timeline);
        if self.dumping.get() {
            return;
        }
        let mut info = self.info.borrow_mut();
        info.state = if failure.is_some() { SnapshotState::Damaged } else { SnapshotState::Paged };
        info.reason = failure.unwrap_or_default();
        info.ended_ms = now_ms();
        drop(info);
        self.ended.notify_waiters();
    }

    /// Whether a round has begun since this was listed. The next one goes on from it, or has no parent: CRIU
    /// has reset the kernel's notes of what changed since any other.
    pub fn has_begun_rounds(&self) -> bool {
        self.begun.get()
    }

    /// An image begins, or goes on.
    pub fn begin_image(&self, name: &str, append: bool) {
        let mut images = self.images.borrow_mut();
        let bytes = images.get(name).filter(|_| append).map_or(0, |image| image.bytes);
        let image = Image { name: name.to_owned(), bytes, whole: false };
        images.insert(name.to_owned(), image);
        self.info.borrow_mut().images += 1;
    }

    /// Bytes of an image were sent.
    pub fn sent(&self, name: &str, bytes: u64) {
        if let Some(image) = self.images.borrow_mut().get_mut(name) {
            image.bytes += bytes;
        }
        self.info.borrow_mut().bytes += bytes;
    }

    /// An image has ended.
    pub fn end_image(&self, name: &str) {
        if let Some(image) = self.images.borrow_mut().get_mut(name) {
            image.whole = true;
        }
    }

    /// The snapshot has ended: the cache has it, or it failed and why.
    pub fn end(&self, failure: Option<String>) {
        let mut info = self.info.borrow_mut();
        let mut timeline = self.timeline.borrow_mut();
        timeline.end(PhaseName::Dump, info.bytes, failure.is_some());
        timeline.end(PhaseName::Acknowledgement, 0, failure.is_some());
        self.tally.count_end(timeline.phases(), failure.is_none(), self.streamed.get());
        drop(timeline);
        info.state = if failure.is_some() { SnapshotState::Damaged } else { SnapshotState::Whole };
        info.reason = failure.unwrap_or_default();
        info.ended_ms = now_ms();
        drop(info);
        self.images.borrow_mut().clear();
        self.dumping.set(false);
        self.ended.notify_waiters();
    }

    /// Tells whoever works on it to stop.
    pub fn stop(&self, reason: &str) {
        self.stop.send_replace(Some(reason.to_owned()));
    }

    /// Resolves when it is to be stopped, with the reason.
    pub async fn stopped(&self) -> String {
        let mut stop = self.stop.subscribe();
        let told = stop.wait_for(Option::is_some).await;
        // The sender lives in this record.
        told.ok().and_then(|reason| reason.clone()).unwrap_or_default()
    }

    /// Resolves when no round can follow: the cache has the whole snapshot, or it is to be stopped.
    pub async fn over(&self) {
        loop {
            let ended = self.ended.notified();
            if self.state() == SnapshotState::Whole {
                return;
            }
            tokio::select! {
                () = ended => {}
                _ = self.stopped() => return,
            }
        }
    }

    /// Resolves when nothing of it is under way.
    pub async fn settled(&self) {
        loop {
            let ended = self.ended.notified();
            if self.state() != SnapshotState::Receiving {
                return;
            }
            ended.await;
        }
    }

    /// It belongs to an attempt to move a process.
    pub fn belongs_to(&self, attempt: u64) {
        self.attempt.set(attempt);
    }

    /// The attempt to move a process that it belongs to, 0 for none.
    pub fn attempt(&self) -> u64 {
        self.attempt.get()
    }

    /// Whether the cache may hold pages of it.
    pub fn has_left_pages(&self) -> bool {
        self.left.get()
    }

    /// It takes the place of another, whose pages it may go with.
    pub fn joins(&self, before: &Record) {
        self.left.set(before.has_left_pages());
        self.timeline.replace(before.timeline.borrow().clone());
    }

    fn is(&self, id: &str) -> bool {
        self.info.borrow().id == id
    }

    fn has_ended(&self) -> bool {
        matches!(self.state(), SnapshotState::Whole | SnapshotState::Damaged | SnapshotState::Paged)
    }
}
