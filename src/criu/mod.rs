//! What CRIU says: one file per protocol, codecs and session state machines without sockets.

pub mod capture;
mod historical;
pub mod images;
pub mod names;
pub mod remote;
pub mod stream;

#[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic)]
#[rustfmt::skip]
mod generated;
