//! Unix sockets in directories.

use std::fs::{self, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, open};

/// Binds a socket `name` in `dir`, for its owner only. A socket that nobody listens on any more is
/// replaced.
///
/// `sun_path` holds 108 bytes (unix(7)), a directory's name can be longer: the path that is bound
/// goes through `/proc/self/fd`.
///
/// # Errors
///
/// `AddrInUse` when somebody listens there, or when there is a file that is no socket.
pub fn bind(dir: &Path, name: &str) -> io::Result<UnixListener> {
    let directory = open(dir, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let short = format!("/proc/self/fd/{}/{name}", directory.as_raw_fd());
    match fs::symlink_metadata(&short) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
        Ok(found) if !found.file_type().is_socket() => {
            return Err(in_use("there is a file of that name which is no socket"));
        }
        Ok(_) if UnixStream::connect(&short).is_ok() => {
            return Err(in_use("another process listens there"));
        }
        Ok(_) => fs::remove_file(&short)?,
    }
    let listener = UnixListener::bind(&short)?;
    fs::set_permissions(&short, Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Connects to the socket at `path`, in a directory of any length.
pub fn connect(path: &Path) -> io::Result<UnixStream> {
    match (UnixStream::connect(path), path.parent(), path.file_name()) {
        // It does not fit into `sun_path`.
        (Err(error), Some(dir), Some(name)) if error.kind() == io::ErrorKind::InvalidInput => {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let directory = open(dir, flags, Mode::empty())?;
            let short = PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd()));
            UnixStream::connect(short.join(name))
        }
        (connected, ..) => connected,
    }
}

/// Whether an error of reading or writing says that the peer has closed its end.
pub fn is_close(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset | io::ErrorKind::UnexpectedEof
    )
}

fn in_use(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::AddrInUse, why)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stale_socket_is_replaced_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let first = bind(dir.path(), "x.sock").unwrap();
        let refused = bind(dir.path(), "x.sock").unwrap_err();
        assert_eq!(refused.to_string(), "another process listens there");
        drop(first);
        bind(dir.path(), "x.sock").unwrap();
        let mode = fs::metadata(dir.path().join("x.sock")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        fs::write(dir.path().join("y.sock"), "").unwrap();
        assert!(bind(dir.path(), "y.sock").unwrap_err().to_string().contains("no socket"));
    }

    #[test]
    fn a_long_directory_is_no_obstacle() {
        let dir = tempfile::tempdir().unwrap();
        let long = dir.path().join("d".repeat(200));
        fs::create_dir(&long).unwrap();
        let _listener = bind(&long, "x.sock").unwrap();
        connect(&long.join("x.sock")).unwrap();
        let missing = connect(&long.join("y.sock")).unwrap_err();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
    }
}
