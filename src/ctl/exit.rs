//! How the command ends: the exit status, and what is said about it.

use std::fmt::Display;
use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

use super::place;
use crate::client;
use crate::control::ClientError;

/// The exit status. `--help` documents it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// What was asked is done.
    Done = 0,
    /// It failed.
    Failed = 1,
    /// The arguments are wrong.
    Usage = 2,
    /// The daemon cannot be reached, or the proxy has no link to the cache that a process is to go to.
    Unreachable = 3,
    /// The daemon knows no such snapshot, or no such image.
    NoSuchSnapshot = 4,
    /// The snapshot is damaged.
    Damaged = 5,
    /// It took longer than `--timeout` allows.
    TimedOut = 6,
    /// The process would be frozen for longer than `--max-downtime` allows.
    OutOfReach = 7,
    /// A signal ended it.
    Interrupted = 8,
    /// A process may run on both hosts, or on none: the message says what is known and what is to be done.
    Unsure = 9,
}

/// The exit status as `--help` tells it.
pub(super) const HELP: &str = "\
Exit status:
  0  done
  1  failed
  2  wrong usage
  3  the daemon cannot be reached, or does not answer; migrate: there is no link to the cache
  4  no such snapshot or image
  5  the snapshot is damaged
  6  timed out
  7  --max-downtime is out of reach: the process was not frozen and runs on
  8  interrupted by a signal: what it was about is as it was before
  9  a migration broke off, and the process may run on both hosts or on none: the message says what is
     known, and what to do on each host";

/// What to do when a daemon ends in the middle.
const ENDED: &str = "the daemon has ended, or was restarted: its journal says why. Try again";
/// What to do when a daemon closes without a word.
const BROKEN: &str =
    "the daemon's journal says why; a uid that is not among its allow-uids is turned away";

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit as u8)
    }
}

/// Why the command failed: what was wrong and where, and what to do about it.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub(super) struct Failure {
    pub(super) exit: Exit,
    what: String,
    cure: Option<String>,
    /// The daemon is not there, or has gone in the middle.
    daemon_gone: bool,
}

impl Failure {
    pub(super) fn new(exit: Exit, what: impl Into<String>) -> Failure {
        Failure { exit, what: what.into(), cure: None, daemon_gone: false }
    }

    pub(super) fn failed(what: impl Into<String>) -> Failure {
        Failure::new(Exit::Failed, what)
    }

    pub(super) fn usage(what: impl Into<String>) -> Failure {
        Failure::new(Exit::Usage, what)
    }

    /// A snapshot that can never be restored.
    pub(super) fn damaged(id: &str, reason: &str) -> Failure {
        Failure::new(Exit::Damaged, format!("snapshot {id} is damaged: {reason}")).cure(
            "it can never be restored. If criu dump failed, the process runs on: dump it again",
        )
    }

    /// Says what to do.
    pub(super) fn cure(self, cure: impl Into<String>) -> Failure {
        Failure { cure: Some(cure.into()), ..self }
    }

    /// Adds what is so all the same, before what is to be done.
    pub(super) fn note(self, note: impl Into<String>) -> Failure {
        let cure = match self.cure {
            None => note.into(),
            Some(cure) => format!("{}; {cure}", note.into()),
        };
        Failure { cure: Some(cure), ..self }
    }

    /// The process may run on both hosts or on none: what is known of it, and what to do.
    pub(super) fn unsure(self, known: impl Display, cure: impl Into<String>) -> Failure {
        Failure::new(Exit::Unsure, format!("{}; {known}", self.what)).cure(cure)
    }

    /// Adds what the proxy knows of it, unless that is said already, or somebody wanted it so.
    pub(super) fn with_reason_of_proxy(self, why: &str) -> Failure {
        if self.what.contains(why) || self.exit == Exit::Interrupted {
            return self;
        }
        // Before what CRIU complained of: that it could not go on.
        let (first, rest) = self.what.split_at(self.what.find('\n').unwrap_or(self.what.len()));
        Failure { what: format!("{first}\n    the proxy: {why}{rest}"), ..self }
    }

    /// It is one of a daemon that has gone in the middle.
    pub(super) fn of_a_daemon_gone(self) -> Failure {
        Failure { daemon_gone: true, ..self }
    }

    /// Whether it says what to do.
    pub(super) fn has_cure(&self) -> bool {
        self.cure.is_some()
    }

    /// Whether the daemon is not there, or has gone in the middle: it may come back.
    pub(super) fn is_daemon_gone(&self) -> bool {
        self.daemon_gone
    }

    /// Writes it to stderr. If that cannot be written, nobody reads it.
    pub(super) fn report(&self) {
        let mut stderr = io::stderr().lock();
        let _ = writeln!(stderr, "criu-imagectl: {}", self.what);
        if let Some(cure) = &self.cure {
            let _ = writeln!(stderr, "  {cure}");
        }
    }
}

/// What to do when nobody answers on a socket, or we may not ask.
fn unreachable(socket: &Path, error: &io::Error) -> String {
    if error.kind() == io::ErrorKind::PermissionDenied {
        return "be root, or a user in allow-uids and in the group criu-image".to_owned();
    }
    if error.kind() == io::ErrorKind::TimedOut {
        return place::service(socket).map_or_else(
            || "see its log".to_owned(),
            |unit| format!("it cannot start, or stands still: journalctl -u {unit} says why"),
        );
    }
    place::unit(socket).map_or_else(
        || "start the daemon whose --work-dir this is".to_owned(),
        |unit| format!("systemctl start {unit}"),
    )
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Failure {
        let what = error.to_string();
        match error {
            ClientError::Unreachable { path, source } => {
                let cure = unreachable(&path, &source);
                let what = format!("the daemon cannot be reached: {what}");
                let denied = source.kind() == io::ErrorKind::PermissionDenied;
                Failure { daemon_gone: !denied, ..Failure::new(Exit::Unreachable, what).cure(cure) }
            }
            ClientError::Broken { answered, .. } => {
                let cure = if answered { ENDED } else { BROKEN };
                Failure { daemon_gone: true, ..Failure::failed(what).cure(cure) }
            }
            ClientError::NoSuchSnapshot(_) => {
                Failure::new(Exit::NoSuchSnapshot, what).cure("criu-imagectl list")
            }
            ClientError::Refused(_) => Failure::failed(format!("the daemon refuses: {what}")),
        }
    }
}

/// For the commands of the remote protocol, which add what the cure depends on.
impl From<client::Error> for Failure {
    fn from(error: client::Error) -> Failure {
        use client::Error;

        let what = error.to_string();
        match error {
            Error::Unreachable { path, source } => {
                let cure = unreachable(&path, &source);
                let what = format!("the daemon cannot be reached: {what}");
                Failure::new(Exit::Unreachable, what).cure(cure)
            }
            Error::NotFound(_) => Failure::new(Exit::NoSuchSnapshot, what),
            Error::Damaged(_) => Failure::new(Exit::Damaged, what),
            Error::Refused { .. } => Failure::failed(format!("the daemon refuses: {what}")),
            Error::Broken { .. } => Failure::failed(what).cure(BROKEN),
            Error::Io(_) => Failure::failed(what),
        }
    }
}
