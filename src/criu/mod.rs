//! What CRIU says: one file per protocol, codecs and session state machines without sockets.

pub mod capture;
pub mod images;
pub mod stream;

#[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic)]
#[rustfmt::skip]
mod generated;
