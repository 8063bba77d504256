//! Notices to systemd (`sd_notify(3)`). Without systemd they go nowhere.
//!
//! systemd reads them one after the other, and its queue for those of all services has some hundred places. Who finds it full
//! waits for a place, and the event loop goes on.

use std::env;
use std::ffi::OsStr;
use std::io;
use std::os::fd::BorrowedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{self, SocketAddr};
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::io::Interest;
use tokio::net::UnixDatagram;

use crate::sys::scm::send_message;

/// Where systemd reads notices.
const SOCKET: &str = "NOTIFY_SOCKET";

/// Whether there is anybody who reads them.
pub(super) fn is_read() -> bool {
    env::var_os(SOCKET).is_some()
}

/// Sends a notice, with a descriptor if one belongs to it.
pub(super) async fn send(
    states: &[NotifyState<'_>],
    descriptor: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let Some(address) = env::var_os(SOCKET) else { return Ok(()) };
    let text = states.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
    let socket = connect(&address)?;
    let send = || send_message(&socket, text.as_bytes(), descriptor);
    socket.async_io(Interest::WRITABLE, send).await
}

/// A socket for each notice: the one of before may be that of a systemd which was executed anew.
fn connect(address: &OsStr) -> io::Result<UnixDatagram> {
    let socket = net::UnixDatagram::unbound()?;
    match address.as_bytes().strip_prefix(b"@") {
        Some(name) => socket.connect_addr(&SocketAddr::from_abstract_name(name)?)?,
        None => socket.connect(address)?,
    }
    socket.set_nonblocking(true)?;
    UnixDatagram::from_std(socket)
}

async fn tell(states: &[NotifyState<'_>]) {
    if let Err(error) = send(states, None).await {
        tracing::debug!("cannot notify systemd: {error}");
    }
}

/// The sockets are served.
pub(super) async fn ready(status: &str) {
    tell(&[NotifyState::Ready, NotifyState::Status(status)]).await;
}

/// The configuration is being read again.
pub(super) async fn reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => tell(&[NotifyState::Reloading, now]).await,
        Err(error) => tracing::debug!("no monotonic clock: {error}"),
    }
}

/// The line that `systemctl status` shows.
pub(super) async fn status(status: &str) {
    tell(&[NotifyState::Status(status)]).await;
}

/// The event loop turns.
pub(super) async fn watchdog() {
    tell(&[NotifyState::Watchdog]).await;
}

/// The daemon ends; it needs `more` time from now on.
pub(super) async fn stopping(status: &str, more: Duration) {
    let more = u32::try_from(more.as_micros()).unwrap_or(u32::MAX);
    let more = NotifyState::ExtendTimeoutUsec(more);
    tell(&[NotifyState::Stopping, more, NotifyState::Status(status)]).await;
}

/// How often systemd wants to hear from the daemon, if at all: half of `WatchdogSec=`.
pub(super) fn watchdog_interval() -> Option<Duration> {
    sd_notify::watchdog_enabled().map(|limit| limit / 2)
}
