//! What systemd keeps of this cache's snapshots while it does not run. They are kept from the moment that they are
//! whole, before their sender is told so, and their record says so when a restore has taken them; they are forgotten with the
//! snapshot.
//!
//! One [task](Keeping::run) alone sends systemd its messages, so that they come in their order. Whoever relies on what they say
//! [waits](Keeping::follow) for it.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::rc::{Rc, Weak};

use tokio::sync::watch;

use crate::daemon::fd_store::{self, file_name, record_name};
use crate::daemon::journal;
use crate::store::{self, Files, Images, Key, Record, Store, close};

/// What is kept.
#[derive(Debug, Default)]
pub(super) struct Keeping {
    /// How many files systemd keeps; 0 if there is no systemd, and nothing is kept.
    room: Cell<usize>,
    /// The number of the next file.
    next: Cell<u64>,
    /// Each snapshot that can be restored.
    snapshots: RefCell<BTreeMap<Key, Snapshot>>,
    /// Files with bytes of images, by their descriptors: those stay open as long as they are here.
    files: RefCell<BTreeMap<RawFd, KeptFile>>,
    /// The names of records that systemd is to close; they are charged for until it has been told so.
    stale: RefCell<VecDeque<(String, Option<Rc<Record>>)>>,
    /// How often somebody has asked for what is kept to be what can be restored, and how many of them have it so.
    asked: watch::Sender<u64>,
    followed: watch::Sender<u64>,
}

#[derive(Debug)]
enum Snapshot {
    Kept(Kept),
    /// It could not be kept, and there is no use in trying again with the same images before there is room for so many files.
    NotKept(Weak<Images>, bool, usize),
}

#[derive(Debug)]
struct Kept {
    /// The images as the record has them. What they show is not given back to the kernel while the record says where
    /// it is.
    images: Rc<Images>,
    /// Whether the record says that it was taken.
    taken: bool,
    /// The record, and its name.
    record: Rc<Record>,
    name: String,
    /// The files that it needs.
    files: BTreeSet<RawFd>,
}

/// Why a snapshot is not kept.
struct NoPlace {
    why: String,
    /// For how many files there is no room.
    needs: usize,
}

impl NoPlace {
    /// It is not for want of room.
    fn ever(why: String) -> NoPlace {
        NoPlace { why, needs: usize::MAX }
    }
}

#[derive(Debug)]
struct KeptFile {
    name: String,
    file: Rc<File>,
    /// Whether systemd has been told of it.
    told: bool,
    /// How many snapshots need it. What none needs is forgotten, unless one comes to need it before.
    needed: usize,
}

impl Snapshot {
    /// Whether it was seen with these very images, and its record says whether it was taken.
    fn has(&self, images: &Rc<Images>, taken: bool) -> bool {
        match self {
            Snapshot::Kept(kept) => kept.taken == taken && Rc::ptr_eq(&kept.images, images),
            Snapshot::NotKept(seen, was, _) => {
                *was == taken && Weak::ptr_eq(seen, &Rc::downgrade(images))
            }
        }
    }
}

impl Drop for Keeping {
    /// The cache ends, and what is kept stays: none of its pages may be given back to the kernel, as they are where nobody
    /// sees them any more.
    fn drop(&mut self) {
        for known in std::mem::take(self.snapshots.get_mut()).into_values() {
            if let Snapshot::Kept(kept) = known {
                std::mem::forget(kept.images);
            }
        }
    }
}

impl Keeping {
    /// Holds what was kept again, and keeps what is whole from now on.
    pub(super) fn begin(&self, store: &Store, kept: Vec<(String, File)>) {
        self.room.set(fd_store::room());
        let highest = kept.iter().filter_map(|(name, _)| fd_store::number(name)).max();
        self.next.set(highest.map_or(0, |highest| highest + 1));

        let (records, files): (Vec<_>, Vec<_>) =
            kept.into_iter().partition(|(name, _)| fd_store::is_record(name));
        let files: Files = files.into_iter().map(|(name, file)| (name, Rc::new(file))).collect();
        let records = records.into_iter().map(|(name, record)| (name, Rc::new(record)));
        let (names, records): (Vec<String>, Vec<Rc<File>>) = records.unzip();
        for (name, outcome) in names.into_iter().zip(store.hold_again(&records, &files)) {
            match outcome {
                Ok(again) => {
                    let id = &again.id;
                    tracing::info!(
                        message_id = journal::SNAPSHOT_HELD_AGAIN,
                        criu_snapshot = id,
                        "snapshot {id} is held again{}: systemd kept it while the cache did not run",
                        if again.taken { ", as one that was taken" } else { "" }
                    );
                    let needed: BTreeSet<_> = again.files.into_iter().collect();
                    let found = needed.iter().filter_map(|name| Some((name, files.get(name)?)));
                    let files =
                        found.map(|(name, file)| self.need(|| name.clone(), file, true)).collect();
                    let (images, taken, record) = (again.images, again.taken, again.record);
                    let kept = Kept { images, taken, record, name, files };
                    self.snapshots.borrow_mut().insert(again.key, Snapshot::Kept(kept));
                }
                Err(lost) => {
                    self.stale.borrow_mut().push_back((name, None));
                    let id = lost.id.as_deref().unwrap_or("unknown");
                    let criu_reason = &lost.why;
                    tracing::warn!(
                        message_id = journal::SNAPSHOT_LOST,
                        criu_snapshot = id,
                        criu_reason,
                        "snapshot {id} is lost: systemd kept it, but {criu_reason}"
                    );
                }
            }
        }
        // Of snapshots that are lost, or that the cache was killed over: nobody needs them.
        let known: BTreeSet<_> = self.files.borrow().keys().copied().collect();
        for (name, file) in files.iter().filter(|(_, file)| !known.contains(&file.as_raw_fd())) {
            let unneeded =
                KeptFile { name: name.clone(), file: file.clone(), told: true, needed: 0 };
            self.files.borrow_mut().insert(file.as_raw_fd(), unneeded);
        }
    }

