//! Commands of CRIU.

/// A word as a shell reads it back.
pub(super) fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+,:@%=".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shell_reads_words_back() {
        assert_eq!(quoted("/srv/web-1"), "/srv/web-1");
        assert_eq!(quoted("/srv/my web's"), r"'/srv/my web'\''s'");
        assert_eq!(quoted(""), "''");
    }
}
