//! Snapshots in memory: images in memfds, the state of each snapshot, the quota that every byte is
//! charged to.
//!
//! ```text
//!              begin            complete              take            keep is over, drop
//!  awaited ──────────▶ receiving ───────▶ whole ───────────▶ taken ───────────▶ (dropped)
//!     │                ▲   │ fail, a check that fails
//!     │                │   └───────────▶ damaged ───▶ (dropped, after keep-damaged)
//!     └──────────────▶ paged ◀─┐ a round of pages
//!       begin_round      └─────┘
//! ```
//!
//! Only whole and taken snapshots have images that a restore can get. A damaged one has given its
//! bytes back and keeps its reason.

mod check;
mod claim;
mod closing;
mod files;
mod flat_images;
mod flatten;
mod image;
mod kept;
mod lists;
mod needs_view;
pub mod pages;
mod quota;
mod record;
mod rounds;
mod snapshot;
mod tally;
mod turns;
mod withdraw;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::sync::watch;

pub use claim::{Claim, OpenDirectory, Permission, Unavailable};
pub use closing::{close, close_in_background};
pub use files::NoFiles;
pub use image::{Image, Part};
pub use kept::{Again, Files, Kept, Lost};
pub use quota::{Charge, Exhausted, Quota};
pub use record::Record;
pub use rounds::ComingRound;
pub use snapshot::{Counts, Images, Memory, Sender, Snapshot, State};
pub use tally::{Tally, one_more};
pub use withdraw::Withdrawn;

use flat_images::flat_images;
use flatten::{flatten, take_out_pages};
use lists::Lists;

use crate::config::{Keep, StoreSettings};
use crate::criu::remote::{PARENT, encode_ids};

/// What need not be kept once it was taken stays this long, so that who waits for it sees that it
/// was.
const LINGER: Duration = Duration::from_secs(1);
/// So many damaged snapshots of a host are listed of which nothing had come.
const EMPTY: usize = 16;

/// Everything that a cache holds.
#[derive(Debug)]
pub struct Store {
    settings: RefCell<StoreSettings>,
    /// Oldest first: the key grows with each snapshot.
    snapshots: RefCell<BTreeMap<Key, Snapshot>>,
    lists: RefCell<Lists>,
    next_key: Cell<u64>,
    next_round: Cell<u64>,
    quota: Quota,
    total: Cell<u64>,
    tally: Tally,
    changed: watch::Sender<()>,
}

/// Names a snapshot for as long as the store runs, even when its id is used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(u64);

/// Why a snapshot or an image is not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The id is that of a snapshot that would be lost.
    #[error(
        "a snapshot {0} is held already and no restore has taken it; drop it, or use another id"
    )]
    Exists(String),
    /// The id is that of a snapshot still coming.
    #[error("a snapshot {0} is being received already")]
    UnderWay(String),
    /// A round of the same snapshot is coming.
    #[error("a round of pages of snapshot {0} is being received already")]
    RoundUnderWay(String),
    /// The pages of the parent are not there.
    #[error("the parent {parent} cannot be used: {why}")]
    NoParent {
        /// The parent's id.
        parent: String,
        /// Why.
        why: String,
    },
    /// The id is that of a snapshot which a restore is reading.
    #[error("a restore is reading a snapshot {0}")]
    InUse(String),
    /// The id is that of a snapshot that was restored, as far as the store knows.
    #[error(
        "a restore has taken snapshot {0}. If no process of it runs: criu-imagectl restore --again {0}. To use the id for \
         another: criu-imagectl --cache drop {0}"
    )]
    Taken(String),
    /// What is wanted again is not there any more.
    #[error("snapshot {0} is not held any more: it cannot be restored again")]
    Gone(String),
    /// The lists of ids are full.
    #[error("the lists of ids hold {0} already, the store's limit (store.max-snapshots)")]
    ListsTooLong(u64),
    /// The list is full.
    #[error("the store lists {0} snapshots, its limit (store.max-snapshots)")]
    TooMany(u64),
    /// The source has given up the attempt to move a process that this belongs to.
    #[error("the source has withdrawn {0}: its process runs on there")]
    Withdrawn(String),
    /// The snapshot was dropped meanwhile.
    #[error("it was dropped")]
    Dropped,
    /// No memfd could be made, for want of memory or of a descriptor.
    #[error("image {name} cannot be held: {cause}")]
    NoMemfd {
        /// The image.
        name: String,
        /// What the kernel said.
        cause: rustix::io::Errno,
    },
}

