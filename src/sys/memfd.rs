//! Images live in memfds: pages that belong to no disk and go back to the kernel when the last
//! descriptor is closed.

use std::os::fd::OwnedFd;

use rustix::fs::{MemfdFlags, memfd_create};
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
