//! The pid file: who runs, and that nobody else does.

use std::fs::{self, File, Permissions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Mode, OFlags, flock};
use rustix::io::Errno;

/// A pid and a newline are shorter; what is longer is somebody's file.
const MAX: u64 = 32;

/// Why there is no pid file.
#[derive(Debug, thiserror::Error)]
pub(super) enum PidFileError {
    /// Its lock is held.
    #[error("already running with pid {pid} ({})", path.display())]
    Running {
        /// The file.
        path: PathBuf,
        /// What stands in it.
        pid: String,
    },
    /// It is not one.
    #[error("{}: holds no pid, so it is not overwritten; name another --pidfile", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
    },
    /// It cannot be made.
    #[error("{}: no pid file can be written: {cause}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
}

/// The daemon's pid file, locked and removed when this is dropped. The lock, not the file, says that
/// the daemon lives: one that was killed leaves its file behind, to be taken over.
#[derive(Debug)]
pub(super) struct PidFile {
    path: PathBuf,
    file: File,
}

impl PidFile {
    /// Takes the file for this process.
    pub(super) fn claim(path: &Path) -> Result<PidFile, PidFileError> {
        let failed = |cause: io::Error| PidFileError::Io { path: path.to_owned(), cause };
        loop {
            let mut file = open(path).map_err(failed)?;
            if !file.metadata().map_err(failed)?.is_file() {
                return Err(PidFileError::Foreign { path: path.to_owned() });
            }
            let locked = flock(&file, FlockOperation::NonBlockingLockExclusive);
            let mut text = String::new();
            let read = (&file).take(MAX).read_to_string(&mut text);
            let pid = text.trim_end();
            if read.is_err() || !(pid.is_empty() || pid.parse::<u32>().is_ok()) {
                return Err(PidFileError::Foreign { path: path.to_owned() });
            }
            match locked {
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) => {
                    let (path, pid) = (path.to_owned(), pid.to_owned());
                    return Err(PidFileError::Running { path, pid });
                }
                Err(error) => return Err(failed(error.into())),
            }
            // Its former owner may have removed it since it was opened.
            if is_at(&file, path) {
                file.set_len(0).map_err(failed)?;
                file.rewind().map_err(failed)?;
                writeln!(file, "{}", std::process::id()).map_err(failed)?;
                // Whatever the umask is: it is there to be read.
                file.set_permissions(Permissions::from_mode(0o644)).map_err(failed)?;
                return Ok(PidFile { path: path.to_owned(), file });
            }
        }
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        if is_at(&self.file, &self.path) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn open(path: &Path) -> io::Result<File> {
    // A link may lead to somebody's file; a pipe is not to be waited for.
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    Ok(rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::from_raw_mode(0o644))?.into())
}

fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::symlink_metadata(path)) {
        (Ok(ours), Ok(there)) => (ours.dev(), ours.ino()) == (there.dev(), there.ino()),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_at_a_time_a_stale_one_is_taken_over() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pid");
        let own = format!("{}\n", std::process::id());
        fs::write(&path, "4194304\n").unwrap();
        let first = PidFile::claim(&path).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), own);
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o644);
        let second = PidFile::claim(&path).unwrap_err().to_string();
        assert!(second.contains(&format!("already running with pid {}", own.trim())), "{second}");
        drop(first);
        assert!(!path.exists());
        PidFile::claim(&path).unwrap();
    }

    #[test]
    fn what_is_no_pid_file_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notes");
        for text in
            ["dear diary\n", "12 monkeys", "1234567890123456789012345678901234567890", "\u{e9}"]
        {
            fs::write(&path, text).unwrap();
            let error = PidFile::claim(&path).unwrap_err().to_string();
            assert!(error.contains("holds no pid"), "{error}");
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(matches!(PidFile::claim(&link), Err(PidFileError::Io { .. })));
        assert!(PidFile::claim(&dir.path().join("none/pid")).is_err());
    }

    #[test]
    fn a_file_that_was_replaced_is_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pid");
        let first = PidFile::claim(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let second = PidFile::claim(&path).unwrap();
        drop(first);
        assert!(path.exists());
        drop(second);
    }
}
