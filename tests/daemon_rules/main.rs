//! The rules by which daemons are started and ended without systemd, as CRIU's own daemons have them:
//! in the background, with a pid file, with a descriptor that tells that they serve, on a socket that
//! is connected already.
//!
//! The daemons are real. No root is needed.
#![allow(clippy::unwrap_used)]

mod run;
mod speak;

mod activated;
mod given;
mod given_end;
mod kept;
mod settings;
mod start;
mod usage;
