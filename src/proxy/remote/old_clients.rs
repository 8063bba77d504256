//! CRIU's old `--remote` clients: their endings name no snapshot, and they are not told of what fails but when
//! they read. So it is known by their process what an ending is about, and what a read is to tell.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::Refusal;
use super::snapshot::Snapshot;
use crate::criu::historical::is_of_a_dump;
use crate::daemon::sessions::Peer;
use crate::proxy::failure::Failure;

/// Refusals that are remembered: more processes do not dump at once.
const REFUSALS_MAX: usize = 1024;

/// A process that appends or writes without an acknowledgement.
#[derive(Debug)]
pub(super) struct Process {
    pub(super) pid: i32,
    /// Its pidfd; `None` if it cannot be seen from here, or had ended.
    descriptor: Option<OwnedFd>,
}

impl Process {
    pub(super) fn of(peer: Peer) -> Process {
        let descriptor =
            Pid::from_raw(peer.pid).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
        Process { pid: peer.pid, descriptor }
    }

    /// Whether it is known to be there.
    pub(super) fn lives(&self) -> bool {
        let Some(descriptor) = &self.descriptor else { return false };
        let mut polled = [PollFd::new(descriptor, PollFlags::IN)];
        // It is readable when the process has ended.
        poll(&mut polled, Some(&Timespec::default())) == Ok(0)
    }
}

/// What processes were refused that do not wait for an answer, by process and list. Their next read tells it.
#[derive(Debug, Default)]
pub(super) struct Refusals(RefCell<BTreeMap<(i32, String), (Process, Refusal)>>);

impl Refusals {
    pub(super) fn remember(&self, peer: Peer, list: &str, refusal: &Refusal) {
        let mut refusals = self.0.borrow_mut();
        if refusals.len() >= REFUSALS_MAX {
            refusals.retain(|_, (process, _)| process.lives());
        }
        if refusals.len() < REFUSALS_MAX {
            let refused = (Process::of(peer), refusal.clone());
            refusals.insert((peer.pid, list.to_owned()), refused);
        }
    }

    /// The process begins anew.
    pub(super) fn forget(&self, peer: Peer, list: &str) {
        self.0.borrow_mut().remove(&(peer.pid, list.to_owned()));
    }

    /// What it has to be told, if that is the same process.
    pub(super) fn of(&self, peer: Peer, list: &str) -> Result<(), Refusal> {
        match self.0.borrow().get(&(peer.pid, list.to_owned())) {
            Some((process, refusal)) if process.descriptor.is_none() || process.lives() => {
                Err(refusal.clone())
            }
            _ => Ok(()),
        }
    }
}

/// What a client is told that dumps as the old ones did, where their endings are not understood.
pub(super) fn not_understood() -> Refusal {
    let reason = "it dumps as CRIU's old --remote clients do, and could not say the end of its dump: set \
                  remote.historical-endings = true for it in the configuration of proxy and cache, and \
                  remote.reads = \"pipe\" if it is of 2020";
    Refusal::new(Errno::INVAL, reason)
}

/// Whether `peer` may append an id to a list: not while another process dumps there, whose end would end both.
/// What died in its dump ends here, so that it is nobody's parent.
pub(super) fn make_way(snapshots: &[Rc<Snapshot>], peer: Peer, list: &str) -> Result<(), Refusal> {
    for other in snapshots.iter().filter(|other| other.is_in(list) && !other.is_of(peer)) {
        if other.is_being_written() {
            let reason = format!(
                "the dump of snapshot {} by {} is under way, and the endings of CRIU's old --remote \
                 clients name no snapshot: let one dump end before the next begins, or give each a pair \
                 of daemons of its own",
                other.id,
                other.process_name(),
            );
            return Err(Refusal::new(Errno::BUSY, reason));
        }
        if other.record.images().iter().any(|image| is_of_a_dump(&image.name)) {
            let why = "its process is gone, and has not said the end of its dump";
            other.fail(&Failure::Incomplete(why.to_owned()));
        }
    }
    Ok(())
}

/// The snapshots whose dump has ended by the word of a process: its own, and before them those in the same lists
/// whose processes are gone. Pre-dumps have no ending.
pub(super) fn ended_by(snapshots: &[Rc<Snapshot>], peer: Peer) -> Vec<Rc<Snapshot>> {
    let Some(last) = snapshots.iter().rposition(|snapshot| snapshot.is_of(peer)) else {
        return Vec::new();
    };
    let snapshots = &snapshots[..=last];
    let own: Vec<_> = snapshots.iter().filter(|snapshot| snapshot.is_of(peer)).collect();
    let before = |snapshot: &Rc<Snapshot>| {
        !snapshot.is_being_written() && own.iter().any(|own| own.shares_list_with(snapshot))
    };
    let ended = |snapshot: &&Rc<Snapshot>| snapshot.is_of(peer) || before(snapshot);
    snapshots.iter().filter(ended).cloned().collect()
}
