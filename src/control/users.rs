//! What each user may have of the control socket: so many connections that call nothing, and so many calls under way. What
//! one uses up nobody else misses.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use crate::daemon::idlers::{Idler, Idlers};
use crate::daemon::sessions::{Session, Sessions, is_privileged};

/// So many connections of one user may call nothing. For one more, the one that has done so for longest is disconnected.
const IDLE_MAX: usize = 128;
/// So many calls of one user may be under way. A further one is refused, unless it is root's or those of the daemon's own user.
const CALLS_MAX: usize = 128;

/// The users that have connected so far. Only those who may connect get here, and those are few.
#[derive(Debug, Default)]
pub(super) struct Users(RefCell<BTreeMap<u32, Rc<User>>>);

/// One user.
#[derive(Debug)]
pub(super) struct User {
    uid: u32,
    idlers: Idlers,
    calls: Sessions,
}

impl Users {
    /// The user of that id.
    pub(super) fn of(&self, uid: u32) -> Rc<User> {
        let user = || Rc::new(User { uid, idlers: Idlers::default(), calls: Sessions::default() });
        self.0.borrow_mut().entry(uid).or_insert_with(user).clone()
    }
}

impl User {
    /// One of its connections calls nothing, until that is dropped.
    pub(super) fn idle(&self) -> Idler {
        if self.idlers.live() >= IDLE_MAX {
            self.idlers.turn_out_oldest();
        }
        self.idlers.enter()
    }

    /// A call of its is under way, until that is dropped. The error is why it may have no more.
    pub(super) fn begin_call(&self) -> Result<Session, String> {
        if self.calls.live() >= CALLS_MAX && !is_privileged(self.uid) {
            return Err(format!("uid {} has {CALLS_MAX} calls under way already", self.uid));
        }
        Ok(self.calls.enter())
    }
}
