//! Unix sockets in directories.

use std::ffi::OsString;
use std::fs::{self, Permissions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, open, statat, unlinkat};
use rustix::net::sockopt::socket_peercred;

/// Binds a socket `name` in `dir`, for its owner only. A socket that nobody listens on any more is
/// replaced.
///
/// `sun_path` holds 108 bytes (unix(7)), a directory's name can be longer: then the path that is bound
/// goes through `/proc/self/fd`, and [`bound_path`] tells nothing.
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
    let listener = match UnixListener::bind(dir.join(name)) {
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => UnixListener::bind(&short)?,
        bound => bound?,
    };
    fs::set_permissions(&short, Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// The path that a socket was bound to, as others can find it.
pub fn bound_path(listener: &UnixListener) -> Option<PathBuf> {
    let address = listener.local_addr().ok()?;
    address.as_pathname().filter(|path| !path.starts_with("/proc")).map(Path::to_owned)
}

/// The file of a socket that listens, removed when this is dropped: where that may be done, and as long as it is
/// the same file. Without it the directory can be copied by programs that know no sockets.
#[derive(Debug)]
pub struct SocketFile(Option<Entry>);

/// A file in a directory, which stays the same one whatever becomes of the path.
#[derive(Debug)]
struct Entry {
    directory: OwnedFd,
    name: OsString,
    inode: (u64, u64),
}

impl SocketFile {
    /// The file that the socket was bound to by whoever made it listen.
    pub fn of(listener: &UnixListener) -> SocketFile {
        SocketFile(Entry::of(listener))
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if let Some(entry) = self.0.as_ref().filter(|entry| entry.is_there()) {
            // It stays where this process may not write.
            let _ = unlinkat(&entry.directory, &entry.name, AtFlags::empty());
        }
    }
}

impl Entry {
    fn of(listener: &UnixListener) -> Option<Entry> {
        let path = bound_path(listener).filter(|path| path.is_absolute())?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = open(path.parent()?, flags, Mode::empty()).ok()?;
        let name = path.file_name()?.to_owned();
        let found = statat(&directory, &name, AtFlags::SYMLINK_NOFOLLOW).ok()?;
        // The path is what a peer says: it may not name a file of somebody else.
        let maker = socket_peercred(listener).ok()?.uid.as_raw();
        (found.st_uid == maker).then_some(Entry {
            inode: (found.st_dev, found.st_ino),
            directory,
            name,
        })
    }

    fn is_there(&self) -> bool {
        statat(&self.directory, &self.name, AtFlags::SYMLINK_NOFOLLOW).is_ok_and(|found| {
            FileType::from_raw_mode(found.st_mode) == FileType::Socket
                && (found.st_dev, found.st_ino) == self.inode
        })
    }
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
        let listener = bind(&long, "x.sock").unwrap();
        assert_eq!(bound_path(&listener), None);
        connect(&long.join("x.sock")).unwrap();
        let missing = connect(&long.join("y.sock")).unwrap_err();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn the_file_of_a_socket_is_removed_and_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.sock");
        let listener = bind(dir.path(), "x.sock").unwrap();
        assert_eq!(bound_path(&listener).as_deref(), Some(path.as_path()));
        drop(SocketFile::of(&listener));
        assert!(!path.exists());
        let file = SocketFile::of(&bind(dir.path(), "x.sock").unwrap());
        let moved = dir.path().join("moved.sock");
        fs::rename(&path, &moved).unwrap();
        let _another = bind(dir.path(), "x.sock").unwrap();
        drop(file);
        assert!(path.exists() && moved.exists());
        let listener = bind(dir.path(), "y.sock").unwrap();
        let no_socket = dir.path().join("y.sock");
        fs::remove_file(&no_socket).unwrap();
        fs::write(&no_socket, "").unwrap();
        drop(SocketFile::of(&listener));
        assert!(no_socket.exists());
    }
}
