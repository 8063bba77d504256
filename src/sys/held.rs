//! Bytes of an image in memory of our own, from when a peer has written them until they are sent.
//!
//! What a peer puts into a pipe by vmsplice(2) or splice(2) is lent: it stays the peer's memory, which may change as
//! long as it is only passed on. To splice it into a memfd copies it, and it is nobody else's from then on.

use std::cell::{Cell, OnceCell, RefCell};
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use tokio::sync::Notify;

use super::ends::Source;
use super::memfd;
use super::pipe::{DEFAULT_CAPACITY, Pipe, transfer_from_file, transfer_to_file};

/// The unit in which a memfd takes memory and gives it back, in bytes.
const PAGE: u64 = 4096;

/// At most so much is copied before others have their turn, in bytes.
const STEP: usize = 1 << 20;

/// How much memory all images together may take.
#[derive(Debug, Default)]
pub struct Budget {
    limit: Cell<u64>,
    used: Cell<u64>,
    freed: Notify,
}

impl Budget {
    /// Nothing is used of so many bytes.
    pub fn new(limit: u64) -> Budget {
        Budget { limit: Cell::new(limit), ..Budget::default() }
    }

    /// Puts another limit in force. What is held stays, even beyond it.
    pub fn set_limit(&self, limit: u64) {
        self.limit.set(limit);
        self.freed.notify_waiters();
    }

    /// How many bytes are used.
    pub fn used(&self) -> u64 {
        self.used.get()
    }

    /// How many bytes are left.
    pub fn room(&self) -> u64 {
        self.limit.get().saturating_sub(self.used.get())
    }

    /// Waits until there is room for a page.
    pub async fn wait_for_room(&self) {
        loop {
            // Before it is looked at: what is given back in between is not missed.
            let freed = self.freed.notified();
            if self.room() >= PAGE {
                return;
            }
            freed.await;
        }
    }

    fn change(&self, before: u64, after: u64) {
        self.used.set(self.used.get() - before + after);
        if after < before {
            self.freed.notify_waiters();
        }
    }
}

/// What came of an attempt to copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Copied {
    /// So many bytes.
    Bytes(usize),
    /// Nothing has been written yet.
    NotYet,
    /// There is no room.
    NoRoom,
    /// The image has ended.
    End,
}

/// An image whose bytes are copied. They are sent from here, as a [`Source`].
#[derive(Debug)]
pub struct Held {
    from: Source,
    memfd: OwnedFd,
    budget: Rc<Budget>,
    /// What comes over a socket passes a pipe on its way into a file.
    staging: OnceCell<Pipe>,
    written: Cell<u64>,
    sent: Cell<u64>,
    ended: Cell<bool>,
    /// Why nothing more can be copied.
    failed: RefCell<Option<io::Error>>,
    changed: Notify,
}

impl Held {
    /// Nothing is copied yet of the image of that name.
    ///
    /// # Errors
    ///
    /// No memfd can be made.
    pub fn new(name: &str, from: Source, budget: &Rc<Budget>) -> io::Result<Held> {
        Ok(Held {
            from,
            memfd: memfd::create(name)?,
            budget: budget.clone(),
            staging: OnceCell::new(),
            written: Cell::new(0),
            sent: Cell::new(0),
            ended: Cell::new(false),
            failed: RefCell::new(None),
            changed: Notify::new(),
        })
    }

    /// Where its bytes come from.
    pub fn from(&self) -> &Source {
        &self.from
    }

    /// Whether all of it was copied, or nothing more can be.
    pub fn has_ended(&self) -> bool {
        self.ended.get()
    }

    /// Copies what is there, at most 1 MiB, as far as there is room.
    ///
    /// # Errors
    ///
    /// The source's, or for want of memory. Nothing more can be copied then.
    pub fn copy(&self) -> io::Result<Copied> {
        let room = usize::try_from(self.budget.room() / PAGE * PAGE).unwrap_or(usize::MAX);
        self.copy_at_most(room.min(STEP), false)
    }

    /// Copies all that is there, even beyond the limit: not more than the pipe holds, if nobody writes to it meanwhile.
    /// Returns how many bytes.
    ///
    /// # Errors
    ///
    /// As of [`copy`](Held::copy).
    pub fn copy_rest(&self) -> io::Result<u64> {
        let mut sum = 0;
        while let Copied::Bytes(bytes) = self.copy_at_most(STEP, true)? {
            sum += bytes as u64;
        }
        Ok(sum)
    }

    fn copy_at_most(&self, max: usize, now: bool) -> io::Result<Copied> {
        if self.ended.get() {
            return Ok(Copied::End);
        }
        if max == 0 {
            return Ok(Copied::NoRoom);
        }
        let before = self.charged();
        let mut offset = self.written.get();
        let copied = self.take(&mut offset, max, now);
        self.written.set(offset);
        self.budget.change(before, self.charged());
        let copied = match copied {
            Ok(0) => Ok(Copied::End),
            Ok(bytes) => Ok(Copied::Bytes(bytes)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Copied::NotYet),
            Err(error) => Err(error),
        };
        match &copied {
            Ok(Copied::End) => self.ended.set(true),
            Err(error) => self.fail(io::Error::new(error.kind(), error.to_string())),
            Ok(_) => {}
        }
        self.changed.notify_one();
        copied
    }

