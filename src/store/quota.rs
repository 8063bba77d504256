//! The quota: every byte is charged before it is accepted, and the charge sits in the object whose
//! end frees the byte.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::timeout;

/// A limit on bytes held.
#[derive(Debug, Clone)]
pub struct Quota(Rc<Account>);

#[derive(Debug)]
struct Account {
    limit: Cell<u64>,
    used: Cell<u64>,
    /// How many wait for room.
    waiting: Cell<usize>,
    freed: Notify,
}

/// Why bytes are not accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Exhausted {
    /// They can never fit.
    #[error("quota exhausted: the snapshot needs more than store.max-bytes, {limit} bytes")]
    Never {
        /// The quota, in bytes.
        limit: u64,
    },
    /// There is no room, and no time to wait for it.
    #[error("quota exhausted: {used} of {limit} bytes (store.max-bytes) are held")]
    Now {
        /// Bytes held.
        used: u64,
        /// The quota, in bytes.
        limit: u64,
    },
    /// No room became free in time.
    #[error("quota exhausted: {used} of {limit} bytes (store.max-bytes) were held for {waited:?}")]
    InTime {
        /// Bytes held.
        used: u64,
        /// The quota, in bytes.
        limit: u64,
        /// store.quota-wait.
        waited: Duration,
    },
}

impl Quota {
    /// A quota of `limit` bytes.
    pub fn new(limit: u64) -> Quota {
        let (limit, used, waiting) = (Cell::new(limit), Cell::new(0), Cell::new(0));
        Quota(Rc::new(Account { limit, used, waiting, freed: Notify::new() }))
    }

    /// Bytes charged now.
    pub fn used(&self) -> u64 {
        self.0.used.get()
    }

    /// Bytes that may be charged.
    pub fn limit(&self) -> u64 {
        self.0.limit.get()
    }

    /// Whether a sender waits for room now.
    pub fn is_reached(&self) -> bool {
        self.waiting() > 0
    }

    /// How many senders wait for room now.
    pub fn waiting(&self) -> u64 {
        self.0.waiting.get() as u64
    }

    /// Changes the limit. What is held stays, even beyond it.
    pub fn set_limit(&self, limit: u64) {
        self.0.limit.set(limit);
        self.0.freed.notify_waiters();
    }

    /// A charge of nothing, to join others to.
    pub fn nothing(&self) -> Charge {
        Charge { account: self.0.clone(), bytes: 0 }
    }

    /// Charges `bytes`, waiting for room at most `patience`. `held` is what the same snapshot is
    /// charged for already: what cannot fit beside it is refused at once.
    pub async fn charge(
        &self,
        bytes: u64,
        held: impl FnOnce() -> u64,
        patience: Duration,
    ) -> Result<Charge, Exhausted> {
        if let Some(charge) = self.try_charge(bytes) {
            return Ok(charge);
        }
        if held().saturating_add(bytes) > self.limit() {
            return Err(Exhausted::Never { limit: self.limit() });
        }
        let _waiting = Waiting::begin(&self.0);
        let room = async {
            loop {
                // Registered before the look, so that no release is missed.
                let freed = self.0.freed.notified();
                if let Some(charge) = self.try_charge(bytes) {
                    return charge;
                }
                freed.await;
            }
        };
        timeout(patience, room).await.map_err(|_| Exhausted::InTime {
            used: self.used(),
            limit: self.limit(),
            waited: patience,
        })
    }

    /// Charges `bytes` if there is room now.
    pub fn charge_now(&self, bytes: u64) -> Result<Charge, Exhausted> {
        let (used, limit) = (self.used(), self.limit());
        let never = bytes > limit;
        let refused =
            if never { Exhausted::Never { limit } } else { Exhausted::Now { used, limit } };
        self.try_charge(bytes).ok_or(refused)
    }

    /// Charges bytes that are held already, even beyond the limit.
    pub(super) fn charge_held(&self, bytes: u64) -> Charge {
        self.0.used.set(self.used().saturating_add(bytes));
        Charge { account: self.0.clone(), bytes }
    }

    fn try_charge(&self, bytes: u64) -> Option<Charge> {
        let used = self.used().checked_add(bytes).filter(|used| *used <= self.limit())?;
        self.0.used.set(used);
        Some(Charge { account: self.0.clone(), bytes })
    }
}

/// Bytes that are charged; given back on drop.
#[derive(Debug)]
pub struct Charge {
    account: Rc<Account>,
    bytes: u64,
}

impl Charge {
    /// How many bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Takes another charge over.
    pub fn join(&mut self, mut other: Charge) {
        self.bytes += std::mem::take(&mut other.bytes);
    }

    /// Hands all of it over.
    #[must_use]
    pub fn take(&mut self) -> Charge {
        Charge { account: self.account.clone(), bytes: std::mem::take(&mut self.bytes) }
    }

    /// Gives back a part of it before its end.
    pub fn give_back(&mut self, bytes: u64) {
        let bytes = bytes.min(self.bytes);
        self.bytes -= bytes;
        drop(Charge { account: self.account.clone(), bytes });
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        if self.bytes > 0 {
            self.account.used.set(self.account.used.get() - self.bytes);
            self.account.freed.notify_waiters();
        }
    }
}

/// Counts a waiting sender, for the status line.
struct Waiting<'a>(&'a Account);

impl Waiting<'_> {
    fn begin(account: &Account) -> Waiting<'_> {
        account.waiting.set(account.waiting.get() + 1);
        Waiting(account)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.set(self.0.waiting.get() - 1);
    }
}
