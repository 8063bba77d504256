//! The image cache: holds checkpoints on the destination host and serves them to restores.

use std::process::ExitCode;

use clap::Parser;
use criu_image_relay::cache::Cache;
use criu_image_relay::daemon::{self, cli::CacheCli};

fn main() -> ExitCode {
    daemon::main::<Cache>(&CacheCli::parse().common)
}
