//! Logs: to journald with fields where a journal is, to stderr where there is none.

use std::io::{self, IsTerminal};
use std::os::fd::AsFd;

use tracing::Level;
use tracing_journald::{Priority, PriorityMappings};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry, reload};

/// Changes the level while the daemon runs.
#[derive(Debug)]
pub(super) struct Logging {
    verbose: u8,
    level: reload::Handle<Targets, Registry>,
}

impl Logging {
    /// Starts logging. `verbose` counts `-v`, and adds to the configured level.
    pub(super) fn start(level: Level, verbose: u8) -> Logging {
        let (filter, handle) = reload::Layer::new(filter(level, verbose));
        let output = match journal() {
            Some(layer) => layer.boxed(),
            None => tracing_subscriber::fmt::layer()
                .with_writer(io::stderr)
                .with_ansi(io::stderr().is_terminal())
                .with_target(false)
                .boxed(),
        };
        // A second logger in one process can only be a test's.
        let _ = tracing_subscriber::registry().with(filter).with(output).try_init();
        Logging { verbose, level: handle }
    }

    /// Puts another configured level in force.
    pub(super) fn set_level(&self, level: Level) {
        let _ = self.level.reload(filter(level, self.verbose));
    }
}

fn filter(level: Level, verbose: u8) -> Targets {
    let least = match verbose {
        0 => level,
        1 => Level::DEBUG,
        _ => Level::TRACE,
    };
    let level = level.max(least);
    // The libraries tell of their insides at trace, zlink of a peer's bytes as if they were text.
    Targets::new()
        .with_default(level.min(Level::DEBUG))
        .with_target(env!("CARGO_CRATE_NAME"), level)
}

/// The journal, if stderr is connected to it: a daemon started from a terminal logs to the terminal.
fn journal() -> Option<tracing_journald::Layer> {
    let connected = std::env::var("JOURNAL_STREAM").ok()?;
    let stat = rustix::fs::fstat(io::stderr().as_fd()).ok()?;
    if connected != format!("{}:{}", stat.st_dev, stat.st_ino) {
        return None;
    }
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
