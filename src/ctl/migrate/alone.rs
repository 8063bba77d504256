//! One migration of a process at a time.
//!
//! A round has the kernel forget which pages were written to before it (`/proc/PID/clear_refs`). So a second migration of
//! the same process would hide from the first one what was written to between two of its rounds: that would go
//! nowhere, and the restored process would find its memory as it was before.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;

use rustix::fs::{FlockOperation, flock};
use rustix::io::{Errno, FdFlags, fcntl_setfd};

use super::memory::parent;
use crate::ctl::exit::Failure;

/// A process and all its children are moved by nobody else as long as this is there. The lock is on the file by which the kernel
/// is told to forget, which only those can open who could disturb the process anyway. Every criu that is run inherits it: one that
/// outlives this program has it until its own end.
#[derive(Debug)]
pub(super) struct Alone {
    _locks: Vec<File>,
}

impl Alone {
    /// Claims a process and its children, unless somebody moves one of them, or a process that they are children of.
    pub(super) fn claim(tree: u32) -> Result<Alone, Failure> {
        let own = lock(tree, FlockOperation::NonBlockingLockExclusive).map_err(|error| {
            if error.kind() != io::ErrorKind::WouldBlock {
                return Failure::failed(format!("process {tree} cannot be looked at: {error}"));
            }
            let what = format!(
                "process {tree}, or a child of it, is being moved by another criu-imagectl migrate"
            );
            Failure::failed(what).cure(CURE)
        })?;
        let mut locks = vec![own];
        let mut below = tree;
        while let Some(parent) = parent(below) {
            match lock(parent, FlockOperation::NonBlockingLockShared) {
                Ok(shared) => locks.push(shared),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let what = format!(
                        "process {parent}, of which {tree} is a child, is being moved by another criu-imagectl migrate"
                    );
                    return Err(Failure::failed(what).cure(CURE));
                }
                // It has ended, or is somebody else's, who alone could move it.
                Err(_) => {}
            }
            below = parent;
        }
        Ok(Alone { _locks: locks })
    }
}

/// What to do about another migration.
const CURE: &str = "wait for its end, or interrupt it: it, or a criu that it has left behind, is in ps -e | grep criu";

fn lock(pid: u32, how: FlockOperation) -> io::Result<File> {
    // Nothing is written to it.
    let file = OpenOptions::new().write(true).open(format!("/proc/{pid}/clear_refs"))?;
    match flock(&file, how) {
        Err(Errno::INTR) => return lock(pid, how),
        locked => locked?,
    }
    fcntl_setfd(file.as_fd(), FdFlags::empty())?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command, id};

    struct Sleeper(Child);

    impl Sleeper {
        fn start() -> Sleeper {
            Sleeper(Command::new("sleep").arg("60").spawn().unwrap())
        }
    }

    impl Drop for Sleeper {
        fn drop(&mut self) {
            let _ = (self.0.kill(), self.0.wait());
        }
    }

    /// Children that other tests start meanwhile inherit a lock, and have it until they end.
    fn claimed_at_last(pid: u32) -> Alone {
        let until = std::time::Instant::now() + std::time::Duration::from_secs(30);
        loop {
            match Alone::claim(pid) {
                Ok(alone) => return alone,
                Err(failure) => assert!(std::time::Instant::now() < until, "{failure}"),
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }

    fn refused(pid: u32, named: u32) {
        let failure = Alone::claim(pid).unwrap_err().to_string();
        assert!(failure.contains(&format!("process {named},")), "{failure}");
        assert!(failure.contains("another criu-imagectl migrate"), "{failure}");
    }

    #[test]
    fn a_process_is_moved_by_one_migration_and_so_are_those_above_and_below_it() {
        assert_eq!(parent(id()), Some(std::os::unix::process::parent_id()));
        // Before there is a lock: what is started later inherits it.
        let sleepers = [Sleeper::start(), Sleeper::start()];
        let [one, other] = [0, 1].map(|which: usize| sleepers[which].0.id());
        let claimed = Alone::claim(one).unwrap();
        refused(one, one);
        refused(id(), id());
        drop(Alone::claim(other).unwrap());
        drop(claimed);
        let above = claimed_at_last(id());
        refused(one, id());
        drop(above);
        drop(claimed_at_last(one));
        assert!(Alone::claim(u32::MAX).is_err());
    }
}
