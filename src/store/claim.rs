//! A restore's hold on a snapshot.

use std::rc::Rc;

use super::snapshot::{Images, Memory, Snapshot, State};
use super::{Key, Store};

/// Why a restore does not get a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unavailable {
    /// It is damaged.
    #[error("snapshot {id} is damaged: {reason}")]
    Damaged {
        /// Its id.
        id: String,
        /// What happened to it.
        reason: String,
    },
    /// Its memory may have changed before it was copied, and nobody has said that it is wanted all the same.
    #[error(
        "the memory in snapshot {0} may have changed before it was copied, and nobody has accepted that: \
         criu-imagectl restore --accept-changed-memory {0}"
    )]
    ChangedMemory(String),
    /// It was dropped while the restore waited.
    #[error("the snapshot was dropped")]
    Dropped,
    /// Another restore is bound to it.
    #[error(
        "another restore has snapshot {0}, or waits for it, and one process is made of a snapshot unless it is \
         asked for as a copy (criu-imagectl restore --copy)"
    )]
    Claimed(String),
    /// A restore has taken it.
    #[error(
        "a restore has taken snapshot {0}; if that one has failed: criu-imagectl restore --again {0}"
    )]
    Taken(String),
}

/// What a restore may have although another restore has it, or had it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Permission {
    /// A snapshot that was taken: that restore failed, and its process does not run.
    pub again: bool,
    /// A snapshot that another restore has or has taken: both processes are to run.
    pub copy: bool,
}

/// A restore's hold on a snapshot: no other restore is given it unasked.
#[derive(Debug)]
pub struct Claim {
    pub(super) store: Rc<Store>,
    pub(super) key: Key,
    /// Whether it keeps others away.
    pub(super) binding: bool,
}

impl Claim {
    /// The snapshot's id, while it is listed.
    pub fn id(&self) -> Option<String> {
        self.store.snapshots.borrow().get(&self.key).map(|snapshot| snapshot.id.clone())
    }

    /// Waits until the snapshot's images come, or it is at its end.
    pub async fn begun(&self) {
        let mut changed = self.store.watch();
        let is_awaited = || {
            let awaited =
                |snapshot: &Snapshot| matches!(snapshot.state, State::Awaited | State::Paged);
            self.store.look(self.key, awaited) == Some(true)
        };
        while is_awaited() {
            // The store outlives its claims, so the sender is there.
            let _ = changed.changed().await;
        }
    }

    /// Why the snapshot has to be restored from a view, if it has.
    pub fn needs_view(&self) -> Option<String> {
        self.store.look(self.key, |snapshot| snapshot.needs_view.clone()).flatten()
    }

    /// Waits until the snapshot is whole, and gives its images; or tells at once why it never will
    /// be.
    pub async fn images(&self) -> Result<Rc<Images>, Unavailable> {
        let mut changed = self.store.watch();
        loop {
            match self.store.snapshots.borrow().get(&self.key) {
                None => return Err(Unavailable::Dropped),
                Some(snapshot) => match &snapshot.state {
                    State::Whole(_) | State::Taken(_)
                        if snapshot.memory == Memory::MayHaveChanged =>
                    {
                        return Err(Unavailable::ChangedMemory(snapshot.id.clone()));
                    }
                    State::Whole(images) | State::Taken(images) => return Ok(images.clone()),
                    State::Damaged { reason, .. } => {
                        let (id, reason) = (snapshot.id.clone(), reason.clone());
                        return Err(Unavailable::Damaged { id, reason });
                    }
                    State::Awaited | State::Paged | State::Receiving(_) => {}
                },
            }
            // The store outlives its claims, so the sender is there.
            let _ = changed.changed().await;
        }
    }

    /// The restore has succeeded, as far as anybody can tell.
    pub fn taken(&self) {
        self.store.take(self.key);
    }

    /// The restore has failed. The snapshot is as it was: whole, or taken by another restore, and then it is kept as long again.
    pub fn failed(&self) {
        self.store.update(self.key, Snapshot::keep_on);
    }

    /// Whether a restore has taken the snapshot.
    pub fn is_taken(&self) -> bool {
        self.store.look(self.key, |snapshot| matches!(snapshot.state, State::Taken(_)))
            == Some(true)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if self.binding {
            self.store.update(self.key, Snapshot::unbind);
            self.store.forget_forsaken(self.key);
        }
    }
}

/// A directory is open for restores of a snapshot, which is listed as long as that may come.
#[derive(Debug)]
pub struct OpenDirectory {
    store: Rc<Store>,
    key: Key,
}

impl OpenDirectory {
    pub(super) fn of(store: &Rc<Store>, key: Key) -> OpenDirectory {
        store.update(key, |snapshot| snapshot.directories += 1);
        OpenDirectory { store: store.clone(), key }
    }
}

impl Drop for OpenDirectory {
    fn drop(&mut self) {
        self.store.update(self.key, |snapshot| snapshot.directories -= 1);
        self.store.forget_forsaken(self.key);
    }
}
