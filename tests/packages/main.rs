//! The packages. The Debian package: built by Debian's own compiler without a network, twice, and installed on hosts
//! that have nothing of the relay, where the first steps of the README are run as they are written. The rpm: built in the same
//! way, and held against it. Root is needed, and:
//!
//! ```text
//! cargo build --release --bins --examples
//! cargo test --release --test packages -- --test-threads=1
//! ```
//!
//! The first test that needs a package builds it, which takes minutes. `CRIU_IMAGE_RELAY_PACKAGES` names a directory
//! to take the Debian package from instead, as `packaging/check-reproducible` leaves it, and `CRIU_IMAGE_RELAY_RPMS`
//! one that `packaging/build-rpm` filled: for work on these tests.

// A test's helpers fail by panicking, too.
#![allow(clippy::unwrap_used)]

#[path = "../hosts/bed.rs"]
#[allow(dead_code)]
mod bed;
mod built;

mod content;
mod debian12;
mod debian13;
mod getting_started;
mod rpm;
