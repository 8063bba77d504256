//! Whether what a dump copies is still the memory as CRIU froze it.
//!
//! CRIU splices its process's pages into the images' pipes, and ends or thaws the process soon after it has written
//! `inventory.img`, the last image. What is copied before CRIU asks for that one, or before it has closed it, was copied from a
//! frozen process.

use std::cell::{Cell, RefCell};
use std::os::fd::OwnedFd;
use std::rc::Rc;

use rustix::io::ioctl_fionread;

use super::failure::Failure;
use super::requests::Asked;
use crate::sys::held::{Budget, Held};

/// What a dump copies, and what is known of the moment.
#[derive(Debug)]
pub(super) struct Freeze {
    /// CRIU's socket.
    socket: Option<OwnedFd>,
    asked: Rc<Asked>,
    budget: Rc<Budget>,
    /// The images that are being copied.
    coming: RefCell<Vec<(String, Rc<Held>)>>,
    /// Something was copied, and it is not known that the process was frozen then.
    unproven: Cell<bool>,
    late: Cell<bool>,
}

impl Freeze {
    /// Nothing is copied yet of a dump. `socket` is CRIU's, as far as it can be looked at.
    pub(super) fn new(socket: Option<OwnedFd>, asked: Rc<Asked>, budget: Rc<Budget>) -> Freeze {
        Freeze {
            socket,
            asked,
            budget,
            coming: RefCell::default(),
            unproven: Cell::new(false),
            late: Cell::new(false),
        }
    }

    /// What is copied is charged to this.
    pub(super) fn budget(&self) -> &Rc<Budget> {
        &self.budget
    }

    /// An image is copied from now on.
    pub(super) fn copies(&self, name: &str, held: &Rc<Held>) {
        let mut coming = self.coming.borrow_mut();
        coming.retain(|(_, held)| !held.has_ended());
        coming.push((name.to_owned(), held.clone()));
    }

    /// Something was copied.
    pub(super) fn copied(&self) {
        self.unproven.set(true);
        self.prove();
    }

    /// What was copied so far was copied in time if CRIU has yet to ask for the last image.
    fn prove(&self) {
        if self.unproven.get() && self.inventory_is_to_come() {
            self.unproven.set(false);
        }
    }

    /// CRIU opens an image. At the limit it may have closed others: the rest of those, at most what a pipe holds, is
    /// copied all the same, so that it is not done too late.
    pub(super) fn opened(&self) -> Result<(), Failure> {
        if self.budget.room() == 0 {
            self.copy_rest(|held| held.from().is_closed())?;
        }
        self.prove();
        Ok(())
    }

    /// CRIU opens the last image; `closed` tells whether it has closed it since. All that was written before is copied now.
    pub(super) fn last_opened(&self, closed: impl Fn() -> bool) -> Result<(), Failure> {
        self.copy_rest(|_| true)?;
        self.late.set(self.unproven.get() && closed());
        Ok(())
    }

    /// Whether something was copied too late.
    pub(super) fn is_late(&self) -> bool {
        self.late.get()
    }

    fn copy_rest(&self, wanted: impl Fn(&Held) -> bool) -> Result<(), Failure> {
        for (name, held) in self.coming.borrow().iter().filter(|(_, held)| wanted(held)) {
            let copied = held
                .copy_rest()
                .map_err(|error| Failure::Image { name: name.clone(), cause: error.to_string() })?;
            if copied > 0 {
                self.copied();
            }
        }
        Ok(())
    }

