//! What is told of the old clients of `--remote` by: how they said that a dump or a restore had ended, which is by
//! an image name and only looked at where `remote.historical-endings` is set, and what else they did.

/// Which side has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    /// A dump.
    Dump,
    /// A restore.
    Restore,
}

/// Whether a header is an ending of the patches of 2015 to 2017 (`DUMP_FINISH`, `RESTORE_FINISH` in the
/// snapshot `null`), or one of the last form, of 2020 (no name, no snapshot; the mode tells the side).
pub(super) fn ending(name: &str, snapshot_id: &str, open_mode: u32) -> Option<Side> {
    match (name, snapshot_id, open_mode) {
        ("DUMP_FINISH", "null", _) | ("", "", 1) => Some(Side::Dump),
        ("RESTORE_FINISH", "null", _) | ("", "", 0) => Some(Side::Restore),
        _ => None,
    }
}

/// Whether a header looks like an ending of the last form, and can be nothing else.
pub(super) fn can_only_be_an_ending(name: &str, snapshot_id: &str, open_mode: u32) -> bool {
    name.is_empty() && ending(name, snapshot_id, open_mode).is_some()
}

/// Whether it is the list that they knew, the only one.
pub fn is_their_list(list: &str) -> bool {
    matches!(list, "" | "null")
}

/// Whether it is an image that dumps write, and pre-dumps do not: those have pages and an inventory, and no
/// ending.
pub fn is_of_a_dump(image: &str) -> bool {
    image == "pstree.img" || image.starts_with("core-") || image.starts_with("mm-")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::criu::remote::Request;

    #[test]
    fn both_kinds_of_endings_are_known() {
        assert_eq!(ending("DUMP_FINISH", "null", 1), Some(Side::Dump));
        assert_eq!(ending("RESTORE_FINISH", "null", 0), Some(Side::Restore));
        assert_eq!(ending("", "", 1), Some(Side::Dump));
        assert_eq!(ending("", "", 0), Some(Side::Restore));
        assert_eq!(ending("DUMP_FINISH", "web", 1), None);
        assert_eq!(ending("core-7.img", "null", 1), None);
    }

    #[test]
    fn without_them_a_magic_name_is_an_image_and_an_empty_one_is_none() {
        let header = b"\x0a\x0bDUMP_FINISH\x12\x04null\x18\x01";
        assert_eq!(Request::decode(header, true), Ok(Request::HistoricalEndOfDump));
        let Ok(Request::Write { snapshot, name, .. }) = Request::decode(header, false) else {
            panic!()
        };
        assert_eq!((snapshot.as_str(), name.as_str()), ("null", "DUMP_FINISH"));
        let last = b"\x0a\0\x12\0\x18\0";
        assert_eq!(Request::decode(last, true), Ok(Request::HistoricalEndOfRestore));
        let refused = Request::decode(last, false).unwrap_err().to_string();
        assert!(refused.contains("remote.historical-endings"), "{refused}");
    }
}
