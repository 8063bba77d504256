//! One image: in a memfd of its own, in its snapshot's record with others, or made of pages that came apart from it.

use std::cell::{Cell, OnceCell, RefCell};
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::rc::Rc;

use tokio::sync::Notify;

use super::closing::close;
use super::pages::{Index, Layer, PageRange, Run};
use super::quota::Charge;
use super::record::Record;
use crate::sys::memfd;

/// What the kernel gives memory in, in bytes. What an image is charged for is rounded up to it, and
/// an empty one is charged for one page: it is a descriptor and an inode.
pub(super) const PAGE: u64 = 4096;

/// How much of an image is read at once, in bytes.
const READ: usize = 128 << 10;

/// An image: where its bytes are, how much of it has come, and what it is charged for.
#[derive(Debug)]
pub struct Image {
    name: String,
    bytes: Bytes,
    len: Cell<u64>,
    whole: Cell<bool>,
    ended: Notify,
    charge: RefCell<Charge>,
}

/// Where the bytes of an image are.
#[derive(Debug)]
enum Bytes {
    /// In one memfd, from its beginning on.
    Memfd {
        /// The memfd.
        file: Rc<File>,
        /// All its pages, once there are others who see some of them. The charge for them is in their
        /// layer then.
        pages: OnceCell<Run>,
    },
    /// In the record of its snapshot, which is charged for it.
    Record {
        /// The record.
        record: Rc<Record>,
        /// Where they begin there.
        offset: u64,
        /// A file of its own, once somebody has asked for one.
        apart: OnceCell<Rc<Image>>,
    },
    /// In the layers that the pages of a space came in. It holds them, and they are charged for.
    Pages {
        /// All of them, one after the other in the order of their addresses.
        index: Index,
        /// Where the first of them is.
        first: Rc<Layer>,
    },
}

/// Where the bytes of an image are.
#[derive(Debug)]
pub(super) enum Place<'a> {
    /// In a memfd, in which are no other's bytes than this image's.
    Memfd(&'a Rc<File>),
    /// In the snapshot's record, from an offset on.
    Record(u64),
    /// In the pages of an index.
    Pages(&'a Index),
}

/// Bytes of an image that follow each other in a file.
#[derive(Debug, Clone, Copy)]
pub struct Part<'a> {
    /// The file.
    pub file: &'a File,
    /// Where the first of them is in the file, in bytes.
    pub offset: u64,
    /// How many they are.
    pub len: u64,
}

impl Image {
    pub(super) fn create(name: &str, charge: Charge) -> rustix::io::Result<Image> {
        let file = Rc::new(memfd::create(name)?.into());
        Ok(Image::new(name, Bytes::Memfd { file, pages: OnceCell::new() }, charge))
    }

    /// A small image that did not come but is made here.
    pub(super) fn made_of(name: &str, bytes: &[u8], charge: Charge) -> rustix::io::Result<Image> {
        let image = Image::create(name, charge)?;
        let mut written = 0;
        while written < bytes.len() {
            written += rustix::io::write(&image, &bytes[written..])?;
        }
        image.len.set(bytes.len() as u64);
        image.end();
        Ok(image)
    }

    /// A pages image: all pages of an index, which are not copied. `charge` is for what an image without
    /// any pages is itself.
    pub(super) fn of_pages(name: &str, index: &Index, charge: Charge) -> rustix::io::Result<Image> {
        let Some(run) = index.runs().next() else { return Image::made_of(name, &[], charge) };
        let bytes = Bytes::Pages { index: index.clone(), first: run.layer().clone() };
        let image = Image::new(name, bytes, charge);
        image.len.set(index.pages() * PAGE);
        image.end();
        Ok(image)
    }

    /// An image in a file that was kept while there was no cache: the first `len` bytes of it. `pages` holds them,
    /// if they are pages, and the charge for them; `charge` is for the rest.
    pub(super) fn kept(
        name: &str,
        file: Rc<File>,
        len: u64,
        pages: Option<Run>,
        charge: Charge,
    ) -> Image {
        let pages = pages.map_or_else(OnceCell::new, OnceCell::from);
        let image = Image::new(name, Bytes::Memfd { file, pages }, charge);
        image.len.set(len);
        image.end();
        image
    }

