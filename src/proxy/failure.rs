//! Why a dump fails.

use crate::criu::capture::Fault;
use crate::criu::stream::BadRequest;
use crate::daemon::sessions::BadSession;
use crate::sys::pipe::NotThatEnd;

/// Why a dump failed. The peer, the snapshot and the image are in the log line's fields.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    /// CRIU, or what speaks in its place, broke the protocol.
    #[error("{0}")]
    Session(#[from] BadSession),
    /// Its request cannot be understood.
    #[error("{0}")]
    Request(#[from] BadRequest),
    /// It passed no usable descriptor with a request.
    #[error("image {name}: {cause}")]
    Descriptor {
        /// The image.
        name: String,
        /// What came instead.
        cause: BadSession,
    },
    /// It broke the protocol's order.
    #[error("{0}")]
    Fault(#[from] Fault),
    /// It passed something else than the read end of a pipe.
    #[error("image {name}: {cause}")]
    Pipe {
        /// The image.
        name: String,
        /// What it was.
        cause: NotThatEnd,
    },
    /// It stopped writing an image, or its pipe failed.
    #[error("image {name}: {cause}")]
    Image {
        /// The image.
        name: String,
        /// What happened.
        cause: String,
    },
    /// It closed the session before it had written all.
    #[error("{0}")]
    Incomplete(String),
    /// The operator or the end of the daemon stopped it.
    #[error("{0}")]
    Stopped(String),
    /// The cache or the link to it failed.
    #[error("{0}")]
    Lost(String),
}

impl Failure {
    /// The image that it concerns, if it is one.
    pub(super) fn image(&self) -> Option<&str> {
        match self {
            Failure::Descriptor { name, .. }
            | Failure::Pipe { name, .. }
            | Failure::Image { name, .. }
            | Failure::Fault(Fault::OpenedTwice(name)) => Some(name),
            _ => None,
        }
    }
}
