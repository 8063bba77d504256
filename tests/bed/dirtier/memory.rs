//! Memory that is mapped, page by page, and the other system calls that only C has.
#![allow(unsafe_code, reason = "mapping, remapping and forking is what this program is for")]

use std::{io, ptr};

use crate::model::{Checksum, PAGE, Page, content};

/// Pages, each at an address of its own.
pub(crate) struct Memory {
    seed: u64,
    /// Null where a page is unmapped.
    pages: Vec<*mut Page>,
}

impl Memory {
    /// Maps `count` pages, shared with the processes that will be forked or not, and fills them.
    pub(crate) fn new(seed: u64, count: usize, shared: bool) -> io::Result<Memory> {
        if count == 0 {
            return Ok(Memory { seed, pages: Vec::new() });
        }
        let sharing = if shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping, nobody's memory.
        let start = unsafe {
            let flags = sharing | libc::MAP_ANONYMOUS;
            libc::mmap(ptr::null_mut(), count * PAGE, protection, flags, -1, 0)
        };
        let start = mapped(start)?;
        let mut memory = Memory { seed, pages: addresses(start, count) };
        for number in 0..count {
            memory.write(number, 0);
        }
        Ok(memory)
    }

    pub(crate) fn len(&self) -> usize {
        self.pages.len()
    }

    /// Makes a page one of this generation, unless it is unmapped.
    pub(crate) fn write(&mut self, number: usize, generation: u64) {
        let address = self.pages[number];
        if !address.is_null() {
            // SAFETY: a mapped page. Other processes may read it, no reference of ours points there.
            unsafe { address.write(content(self.seed, number, generation)) };
        }
    }

    pub(crate) fn checksum(&self) -> u64 {
        let mut sum = Checksum::new();
        for (number, address) in self.pages.iter().enumerate().filter(|(_, page)| !page.is_null()) {
            // SAFETY: a mapped page, copied.
            sum.add(number, &unsafe { address.read() });
        }
        sum.0
    }

    pub(crate) fn unmap(&mut self, from: usize, count: usize) -> io::Result<()> {
        let pages = self.range(from, count)?;
        // SAFETY: these pages are mapped and not used any more.
        if unsafe { libc::munmap(pages[0].cast(), count * PAGE) } != 0 {
            return Err(io::Error::last_os_error());
        }
        pages.fill(ptr::null_mut());
        Ok(())
    }

    /// Moves pages that are next to each other to addresses where nothing was: they stay the same pages.
    pub(crate) fn remap(&mut self, from: usize, count: usize) -> io::Result<()> {
        let pages = self.range(from, count)?;
        let len = count * PAGE;
        // SAFETY: room is found by a new mapping, which the second call replaces; the pages' old address is not used again.
        let start = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            let room = mapped(libc::mmap(ptr::null_mut(), len, libc::PROT_NONE, flags, -1, 0))?;
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            mapped(libc::mremap(pages[0].cast(), len, len, flags, room))?
        };
        pages.copy_from_slice(&addresses(start, count));
        Ok(())
    }

    /// Pages that are mapped at consecutive addresses.
    fn range(&mut self, from: usize, count: usize) -> io::Result<&mut [*mut Page]> {
        self.pages
            .get_mut(from..from + count)
            .filter(|pages| {
                pages.first().is_some_and(|first| **pages == addresses(first.cast(), count)[..])
                    && !pages.contains(&ptr::null_mut())
            })
            .ok_or_else(|| io::Error::other("these pages are not next to each other"))
    }
}

fn mapped(address: *mut libc::c_void) -> io::Result<*mut libc::c_void> {
    if address == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(address) }
}

fn addresses(start: *mut libc::c_void, count: usize) -> Vec<*mut Page> {
    (0..count).map(|number| start.cast::<Page>().wrapping_add(number)).collect()
}

/// Forks; whether this is the child.
pub(crate) fn fork() -> io::Result<bool> {
    // SAFETY: there are no threads.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        pid => Ok(pid == 0),
    }
}

/// Takes leave of children that have ended.
pub(crate) fn reap() {
    // SAFETY: no status is asked for.
    while unsafe { libc::waitpid(-1, ptr::null_mut(), libc::WNOHANG) } > 0 {}
}
