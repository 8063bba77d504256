//! A restore's hold on a snapshot.

use std::rc::Rc;

use super::snapshot::{Images, Snapshot, State};
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
    /// It was dropped while the restore waited.
    #[error("the snapshot was dropped")]
    Dropped,
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

    /// Waits until the snapshot is whole, and gives its images; or tells at once why it never will
    /// be.
    pub async fn images(&self) -> Result<Rc<Images>, Unavailable> {
        let mut changed = self.store.watch();
        loop {
            match self.store.snapshots.borrow().get(&self.key) {
                None => return Err(Unavailable::Dropped),
                Some(snapshot) => match &snapshot.state {
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

    /// The restore has read the snapshot.
    pub fn taken(&self) {
        self.store.take(self.key);
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if self.binding {
            self.store.update(self.key, Snapshot::unbind);
        }
    }
}
