//! Why a dump fails.

use std::time::Duration;

use crate::criu::capture::Fault;
use crate::daemon::page_server::BadClient;
use crate::daemon::sessions::BadSession;
use crate::metrics::refusals::Reason;

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
    /// A client that sends pages stalled, or said what is no command.
    #[error("{0}")]
    Client(#[from] BadClient),
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

    /// Why a peer that has begun nothing yet is not served.
    pub(super) fn reason(&self) -> Reason {
        match self {
            Failure::Session(bad) => bad.into(),
            Failure::Client(bad) => bad.into(),
            _ => Reason::Protocol,
        }
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
