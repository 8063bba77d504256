//! Ranges of whole pages.

/// What memory is dumped, kept and charged in, in bytes.
pub const PAGE: u64 = 4096;

/// Some pages that follow each other in a page space: at least one, and none beyond the last address that
/// 64 bits can name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageRange {
    /// The first page's number: its address divided by [`PAGE`].
    pub(super) start: u64,
    /// The number after the last page's.
    pub(super) end: u64,
}

/// Why an address and a count are no range of pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadRange {
    /// It begins within a page.
    #[error("address {0:#x} is not a multiple of the page size, 4096 bytes")]
    Unaligned(u64),
    /// It has no pages.
    #[error("no pages at address {0:#x}")]
    Empty(u64),
    /// It has too many.
    #[error("{pages} pages at address {address:#x} end beyond the address space")]
    Beyond {
        /// Where it begins, in bytes.
        address: u64,
        /// How many.
        pages: u64,
    },
}

impl PageRange {
    /// `pages` pages from `address`, in bytes, on: in a task's memory, or in a shmem segment.
    pub fn new(address: u64, pages: u64) -> Result<PageRange, BadRange> {
        if address % PAGE != 0 {
            return Err(BadRange::Unaligned(address));
        }
        let start = address / PAGE;
        match start.checked_add(pages) {
            Some(end) if end <= u64::MAX / PAGE => {
                PageRange::between(start, end).ok_or(BadRange::Empty(address))
            }
            _ => Err(BadRange::Beyond { address, pages }),
        }
    }

    /// From one page number to another; `None` if that is nothing.
    pub(super) fn between(start: u64, end: u64) -> Option<PageRange> {
        (start < end).then_some(PageRange { start, end })
    }

    /// Where it begins, in bytes.
    pub fn address(self) -> u64 {
        self.start * PAGE
    }

    /// Where it ends, in bytes: the address after its last.
    pub fn end_address(self) -> u64 {
        self.end * PAGE
    }

    /// How many pages.
    pub fn pages(self) -> u64 {
        self.end - self.start
    }

    /// How many bytes.
    pub fn bytes(self) -> u64 {
        self.pages() * PAGE
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

        let refused = |address, pages| PageRange::new(address, pages).unwrap_err().to_string();
        assert_eq!(
            refused(0x1001, 1),
            "address 0x1001 is not a multiple of the page size, 4096 bytes"
        );
        assert_eq!(refused(0x1000, 0), "no pages at address 0x1000");
        for (address, pages) in [(0x1000, u64::MAX), (0x1000, u64::MAX / PAGE), (!0xfff, 1)] {
            assert_eq!(
                refused(address, pages),
                format!("{pages} pages at address {address:#x} end beyond the address space")
            );
        }
        assert!(PageRange::new(0, u64::MAX / PAGE).is_ok());
    }
}
