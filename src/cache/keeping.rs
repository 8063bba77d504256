//! What systemd keeps of this cache's snapshots while it does not run. They are kept from the moment that they are
//! whole, before their sender is told so, and with another record when a restore has taken them; they are forgotten with the
//! snapshot.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::rc::{Rc, Weak};

use crate::daemon::fd_store::{self, file_name, record_name};
use crate::daemon::journal;
use crate::store::{Charge, Files, Images, Key, Store};

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
}

#[derive(Debug)]
enum Snapshot {
    Kept(Kept),
    /// It could not be kept, and there is no use in trying again with the same images.
    NotKept(Weak<Images>),
}

#[derive(Debug)]
struct Kept {
    /// The images as the record has them. What they show is not given back to the kernel while the record says where
    /// it is.
    images: Rc<Images>,
    /// Whether the record says that it was taken.
    taken: bool,
    /// The record's name.
    record: String,
    /// The files that it needs.
    files: BTreeSet<RawFd>,
    /// For the record.
    _charge: Charge,
}

#[derive(Debug)]
struct KeptFile {
    name: String,
    file: Rc<File>,
    /// How many snapshots need it.
    needed: usize,
}

impl Snapshot {
    /// Whether it was seen with these very images, and its record says whether it was taken.
    fn has(&self, images: &Rc<Images>, taken: bool) -> bool {
        match self {
            Snapshot::Kept(kept) => kept.taken == taken && Rc::ptr_eq(&kept.images, images),
            Snapshot::NotKept(seen) => Weak::ptr_eq(seen, &Rc::downgrade(images)),
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
        let (names, records): (Vec<String>, Vec<File>) = records.into_iter().unzip();
        for (record, outcome) in names.into_iter().zip(store.hold_again(&records, &files)) {
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
                    let files = found.map(|(name, file)| self.need(name, file)).collect();
                    let (images, taken) = (again.images, again.taken);
                    let kept = Kept { images, taken, record, files, _charge: again.charge };
                    self.snapshots.borrow_mut().insert(again.key, Snapshot::Kept(kept));
                }
                Err(lost) => {
                    fd_store::forget(&record);
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
        // Of snapshots that are lost, or that the cache was killed over.
        let needed: BTreeSet<_> =
            self.files.borrow().values().map(|file| file.name.clone()).collect();
        files.keys().filter(|name| !needed.contains(*name)).for_each(|name| fd_store::forget(name));
    }

    /// Whether anything is kept at all.
    pub(super) fn is_on(&self) -> bool {
        self.room.get() > 0
    }

    /// Keeps what can be restored and was not kept, has its images elsewhere now, or was taken; and forgets what is gone.
    pub(super) fn follow(&self, store: &Store) {
        if !self.is_on() {
            return;
        }
        let restorable = store.restorable();
        let here: BTreeSet<Key> = restorable.iter().map(|(key, ..)| *key).collect();
        let gone = |key: &Key| !here.contains(key);
        let gone: Vec<Key> = self.snapshots.borrow().keys().copied().filter(gone).collect();
        for key in gone {
            self.forget(key);
        }
        for (key, images, taken) in restorable {
            if self.snapshots.borrow().get(&key).is_some_and(|known| known.has(&images, taken)) {
                continue;
            }
            let kept = self.keep(store, key, &images, taken);
            if let Err(why) = &kept {
                let id = store.id(key).unwrap_or_default();
                tracing::warn!(
                    message_id = journal::SNAPSHOT_NOT_KEPT,
                    criu_snapshot = id,
                    criu_reason = why,
                    "snapshot {id} would be lost if the cache stopped: {why}"
                );
            }
            // What was kept before is good until now.
            self.forget(key);
            let known =
                kept.map_or_else(|_| Snapshot::NotKept(Rc::downgrade(&images)), Snapshot::Kept);
            self.snapshots.borrow_mut().insert(key, known);
        }
    }

    /// Whether a snapshot is kept.
    pub(super) fn has(&self, key: Key) -> bool {
        matches!(self.snapshots.borrow().get(&key), Some(Snapshot::Kept(_)))
    }

    fn keep(
        &self,
        store: &Store,
        key: Key,
        images: &Rc<Images>,
        taken: bool,
    ) -> Result<Kept, String> {
        let mut files = BTreeSet::new();
        let mut new: BTreeMap<RawFd, KeptFile> = BTreeMap::new();
        let kept = store.keep(key, |file| {
            let number = file.as_raw_fd();
            files.insert(number);
            if let Some(known) = self.files.borrow().get(&number) {
                return known.name.clone();
            }
            let named = new.entry(number).or_insert_with(|| {
                let name = file_name(self.next_number());
                KeptFile { name, file: file.clone(), needed: 0 }
            });
            named.name.clone()
        });
        let kept = kept.ok_or("it cannot be restored")?.map_err(|error| error.to_string())?;
        let snapshots = self.snapshots.borrow();
        let records = snapshots.values().filter(|known| matches!(known, Snapshot::Kept(_))).count();
        let (has, room) = (self.files.borrow().len() + records, self.room.get());
        if has + new.len() + 1 > room {
            let needs = new.len() + 1;
            return Err(format!("it is {needs} files, and systemd keeps {has} of {room} already"));
        }
        let record = record_name(self.next_number());
        // The record last: what is not in one is forgotten at the next start.
        let mut all = new.values().map(|file| (&file.name, &*file.file));
        let sent = all
            .try_for_each(|(name, file)| fd_store::keep(name, file))
            .and_then(|()| fd_store::keep(&record, &kept.record));
        if let Err(error) = sent {
            for file in new.values() {
                fd_store::forget(&file.name);
            }
            return Err(format!("systemd cannot be told to keep it: {error}"));
        }
        self.files.borrow_mut().extend(new);
        let mut known = self.files.borrow_mut();
        for number in &files {
            if let Some(file) = known.get_mut(number) {
                file.needed += 1;
            }
        }
        Ok(Kept { images: images.clone(), taken, record, files, _charge: kept.charge })
    }

    fn forget(&self, key: Key) {
        let known = self.snapshots.borrow_mut().remove(&key);
        let Some(Snapshot::Kept(kept)) = known else { return };
        fd_store::forget(&kept.record);
        let mut files = self.files.borrow_mut();
        for number in kept.files {
            let Some(file) = files.get_mut(&number) else { continue };
            file.needed -= 1;
            if file.needed == 0 {
                fd_store::forget(&file.name);
                files.remove(&number);
            }
        }
    }

    fn need(&self, name: &str, file: &Rc<File>) -> RawFd {
        let number = file.as_raw_fd();
        let mut files = self.files.borrow_mut();
        let named = || KeptFile { name: name.to_owned(), file: file.clone(), needed: 0 };
        files.entry(number).or_insert_with(named).needed += 1;
        number
    }

    fn next_number(&self) -> u64 {
        self.next.replace(self.next.get() + 1)
    }
}
