//! What both daemons need to be services: options, sockets, accepting, logs, notices to systemd,
//! reload and an orderly end.

pub mod accept;
pub mod cli;
pub mod handed_over;
pub mod journal;
mod logging;
mod notify;
pub mod rate;
pub mod remote;
mod service;
pub mod sessions;
mod sockets;

pub use service::{Daemon, main};
pub use sockets::{CONTROL_SOCKET, SocketError, Sockets, Wanted};
