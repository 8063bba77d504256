//! A snapshot that clients have begun and not ended. What fails stays here until its end is said, so
//! that what still comes of it is refused.

use std::cell::{Cell, RefCell};
use std::collections::HashSet;
use std::rc::Rc;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use tokio::sync::{Notify, OnceCell, watch};

use super::Refusal;
use super::old_clients::Process;
use crate::daemon::sessions::Peer;
use crate::proxy::Proxy;
use crate::proxy::dump::tell;
use crate::proxy::failure::Failure;
use crate::proxy::records::Record;
use crate::proxy::upload::{Upload, lost};

/// One snapshot.
#[derive(Debug)]
pub(super) struct Snapshot {
    pub(super) id: String,
    pub(super) record: Rc<Record>,
    /// When a client last wrote to any image.
    pub(super) written: Rc<Cell<Instant>>,
    cache: String,
    started: Instant,
    upload: OnceCell<Rc<Upload>>,
    open: RefCell<HashSet<String>>,
    closed: Notify,
    /// How many images were opened.
    opened: Cell<u64>,
    /// The list that it was appended to last.
    list: RefCell<Option<String>>,
    /// The process that appended or wrote to it without an acknowledgement.
    process: RefCell<Option<Process>>,
    ending: Cell<bool>,
    phase: watch::Sender<Phase>,
    forgotten: Notify,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Phase {
    UnderWay,
    Failed(String),
    /// The cache has it.
    Sent,
}

impl Snapshot {
    pub(super) fn begin(
        proxy: &Rc<Proxy>,
        id: &str,
        cache: &str,
        record: Rc<Record>,
    ) -> Rc<Snapshot> {
        let started = Instant::now();
        let snapshot = Rc::new(Snapshot {
            id: id.to_owned(),
            record,
            written: Rc::new(Cell::new(started)),
            cache: cache.to_owned(),
            started,
            upload: OnceCell::new(),
            open: RefCell::default(),
            closed: Notify::new(),
            opened: Cell::new(0),
            list: RefCell::default(),
            process: RefCell::default(),
            ending: Cell::new(false),
            phase: watch::Sender::new(Phase::UnderWay),
            forgotten: Notify::new(),
        });
        tokio::task::spawn_local(watch_record(proxy.clone(), snapshot.clone()));
        snapshot
    }

    /// Opens an image until the guard is dropped.
    pub(super) fn open(self: &Rc<Self>, name: &str) -> Result<Writing, Refusal> {
        self.must_be_open()?;
        if !self.open.borrow_mut().insert(name.to_owned()) {
            let reason = format!("image {name} of snapshot {} is being written already", self.id);
            return Err(Refusal::new(Errno::BUSY, reason));
        }
        self.opened.set(self.opened.get() + 1);
        self.written.set(Instant::now());
        Ok(Writing { snapshot: self.clone(), name: name.to_owned() })
    }

    /// The way to the cache; the first who needs it has the link made.
    pub(super) async fn upload(self: &Rc<Self>, proxy: &Proxy) -> Result<Rc<Upload>, Failure> {
        let begin = async {
            let settings = proxy.settings();
            let connection =
                proxy.links.connect(&self.cache, &settings).await.map_err(Failure::Lost)?;
            let upload = Rc::new(connection.begin(&self.id, true).await);
            tokio::task::spawn_local(watch_fate(self.clone(), upload.clone()));
            Ok(upload)
        };
        self.upload.get_or_try_init(|| begin).await.cloned()
    }

    /// Resolves when an image is not open for writing, or the snapshot has failed.
    pub(super) async fn image_ended(&self, name: &str) {
        while self.open.borrow().contains(name) && !self.has_failed() {
            self.closed.notified().await;
        }
    }

    /// Ends it: waits for the images that are open, and for the cache's acknowledgement. `images` is
    /// how many the client says that it opened; what is `partial` need not be a checkpoint.
    pub(super) async fn finish(
        self: &Rc<Self>,
        proxy: &Proxy,
        images: Option<u64>,
        partial: bool,
    ) -> Result<(), Refusal> {
        let finish = async {
            while !self.open.borrow().is_empty() {
                self.closed.notified().await;
            }
            let opened = self.opened.get();
            if let Some(told) = images.filter(|told| *told != opened) {
                let why = format!("its writer opened {told} images, {opened} have come");
                return Err(Failure::Incomplete(why));
            }
            let limit = proxy.settings().link.ack_timeout;
            let upload = self.upload(proxy).await?;
            self.record.all_sent();
            upload.finish(partial, limit).await
        };
        let finished = tokio::select! {
            biased;
            why = self.failed() => return Err(Refusal::failed(why)),
            finished = finish => finished,
        };
        match finished {
            Ok(()) => {
                self.phase.send_replace(Phase::Sent);
                self.record.end(None);
                tell(&self.record, None, self.started);
                Ok(())
            }
            Err(failure) => {
                let why = failure.to_string();
                self.fail(&failure);
                Err(Refusal::failed(why))
            }
        }
    }

