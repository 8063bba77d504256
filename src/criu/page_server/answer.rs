//! What a page server answers.

use super::command::BadCommand;
use super::header::{Dialect, Header};
use super::kind::{COMMAND_BITS, Kind};
use crate::criu::pages::{Contents, PageRange};

/// No GET is answered with more pages: CRIU asks for no more (`MAX_XFER_LEN` in `criu/uffd.c`), and takes fewer
/// than it asked for.
pub const GET_MAX: u64 = 1024;

/// The answer to OPEN2: whether the space has a parent.
pub fn open(has_parent: bool) -> [u8; 1] {
    [has_parent.into()]
}

/// The answer to PARENT: the same, in 32 bits.
pub fn parent(has_parent: bool) -> [u8; 4] {
    i32::from(has_parent).to_le_bytes()
}

/// The answer to CLOSE and `FORCE_CLOSE`: with `received` CRIU's dump succeeds, without it fails.
pub fn status(received: bool) -> [u8; 4] {
    (if received { 0i32 } else { -1 }).to_le_bytes()
}

/// The header of the answer to GET; the pages follow it. Fewer pages than were asked for may be sent, but not
/// none.
pub fn get(dialect: Dialect, id: u64, address: u64, pages: u64) -> Result<Vec<u8>, BadCommand> {
    PageRange::new(address, pages).map_err(|range| BadCommand::GetRange { id, range })?;
    let present = Contents::Present { lazy: false }.flags() << COMMAND_BITS;
    let cmd = present | Kind::AddFlags as u32;
    Header { cmd, nr_pages: pages, vaddr: address, dst_id: id }.encode(dialect)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answers_are_what_criu_waits_for() {
        assert_eq!((open(false), open(true)), ([0], [1]));
        assert_eq!((parent(false), parent(true)), ([0; 4], [1, 0, 0, 0]));
        assert_eq!((status(true), status(false)), ([0; 4], [0xff; 4]));
        assert_eq!(
            get(Dialect::Short, 7, 0x1000, 3).unwrap(),
            b"\x06\0\x04\0\x03\0\0\0\0\x10\0\0\0\0\0\0\x07\0\0\0\0\0\0\0"
        );
        assert_eq!(get(Dialect::Long, 7, 0x1000, 3).unwrap().len(), 32);
        assert!(get(Dialect::Short, 7, 0x1000, 0).is_err());
        assert!(get(Dialect::Short, 7, 0x1000, 1 << 32).is_err());
    }
}
