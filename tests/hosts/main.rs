//! The main job on real parts: stock CRIU, systemd and journald on two hosts with addresses of their
//! own (see `tests/bed`). Root is needed; `tests/all` runs these after building what they need:
//!
//! ```text
//! cargo build --release --bins --examples
//! cargo test --release --test hosts -- --test-threads=1
//! ```

// A test's helpers fail by panicking, too.
#![allow(clippy::unwrap_used)]

mod bed;
mod handbook;
// What is not asked for here, other targets have.
#[path = "../messages/mod.rs"]
mod messages;
// The tests of tests/figures use all of it.
#[allow(dead_code)]
#[path = "../figures/scrape.rs"]
mod scrape;

mod confinement;
mod directories;
mod drop_ins;
mod failed_restores;
mod failures;
mod figures;
mod hand_over;
mod instances;
mod journal;
mod limits;
mod local_users;
mod memory;
mod migration;
mod one_command;
mod page_server;
mod service;
mod views;
