//! The remote protocol as its clients see it: a real proxy and a real cache, joined over loopback TCP.
//!
//! The clients are those of this directory (`client.py`, `client.c`), a stand-in for CRIU's old ones,
//! and single connections that do one step at a time. No root is needed; `python3`, `cc` and `strace`
//! are, and that ptrace(2) is permitted.
#![allow(clippy::unwrap_used)]

// Each target uses a part of what they share.
#[allow(dead_code)]
#[path = "../bad_input/criu.rs"]
mod criu;
#[allow(dead_code)]
#[path = "../bad_input/daemons.rs"]
mod daemons;
#[allow(dead_code)]
#[path = "../bad_input/hosts.rs"]
mod hosts;

mod client;
mod historical;

mod clients;
mod files;
mod lists;
mod many;
mod old_clients;
mod order;
mod waiting;