    /// An image that is in a record: `len` bytes from `offset` on.
    pub(super) fn in_record(name: &str, record: &Rc<Record>, offset: u64, len: u64) -> Image {
        let charge = record.nothing();
        let bytes = Bytes::Record { record: record.clone(), offset, apart: OnceCell::new() };
        let image = Image::new(name, bytes, charge);
        image.len.set(len);
        image.end();
        image
    }

    fn new(name: &str, bytes: Bytes, charge: Charge) -> Image {
        Image {
            name: name.to_owned(),
            bytes,
            len: Cell::new(0),
            whole: Cell::new(false),
            ended: Notify::new(),
            charge: RefCell::new(charge),
        }
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

    /// The file that it begins in: all of it, and where more of it is written, as long as it is coming (see
    /// [`part`](Self::part)).
    pub fn file(&self) -> &File {
        match &self.bytes {
            Bytes::Memfd { file, .. } => file,
            Bytes::Record { record, .. } => record.file(),
            Bytes::Pages { first, .. } => first.file(),
        }
    }

    /// The file that is this image and nothing else, from its beginning on; `None` if there is no such file.
    pub fn as_file(&self) -> Option<&File> {
        let first = match &self.bytes {
            Bytes::Memfd { file, .. } => return Some(file),
            Bytes::Record { apart, .. } => return apart.get()?.as_file(),
            Bytes::Pages { first, .. } => first,
        };
        let part = self.part(0, self.len())?;
        let alone = part.offset == 0 && part.len == self.len() && first.len() == part.len;
        alone.then_some(part.file)
    }

    /// Where its bytes are, for whoever keeps them while there is no cache.
    pub(super) fn place(&self) -> Place<'_> {
        match &self.bytes {
            Bytes::Memfd { file, .. } => Place::Memfd(file),
            Bytes::Record { offset, .. } => Place::Record(*offset),
            Bytes::Pages { index, .. } => Place::Pages(index),
        }
    }

    /// Gives an image that is in a record a file of its own beside it, which stays as long as the image does, and takes over the
    /// charge for that.
    pub(super) fn set_apart(&self, charge: Charge) -> io::Result<()> {
        if let Bytes::Record { apart, .. } = &self.bytes {
            let image = Image::create(&self.name, charge)?;
            image.file().write_all_at(&self.bytes()?, 0)?;
            image.grown_to(self.len());
            image.end();
            let _ = apart.set(Rc::new(image));
        }
        Ok(())
    }

