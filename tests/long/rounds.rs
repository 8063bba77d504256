//! What a second round costs a run, the larger it is, when every second page has been written to since the first.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../bad_input/daemons.rs"]
#[allow(dead_code, reason = "what is not asked for here, other targets have")]
mod daemons;
#[path = "../pages/page_client.rs"]
#[allow(dead_code, reason = "what is not asked for here, other targets have")]
mod page_client;
#[path = "../pages/rounds.rs"]
mod rounds;

use std::process::{Command, ExitCode};
use std::time::Duration;

use rounds::{daemons, second_round};

const USAGE: &str = "\
usage: tests/long/rounds [--build DIR]

Sends the memory of a process in a first round, and every second page of it in a second one: of 64, 128, 256 and 512 MiB and of 1 GiB.
Prints the time that the second one took for each run that was said, and the slowest answer of the cache to `status` meanwhile.
Exit status 0 says that no size costs more than 1.5 times as much a run as the one before it, and that every answer came within
100 ms.

  --build DIR   the binaries to try (default: this checkout's)
";

/// How long an answer of the cache may take, whatever else it does.
const AT_ONCE: Duration = Duration::from_millis(100);

/// In MiB.
const SIZES: [u64; 5] = [64, 128, 256, 512, 1024];

fn main() -> ExitCode {
    let told: Vec<String> = std::env::args().skip(1).collect();
    match told.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => {}
        ["--help" | "-h"] => {
            print!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        ["--build", dir] => return with_build(dir),
        _ => {
            eprint!("{USAGE}");
            return ExitCode::from(2);
        }
    }
    println!("  MiB   µs a run   slowest status");
    let (mut before, mut failed) = (None, false);
    for mib in SIZES {
        let cost = second_round(&daemons(mib * 3), mib);
        let (a_run, slowest) = (cost.a_run.as_secs_f64() * 1e6, cost.slowest_status);
        let grown = before.is_some_and(|before| a_run > before * 1.5);
        let late = slowest > AT_ONCE;
        let why = match (grown, late) {
            (false, false) => "",
            (true, false) => "  the time a run has grown",
            (false, true) => "  an answer came late",
            (true, true) => "  the time a run has grown, and an answer came late",
        };
        println!("{mib:5} {a_run:10.1} {:13.1} ms{why}", slowest.as_secs_f64() * 1e3);
        failed |= grown || late;
        before = Some(a_run);
    }
    ExitCode::from(u8::from(failed))
}

/// The same with other binaries.
fn with_build(dir: &str) -> ExitCode {
    let again = std::env::current_exe().unwrap();
    let build = std::path::absolute(dir).unwrap();
    let ended = Command::new(again).env("CRIU_IMAGE_RELAY_BUILD", build).status().unwrap();
    ExitCode::from(u8::from(!ended.success()))
}
