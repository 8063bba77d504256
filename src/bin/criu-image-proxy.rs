//! The image proxy: takes CRIU's dumps on the source host.

use std::process::ExitCode;

use clap::Parser;
use criu_image_relay::daemon::{self, cli::ProxyCli};
use criu_image_relay::proxy::Proxy;

fn main() -> ExitCode {
    daemon::main::<Proxy>(&ProxyCli::parse().common)
}
