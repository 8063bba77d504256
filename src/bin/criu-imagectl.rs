//! The command: see `criu_image_relay::ctl`.

use std::process::ExitCode;

fn main() -> ExitCode {
    criu_image_relay::ctl::main()
}