    fn take(&self, offset: &mut u64, max: usize, now: bool) -> io::Result<usize> {
        match &self.from {
            Source::Pipe(pipe) if now => {
                return pipe.transfer_now_to_file(&self.memfd, offset, max);
            }
            Source::Pipe(pipe) => return pipe.transfer_to_file(&self.memfd, offset, max),
            _ => {}
        }
        if self.staging.get().is_none() {
            let _ = self.staging.set(Pipe::new(DEFAULT_CAPACITY)?);
        }
        let Some(staging) = self.staging.get() else { return Err(io::ErrorKind::Other.into()) };
        let len = self.from.transfer_to(staging, max.min(staging.capacity()))?;
        let mut left = len;
        while left > 0 {
            left -= transfer_to_file(&staging.out, &self.memfd, offset, left)?;
        }
        Ok(len)
    }

    /// Nothing more will be copied, and why.
    pub fn fail(&self, why: io::Error) {
        *self.failed.borrow_mut() = Some(why);
        self.ended.set(true);
        self.changed.notify_one();
    }

    /// Waits until there is something to send, or the end.
    pub(super) async fn readable(&self) {
        while self.sent.get() == self.written.get() && !self.ended.get() {
            self.changed.notified().await;
        }
    }

    /// Moves what was copied, at most `len` bytes, into an empty pipe; 0 is the end.
    pub(super) fn transfer_to(&self, pipe: &Pipe, len: usize) -> io::Result<usize> {
        let there = self.written.get() - self.sent.get();
        let len = usize::try_from(there).unwrap_or(usize::MAX).min(len);
        if len == 0 {
            return match self.failed.borrow_mut().take() {
                Some(error) => Err(error),
                None if self.ended.get() => Ok(0),
                None => Err(io::ErrorKind::WouldBlock.into()),
            };
        }
        let before = self.charged();
        let (mut offset, gone) = (self.sent.get(), self.sent.get() / PAGE * PAGE);
        let moved = transfer_from_file(&self.memfd, &mut offset, &pipe.into, len)?;
        self.sent.set(offset);
        // They stay in the pipe and the socket until they are read, and are never written again.
        let sent = offset / PAGE * PAGE;
        if sent > gone {
            memfd::punch(&self.memfd, gone, sent - gone)?;
        }
        self.budget.change(before, self.charged());
        Ok(moved)
    }

    /// What it is charged for, in bytes.
    fn charged(&self) -> u64 {
        self.written.get().next_multiple_of(PAGE) - self.sent.get() / PAGE * PAGE
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.budget.change(self.charged(), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::pipe::PipeReader;
    use std::os::fd::AsFd;

    fn held(limit: u64) -> (Held, OwnedFd, Rc<Budget>) {
        let (out, into) = rustix::pipe::pipe().unwrap();
        let budget = Rc::new(Budget::new(limit));
        let from = Source::Pipe(PipeReader::adopt(out).unwrap());
        (Held::new("pages-1.img", from, &budget).unwrap(), into, budget)
    }

    fn read(pipe: &Pipe, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let mut done = 0;
        while done < len {
            done += rustix::io::read(&pipe.out, &mut bytes[done..]).unwrap();
        }
        bytes
    }

    #[tokio::test]
    async fn what_was_lent_does_not_change_any_more() {
        let (held, into, _) = held(1 << 20);
        let theirs = memfd::create("a process").unwrap();
        rustix::io::pwrite(&theirs, &[1; 4096], 0).unwrap();
        transfer_from_file(&theirs, &mut 0, into.as_fd(), 4096).unwrap();
        held.from().readable().await.unwrap();
        assert_eq!(held.copy().unwrap(), Copied::Bytes(4096));
        rustix::io::pwrite(&theirs, &[2; 4096], 0).unwrap();
        let lane = Pipe::new(DEFAULT_CAPACITY).unwrap();
        held.readable().await;
        assert_eq!(held.transfer_to(&lane, 1 << 20).unwrap(), 4096);
        assert_eq!(read(&lane, 4096), [1; 4096]);
    }

    #[tokio::test]
    async fn what_goes_on_its_way_is_not_touched_again_and_makes_room() {
        let (held, into, budget) = held(8192);
        let lane = Pipe::new(DEFAULT_CAPACITY).unwrap();
        let mut come = Vec::new();
        for number in 0..5u8 {
            rustix::io::write(&into, &[number; 3000]).unwrap();
            held.from().readable().await.unwrap();
            assert_eq!(held.copy().unwrap(), Copied::Bytes(3000), "{number}");
            assert_eq!(held.transfer_to(&lane, 1 << 20).unwrap(), 3000);
            come.push(number);
        }
        drop(into);
        held.from().readable().await.unwrap();
        assert_eq!(held.copy().unwrap(), Copied::End);
        assert_eq!(held.transfer_to(&lane, 1 << 20).unwrap(), 0);
        for number in come {
            assert_eq!(read(&lane, 3000), [number; 3000]);
        }
        assert!(budget.used() <= 8192, "{}", budget.used());
        drop(held);
        assert_eq!(budget.used(), 0);
    }

    #[tokio::test]
    async fn at_the_limit_nothing_is_copied_until_there_is_room() {
        let (held, into, budget) = held(4096);
        rustix::io::write(&into, &[1; 8192]).unwrap();
        held.from().readable().await.unwrap();
        assert_eq!(held.copy().unwrap(), Copied::Bytes(4096));
        assert_eq!(held.copy().unwrap(), Copied::NoRoom);
        let lane = Pipe::new(DEFAULT_CAPACITY).unwrap();
        let (sent, ()) = tokio::join!(
            async { held.transfer_to(&lane, 1 << 20).unwrap() },
            budget.wait_for_room()
        );
        assert_eq!(sent, 4096);
        assert_eq!(held.copy().unwrap(), Copied::Bytes(4096));
    }
}
