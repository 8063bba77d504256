//! The remote protocol at the source host: snapshots whose images come on many connections, by name.
//!
//! - [`session`]: one client, from its first request to its last; `task` is what a request does at once,
//!   `write` an image on its way.
//! - `snapshot`: a snapshot that its clients have begun and not ended.
//! - `read`: what a dump reads of its parents.
//! - `old_clients`: whose endings name no snapshot.
//!
//! Requests are registered here at the moment they are looked at, and that is the order in which clients
//! were accepted: so the end of a dump waits for the images whose headers came before it, and a list
//! is read with all that was appended.

mod old_clients;
mod read;
pub(super) mod session;
mod snapshot;
mod task;
mod write;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;
use std::time::Duration;

use rustix::io::Errno;
use tokio::sync::Notify;

use super::Proxy;
use super::failure::Failure;
use crate::control::model::SnapshotState;
use crate::criu::historical::is_their_list;
use crate::daemon::sessions::Peer;
use old_clients::Refusals;
use snapshot::Snapshot;

/// Snapshots that are begun and not ended, as many as a cache takes on one link.
const SNAPSHOTS: usize = 1024;

/// Why a request is refused, as its reply says it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub(super) struct Refusal {
    errno: Errno,
    reason: String,
}

impl Refusal {
    fn new(errno: Errno, reason: impl Into<String>) -> Refusal {
        Refusal { errno, reason: reason.into() }
    }

    /// The snapshot is damaged.
    fn failed(reason: impl Into<String>) -> Refusal {
        Refusal::new(Errno::IO, reason)
    }
}

/// The snapshots that clients have begun, in that order.
#[derive(Debug, Default)]
pub(super) struct Remote {
    snapshots: RefCell<BTreeMap<u64, Rc<Snapshot>>>,
    next: Cell<u64>,
    /// How many clients append to each list now.
    appending: RefCell<HashMap<String, usize>>,
    appended: Notify,
    refusals: Refusals,
}

impl Remote {
    fn find(&self, id: &str) -> Option<Rc<Snapshot>> {
        self.snapshots.borrow().values().find(|snapshot| snapshot.id == id).cloned()
    }

    /// The snapshot that an image is written to: it begins if it is not there. One that has failed is
    /// refused, so that the rest of a dump is not taken for another.
    fn written(&self, proxy: &Rc<Proxy>, id: &str) -> Result<Rc<Snapshot>, Refusal> {
        match self.find(id) {
            None => self.begin(proxy, id),
            Some(snapshot) => snapshot.must_be_open().map(|()| snapshot),
        }
    }

    /// The snapshot whose id is appended to a list: a dump begins, whatever became of the last one. `old` is
    /// the old client that does it, if it is one.
    fn listed(
        &self,
        proxy: &Rc<Proxy>,
        id: &str,
        list: &str,
        old: Option<Peer>,
    ) -> Result<Rc<Snapshot>, Refusal> {
        let snapshot = match self.find(id) {
            Some(snapshot) if snapshot.has_failed() => {
                self.forget(&snapshot);
                self.begin(proxy, id)?
            }
            Some(snapshot) => snapshot,
            None => self.begin(proxy, id)?,
        };
        snapshot.must_be_open()?;
        snapshot.set_listed(list);
        if let Some(peer) = old {
            snapshot.set_process(peer);
        }
        Ok(snapshot)
    }

    /// An old client may append an id to its list, unless another one dumps.
    fn make_way(&self, peer: Peer, list: &str) -> Result<(), Refusal> {
        old_clients::make_way(&self.not_ending(), peer, list)
    }

    fn begin(&self, proxy: &Rc<Proxy>, id: &str) -> Result<Rc<Snapshot>, Refusal> {
        self.make_room()?;
        let cache = proxy.links.destination(&proxy.settings());
        let record = proxy.records.add(id, &cache, SnapshotState::Receiving).ok_or_else(|| {
            Refusal::new(Errno::BUSY, format!("a dump through another socket is snapshot {id}"))
        })?;
        let snapshot = Snapshot::begin(proxy, id, &cache, record);
        self.snapshots
            .borrow_mut()
            .insert(self.next.replace(self.next.get() + 1), snapshot.clone());
        Ok(snapshot)
    }

