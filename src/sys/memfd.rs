//! Images live in memfds: pages that belong to no disk and go back to the kernel when the last
//! descriptor is closed.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, memfd_create};
use rustix::io::{Errno, Result};

/// The kernel takes this many bytes of a memfd's name.
const NAME_MAX: usize = 249;

/// Makes an empty memfd. The name is what `/proc/PID/fd` and `/proc/PID/maps` show; what the kernel
/// would refuse as too long is cut off.
pub fn create(name: &str) -> Result<OwnedFd> {
    let name = shorten(name);
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    match memfd_create(name, flags | MemfdFlags::NOEXEC_SEAL) {
        // Kernels before 6.3 do not know MFD_NOEXEC_SEAL.
        Err(Errno::INVAL) => memfd_create(name, flags),
        made => made,
    }
}

/// Gives whole pages of a memfd back to the kernel, `len` bytes from `offset` on; the file stays as long as
/// it is, and reads there give zeros. A page that was spliced into a pipe stays in the pipe.
pub fn punch(memfd: impl AsFd, offset: u64, len: u64) -> Result<()> {
    fallocate(memfd, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, len)
}

fn shorten(name: &str) -> &str {
    let mut end = name.len().min(NAME_MAX);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    &name[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_name_is_cut_at_a_character() {
        let long = "ä".repeat(200);
        assert_eq!(shorten(&long).len(), 248);
        assert_eq!(shorten("core-7.img"), "core-7.img");
        assert!(create(&long).is_ok());
    }
}
