//! CRIU and the daemons in a guest whose kernel tracks dirty pages, so that CRIU pre-dumps (see
//! `tests/bed/guest`). Root is needed to make the guest's disk, once; `tests/all` runs these after
//! building what they need:
//!
//! ```text
//! cargo build --release --bins --examples
//! cargo test --release --test guest -- --test-threads=1
//! ```

// A test's helpers fail by panicking, too.
#![allow(clippy::unwrap_used)]

mod bed;
mod dirtier;

mod memory;
mod migrate;
mod phaul;
mod precopy;
mod relay;
mod rounds;