    /// Whether anything is kept at all.
    pub(super) fn is_on(&self) -> bool {
        self.room.get() > 0
    }

    /// Resolves when systemd has been told of all that can be restored now, and of what no longer can be.
    pub(super) async fn follow(&self) {
        if !self.is_on() {
            return;
        }
        let mut followed = self.followed.subscribe();
        self.asked.send_modify(|asked| *asked += 1);
        let asked = *self.asked.borrow();
        // The sender is in self: it is not dropped while this waits.
        let _ = followed.wait_for(|followed| *followed >= asked).await;
    }

    /// Has systemd keep what can be restored, as long as this is polled.
    pub(super) async fn run(&self, store: &Store) {
        let (mut changed, mut asked) = (store.watch(), self.asked.subscribe());
        loop {
            changed.mark_unchanged();
            let now = *asked.borrow_and_update();
            self.follow_now(store).await;
            self.followed.send_replace(now);
            // Whoever waits is more than what nobody needs any more.
            let is_waited_for = || {
                matches!(changed.has_changed(), Ok(true)) || matches!(asked.has_changed(), Ok(true))
            };
            while !is_waited_for() && self.forget_one().await {}
            tokio::select! {
                // The store lives as long as the cache.
                _ = changed.changed() => {}
                _ = asked.changed() => {}
            }
        }
    }

    /// Keeps what can be restored and was not kept, has its images elsewhere now, or was taken; and forgets the records of what
    /// is gone.
    async fn follow_now(&self, store: &Store) {
        let restorable = store.restorable();
        let here: BTreeSet<Key> = restorable.iter().map(|(key, ..)| *key).collect();
        let gone = |key: &Key| !here.contains(key);
        let gone: Vec<Key> = self.snapshots.borrow().keys().copied().filter(gone).collect();
        for key in gone {
            self.replace(key, None);
        }
        self.forget_records().await;
        for (key, images, taken) in restorable {
            if self.is_as_it_can_be(key, &images, taken) {
                continue;
            }
            // It may be gone by now; then it is not here the next time.
            let Some(kept) = self.keep(store, key).await else { continue };
            if let Err(NoPlace { why, .. }) = &kept {
                let id = store.id(key).unwrap_or_default();
                let sender = store.sender(key).unwrap_or_default();
                tracing::warn!(
                    message_id = journal::SNAPSHOT_NOT_KEPT,
                    criu_snapshot = id,
                    criu_peer = sender.address(),
                    criu_reason = why,
                    "snapshot {id} would be lost if the cache stopped: {why}"
                );
            }
            let not_kept =
                |none: NoPlace| Snapshot::NotKept(Rc::downgrade(&images), taken, none.needs);
            let known = kept.map_or_else(not_kept, Snapshot::Kept);
            self.replace(key, Some(known));
            self.forget_records().await;
        }
    }

    /// Whether there is nothing to be done for a snapshot with these images.
    fn is_as_it_can_be(&self, key: Key, images: &Rc<Images>, taken: bool) -> bool {
        match self.snapshots.borrow().get(&key) {
            Some(known) if !known.has(images, taken) => false,
            Some(Snapshot::NotKept(_, _, needs)) => {
                self.needed().saturating_add(*needs) > self.room.get()
            }
            Some(Snapshot::Kept(_)) => true,
            None => false,
        }
    }

    /// Whether systemd keeps a snapshot.
    pub(super) fn has(&self, key: Key) -> bool {
        matches!(self.snapshots.borrow().get(&key), Some(Snapshot::Kept(_)))
    }

    /// `None` if it cannot be restored any more.
    async fn keep(&self, store: &Store, key: Key) -> Option<Result<Kept, NoPlace>> {
        let mut files = BTreeSet::new();
        let kept = store.keep(key, |file| {
            let number = file.as_raw_fd();
            // What is needed is not forgotten meanwhile.
            if files.insert(number) {
                self.need(|| file_name(self.next_number()), file, false);
            }
            self.files.borrow()[&number].name.clone()
        });
        let kept = match kept.await? {
            Ok(kept) => kept,
            Err(error) => {
                self.need_no_more(&files);
                return Some(Err(NoPlace::ever(error.to_string())));
            }
        };
        // It says something else from now on, if systemd has it already.
        let name = match self.snapshots.borrow().get(&key) {
            Some(Snapshot::Kept(before)) if Rc::ptr_eq(&before.record, &kept.record) => {
                Some(before.name.clone())
            }
            _ => None,
        };
        match self.tell(&files, &kept, name).await {
            Ok(name) => {
                let store::Kept { images, taken, record, .. } = kept;
                Some(Ok(Kept { images, taken, record, name, files }))
            }
            Err(none) => {
                self.need_no_more(&files);
                Some(Err(none))
            }
        }
    }

