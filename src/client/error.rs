//! What can go wrong.

use std::io;
use std::path::PathBuf;

use rustix::io::Errno;

use crate::criu::remote::{Reply, errno_of};

/// Why an image is not written or read, or nothing else is done. Where the daemon said so, in its words.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody answers on the socket, or we may not ask.
    #[error("{}: {source}", path.display())]
    Unreachable {
        /// The socket.
        path: PathBuf,
        /// What connect(2) said.
        source: io::Error,
    },
    /// There is no such image; to an end, no such snapshot (`ENOENT`).
    #[error("{0}")]
    NotFound(String),
    /// The snapshot is damaged, or the proxy has lost the cache (`EIO`).
    #[error("{0}")]
    Damaged(String),
    /// The daemon does not do it.
    #[error("{reason}")]
    Refused {
        /// The protocol's number for it.
        errno: Errno,
        /// The daemon's reason, or what the number means.
        reason: String,
    },
    /// The daemon closed the connection without a word, or said what the protocol does not have.
    #[error("{}: the conversation broke off: {why}", path.display())]
    Broken {
        /// The socket.
        path: PathBuf,
        /// What happened.
        why: String,
    },
    /// Something on this side: a pipe that cannot be made, a file that cannot be read.
    #[error("{0}")]
    Io(io::Error),
}

impl Error {
    /// What a reply with an error says.
    pub(super) fn told(reply: Reply) -> Error {
        let errno = errno_of(reply.error);
        let reason = if reply.reason.is_empty() { errno.to_string() } else { reply.reason };
        match errno {
            Errno::NOENT => Error::NotFound(reason),
            Errno::IO => Error::Damaged(reason),
            errno => Error::Refused { errno, reason },
        }
    }

    /// The errno of Linux for it; `None` if the conversation broke off.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Error::NotFound(_) => Some(Errno::NOENT),
            Error::Damaged(_) => Some(Errno::IO),
            Error::Refused { errno, .. } => Some(*errno),
            Error::Unreachable { source, .. } | Error::Io(source) => Errno::from_io_error(source),
            Error::Broken { .. } => None,
        }
    }
}

/// A reader's or writer's error, on its way through [`io::Read`] or [`io::Write`], stays what it was.
impl From<io::Error> for Error {
    fn from(error: io::Error) -> Error {
        error.downcast::<Error>().unwrap_or_else(Error::Io)
    }
}

impl From<Error> for io::Error {
    fn from(error: Error) -> io::Error {
        let kind = match error {
            Error::Io(source) => return source,
            Error::Unreachable { ref source, .. } => source.kind(),
            Error::NotFound(_) => io::ErrorKind::NotFound,
            Error::Broken { .. } => io::ErrorKind::UnexpectedEof,
            Error::Damaged(_) | Error::Refused { .. } => io::ErrorKind::Other,
        };
        io::Error::new(kind, error)
    }
}
