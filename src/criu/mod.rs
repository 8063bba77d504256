//! What CRIU says: one module per protocol, codecs and session state machines without sockets.
//!
//! Nothing is wired yet to [`page_server`], [`pagemap`] and [`pages`].

pub mod capture;
mod historical;
pub mod images;
pub mod names;
pub mod page_server;
pub mod pagemap;
pub mod pages;
pub mod remote;
pub mod stream;

#[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic)]
#[rustfmt::skip]
mod generated;
