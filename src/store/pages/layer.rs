//! The pages that one snapshot brought for one page space, and who sees them.

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::rc::Rc;

use super::release::release_hold;
use super::seen::Seen;
use super::{PAGE, PageRange};
use crate::store::closing::close;
use crate::store::quota::{Charge, Quota};
use crate::sys::memfd;

/// A file has at most this many pages: its length is signed (lseek(2)).
const PAGES_MAX: u64 = i64::MAX as u64 / PAGE;

/// A memfd that is only ever appended to. Nothing in it is overwritten: its pages may sit in pipes, on
/// their way to a restore.
///
/// What no [`Run`] sees any more is given back to the kernel at once, and with it its charge. A page that
/// sits in a pipe survives that, it is the pipe's then. The layer is closed with the last of its runs.
#[derive(Debug)]
pub struct Layer {
    file: Rc<File>,
    /// How many pages have been given a place.
    end: Cell<u64>,
    seen: RefCell<Seen>,
    /// For all that is seen; none before the first page.
    charge: RefCell<Option<Charge>>,
}

impl Layer {
    pub(super) fn create(name: &str) -> rustix::io::Result<Layer> {
        Ok(Layer {
            file: Rc::new(memfd::create(name)?.into()),
            end: Cell::new(0),
            seen: RefCell::default(),
            charge: RefCell::default(),
        })
    }

    /// A layer of pages that came as an image: `pages` of them, the whole file. Whoever has the image holds the
    /// run of them all; its addresses mean nothing. `None` if there are no pages, or more than a file has.
    ///
    /// The layer takes over the image's charge.
    pub(in crate::store) fn of_image(file: &Rc<File>, pages: u64, charge: Charge) -> Option<Run> {
        let all = PageRange::between(0, pages).filter(|_| pages <= PAGES_MAX)?;
        let layer = Rc::new(Layer {
            file: file.clone(),
            end: Cell::new(pages),
            seen: RefCell::default(),
            charge: RefCell::new(Some(charge)),
        });
        Some(Run::new(&layer, all, 0, 0))
    }

    /// A layer in a file that was kept while there was no cache. What of it is [held](Self::hold) is charged for.
    pub(in crate::store) fn kept(file: &Rc<File>) -> std::io::Result<Rc<Layer>> {
        Ok(Rc::new(Layer {
            file: file.clone(),
            end: Cell::new(file.metadata()?.len() / PAGE),
            seen: RefCell::default(),
            charge: RefCell::default(),
        }))
    }

    /// Pages of a layer that was [kept](Self::kept), from the one at `offset` on, as those of a range; they are
    /// charged for as far as nobody else holds them. `None` if the layer has not so many.
    pub(in crate::store) fn hold(
        self: &Rc<Layer>,
        range: PageRange,
        offset: u64,
        quota: &Quota,
    ) -> Option<Run> {
        let end = offset.checked_add(range.pages()).filter(|end| *end <= self.end.get())?;
        let unseen =
            self.seen.borrow().unseen(offset..end).map(|part| part.end - part.start).sum::<u64>();
        let more = quota.charge_held(unseen * PAGE);
        self.join_charge(more);
        Some(Run::new(self, range, offset, 0))
    }

    fn join_charge(&self, more: Charge) {
        match &mut *self.charge.borrow_mut() {
            Some(charge) => charge.join(more),
            none => *none = Some(more),
        }
    }

    /// The file, to be kept while there is no cache.
    pub(in crate::store) fn shared_file(&self) -> &Rc<File> {
        &self.file
    }

    /// The file that holds the pages.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// How long the file is, in bytes: with all that has been given a place.
    pub fn len(&self) -> u64 {
        self.end.get() * PAGE
    }

    /// Whether nothing has been given a place.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many bytes it is charged for: what its runs see.
    pub fn charged(&self) -> u64 {
        self.charge.borrow().as_ref().map_or(0, Charge::bytes)
    }

    /// Gives pages the next place, and takes over the charge for them; `None` if the file would be too long.
    pub(super) fn append(
        self: &Rc<Layer>,
        range: PageRange,
        flags: u32,
        more: Charge,
    ) -> Option<Run> {
        let offset = self.end.get();
        let end = offset.checked_add(range.pages()).filter(|end| *end <= PAGES_MAX)?;
        self.end.set(end);
        self.join_charge(more);
        Some(Run::new(self, range, offset, flags))
    }

    /// A run no longer sees its pages. What the kernel would not take back stays charged until the layer is
    /// closed.
    pub(super) fn release(&self, offset: u64, pages: u64) {
        let mut charge = self.charge.borrow_mut();
        for unseen in self.seen.borrow_mut().remove(offset..offset + pages) {
            let bytes = (unseen.end - unseen.start) * PAGE;
            let punched = memfd::punch(&self.file, unseen.start * PAGE, bytes);
            if let (Ok(()), Some(charge)) = (punched, &mut *charge) {
                charge.give_back(bytes);
            }
        }
    }
}

impl Drop for Layer {
    fn drop(&mut self) {
        close(&self.file, self.charge.get_mut().take());
    }
}

impl AsFd for Layer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Pages that follow each other in a page space and in a layer. They stay as long as it does.
#[derive(Debug)]
pub struct Run {
    range: PageRange,
    /// Where they are in the layer, in pages.
    offset: u64,
    flags: u32,
    layer: Rc<Layer>,
}

impl Run {
    fn new(layer: &Rc<Layer>, range: PageRange, offset: u64, flags: u32) -> Run {
        layer.seen.borrow_mut().add(offset..offset + range.pages());
        Run { range, offset, flags, layer: layer.clone() }
    }

    /// Which pages.
    pub fn range(&self) -> PageRange {
        self.range
    }

    /// CRIU's flags of these pages (`PE_LAZY`, …), as they came; the store has no use for them.
    pub fn flags(&self) -> u32 {
        self.flags
    }

    /// Where their bytes are.
    pub fn layer(&self) -> &Rc<Layer> {
        &self.layer
    }

    /// Where the first of them is in the layer's file, in bytes.
    pub fn offset(&self) -> u64 {
        self.offset * PAGE
    }

    /// The part of it that lies in a range, on its own.
    pub(in crate::store) fn part(&self, range: PageRange) -> Option<Run> {
        let start = self.range.start.max(range.start);
        let part = PageRange::between(start, self.range.end.min(range.end))?;
        let offset = self.offset + (start - self.range.start);
        Some(Run::new(&self.layer, part, offset, self.flags))
    }

    /// The same bytes, as pages of another range.
    pub(super) fn moved(&self, range: PageRange, flags: u32) -> Run {
        Run::new(&self.layer, range, self.offset, flags)
    }

    /// Both as one, if the other goes on where this one ends, in the space and in the layer.
    pub(super) fn with(&self, next: &Run) -> Option<Run> {
        let follows = self.range.end == next.range.start
            && self.offset + self.range.pages() == next.offset
            && self.flags == next.flags
            && Rc::ptr_eq(&self.layer, &next.layer);
        let range = PageRange { start: self.range.start, end: next.range.end };
        follows.then(|| Run::new(&self.layer, range, self.offset, self.flags))
    }
}

impl Clone for Run {
    fn clone(&self) -> Run {
        Run::new(&self.layer, self.range, self.offset, self.flags)
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        // The last one need not punch a file that is closed with it.
        if Rc::strong_count(&self.layer) > 1 {
            release_hold(&self.layer, self.offset, self.range.pages());
        }
    }
}
