//! Notices to systemd (`sd_notify(3)`). Without systemd they go nowhere.

use std::time::Duration;

use sd_notify::NotifyState;

fn send(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!("cannot notify systemd: {error}");
    }
}

/// The sockets are served.
pub(super) fn ready(status: &str) {
    send(&[NotifyState::Ready, NotifyState::Status(status)]);
}

/// The configuration is being read again.
pub(super) fn reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => send(&[NotifyState::Reloading, now]),
        Err(error) => tracing::debug!("no monotonic clock: {error}"),
    }
}

/// The line that `systemctl status` shows.
pub(super) fn status(status: &str) {
    send(&[NotifyState::Status(status)]);
}

/// The event loop turns.
pub(super) fn watchdog() {
    send(&[NotifyState::Watchdog]);
}

/// The daemon ends; it needs `more` time from now on.
pub(super) fn stopping(status: &str, more: Duration) {
    let more = u32::try_from(more.as_micros()).unwrap_or(u32::MAX);
    send(&[
        NotifyState::Stopping,
        NotifyState::ExtendTimeoutUsec(more),
        NotifyState::Status(status),
    ]);
}

/// How often systemd wants to hear from the daemon, if at all: half of `WatchdogSec=`.
pub(super) fn watchdog_interval() -> Option<Duration> {
    sd_notify::watchdog_enabled().map(|limit| limit / 2)
}