    /// It cannot be completed any more.
    pub(super) fn fail(self: &Rc<Self>, failure: &Failure) {
        if *self.phase.borrow() != Phase::UnderWay {
            return;
        }
        let why = failure.to_string();
        self.record.end(Some(why.clone()));
        tell(&self.record, Some(failure), self.started);
        self.written.set(Instant::now());
        if let Some(upload) = self.upload.get().cloned() {
            let why = why.clone();
            tokio::task::spawn_local(async move { upload.abort(&why).await });
        }
        self.phase.send_replace(Phase::Failed(why));
        self.closed.notify_waiters();
    }

    /// Resolves when it has failed, with the reason.
    pub(super) async fn failed(&self) -> String {
        let mut phase = self.phase.subscribe();
        let failed = |phase: &Phase| matches!(phase, Phase::Failed(_));
        let settled = phase.wait_for(failed).await.map(|phase| phase.clone());
        match settled {
            Ok(Phase::Failed(why)) => format!("snapshot {} is damaged: {why}", self.id),
            // The sender is in this snapshot.
            _ => std::future::pending().await,
        }
    }

    pub(super) fn has_failed(&self) -> bool {
        matches!(*self.phase.borrow(), Phase::Failed(_))
    }

    pub(super) fn must_not_have_failed(&self) -> Result<(), Refusal> {
        match &*self.phase.borrow() {
            Phase::Failed(why) => {
                Err(Refusal::failed(format!("snapshot {} is damaged: {why}", self.id)))
            }
            Phase::UnderWay | Phase::Sent => Ok(()),
        }
    }

    pub(super) fn must_be_open(&self) -> Result<(), Refusal> {
        self.must_not_have_failed()?;
        if self.ending.get() {
            let reason = format!("the dump of {} has ended", self.id);
            return Err(Refusal::new(Errno::INVAL, reason));
        }
        Ok(())
    }

    /// Whether nobody has written to it for that long, nor is anybody about to.
    pub(super) fn is_idle(&self, limit: Duration) -> bool {
        self.open.borrow().is_empty()
            && (!self.ending.get() || self.has_failed())
            && self.written.get().elapsed() >= limit
    }

    pub(super) fn is_ending(&self) -> bool {
        self.ending.get()
    }

    pub(super) fn set_ending(&self) {
        self.ending.set(true);
    }

    /// No client can come for it any more.
    pub(super) fn forget(&self) {
        self.forgotten.notify_one();
    }

    pub(super) fn is_listed(&self) -> bool {
        self.list.borrow().is_some()
    }

    pub(super) fn set_listed(&self, list: &str) {
        *self.list.borrow_mut() = Some(list.to_owned());
    }

    /// A process works on it that is not answered.
    pub(super) fn set_process(&self, peer: Peer) {
        let mut process = self.process.borrow_mut();
        if process.as_ref().is_none_or(|known| known.pid != peer.pid) {
            *process = Some(Process::of(peer));
        }
    }

    /// Whether it is one of the old clients' in that list.
    pub(super) fn is_in(&self, list: &str) -> bool {
        self.process.borrow().is_some() && self.list.borrow().as_deref() == Some(list)
    }

    /// Whether a process works on it that is not answered.
    pub(super) fn is_of(&self, peer: Peer) -> bool {
        self.process.borrow().as_ref().is_some_and(|process| process.pid == peer.pid)
    }

    /// Whether both are in one list of old clients.
    pub(super) fn shares_list_with(&self, other: &Snapshot) -> bool {
        self.list.borrow().as_deref().is_some_and(|list| other.is_in(list))
    }

    /// Whether an image is open, or the process lives that works on it.
    pub(super) fn is_being_written(&self) -> bool {
        let lives = || self.process.borrow().as_ref().is_some_and(Process::lives);
        !self.has_failed() && (!self.open.borrow().is_empty() || lives())
    }

    /// Who works on it, for people.
    pub(super) fn process_name(&self) -> String {
        let process = self.process.borrow();
        process.as_ref().map_or_else(String::new, |process| format!("process {}", process.pid))
    }
}

/// An image that is open for writing.
#[derive(Debug)]
pub(super) struct Writing {
    pub(super) snapshot: Rc<Snapshot>,
    pub(super) name: String,
}

impl Drop for Writing {
    fn drop(&mut self) {
        self.snapshot.open.borrow_mut().remove(&self.name);
        self.snapshot.closed.notify_waiters();
    }
}

/// Fails a snapshot that the cache gives up, or whose link breaks.
async fn watch_fate(snapshot: Rc<Snapshot>, upload: Rc<Upload>) {
    let mut phase = snapshot.phase.subscribe();
    tokio::select! {
        _ = phase.wait_for(|phase| *phase != Phase::UnderWay) => {}
        fate = upload.lost() => snapshot.fail(&lost(fate)),
    }
}

/// Fails a snapshot that the operator drops, and forgets it.
async fn watch_record(proxy: Rc<Proxy>, snapshot: Rc<Snapshot>) {
    tokio::select! {
        () = snapshot.forgotten.notified() => {}
        reason = snapshot.record.stopped() => {
            snapshot.fail(&Failure::Stopped(reason));
            proxy.remote.forget(&snapshot);
        }
    }
}
