//! A directory of its own for a run of CRIU: what CRIU writes besides pages, which is what a process
//! has in its registers, files and sockets, and its logs.

use std::fs::{self, DirBuilder};
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::{env, process};

use super::exit::Failure;
use super::place::RUN;

/// A directory that only its owner can read, removed in the end unless it is kept.
#[derive(Debug)]
pub(super) struct WorkDir {
    path: PathBuf,
    keep: bool,
}

impl WorkDir {
    /// Makes one in `parent`, or where it belongs by default.
    pub(super) fn make(parent: Option<&Path>, what: &str, keep: bool) -> Result<WorkDir, Failure> {
        let parent = parent.map_or_else(default_parent, Path::to_owned);
        let failed = |error: io::Error| {
            Failure::failed(format!("{}: no work directory can be made: {error}", parent.display()))
                .cure("name a directory on a tmpfs with --work-dir")
        };
        // CRIU gets it as an argument, and what it runs may be elsewhere.
        let parent = fs::canonicalize(&parent).map_err(failed)?;
        let mut number = 0;
        loop {
            let path = parent.join(format!("{what}-{}-{number}", process::id()));
            match DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => return Ok(WorkDir { path, keep }),
                // A process that had this pid did not live to remove it.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => number += 1,
                Err(error) => return Err(failed(error)),
            }
        }
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        let mut stderr = io::stderr();
        let path = self.path.display();
        if self.keep {
            let _ = writeln!(stderr, "CRIU's logs and small images are kept in {path}");
        } else if let Err(error) = fs::remove_dir_all(&self.path) {
            let _ = writeln!(stderr, "{path}: not removed: {error}");
        }
    }
}

/// The relay's directory under systemd, else the user's, else any.
fn default_parent() -> PathBuf {
    if Path::new(RUN).is_dir() {
        return RUN.into();
    }
    env::var_os("XDG_RUNTIME_DIR").map_or_else(env::temp_dir, PathBuf::from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn it_is_private_and_goes_with_what_is_in_it() {
        let parent = tempfile::tempdir().unwrap();
        let make = |keep| WorkDir::make(Some(parent.path()), "test", keep).unwrap();
        let (first, second) = (make(false), make(true));
        assert_ne!(first.path(), second.path());
        let mode = fs::metadata(first.path()).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        fs::write(first.path().join("file"), "x").unwrap();
        let paths = [first.path().to_owned(), second.path().to_owned()];
        drop((first, second));
        assert_eq!(paths.map(|path| path.exists()), [false, true]);
        let nowhere = WorkDir::make(Some(Path::new("/nonexistent")), "test", false).unwrap_err();
        assert!(nowhere.to_string().contains("/nonexistent"));
    }
}
