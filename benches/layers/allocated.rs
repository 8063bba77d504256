//! How much memory the process has allocated: the system's allocator, and a count beside it.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

#[global_allocator]
static ALLOCATOR: Counting = Counting(AtomicUsize::new(0));

struct Counting(AtomicUsize);

/// Bytes that are allocated now, as they were asked for: without what the allocator adds.
pub(crate) fn bytes() -> usize {
    ALLOCATOR.0.load(Ordering::Relaxed)
}

// SAFETY: the system's allocator does all of it, and is asked for what was asked for here.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        self.0.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise is the one that is asked for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        self.0.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as above; the memory came from there.
        unsafe { System.dealloc(memory, layout) }
    }
}
