//! Which pages of a page space there are, and where.

use std::rc::Rc;

use super::layer::{Layer, Run};
use super::release::release;
use super::tree::{Runs, Tree};
use crate::criu::pages::PageRange;

/// The pages of one page space: runs, not pages. A clone costs nothing, and is not changed by what is
/// done to the other.
#[derive(Debug, Clone, Default)]
pub struct Index(Tree);

/// A part of a range that was looked up.
#[derive(Debug)]
pub enum Part<'a> {
    /// Pages that are there.
    Pages {
        /// Which.
        range: PageRange,
        /// Where the first of them is in the file of the run's layer, in bytes.
        offset: u64,
        /// What they are a part of.
        run: &'a Rc<Run>,
    },
    /// Pages that are not there.
    Gap(PageRange),
}

impl Index {
    /// All runs, in the order of their addresses: what a pagemap and its pages image are made of.
    pub fn runs(&self) -> Runs<'_> {
        self.0.iter_from(0)
    }

    /// How many runs.
    pub fn len(&self) -> usize {
        self.0.runs()
    }

    /// Whether there are no pages.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many pages.
    pub fn pages(&self) -> u64 {
        self.0.pages()
    }

    /// The runs from the one that has the `nth` page of all on, counted from 0, and how many pages it has
    /// before that page. There are none if there are not so many pages.
    pub fn runs_at(&self, nth: u64) -> (Runs<'_>, u64) {
        self.0.iter_at(nth)
    }

    /// What there is in a range, from its start to its end.
    pub fn parts(&self, range: PageRange) -> Parts<'_> {
        Parts { runs: self.0.iter_from(range.start), next: None, at: range.start, end: range.end }
    }

    /// The pages that a range begins with, up to the first that is not there; `None` if its first is not.
    pub fn leading(&self, range: PageRange) -> Option<PageRange> {
        let there = self.parts(range).map_while(|part| match part {
            Part::Pages { range, .. } => Some(range.pages()),
            Part::Gap(_) => None,
        });
        range.split(there.sum()).0
    }

    /// The first pages of a range that follow each other in one file, too, and where they begin there, in
    /// bytes. `None` if its first page is not there.
    pub fn together(&self, range: PageRange) -> Option<(PageRange, &Rc<Layer>, u64)> {
        let mut parts = self.parts(range);
        let Some(Part::Pages { range: mut first, offset, run }) = parts.next() else { return None };
        for part in parts {
            match part {
                Part::Pages { range: next, offset: at, run: other }
                    if Rc::ptr_eq(run.layer(), other.layer()) && at == offset + first.bytes() =>
                {
                    first.end = next.end;
                }
                _ => break,
            }
        }
        Some((first, run.layer(), offset))
    }

    /// An index of one run.
    pub(super) fn of(run: Run) -> Index {
        Index(Tree::of(run))
    }

    /// Adds a run that begins after all others.
    pub(in crate::store) fn append(&mut self, run: Run) {
        self.0 = Tree::concat(std::mem::take(&mut self.0), Tree::of(run));
    }

    /// All pages of a range; the error is the address, in bytes, of the first that is not there.
    pub(super) fn slice(&self, range: PageRange) -> Result<Index, u64> {
        let slice = self.0.slice(range);
        if slice.pages() == range.pages() {
            return Ok(Index(slice));
        }
        let missing = self.parts(range).find_map(|part| match part {
            Part::Gap(gap) => Some(gap.address()),
            Part::Pages { .. } => None,
        });
        Err(missing.unwrap_or(range.address()))
    }

    /// Looks whether nothing of a range is there yet; the error is the address, in bytes, of the first
    /// page that is.
    pub(super) fn free(&self, range: PageRange) -> Result<(), u64> {
        match self.0.iter_from(range.start).next() {
            Some(run) if run.range().start < range.end => {
                Err(run.range().address().max(range.address()))
            }
            _ => Ok(()),
        }
    }

    /// Adds all pages of a range that is [free](Self::free).
    pub(super) fn put(&mut self, range: PageRange, mut pages: Index) {
        let (before, after) = (self.0.until(range.start), self.0.from(range.start));
        self.0 = Tree::concat(Tree::concat(before, std::mem::take(&mut pages.0)), after);
    }

    #[cfg(test)]
    pub(super) fn check(&self) {
        self.0.check();
    }
}

impl Drop for Index {
    fn drop(&mut self) {
        release(std::mem::take(&mut self.0));
    }
}

/// The parts of a range, in the order of their addresses.
#[derive(Debug)]
pub struct Parts<'a> {
    runs: Runs<'a>,
    /// The run after the gap that was given out.
    next: Option<&'a Rc<Run>>,
    /// Where the next part begins, and the range ends, in pages.
    at: u64,
    end: u64,
}

impl<'a> Iterator for Parts<'a> {
    type Item = Part<'a>;

    fn next(&mut self) -> Option<Part<'a>> {
        let rest = PageRange::between(self.at, self.end)?;
        let run = self.next.take().or_else(|| self.runs.next());
        let Some(run) = run.filter(|run| run.range().start < self.end) else {
            self.at = self.end;
            return Some(Part::Gap(rest));
        };
        if let Some(gap) = PageRange::between(self.at, run.range().start) {
            (self.at, self.next) = (gap.end, Some(run));
            return Some(Part::Gap(gap));
        }
        let range = PageRange { start: self.at, end: run.range().end.min(self.end) };
        self.at = range.end;
        let offset = run.offset() + (range.address() - run.range().address());
        Some(Part::Pages { range, offset, run })
    }
}
