//! Why a dump fails.

use std::time::Duration;

use crate::criu::capture::Fault;
use crate::daemon::sessions::BadSession;

/// Why a dump failed. The peer, the snapshot and the image are in the log line's fields.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    /// CRIU, or what speaks in its place, broke the protocol.
    #[error("{0}")]
    Session(#[from] BadSession),
    /// It broke the protocol's order.
    #[error("{0}")]
    Fault(#[from] Fault),
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
    /// The cache has not said in time whether it accepts something.
    pub(super) fn unanswered(limit: Duration) -> Failure {
        Failure::Lost(format!("the cache did not answer within {limit:?}"))
    }

    /// The image that it concerns, if it is one.
    pub(super) fn image(&self) -> Option<&str> {
        match self {
            Failure::Session(BadSession::Pipe { name, .. })
            | Failure::Image { name, .. }
            | Failure::Fault(Fault::OpenedTwice(name)) => Some(name),
            _ => None,
        }
    }
}
