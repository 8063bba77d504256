//! Copies an image out of the pipe or the socket that its writer writes to, as fast as it is written, whatever the link
//! does.

use std::cell::Cell;
use std::io;
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::time::timeout;

use crate::sys::held::{Copied, Held};
use crate::sys::pipe::DEFAULT_CAPACITY;

/// One image that is copied.
pub(super) struct Copy {
    pub(super) held: Rc<Held>,
    /// When its writer, or that of another image of the dump, last wrote.
    pub(super) written: Rc<Cell<Instant>>,
    pub(super) stall_timeout: Duration,
    pub(super) pipe_size: usize,
}

impl Copy {
    /// Copies to the image's end, and calls `copied` each time that something was. Who sends the image is told of a
    /// failure.
    pub(super) async fn run(self, budget: &crate::sys::held::Budget, copied: impl Fn()) {
        let mut grown = false;
        let from = self.held.from();
        loop {
            match timeout(self.stall_timeout, from.readable()).await {
                Err(_) if self.held.has_ended() => return,
                Err(_) if self.written.get().elapsed() < self.stall_timeout => continue,
                Err(_) => {
                    let why = format!("nothing was written for {:?}", self.stall_timeout);
                    return self.held.fail(io::Error::other(why));
                }
                Ok(Err(error)) => return self.held.fail(error),
                Ok(Ok(())) => {}
            }
            match self.held.copy() {
                Ok(Copied::NotYet) => {}
                Ok(Copied::End) => return,
                // Its writer waits, which is not its fault.
                Ok(Copied::NoRoom) => {
                    budget.wait_for_room().await;
                    self.written.set(Instant::now());
                }
                Ok(Copied::Bytes(bytes)) => {
                    self.written.set(Instant::now());
                    copied();
                    // Only the pipes that were full are worth the memory that the kernel grants.
                    if !grown && bytes >= DEFAULT_CAPACITY {
                        from.grow(self.pipe_size);
                        grown = true;
                    }
                    // Much may be there at once, and others wait.
                    tokio::task::yield_now().await;
                }
                Err(error) => return self.held.fail(error),
            }
        }
    }
}
