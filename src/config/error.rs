//! What can be wrong with a configuration, said with its place, cause and cure.

use std::{
    io,
    path::{Path, PathBuf},
};

/// Why there are no settings. Its text is complete: file, line and column (both from 1, the
/// column in characters), what was found there and what to write instead.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file that was named is not there.
    #[error("{}: no such file; create it, or name no file to run with the defaults", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// The file is there and cannot be read.
    #[error("{}: cannot be read: {cause}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
    /// The file was read and is wrong in one place.
    #[error("{}:{line}:{column}: {problem}", path.display())]
    Wrong {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// The column in characters, from 1.
        column: usize,
        /// What is wrong there.
        problem: Problem,
    },
}

/// What is wrong at one place of a configuration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// It is not UTF-8.
    #[error("a byte that is not UTF-8; save the file as UTF-8")]
    NotUtf8,
    /// It is not TOML.
    #[error("not TOML: {0}")]
    NotToml(String),
    /// There is no such key.
    #[error("unknown key `{key}`{}", suggestion(near.as_deref()))]
    UnknownKey {
        /// The key with its table, as in `store.max-bytes`.
        key: String,
        /// The existing key that was probably meant.
        near: Option<String>,
    },
    /// The key has a value it cannot have.
    #[error("`{key}`: {cause}")]
    Value {
        /// The key with its table.
        key: String,
        /// What was found and what was expected, with an example.
        cause: String,
    },
}

impl ConfigError {
    /// `problem` at the byte `offset` of `text`, which was read from `path`.
    pub(super) fn at(path: &Path, text: &str, offset: usize, problem: Problem) -> Self {
        let before = text.get(..offset).unwrap_or(text);
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        Self::Wrong {
            path: path.into(),
            line: before.matches('\n').count() + 1,
            column: before[line_start..].chars().count() + 1,
            problem,
        }
    }
}

fn suggestion(near: Option<&str>) -> String {
    near.map(|key| format!("; did you mean `{key}`?")).unwrap_or_default()
}