    /// Whether CRIU has yet to ask for the last image: it has not, and nothing that it said is unread.
    fn inventory_is_to_come(&self) -> bool {
        let unread = |socket: &OwnedFd| ioctl_fionread(socket).unwrap_or(u64::MAX);
        !self.asked.for_inventory()
            && self.socket.as_ref().is_some_and(|socket| unread(socket) == 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::ends::Source;
    use crate::sys::held::Copied;
    use crate::sys::pipe::PipeReader;
    use std::io::Write;
    use std::os::unix::net::UnixStream;
    use tokio::task::LocalSet;

    const PAGES: [u8; 8192] = [7; 8192];

    /// CRIU's end of the socket, what knows of its freeze, an image that it writes, and the pipe of that.
    struct Criu {
        socket: UnixStream,
        freeze: Freeze,
        held: Rc<Held>,
        pipe: Option<OwnedFd>,
    }

    /// An image in a pipe, and CRIU's end of it.
    fn image(budget: &Rc<Budget>) -> (Rc<Held>, OwnedFd) {
        let (out, into) = rustix::pipe::pipe().unwrap();
        let from = Source::Pipe(PipeReader::adopt(out).unwrap());
        (Rc::new(Held::new("pages-1.img", from, budget).unwrap()), into)
    }

    impl Criu {
        fn new(limit: u64) -> Criu {
            let (socket, ours) = UnixStream::pair().unwrap();
            let budget = Rc::new(Budget::new(limit));
            let freeze = Freeze::new(Some(ours.into()), Rc::default(), budget.clone());
            let (held, pipe) = image(&budget);
            freeze.copies("pages-1.img", &held);
            Criu { socket, freeze, held, pipe: Some(pipe) }
        }

        fn writes(&self, bytes: &[u8]) {
            rustix::io::write(self.pipe.as_ref().unwrap(), bytes).unwrap();
        }

        fn asks(&mut self) {
            self.socket.write_all(b"a request").unwrap();
        }

        async fn is_copied(&self) -> Copied {
            self.held.from().readable().await.unwrap();
            let copied = self.held.copy().unwrap();
            self.freeze.copied();
            copied
        }
    }

    async fn locally<T>(test: impl Future<Output = T>) -> T {
        LocalSet::new().run_until(test).await
    }

    #[tokio::test]
    async fn what_is_copied_before_criu_asks_for_the_inventory_is_in_time() {
        locally(async {
            let mut criu = Criu::new(1 << 20);
            criu.writes(&PAGES);
            assert_eq!(criu.is_copied().await, Copied::Bytes(8192));
            criu.asks();
            criu.freeze.last_opened(|| true).unwrap();
            assert!(!criu.freeze.is_late());
        })
        .await;
    }

    #[tokio::test]
    async fn what_is_copied_after_that_is_in_time_while_criu_has_the_inventory_open() {
        locally(async {
            for closed in [false, true] {
                let mut criu = Criu::new(1 << 20);
                criu.writes(&PAGES);
                criu.asks();
                criu.freeze.last_opened(|| closed).unwrap();
                assert_eq!(criu.freeze.is_late(), closed);
                assert_eq!(criu.freeze.budget().used(), 8192, "all of it is copied by then");
            }
        })
        .await;
    }

    #[tokio::test]
    async fn a_later_request_shows_that_a_copy_was_in_time() {
        locally(async {
            let mut criu = Criu::new(1 << 20);
            criu.writes(&PAGES);
            criu.asks();
            criu.is_copied().await;
            // It could have been the last.
            let mut request = [0; 9];
            rustix::io::read(criu.freeze.socket.as_ref().unwrap(), &mut request).unwrap();
            criu.freeze.opened().unwrap();
            criu.freeze.last_opened(|| true).unwrap();
            assert!(!criu.freeze.is_late());
        })
        .await;
    }

    #[tokio::test]
    async fn at_the_limit_criu_waits_but_for_what_it_has_closed() {
        locally(async {
            let mut criu = Criu::new(4096);
            criu.writes(&PAGES);
            assert_eq!(criu.is_copied().await, Copied::Bytes(4096));
            assert_eq!(criu.is_copied().await, Copied::NoRoom);
            criu.freeze.opened().unwrap();
            assert_eq!(criu.freeze.budget().used(), 4096, "CRIU may write on");
            criu.pipe = None;
            criu.freeze.opened().unwrap();
            assert_eq!(criu.freeze.budget().used(), 8192);
            assert!(criu.held.has_ended());
            criu.freeze.last_opened(|| true).unwrap();
            assert!(!criu.freeze.is_late());
            let Criu { freeze, held, .. } = criu;
            let budget = freeze.budget().clone();
            drop((freeze, held));
            assert_eq!(budget.used(), 0);
        })
        .await;
    }
}
