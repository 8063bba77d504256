//! One image in a memfd.

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};

use tokio::sync::Notify;

use super::quota::Charge;
use crate::sys::memfd;

/// What the kernel gives memory in, in bytes. What an image is charged for is rounded up to it, and
/// an empty one is charged for one page: it is a descriptor and an inode.
const PAGE: u64 = 4096;

/// An image: a memfd, how much of it has come, and what it is charged for.
#[derive(Debug)]
pub struct Image {
    name: String,
    file: File,
    len: Cell<u64>,
    whole: Cell<bool>,
    ended: Notify,
    charge: RefCell<Charge>,
}

impl Image {
    pub(super) fn create(name: &str, charge: Charge) -> rustix::io::Result<Image> {
        Ok(Image {
            name: name.to_owned(),
            file: memfd::create(name)?.into(),
            len: Cell::new(0),
            whole: Cell::new(false),
            ended: Notify::new(),
            charge: RefCell::new(charge),
        })
    }

    /// A small image that did not come but is made here, and charged to nobody.
    pub(super) fn made_of(name: &str, bytes: &[u8], charge: Charge) -> rustix::io::Result<Image> {
        let image = Image::create(name, charge)?;
        let mut written = 0;
        while written < bytes.len() {
            written += rustix::io::write(&image.file, &bytes[written..])?;
        }
        image.len.set(bytes.len() as u64);
        image.end();
        Ok(image)
    }

    /// CRIU's name for it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Bytes that have come.
    pub fn len(&self) -> u64 {
        self.len.get()
    }

    /// Whether nothing has come.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether its end has come.
    pub fn is_whole(&self) -> bool {
        self.whole.get()
    }

    /// The file that holds it.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// How many bytes it is charged for.
    pub fn charged(&self) -> u64 {
        self.charge.borrow().bytes()
    }

    /// How many bytes must be charged before `more` bytes may be accepted.
    pub fn growth(&self, more: u64) -> u64 {
        let pages = |bytes: u64| bytes.div_ceil(PAGE) * PAGE;
        pages((self.len() + more).max(1)).saturating_sub(self.charged())
    }

    /// Takes a charge over: it is given back with the image.
    pub fn charge(&self, charge: Charge) {
        self.charge.borrow_mut().join(charge);
    }

    /// Bytes have been appended.
    pub fn grown_to(&self, len: u64) {
        self.len.set(len);
    }

    /// Its end has come.
    pub fn end(&self) {
        self.whole.set(true);
        self.ended.notify_waiters();
    }

    /// More is to come after its end.
    pub(super) fn reopen(&self) {
        self.whole.set(false);
    }

    /// Resolves when its end comes.
    pub async fn ended(&self) {
        self.ended.notified().await;
    }
}

impl AsFd for Image {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
