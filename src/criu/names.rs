//! The names that peers give to images and snapshots.

/// No image name of the stream protocol and no id of the control interface is longer than this, in
/// bytes: it has to work as a file name.
pub const FILE_NAME_MAX: usize = 255;
/// No name and no id at all is longer than this, in bytes: CRIU's `PATH_MAX`.
pub const NAME_MAX: usize = 4096;

/// A name that is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a bad {what} {name:?}: {why}")]
pub struct BadName {
    /// What it should name.
    pub what: &'static str,
    /// The name as it came, or its beginning.
    pub name: String,
    /// What is wrong with it.
    pub why: &'static str,
}

/// Checks a name for an image or a snapshot that becomes a file's: of an image of the stream
/// protocol, or of a directory that was opened.
pub fn check_name(name: &str) -> Result<(), BadName> {
    if name.len() > FILE_NAME_MAX {
        return bad("image name", name, "it is longer than 255 bytes");
    }
    check_image(name)
}

/// Checks a name for an image: it must be usable in one directory, since `extract` makes it a file's.
pub fn check_image(name: &str) -> Result<(), BadName> {
    let why = if name.contains('/') {
        "it contains a slash"
    } else if name.contains("..") {
        "it contains two dots in a row"
    } else if name == "." {
        "it names a directory"
    } else {
        return check("image name", name);
    };
    bad("image name", name, why)
}

/// Checks a snapshot's id. It may be a path: CRIU's `--remote` takes its `-D` for it.
pub fn check_id(id: &str) -> Result<(), BadName> {
    check("snapshot id", id)
}

/// Checks the name of a list of ids, which may be empty.
pub fn check_list(list: &str) -> Result<(), BadName> {
    if list.is_empty() { Ok(()) } else { check("name of a list", list) }
}

/// Whether a character moves the cursor, or what comes after it, elsewhere or out of sight: no name has it, and no
/// terminal or log gets it from a peer.
pub fn is_unprintable(c: char) -> bool {
    // Those of Unicode that are not control characters by its own count: marks of zero width, separators of lines, and
    // what turns the direction of writing.
    let unseen = matches!(c, '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}');
    c.is_control() || unseen
}

/// As much of a text as `max` bytes hold, cut between two characters.
pub fn cut(text: &str, max: usize) -> &str {
    let mut end = text.len().min(max);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

fn check(what: &'static str, name: &str) -> Result<(), BadName> {
    if name.is_empty() {
        bad(what, name, "it is empty")
    } else if name.len() > NAME_MAX {
        bad(what, name, "it is longer than 4096 bytes")
    } else if name.chars().any(is_unprintable) {
        bad(what, name, "it contains a NUL or another control character, or one that is not seen")
    } else {
        Ok(())
    }
}

fn bad(what: &'static str, name: &str, why: &'static str) -> Result<(), BadName> {
    // As much of it as belongs into a log line.
    Err(BadName { what, name: name.chars().take(64).collect(), why })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_leave_a_directory_are_refused() {
        for bad in
            ["", ".", "..", "a/b", "/etc/passwd", "../x", "a..b", "a\0b", "a\nb", "a\u{202e}b"]
        {
            assert!(check_name(bad).is_err(), "{bad:?}");
            assert!(check_image(bad).is_err(), "{bad:?}");
        }
        for good in ["core-7.img", "pages-1.img", "tmpfs-dev-52.tar.gz.img"] {
            assert!(check_name(good).is_ok(), "{good}");
        }
    }

    #[test]
    fn names_have_at_most_255_bytes_or_4_kib() {
        assert!(check_name(&"x".repeat(255)).is_ok());
        assert!(check_name(&"x".repeat(256)).is_err());
        for check in [check_image, check_id, check_list] {
            assert!(check(&"x".repeat(4096)).is_ok());
            assert!(check(&"x".repeat(4097)).is_err());
        }
    }

    #[test]
    fn an_id_may_be_a_path_and_a_list_have_no_name() {
        assert!(check_id("/tmp/ckpt/../1").is_ok());
        assert!(check_id("").is_err());
        for bad in ["a\nb", "a\u{85}", "a\u{2028}b", "\u{feff}a", "a\u{200b}", "\u{202e}a"] {
            assert!(check_id(bad).is_err(), "{bad:?}");
        }
        assert!(check_id("köln-京都").is_ok());
        assert!(check_list("").is_ok());
    }
}
