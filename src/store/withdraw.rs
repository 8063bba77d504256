//! A source gives up its attempt to move a process: the process runs on there, so that what came of the attempt
//! must not be restored any more.

use std::net::IpAddr;

use super::snapshot::{Counts, Sender, Snapshot, State};
use super::{Refused, Store, one_more};

/// What becomes of an attempt that its source withdraws.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Withdrawn {
    /// Nothing of it can be restored any more, and whoever waits for it has been told.
    Withdrawn,
    /// A restore is reading it, or has taken it: the process may run here.
    Taken,
    /// Nothing of it is here.
    Unknown,
}

impl Store {
    /// Withdraws what `host` sent as this attempt, and ends the wait of those who await the id. What another
    /// attempt brought stays as it is.
    ///
    /// The snapshot is listed as damaged from then on, so that what still comes of this attempt, over a link that
    /// has not ended yet, is refused.
    pub fn withdraw(
        &self,
        id: &str,
        host: Option<IpAddr>,
        attempt: u64,
        reason: &str,
    ) -> Withdrawn {
        let sender = Sender { name: String::new(), host, attempt };
        let Some(key) = self.key_of(id) else {
            let _ = self.list(Snapshot::withdrawn(id, &sender, reason));
            return Withdrawn::Unknown;
        };
        let found = self.look(key, |known| {
            let is_own = attempt != 0 && known.is_of(&sender);
            match &known.state {
                State::Damaged { .. } if is_own => Some(Withdrawn::Withdrawn),
                // This attempt has brought nothing; an earlier one may have.
                State::Awaited | State::Damaged { .. } => Some(Withdrawn::Unknown),
                _ if !is_own => None,
                State::Taken(_) => Some(Withdrawn::Taken),
                State::Whole(_) if known.restores > 0 => Some(Withdrawn::Taken),
                State::Whole(_) | State::Paged | State::Receiving(_) => Some(Withdrawn::Withdrawn),
            }
        });
        let Some(outcome) = found.flatten() else { return Withdrawn::Unknown };
        if outcome != Withdrawn::Taken {
            self.update(key, |known| known.withdraw(&sender, reason));
            self.lists.borrow_mut().forget(id);
            one_more(&self.tally.damaged);
        }
        outcome
    }

    /// Whether what begins to come belongs to an attempt that its source has withdrawn by now. It may have been
    /// on its way, over a link of before.
    pub(super) fn must_not_be_withdrawn(&self, id: &str, sender: &Sender) -> Result<(), Refused> {
        match self.find(id, |known| known.withdrawn && known.is_of(sender)) {
            Some(true) if sender.attempt != 0 => Err(Refused::Withdrawn(id.to_owned())),
            _ => Ok(()),
        }
    }
}

impl Snapshot {
    /// A list entry for what was withdrawn before anything of it came.
    fn withdrawn(id: &str, sender: &Sender, reason: &str) -> Snapshot {
        let mut snapshot = Snapshot::new(id, sender, State::Awaited);
        snapshot.withdraw(sender, reason);
        snapshot
    }

    fn withdraw(&mut self, by: &Sender, reason: &str) {
        let counts = match &self.state {
            State::Damaged { counts, .. } => *counts,
            State::Awaited => Counts::default(),
            _ => self.counts(),
        };
        self.end(State::Damaged { reason: reason.to_owned(), counts });
        self.sender.host = by.host;
        self.sender.attempt = by.attempt;
        self.withdrawn = true;
    }

    fn is_of(&self, sender: &Sender) -> bool {
        (self.sender.host, self.sender.attempt) == (sender.host, sender.attempt)
    }
}
