//! Logs: to a file if one is named, else to journald with fields where a journal is, else to stderr.

use std::fmt::Display;
use std::fs::File;
use std::io::{self, IsTerminal};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::OFlags;
use rustix::io::Errno;
use tracing::Level;
use tracing_journald::{Priority, PriorityMappings};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry, reload};

use super::floods::Floods;
use super::journal;
use crate::config::LogSettings;

/// Where journald takes messages (systemd-journald.service(8)).
pub(super) const JOURNAL: &str = "/run/systemd/journal/socket";

/// Changes the level, and the file, while the daemon runs.
#[derive(Debug)]
pub(super) struct Logging {
    level: reload::Handle<Targets, Registry>,
    file: Option<LogFile>,
    on_stderr: bool,
    floods: Floods,
}

impl Logging {
    /// Starts logging. In the `background` there is no stderr to fall back on.
    pub(super) fn start(settings: &LogSettings, background: bool) -> io::Result<Logging> {
        let (filter, level) = reload::Layer::new(filter(settings.level));
        let file = settings.file.as_deref().map(LogFile::start).transpose()?;
        let connected = stderr_is_journal();
        let journal = if file.is_none() && (connected || background) { journald() } else { None };
        if background && file.is_none() && journal.is_none() {
            return Err(io::Error::other("the journal does not answer; name a --log-file"));
        }
        let on_stderr = file.is_none() && (journal.is_none() || connected);
        let text = tracing_subscriber::fmt::layer().with_target(false);
        let output = match (journal, &file) {
            (Some(layer), _) => layer.boxed(),
            (None, Some(file)) => {
                let current = file.current.clone();
                let writer = move || current.lock().unwrap_or_else(PoisonError::into_inner).clone();
                text.with_writer(writer).with_ansi(false).boxed()
            }
            (None, None) => {
                text.with_writer(io::stderr).with_ansi(io::stderr().is_terminal()).boxed()
            }
        };
        let floods = Floods::default();
        let layers = tracing_subscriber::registry().with(filter).with(floods.clone()).with(output);
        // A second logger in one process can only be a test's.
        let _ = layers.try_init();
        Ok(Logging { level, file, on_stderr, floods })
    }

    /// Puts another configured level in force.
    pub(super) fn set_level(&self, level: Level) {
        let _ = self.level.reload(filter(level));
    }

    /// Opens the log file anew, if there is one: the one that is open may have been moved away.
    pub(super) fn reopen(&self) {
        if let Some(Err(error)) = self.file.as_ref().map(LogFile::reopen) {
            tracing::error!(
                message_id = journal::LOG_NOT_REOPENED,
                criu_reason = %error,
                "logging goes on to the file that was open: {error}"
            );
        }
    }

    /// Says how many messages of a flood were left out, when its minute is over; at the `end` in any case. To be called
    /// about once a second.
    pub(super) fn tell_left_out(&self, end: bool) {
        self.floods.tell_left_out(end);
    }

    /// Whether what is logged is seen where stderr is.
    pub(super) fn is_on_stderr(&self) -> bool {
        self.on_stderr
    }
}

/// Logs why a daemon cannot start.
pub(super) fn failed(error: &dyn Display) {
    let message_id = journal::DAEMON_FAILED;
    tracing::error!(message_id, criu_reason = %error, "cannot start: {error}");
}

/// The same before logging has started: in the journal, if stderr goes there. Returns whether it did.
pub(super) fn tell_failure(error: &dyn Display) -> bool {
    let Some(journal) = stderr_is_journal().then(journald).flatten() else { return false };
    tracing::subscriber::with_default(Registry::default().with(journal), || failed(error));
    true
}

/// The log file. What logs takes hold of the one that is current, hence the two `Arc`.
#[derive(Debug)]
struct LogFile {
    path: PathBuf,
    current: Arc<Mutex<Arc<File>>>,
}

impl LogFile {
    fn start(path: &Path) -> io::Result<LogFile> {
        let current = Arc::new(Mutex::new(Arc::new(open(path)?)));
        Ok(LogFile { path: path.to_owned(), current })
    }

    fn reopen(&self) -> io::Result<()> {
        let file = Arc::new(open(&self.path)?);
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = file;
        Ok(())
    }
}

fn open(path: &Path) -> io::Result<File> {
    open_ours(path).map_err(|error| {
        let text = format!("cannot open the log file {}: {error}", path.display());
        io::Error::new(error.kind(), text)
    })
}

/// Opens a file that nobody else has put there: in a directory that others may write to, they could have a
/// daemon of root's append to any file.
fn open_ours(path: &Path) -> io::Result<File> {
    let refused = |why| Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
    let flags = i32::try_from(OFlags::NOFOLLOW.bits()).map_err(io::Error::other)?;
    let opened =
        File::options().append(true).create(true).mode(0o600).custom_flags(flags).open(path);
    let file = match opened {
        Err(error) if Errno::from_io_error(&error) == Some(Errno::LOOP) => {
            return refused("it is a symbolic link, which is not followed; name the file itself");
        }
        opened => opened?,
    };
    let (found, ours) = (file.metadata()?, rustix::process::geteuid().as_raw());
    if found.uid() != 0 && found.uid() != ours {
        return refused("it belongs to another user; remove it, or change its owner");
    }
    if found.is_file() && found.nlink() > 1 {
        return refused("it has another name, too (a hard link); remove it");
    }
    Ok(file)
}

fn filter(level: Level) -> Targets {
    // The libraries tell of their insides at trace, zlink of a peer's bytes as if they were text.
    Targets::new()
        .with_default(level.min(Level::DEBUG))
        .with_target(env!("CARGO_CRATE_NAME"), level)
}

/// Whether stderr is connected to the journal: a daemon started from a terminal logs to the terminal.
fn stderr_is_journal() -> bool {
    let Ok(connected) = std::env::var("JOURNAL_STREAM") else { return false };
    let stat = rustix::fs::fstat(io::stderr().as_fd());
    stat.is_ok_and(|stat| connected == format!("{}:{}", stat.st_dev, stat.st_ino))
}

/// Fields go to the journal under the names that they have in the code, in capitals: `criu_snapshot` is
/// `CRIU_SNAPSHOT`, and `message_id` needs no more. The layer adds `SPAN_NAME`, `TARGET`, `CODE_FILE` and so on.
fn journald() -> Option<tracing_journald::Layer> {
    let layer = tracing_journald::layer().ok()?.with_field_prefix(None);
    // The layer's own choice is a step louder: notice for info.
    Some(layer.with_priority_mappings(PriorityMappings {
        error: Priority::Error,
        warn: Priority::Warning,
        info: Priority::Informational,
        debug: Priority::Debug,
        trace: Priority::Debug,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_log_goes_to_no_file_that_somebody_else_has_led_it_to() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        open(&at("log")).unwrap();
        open(&at("log")).unwrap();
        symlink(at("log"), at("soft")).unwrap();
        symlink(at("missing"), at("dangling")).unwrap();
        for link in ["soft", "dangling"] {
            let refused = open(&at(link)).unwrap_err().to_string();
            assert!(refused.ends_with("is not followed; name the file itself"), "{refused}");
        }
        assert!(!at("missing").exists());
        std::fs::hard_link(at("log"), at("hard")).unwrap();
        let refused = open(&at("hard")).unwrap_err().to_string();
        assert!(refused.contains("a hard link"), "{refused}");
    }
}
