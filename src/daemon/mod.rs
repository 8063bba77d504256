//! What both daemons need to be services: options, sockets, accepting, logs, readiness, notices to
//! systemd, what systemd keeps, reload and an orderly end.

pub mod accept;
mod background;
pub mod cli;
pub mod fd_store;
mod floods;
pub mod given;
pub mod handed_over;
pub mod idlers;
pub mod journal;
pub mod local_peers;
mod logging;
mod notify;
pub mod outages;
pub mod page_server;
mod pidfile;
pub mod places;
pub mod rate;
pub mod remote;
mod service;
pub mod sessions;
mod sockets;
mod start;

pub use service::Daemon;
pub use sockets::{Bound, CONTROL_SOCKET, SocketError, Sockets, Wanted};
pub use start::main;