    /// Where its bytes are from `offset` on: as many as follow each other in one file, at most `max` and
    /// at least one. `None` at its end.
    pub fn part(&self, offset: u64, max: u64) -> Option<Part<'_>> {
        let max = max.min(self.len().checked_sub(offset)?);
        if max == 0 {
            return None;
        }
        let index = match &self.bytes {
            Bytes::Memfd { file, .. } => return Some(Part { file, offset, len: max }),
            Bytes::Record { record, offset: begin, .. } => {
                return Some(Part { file: record.file(), offset: begin + offset, len: max });
            }
            Bytes::Pages { index, .. } => index,
        };
        let (mut runs, skipped) = index.runs_at(offset / PAGE);
        let run = runs.next()?;
        let skipped = skipped * PAGE + offset % PAGE;
        let offset = run.offset() + skipped;
        let mut len = run.range().bytes() - skipped;
        for next in runs {
            let goes_on = Rc::ptr_eq(next.layer(), run.layer()) && next.offset() == offset + len;
            if len >= max || !goes_on {
                break;
            }
            len += next.range().bytes();
        }
        Some(Part { file: run.layer().file(), offset, len: len.min(max) })
    }

    /// The pages of a pages image that has ended, `count` from the one at `start` on: runs of them in order,
    /// whose addresses mean nothing. As long as somebody has them they stay, even when the image goes.
    /// They are fewer if it has not so many. Those of an image that is in a record are [set apart](Self::set_apart) for it.
    pub(super) fn pages(&self, start: u64, count: u64) -> Result<Vec<Run>, String> {
        Ok(match &self.bytes {
            Bytes::Record { record, apart, .. } => {
                if apart.get().is_none() {
                    let charge = record.charge_now(Image::needs(self.len()));
                    let charge = charge.map_err(|exhausted| exhausted.to_string())?;
                    self.set_apart(charge).map_err(|error| error.to_string())?;
                }
                return apart.get().map_or(Ok(Vec::new()), |image| image.pages(start, count));
            }
            Bytes::Memfd { file, pages } => {
                let all = self.len() / PAGE;
                if all > 0 && pages.get().is_none() {
                    let held = Layer::of_image(file, all, self.charge.borrow_mut().take());
                    if let Some(held) = held {
                        let _ = pages.set(held);
                    }
                }
                let range = PageRange::new(start * PAGE, count).ok();
                let part = pages.get().zip(range).and_then(|(all, range)| all.part(range));
                part.into_iter().collect()
            }
            Bytes::Pages { index, .. } => {
                let (runs, mut skipped) = index.runs_at(start);
                let mut left = count;
                let mut parts = Vec::new();
                for run in runs {
                    let from = run.range().address() + std::mem::take(&mut skipped) * PAGE;
                    let range = PageRange::new(from, left).ok();
                    let Some(part) = range.and_then(|range| run.part(range)) else { break };
                    left -= part.range().pages();
                    parts.push(part);
                }
                parts
            }
        })
    }

    /// Takes the charge of an image that is whole and small, and in a memfd of its own: whoever asks has its bytes elsewhere.
    pub(super) fn take_charge(&self) -> Charge {
        self.charge.borrow_mut().take()
    }

    /// How many bytes it is charged for.
    pub fn charged(&self) -> u64 {
        self.charge.borrow().bytes()
    }

    /// How many bytes must be charged before `more` bytes may be accepted.
    pub fn growth(&self, more: u64) -> u64 {
        Image::needs(self.len() + more).saturating_sub(self.charged())
    }

    /// What an image of so many bytes is charged for, in bytes.
    pub(super) fn needs(len: u64) -> u64 {
        len.max(1).div_ceil(PAGE) * PAGE
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

impl Drop for Image {
    fn drop(&mut self) {
        if let Bytes::Memfd { file, .. } = &self.bytes {
            let charge = self.charge.get_mut().take();
            // What is charged for elsewhere by now, as it was taken over, goes at once: it is small.
            if charge.bytes() > 0 || Rc::strong_count(file) > 1 {
                close(file, Some(charge));
            }
        }
    }
}

/// Reads an image's one file from its start, whoever else reads or writes it.
#[derive(Debug)]
pub(super) struct FromStart<'a> {
    file: &'a File,
    begin: u64,
    len: u64,
    at: u64,
}

impl Image {
    /// All bytes of a small image.
    pub(super) fn bytes(&self) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; usize::try_from(self.len()).map_err(io::Error::other)?];
        let mut room = &mut bytes[..];
        while let Some(part) = self.part(self.len() - room.len() as u64, room.len() as u64) {
            let len = usize::try_from(part.len).map_err(io::Error::other)?;
            let (now, later) = room.split_at_mut(len);
            part.file.read_exact_at(now, part.offset)?;
            room = later;
        }
        Ok(bytes)
    }

    /// Reads an image that is in one file, in large pieces.
    pub(super) fn reader(&self) -> BufReader<FromStart<'_>> {
        let begin = if let Bytes::Record { offset, .. } = &self.bytes { *offset } else { 0 };
        let from = FromStart { file: self.file(), begin, len: self.len(), at: 0 };
        BufReader::with_capacity(READ, from)
    }
}

impl Read for FromStart<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.len.saturating_sub(self.at)).unwrap_or(usize::MAX);
        let len = bytes.len().min(left);
        let read = self.file.read_at(&mut bytes[..len], self.begin + self.at)?;
        self.at += read as u64;
        Ok(read)
    }
}

impl Seek for FromStart<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let to = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
            SeekFrom::End(_) => None,
        };
        self.at = to.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.at)
    }
}

impl AsFd for Image {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file().as_fd()
    }
}
