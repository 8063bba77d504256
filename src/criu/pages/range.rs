//! Ranges of whole pages.

/// What memory is dumped, kept and charged in, in bytes. CRIU counts in pages of the host that it runs on;
/// those of x86 are these.
pub const PAGE_SIZE: u64 = 4096;

/// Some pages that follow each other in a page space: at least one, and none beyond the last address that
/// 64 bits can name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageRange {
    /// The first page's number: its address divided by [`PAGE_SIZE`].
    pub(crate) start: u64,
    /// The number after the last page's.
    pub(crate) end: u64,
}

/// Pages that cannot be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadRange {
    /// None.
    #[error("no pages at {0:#x}")]
    Empty(u64),
    /// The address is within a page.
    #[error("pages at {0:#x}, which is not where a page begins")]
    Unaligned(u64),
    /// The last ends beyond the last address.
    #[error("{pages} pages at {address:#x} end beyond 2^64")]
    TooLong {
        /// Where they begin.
        address: u64,
        /// How many.
        pages: u64,
    },
}

impl PageRange {
    /// `pages` pages from `address`, in bytes, on: in a task's memory, or in a shmem segment.
    pub fn new(address: u64, pages: u64) -> Result<PageRange, BadRange> {
        if address % PAGE_SIZE != 0 {
            return Err(BadRange::Unaligned(address));
        }
        let start = address / PAGE_SIZE;
        match start.checked_add(pages) {
            Some(end) if end <= u64::MAX / PAGE_SIZE => {
                PageRange::between(start, end).ok_or(BadRange::Empty(address))
            }
            _ if pages == 0 => Err(BadRange::Empty(address)),
            _ => Err(BadRange::TooLong { address, pages }),
        }
    }

    /// From one page number to another; `None` if that is nothing.
    pub(crate) fn between(start: u64, end: u64) -> Option<PageRange> {
        (start < end).then_some(PageRange { start, end })
    }

    /// Where it begins, in bytes.
    pub fn address(self) -> u64 {
        self.start * PAGE_SIZE
    }

    /// Where it ends, in bytes: the address after its last.
    pub fn end_address(self) -> u64 {
        self.end * PAGE_SIZE
    }

    /// How many pages.
    pub fn pages(self) -> u64 {
        self.end - self.start
    }

    /// How many bytes.
    pub fn bytes(self) -> u64 {
        self.pages() * PAGE_SIZE
    }

    /// The first pages of it, at most so many, and the rest. What has none is `None`.
    pub fn split(self, pages: u64) -> (Option<PageRange>, Option<PageRange>) {
        let at = self.start.saturating_add(pages).min(self.end);
        (PageRange::between(self.start, at), PageRange::between(at, self.end))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_pages_within_the_address_space_are_a_range() {
        let range = PageRange::new(0x7f00_0000_1000, 3).unwrap();
        assert_eq!((range.address(), range.pages(), range.bytes()), (0x7f00_0000_1000, 3, 12288));
        assert_eq!(range.end_address(), 0x7f00_0000_4000);

        assert_eq!(PageRange::new(0x1001, 1), Err(BadRange::Unaligned(0x1001)));
        for address in [0x1000, !0xfff] {
            assert_eq!(PageRange::new(address, 0), Err(BadRange::Empty(address)));
        }
        for (address, pages) in
            [(0x1000, u64::MAX), (0x1000, u64::MAX / PAGE_SIZE), (0, 1 << 52), (!0xfff, 1)]
        {
            assert_eq!(
                PageRange::new(address, pages),
                Err(BadRange::TooLong { address, pages }),
                "{pages} at {address:#x}"
            );
        }
        assert!(PageRange::new(0, u64::MAX / PAGE_SIZE).is_ok());
        assert!(PageRange::new(0u64.wrapping_sub(2 * PAGE_SIZE), 1).is_ok());
    }

    #[test]
    fn a_range_is_split_where_it_is_said_to_be() {
        let range = |page: u64, pages| PageRange::new(page * PAGE_SIZE, pages).unwrap();
        let five = range(7, 5);
        assert_eq!(five.split(0), (None, Some(five)));
        assert_eq!(five.split(2), (Some(range(7, 2)), Some(range(9, 3))));
        for more in [5, 6, u64::MAX] {
            assert_eq!(five.split(more), (Some(five), None));
        }
    }
}
