//! Signals that ask a command to end, so that it can leave everything as it was.

use std::io;

use tokio::select;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::exit::{Exit, Failure};

/// SIGINT, SIGTERM and SIGHUP, from now on.
#[derive(Debug)]
pub(super) struct Interrupts {
    int: Signal,
    term: Signal,
    hangup: Signal,
}

/// One of them came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Interrupted;

impl From<Interrupted> for Failure {
    fn from(_: Interrupted) -> Failure {
        Failure::new(Exit::Interrupted, "interrupted")
    }
}

impl Interrupts {
    /// From now on they do not end the process by themselves.
    pub(super) fn catch() -> Result<Interrupts, Failure> {
        let failed = |error: io::Error| Failure::failed(format!("signals: {error}"));
        Ok(Interrupts {
            int: signal(SignalKind::interrupt()).map_err(failed)?,
            term: signal(SignalKind::terminate()).map_err(failed)?,
            hangup: signal(SignalKind::hangup()).map_err(failed)?,
        })
    }

    /// The next one. It can be cancelled without losing one.
    pub(super) async fn next(&mut self) -> Interrupted {
        select! {
            _ = self.int.recv() => {}
            _ = self.term.recv() => {}
            _ = self.hangup.recv() => {}
        }
        Interrupted
    }

    /// What a future gives, unless one comes first; then the future is dropped.
    pub(super) async fn during<T>(
        &mut self,
        future: impl Future<Output = T>,
    ) -> Result<T, Interrupted> {
        select! {
            biased;
            interrupted = self.next() => Err(interrupted),
            output = future => Ok(output),
        }
    }
}
