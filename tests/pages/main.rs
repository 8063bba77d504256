//! Rounds of pages as a dump sends them: a real proxy and a real cache, joined over loopback TCP.
//!
//! A stand-in speaks in CRIU's place, for processes that are a model of memory and of the kernel's notes
//! of what was written to. No root is needed.
#![allow(clippy::unwrap_used)]

// Each target uses a part of what they share.
#[allow(dead_code)]
#[path = "../bad_input/criu.rs"]
mod criu;
#[allow(dead_code)]
#[path = "../bad_input/daemons.rs"]
mod daemons;

mod bench;
mod forwarder;
mod model;
// The tests of tests/bad_input use it, too.
#[allow(dead_code)]
mod page_client;

mod chain;
mod cuts;
mod memory;
mod order;
#[allow(dead_code, reason = "what is not asked for here, tests/long has")]
mod rounds;
mod views;