    /// Forgets the oldest of those that have failed, if there are too many in all.
    fn make_room(&self) -> Result<(), Refusal> {
        if self.snapshots.borrow().len() < SNAPSHOTS {
            return Ok(());
        }
        let failed = {
            let snapshots = self.snapshots.borrow();
            snapshots.values().find(|snapshot| snapshot.has_failed()).cloned()
        };
        let Some(failed) = failed else {
            let reason = format!("{SNAPSHOTS} snapshots are under way, and none has ended");
            return Err(Refusal::new(Errno::BUSY, reason));
        };
        self.forget(&failed);
        Ok(())
    }

    fn forget(&self, snapshot: &Rc<Snapshot>) {
        self.snapshots.borrow_mut().retain(|_, known| !Rc::ptr_eq(known, snapshot));
        snapshot.forget();
    }

    /// The snapshot whose dump has ended: from now on it takes no new images.
    fn ending(&self, id: &str) -> Result<Rc<Snapshot>, Refusal> {
        let snapshot = self
            .find(id)
            .filter(|snapshot| !snapshot.is_ending())
            .ok_or_else(|| Refusal::new(Errno::NOENT, format!("no dump of {id} is under way")))?;
        snapshot.set_ending();
        Ok(snapshot)
    }

    /// Those of an old client, oldest first: it has said the end of its dump.
    fn ended_by(&self, peer: Peer) -> Vec<Rc<Snapshot>> {
        let ending = old_clients::ended_by(&self.not_ending(), peer);
        for snapshot in &ending {
            snapshot.set_ending();
        }
        ending
    }

    fn not_ending(&self) -> Vec<Rc<Snapshot>> {
        let snapshots = self.snapshots.borrow();
        snapshots.values().filter(|snapshot| !snapshot.is_ending()).cloned().collect()
    }

    /// What an old client has to be told that reads a list. Where its ending would not be `understood` this is
    /// the last moment at which its dump can fail: it reads the list before its first image.
    fn may_read_list(&self, peer: Peer, list: &str, understood: bool) -> Result<(), Refusal> {
        self.refusals.of(peer, list)?;
        if understood || !is_their_list(list) {
            return Ok(());
        }
        let is_its = |snapshot: &&Rc<Snapshot>| snapshot.is_of(peer) && snapshot.is_in(list);
        let begun: Vec<_> = self.not_ending();
        let mut begun = begun.iter().filter(is_its).peekable();
        if begun.peek().is_none() {
            return Ok(());
        }
        let refusal = old_clients::not_understood();
        for snapshot in begun {
            snapshot.fail(&Failure::Incomplete(refusal.reason.clone()));
        }
        Err(refusal)
    }

    /// Somebody appends to a list, until the guard is dropped.
    fn append(self: &Rc<Self>, list: &str) -> Appending {
        *self.appending.borrow_mut().entry(list.to_owned()).or_default() += 1;
        Appending { remote: self.clone(), list: list.to_owned() }
    }

    /// Resolves when nobody appends to a list.
    async fn appended(&self, list: &str) {
        while self.appending.borrow().contains_key(list) {
            self.appended.notified().await;
        }
    }

    /// Gives up what nobody has written to for that long, and forgets what has failed that long ago.
    pub(super) fn expire(&self, limit: Duration) {
        let idle: Vec<_> = {
            let snapshots = self.snapshots.borrow();
            snapshots.values().filter(|snapshot| snapshot.is_idle(limit)).cloned().collect()
        };
        for snapshot in idle {
            if snapshot.has_failed() {
                self.forget(&snapshot);
            } else {
                let why = format!("nobody wrote to it for {limit:?}, and its end did not come");
                snapshot.fail(&Failure::Incomplete(why));
            }
        }
    }
}

/// A list that is being appended to.
#[derive(Debug)]
struct Appending {
    remote: Rc<Remote>,
    list: String,
}

impl Drop for Appending {
    fn drop(&mut self) {
        let mut appending = self.remote.appending.borrow_mut();
        if let Some(clients) = appending.get_mut(&self.list) {
            *clients -= 1;
            if *clients == 0 {
                appending.remove(&self.list);
            }
        }
        self.remote.appended.notify_waiters();
    }
}
