//! Peers that break the rules: each costs its own session, with a message that names peer, snapshot,
//! image and cause; the daemon and every other session go on as they were.
//!
//! The daemons are real, their peers are stand-ins made of the library's codecs. No root is needed,
//! and no systemd.
#![allow(clippy::unwrap_used)]

mod cache_standin;
mod criu;
mod crowds;
// The tests of tests/remote use it, too.
#[allow(dead_code)]
mod daemons;
mod hosts;
mod lazy;
mod link;
// The tests of tests/pages have it.
#[allow(dead_code)]
#[path = "../pages/page_client.rs"]
mod page_client;
mod proxy_standin;
mod remote;

mod capture;
mod capture_waits;
mod descriptors;
mod dropping;
mod gets_at_proxy;
mod link_at_cache;
mod link_at_proxy;
mod link_order;
mod memory;
mod metrics;
mod opened;
mod outcomes;
mod pages_at_cache;
mod pages_at_proxy;
mod pages_at_proxy_wait;
mod quota;
mod remote_headers;
mod remote_link_at_cache;
mod remote_link_at_proxy;
mod remote_lists;
mod remote_readers;
mod remote_writers;
mod remote_writers_wait;
mod requests_at_cache;
mod requests_at_proxy;
mod rounds_at_cache;
mod serve;
mod serve_waits;
mod told;