impl Store {
    /// An empty store.
    pub fn new(settings: StoreSettings) -> Rc<Store> {
        Rc::new(Store {
            quota: Quota::new(settings.max_bytes),
            settings: RefCell::new(settings),
            snapshots: RefCell::default(),
            lists: RefCell::default(),
            next_key: Cell::new(0),
            next_round: Cell::new(0),
            total: Cell::new(0),
            tally: Tally::default(),
            changed: watch::Sender::new(()),
        })
    }

    /// Puts other limits in force. What is held already stays, even beyond them.
    pub fn configure(&self, settings: StoreSettings) {
        self.quota.set_limit(settings.max_bytes);
        *self.settings.borrow_mut() = settings;
        self.changed.send_replace(());
    }

    /// The limits in force.
    pub fn settings(&self) -> StoreSettings {
        self.settings.borrow().clone()
    }

    /// What bytes are charged to.
    pub fn quota(&self) -> &Quota {
        &self.quota
    }

    /// Bytes received since the start.
    pub fn total(&self) -> u64 {
        self.total.get()
    }

    /// What has become of snapshots since the start.
    pub fn tally(&self) -> &Tally {
        &self.tally
    }

    /// Wakes whenever a snapshot changes its state, comes or goes.
    pub fn watch(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// Looks at every snapshot, oldest first.
    pub fn for_each(&self, mut look: impl FnMut(&Snapshot)) {
        self.snapshots.borrow().values().for_each(&mut look);
    }

    /// Looks at the snapshot of that id.
    pub fn find<T>(&self, id: &str, look: impl FnOnce(&Snapshot) -> T) -> Option<T> {
        self.snapshots.borrow().values().find(|snapshot| snapshot.id == id).map(look)
    }

    /// A restore will ask for a snapshot of that id by name: lists it as awaited if it is not there. It has to be
    /// [claimed](Store::claim), or a [directory](Store::open_directory) opened for it: when the last of them goes, the
    /// snapshot is listed no more, unless something of it has come.
    ///
    /// One that was taken is refused unless that is permitted: its process may run, and the one
    /// that is awaited may be another. One that is wanted again has to be there.
    pub fn expect(&self, id: &str, permission: Permission) -> Result<Key, Refused> {
        let Permission { again, copy } = permission;
        let here = self.find(id, |known| !matches!(known.state, State::Awaited)) == Some(true);
        if again && !here {
            return Err(Refused::Gone(id.to_owned()));
        }
        let key = match self.key_of(id) {
            Some(key) => key,
            None => self.list(Snapshot::new(id, &Sender::default(), State::Awaited))?,
        };
        if self.look(key, |known| known.withdrawn) == Some(true) {
            // Its reason was told to those who waited for that attempt; this one waits for the next.
            self.update(key, |known| known.begin(&Sender::default(), State::Awaited));
        }
        let taken = self.look(key, |known| matches!(known.state, State::Taken(_))) == Some(true);
        if taken && !again && !copy {
            return Err(Refused::Taken(id.to_owned()));
        }
        Ok(key)
    }

    /// Keeps a snapshot listed while a directory is open for restores of it.
    pub fn open_directory(self: &Rc<Store>, key: Key) -> OpenDirectory {
        OpenDirectory::of(self, key)
    }

    /// Takes a snapshot from the list of which nothing has come, if nobody waits for it any more.
    fn forget_forsaken(&self, key: Key) {
        if self.look(key, Snapshot::is_forsaken) == Some(true) {
            self.snapshots.borrow_mut().remove(&key);
            self.changed.send_replace(());
        }
    }

    /// Keeps a snapshot for the restores that ask for it by name.
    pub fn reserve(&self, key: Key) {
        self.update(key, |snapshot| snapshot.reserved = true);
    }

    /// A restore from a view waits for a snapshot.
    pub fn await_view(&self, key: Key) {
        self.update(key, |snapshot| snapshot.view_awaited = true);
    }

    /// The snapshot of that id, for somebody who looks at it.
    pub fn key_of(&self, id: &str) -> Option<Key> {
        let snapshots = self.snapshots.borrow();
        snapshots.iter().find(|(_, snapshot)| snapshot.id == id).map(|(key, _)| *key)
    }

    /// The id of a snapshot, while it is listed.
    pub fn id(&self, key: Key) -> Option<String> {
        self.look(key, |snapshot| snapshot.id.clone())
    }

    /// Who sent a snapshot, while it is listed.
    pub fn sender(&self, key: Key) -> Option<Sender> {
        self.look(key, |snapshot| snapshot.sender.clone())
    }

    /// Resolves when the snapshot is no longer listed.
    pub async fn gone(&self, key: Key) {
        let mut changed = self.watch();
        while self.snapshots.borrow().contains_key(&key) {
            // The store outlives those who wait for it.
            let _ = changed.changed().await;
        }
    }

    /// A snapshot begins to come. An id that is awaited or spent is used (again).
    pub fn begin(&self, id: &str, sender: &Sender) -> Result<Key, Refused> {
        self.must_not_be_withdrawn(id, sender)?;
        let Some(key) = self.key_of(id) else {
            return self.list(Snapshot::new(id, sender, State::Receiving(Rc::default())));
        };
        let refused = self.find(id, |known| match known.state {
            State::Receiving(_) => Some(Refused::UnderWay(id.to_owned())),
            State::Whole(_) => Some(Refused::Exists(id.to_owned())),
            State::Taken(_) if known.restores > 0 => Some(Refused::InUse(id.to_owned())),
            // Pages of a process go with images of the same one.
            State::Paged if known.sender.host != sender.host => {
                Some(Refused::UnderWay(id.to_owned()))
            }
            State::Awaited | State::Paged | State::Taken(_) | State::Damaged { .. } => None,
        });
        if let Some(refused) = refused.flatten() {
            return Err(refused);
        }
        self.update(key, |snapshot| snapshot.begin(sender, State::Receiving(Rc::default())));
        Ok(key)
    }

    /// Appends a snapshot's id to a list of the host that sends it.
    pub fn append_to_list(&self, key: Key, list: &str) -> Result<(), Refused> {
        let known = self.look(key, |snapshot| (snapshot.id.clone(), snapshot.sender.host));
        let (id, host) = known.ok_or(Refused::Dropped)?;
        let mut lists = self.lists.borrow_mut();
        // A snapshot may stand in more lists than one, but not in any number of them.
        let limit = self.settings.borrow().max_snapshots;
        if lists.len() as u64 >= limit && !lists.has(list, host, &id) {
            return Err(Refused::ListsTooLong(limit));
        }
        lists.append(list, host, &id);
        drop(lists);
        self.changed.send_replace(());
        Ok(())
    }

    /// The ids of a list, oldest first.
    pub fn list_ids(&self, list: &str) -> Vec<String> {
        self.lists.borrow().ids(list)
    }

    /// A list as an image: all of it, or the chain of one host that has not ended, where a dump looks for its
    /// parents; `None` while it is empty.
    pub fn list_image(
        &self,
        list: &str,
        host: Option<Option<IpAddr>>,
    ) -> rustix::io::Result<Option<Rc<Image>>> {
        let lists = self.lists.borrow();
        let ids = match host {
            Some(host) => lists.open_chain(list, host),
            None => lists.ids(list),
        };
        if ids.is_empty() {
            return Ok(None);
        }
        let made = Image::made_of(PARENT, &encode_ids(&ids), self.quota.nothing())?;
        Ok(Some(Rc::new(made)))
    }

    /// Whether a list has an id, and none of its snapshots is still coming.
    pub fn list_is_settled(&self, list: &str) -> bool {
        let ids = self.list_ids(list);
        let coming = |id: &String| {
            self.find(id, |found| {
                matches!(found.state, State::Awaited | State::Paged | State::Receiving(_))
            })
        };
        !ids.is_empty() && !ids.iter().any(|id| coming(id) == Some(true))
    }

    /// An image of a snapshot begins, to be [charged](Self::charge) for. One of that name that ended
    /// before is replaced, or goes on if it is appended to.
    pub fn begin_image(&self, key: Key, name: &str, append: bool) -> Result<Rc<Image>, Refused> {
        let mut snapshots = self.snapshots.borrow_mut();
        let Some(snapshot) = snapshots.get_mut(&key).filter(|known| !known.pages.ending) else {
            return Err(Refused::Dropped);
        };
        let State::Receiving(images) = &mut snapshot.state else { return Err(Refused::Dropped) };
        if let (true, Some(image)) = (append, images.get(name)) {
            image.reopen();
            return Ok(image.clone());
        }
        let image = Image::create(name, self.quota.nothing())
            .map_err(|cause| Refused::NoMemfd { name: name.to_owned(), cause })?;
        let image = Rc::new(image);
        Rc::make_mut(images).insert(name.to_owned(), image.clone());
        Ok(image)
    }

    /// Charges an image of a snapshot for `more` bytes, before they are accepted; waits for room.
    /// With 0 it charges a new image for what it is itself.
    pub async fn charge(&self, key: Key, image: &Image, more: u64) -> Result<(), Exhausted> {
        let patience = self.settings.borrow().quota_wait;
        let charge = self.quota.charge(image.growth(more), || self.charged(key), patience).await?;
        image.charge(charge);
        Ok(())
    }

    /// Whether a snapshot is still coming, and was not dropped.
    pub fn is_receiving(&self, key: Key) -> bool {
        let snapshots = self.snapshots.borrow();
        matches!(snapshots.get(&key), Some(Snapshot { state: State::Receiving(_), .. }))
    }

    /// How many bytes a snapshot is charged for.
    fn charged(&self, key: Key) -> u64 {
        let charged = |snapshot: &Snapshot| {
            let images = snapshot.images().into_iter().flat_map(BTreeMap::values);
            images.map(|image| image.charged()).sum::<u64>() + snapshot.paged()
        };
        self.look(key, charged).unwrap_or(0)
    }

    /// Counts bytes that came in.
    pub fn received(&self, bytes: u64) {
        self.total.set(self.total.get() + bytes);
    }

    /// Everything of a snapshot has come: checks it, and makes it whole or damaged. The error is the
    /// reason for the latter. What is `partial` need not be a checkpoint by itself. Its images are those of one
    /// dump from then on: what came in rounds, and what is in its [parent](Self::set_parent), is a part of them.
    ///
    /// Others have their turn while that is done; it may be dropped meanwhile.
    pub async fn complete(&self, key: Key, partial: bool) -> Result<(), String> {
        match self.make_whole(key, partial).await {
            Ok((images, record)) => {
                let needs_view = needs_view::why(&images);
                self.update(key, |snapshot| {
                    snapshot.end(State::Whole(images));
                    snapshot.record = record;
                    snapshot.needs_view = needs_view;
                    if !partial {
                        self.lists.borrow_mut().end_chain(&snapshot.id);
                    }
                });
                one_more(&self.tally.whole);
                Ok(())
            }
            Err(reason) => {
                self.fail(key, &reason);
                Err(reason)
            }
        }
    }

    /// The memory in a snapshot that is coming may have changed before it was copied.
    pub fn mark_memory(&self, key: Key) {
        self.update(key, |snapshot| snapshot.memory = Memory::MayHaveChanged);
    }

    /// What is known of the memory in a snapshot.
    pub fn memory(&self, key: Key) -> Option<Memory> {
        self.look(key, |snapshot| snapshot.memory)
    }

    /// Somebody wants a snapshot even though its memory may have changed. Returns whether it may have.
    pub fn accept_changed_memory(&self, key: Key) -> bool {
        let changed = self.memory(key) == Some(Memory::MayHaveChanged);
        if changed {
            self.update(key, |snapshot| snapshot.memory = Memory::Accepted);
        }
        changed
    }

    /// The images of a snapshot of which everything has come, the small ones in its record.
    async fn make_whole(
        &self,
        key: Key,
        partial: bool,
    ) -> Result<(Rc<Images>, Option<Rc<Record>>), String> {
        let images = self.all_images(key, partial).await?;
        self.update(key, |snapshot| {
            if let State::Receiving(came) = &mut snapshot.state {
                *came = images;
                snapshot.pages.ending = true;
            }
        });
        let record = self.take_in_small(key).await?;
        let images = self.look(key, |snapshot| match &snapshot.state {
            State::Receiving(images) => Some(images.clone()),
            _ => None,
        });
        images.flatten().map_or_else(dropped, |images| Ok((images, record)))
    }

    /// The images of a snapshot of which everything has come, as if it was one dump: with the pages that came
    /// in rounds, or that are in its parent.
    async fn all_images(&self, key: Key, partial: bool) -> Result<Rc<Images>, String> {
        let (came, of_parent, flat) =
            self.look(key, Snapshot::all_that_came).unwrap_or_else(dropped)?;
        check::check(&came, partial).await?;
        let mut images = came.clone();
        let flat = match (&of_parent, &flat) {
            (Some(_), Some(_)) => {
                return Err("its pages came in rounds, and it has a parent as well".to_owned());
            }
            (Some(parent), None) => {
                let flat = flatten(&images, Some(parent)).await?;
                take_out_pages(Rc::make_mut(&mut images));
                Some(flat)
            }
            (None, flat) => flat.clone(),
        };
        if let Some(flat) = &flat {
            flat_images(flat, Rc::make_mut(&mut images), &self.quota).await?;
        }
        if !partial {
            check::check_memory(&images)?;
        }
        let (now, ..) = self.look(key, Snapshot::all_that_came).unwrap_or_else(dropped)?;
        if Rc::ptr_eq(&now, &came) { Ok(images) } else { dropped() }
    }

    /// A snapshot cannot be completed: its bytes are given back, its reason is kept. One that had pages
    /// before its images began keeps those.
    pub fn fail(&self, key: Key, reason: &str) {
        self.update(key, |snapshot| {
            // Its source has said why.
            if !snapshot.withdrawn {
                snapshot.fail(reason);
                one_more(&self.tally.damaged);
            }
        });
        self.forget_empty(key);
    }

    /// A snapshot has failed. Of what its host began and nothing has come of, the last are enough: whoever begins
    /// snapshots without end does not fill the list.
    fn forget_empty(&self, failed: Key) {
        let Some(host) = self.look(failed, |failed| failed.sender.host) else { return };
        let mut empty: Vec<(Instant, String)> = Vec::new();
        self.for_each(|snapshot| {
            let State::Damaged { counts, .. } = snapshot.state else { return };
            let is_empty = counts == Counts::default() && !snapshot.withdrawn;
            if is_empty && snapshot.sender.host == host && snapshot.restores == 0 {
                empty.push((snapshot.since, snapshot.id.clone()));
            }
        });
        empty.sort();
        for (_, id) in empty.iter().rev().skip(EMPTY) {
            self.remove(id, &self.tally.expired);
        }
    }

    /// Binds a restore to the oldest snapshot that is whole or coming, that no restore is bound to
    /// or has taken, and that is not reserved.
    pub fn claim_oldest(self: &Rc<Store>) -> Option<Claim> {
        let snapshots = self.snapshots.borrow();
        let free = |snapshot: &Snapshot| {
            snapshot.restores == 0
                && !snapshot.reserved
                && matches!(snapshot.state, State::Receiving(_) | State::Whole(_))
        };
        // One that would be refused keeps nobody from another; alone it is better refused than waited for.
        let mut in_order = [false, true].into_iter().flat_map(|changed| {
            snapshots.iter().filter(move |(_, snapshot)| {
                (snapshot.memory == Memory::MayHaveChanged) == changed && free(snapshot)
            })
        });
        let key = in_order.next().map(|(key, _)| *key)?;
        drop(in_order);
        drop(snapshots);
        Some(self.bind(key))
    }

    /// Binds a restore to a snapshot, which need not have come yet. It gets none that another restore has or has
    /// taken, unless it is permitted to.
    pub fn claim(self: &Rc<Store>, key: Key, permission: Permission) -> Result<Claim, Unavailable> {
        let refused = self.look(key, |snapshot| {
            let id = || snapshot.id.clone();
            let taken = matches!(snapshot.state, State::Taken(_));
            if snapshot.restores > 0 && !permission.copy {
                Some(Unavailable::Claimed(id()))
            } else if taken && permission == Permission::default() {
                Some(Unavailable::Taken(id()))
            } else {
                None
            }
        });
        match refused {
            None => Err(Unavailable::Dropped),
            Some(Some(refused)) => Err(refused),
            Some(None) => Ok(self.bind(key)),
        }
    }

    fn bind(self: &Rc<Store>, key: Key) -> Claim {
        self.update(key, Snapshot::bind);
        Claim { store: self.clone(), key, binding: true }
    }

    /// Gives somebody a look at a snapshot; restores get it all the same.
    pub fn peek(self: &Rc<Store>, key: Key) -> Claim {
        Claim { store: self.clone(), key, binding: false }
    }

    /// A restore of a snapshot has ended: it and its parents, those before it in its chain, are taken. Returns their ids; `None` when
    /// there is no such snapshot that is whole.
    pub fn restored(&self, id: &str) -> Option<Vec<String>> {
        let whole = |id: &str| {
            let whole = self.find(id, |found| matches!(found.state, State::Whole(_)));
            self.key_of(id).filter(|_| whole == Some(true))
        };
        whole(id)?;
        let mut taken = self.lists.borrow().parents(id);
        taken.push(id.to_owned());
        taken.retain(|id| match whole(id) {
            Some(key) => {
                self.take(key);
                true
            }
            None => false,
        });
        Some(taken)
    }

    /// A restore has read a snapshot: it is no parent of what is dumped from now on.
    fn take(&self, key: Key) {
        self.update(key, |snapshot| {
            if let State::Whole(images) | State::Taken(images) = &snapshot.state {
                let images = images.clone();
                snapshot.take(images);
                one_more(&self.tally.taken);
                self.lists.borrow_mut().forget(&snapshot.id);
            }
        });
    }

    /// Forgets a snapshot. A restore that is reading it keeps what it reads.
    pub fn drop_snapshot(&self, id: &str) -> Option<State> {
        self.remove(id, &self.tally.dropped)
    }

    /// Forgets a snapshot, and counts it.
    fn remove(&self, id: &str, count: &Cell<u64>) -> Option<State> {
        let key = self.key_of(id)?;
        one_more(count);
        let dropped = self.snapshots.borrow_mut().remove(&key);
        self.lists.borrow_mut().forget(id);
        self.changed.send_replace(());
        dropped.map(|snapshot| snapshot.state)
    }

    /// Forgets what has been kept long enough; returns the ids of snapshots among it, of what was taken and of
    /// what was damaged, each with who sent it and the reason.
    pub fn expire(&self, now: Instant) -> Vec<(String, Sender, &'static str)> {
        let (keep, keep_damaged) = {
            let settings = self.settings.borrow();
            (settings.keep, settings.keep_damaged)
        };
        let over = |snapshot: &Snapshot, limit: Duration| {
            snapshot.restores == 0 && now.saturating_duration_since(snapshot.since) >= limit
        };
        let mut expired = Vec::new();
        self.snapshots.borrow_mut().retain(|_, snapshot| {
            let keeps = match (&snapshot.state, keep) {
                (State::Taken(_), Keep::Taken) => !over(snapshot, LINGER),
                (State::Taken(_), Keep::For(limit)) => !over(snapshot, limit),
                (State::Damaged { .. }, _) => !over(snapshot, keep_damaged),
                _ => true,
            };
            if !keeps {
                let why = match snapshot.state {
                    State::Damaged { .. } => "it is damaged, and store.keep-damaged is over",
                    _ => "it was taken, and store.keep is over",
                };
                expired.push((snapshot.id.clone(), snapshot.sender.clone(), why));
            }
            snapshot.forget_unused(now);
            keeps
        });
        for (id, ..) in &expired {
            one_more(&self.tally.expired);
            self.lists.borrow_mut().forget(id);
        }
        if !expired.is_empty() {
            self.changed.send_replace(());
        }
        expired
    }

    fn list(&self, snapshot: Snapshot) -> Result<Key, Refused> {
        let limit = self.settings.borrow().max_snapshots;
        if self.snapshots.borrow().len() as u64 >= limit {
            return Err(Refused::TooMany(limit));
        }
        Ok(self.list_beyond(snapshot))
    }

    /// Lists a snapshot even beyond the limit.
    fn list_beyond(&self, snapshot: Snapshot) -> Key {
        let key = Key(self.next_key.get());
        self.next_key.set(key.0 + 1);
        self.snapshots.borrow_mut().insert(key, snapshot);
        self.changed.send_replace(());
        key
    }

    fn look<T>(&self, key: Key, look: impl FnOnce(&Snapshot) -> T) -> Option<T> {
        self.snapshots.borrow().get(&key).map(look)
    }

    fn update(&self, key: Key, change: impl FnOnce(&mut Snapshot)) {
        if let Some(snapshot) = self.snapshots.borrow_mut().get_mut(&key) {
            change(snapshot);
        }
        self.changed.send_replace(());
    }
}

fn dropped<T>() -> Result<T, String> {
    Err(Refused::Dropped.to_string())
}

#[cfg(test)]
mod tests;
