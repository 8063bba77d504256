//! Descriptors that a parent left open for this process and named by their numbers, as CRIU's
//! `--status-fd` and `--ps-socket` do.

use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};

use listenfd::ListenFd;
use rustix::io::{FdFlags, fcntl_getfd, fcntl_setfd};

/// Why a descriptor cannot be taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NotInherited {
    /// A standard stream, or no number of a descriptor.
    #[error("0, 1 and 2 are the standard streams; pass another descriptor")]
    Standard,
    /// It is in use here already.
    #[error("it was not inherited, or it is named twice")]
    InUse,
    /// `EBADF`.
    #[error("it is not open")]
    NotOpen,
}

/// Takes the descriptor of that number from the parent.
///
/// To be called first thing in `main`, while there is one thread.
#[allow(unsafe_code)]
pub(crate) fn take(number: RawFd) -> Result<OwnedFd, NotInherited> {
    if number <= 2 {
        return Err(NotInherited::Standard);
    }
    // SAFETY: the number is not negative. While there is one thread nothing closes the descriptor
    // during these two calls; if it is not open, they say so (EBADF).
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    let flags = fcntl_getfd(borrowed).map_err(|_| NotInherited::NotOpen)?;
    if flags.contains(FdFlags::CLOEXEC) {
        return Err(NotInherited::InUse);
    }
    fcntl_setfd(borrowed, FdFlags::CLOEXEC).map_err(|_| NotInherited::NotOpen)?;
    // SAFETY: it is open, and nothing here owns it: what this process opens has FD_CLOEXEC from the
    // start (the standard library, rustix and tokio all see to it), and this one had not, so it was
    // inherited. It has the flag now, so that it is not taken a second time.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Takes the descriptor of that number from `listenfd`, which checks all but regular files itself.
///
/// To be called first thing in `main`, while there is one thread.
#[allow(unsafe_code)]
pub(crate) fn take_file(from: &mut ListenFd, index: usize) -> io::Result<OwnedFd> {
    let number = from.take_raw_fd(index)?.ok_or(io::ErrorKind::NotFound)?;
    // SAFETY: listenfd owns all descriptors from 3 on that systemd says are ours, and has given this one away: it gives
    // none a second time, and closes none.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    // What is not open says so (EBADF).
    fcntl_setfd(borrowed, FdFlags::CLOEXEC)?;
    // SAFETY: as above; it is open.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::{AsRawFd, IntoRawFd};

    #[test]
    fn only_what_was_inherited_is_taken_and_once() {
        let (ours, theirs) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        assert!(matches!(take(ours.as_raw_fd()), Err(NotInherited::InUse)));
        for standard in [-1, 0, 1, 2] {
            assert!(matches!(take(standard), Err(NotInherited::Standard)));
        }
        assert!(matches!(take(100_000), Err(NotInherited::NotOpen)));

        // As a parent leaves it: open, without FD_CLOEXEC, and owned by nothing here.
        fcntl_setfd(&theirs, FdFlags::empty()).unwrap();
        let number = theirs.into_raw_fd();
        let taken = take(number).unwrap();
        assert!(matches!(take(number), Err(NotInherited::InUse)));
        drop(taken);
    }
}