    /// Has systemd keep those files that it does not keep already, and a record that says so; returns the record's name, which it
    /// has if systemd keeps that already.
    async fn tell(
        &self,
        files: &BTreeSet<RawFd>,
        kept: &store::Kept,
        name: Option<String>,
    ) -> Result<String, NoPlace> {
        let new = {
            let known = self.files.borrow();
            let new = files.iter().filter_map(|number| known.get(number)).filter(|file| !file.told);
            let new: Vec<_> = new.map(|file| (file.name.clone(), file.file.clone())).collect();
            new
        };
        let (needs, room) = (new.len() + usize::from(name.is_none()), self.room.get());
        while needs > 0 && self.told() + needs > room {
            if !self.forget_one().await {
                let has = self.told();
                let why = format!("it is {needs} files, and systemd keeps {has} of {room} already");
                // Others that need the same files may be gone by then.
                return Err(NoPlace { why, needs: files.len() + 1 });
            }
        }
        // The record last: what is not in one is forgotten at the next start.
        let failed = |error| NoPlace::ever(format!("systemd cannot be told to keep it: {error}"));
        for (name, file) in new {
            fd_store::keep(&name, &file).await.map_err(failed)?;
            if let Some(file) = self.files.borrow_mut().get_mut(&file.as_raw_fd()) {
                file.told = true;
            }
        }
        let unwritten = |error| NoPlace::ever(format!("its record cannot be written: {error}"));
        kept.write().await.map_err(unwritten)?;
        let Some(name) = name else {
            let name = record_name(self.next_number());
            fd_store::keep(&name, kept.record.file()).await.map_err(failed)?;
            return Ok(name);
        };
        Ok(name)
    }

    /// How many files systemd keeps.
    fn told(&self) -> usize {
        let files = self.files.borrow().values().filter(|file| file.told).count();
        files + self.records() + self.stale.borrow().len()
    }

    /// How many of them somebody needs.
    fn needed(&self) -> usize {
        let needed = |file: &&KeptFile| file.told && file.needed > 0;
        self.files.borrow().values().filter(needed).count() + self.records()
    }

    fn records(&self) -> usize {
        let snapshots = self.snapshots.borrow();
        snapshots.values().filter(|known| matches!(known, Snapshot::Kept(_))).count()
    }

    /// Another one is in the place of what is kept of a snapshot, or none: nobody needs what was there before.
    fn replace(&self, key: Key, by: Option<Snapshot>) {
        let name = match &by {
            Some(Snapshot::Kept(kept)) => Some(kept.name.clone()),
            _ => None,
        };
        let mut snapshots = self.snapshots.borrow_mut();
        let before = match by {
            Some(by) => snapshots.insert(key, by),
            None => snapshots.remove(&key),
        };
        let Some(Snapshot::Kept(before)) = before else { return };
        self.need_no_more(&before.files);
        if Some(&before.name) != name.as_ref() {
            self.stale.borrow_mut().push_back((before.name, Some(before.record)));
        }
    }

    /// Has systemd close the records that nobody needs any more: nothing is held again by them from now on.
    async fn forget_records(&self) {
        loop {
            let next = self.stale.borrow().front().map(|(record, _)| record.clone());
            let Some(record) = next else { return };
            fd_store::forget(&record).await;
            self.stale.borrow_mut().pop_front();
        }
    }

    /// Has systemd close one file that nobody needs any more. Returns whether there was one.
    async fn forget_one(&self) -> bool {
        self.forget_records().await;
        let unneeded = {
            let mut files = self.files.borrow_mut();
            let number = files.iter().find(|(_, file)| file.needed == 0).map(|(number, _)| *number);
            number.and_then(|number| files.remove(&number))
        };
        let Some(unneeded) = unneeded else { return false };
        if unneeded.told {
            fd_store::forget(&unneeded.name).await;
        }
        close(&unneeded.file, None);
        true
    }

    fn need(&self, name: impl FnOnce() -> String, file: &Rc<File>, told: bool) -> RawFd {
        let number = file.as_raw_fd();
        let mut files = self.files.borrow_mut();
        let named = || KeptFile { name: name(), file: file.clone(), told, needed: 0 };
        files.entry(number).or_insert_with(named).needed += 1;
        number
    }

    fn need_no_more(&self, files: &BTreeSet<RawFd>) {
        let mut known = self.files.borrow_mut();
        for number in files {
            if let Some(file) = known.get_mut(number) {
                file.needed -= 1;
            }
        }
    }

    fn next_number(&self) -> u64 {
        self.next.replace(self.next.get() + 1)
    }
}
