//! `criu-imagectl`: what an operator asks the daemons.
//!
//! Each command is a file. What it has to say goes to stdout in one piece, as text or, with
//! `--json`, as JSON; errors are a line or two on stderr, and the exit status ([`Exit`]) says which
//! kind. `push` and `extract` are clients of CRIU's stream protocol, as `criu dump` and
//! `criu restore` are; `put`, `get` and `finish` are of the remote protocol.

mod cli;
mod complaints;
mod criu;
mod exit;
mod extract;
mod finish;
mod generate;
mod get;
mod hook;
mod interrupts;
mod look;
mod man;
mod migrate;
mod open;
mod place;
mod print;
mod push;
mod put;
mod reach;
mod restore;
mod stream;
mod timeline;
mod view;
mod wait;
mod watch;
mod work_dir;
mod written;

pub use cli::Cli;
pub use exit::Exit;

use std::process::ExitCode;

use clap::Parser;

use cli::Command;
use exit::Failure;
use migrate::hand_over::HandOver;
use print::Output;

/// Runs the command that is asked for.
pub fn main() -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let outcome = match runtime {
        Ok(runtime) => runtime.block_on(asked()),
        Err(error) => Err(Failure::failed(format!("the event loop cannot be set up: {error}"))),
    };
    match outcome {
        Ok(()) => Exit::Done.into(),
        Err(failure) => {
            failure.report();
            failure.exit.into()
        }
    }
}

/// What CRIU asks, whose action script this is, or else what the arguments do.
async fn asked() -> Result<(), Failure> {
    match HandOver::asked() {
        Some(hand_over) => hand_over?.run().await,
        None if hook::called_by_criu() => hook::run_for_criu().await,
        None => run(Cli::parse()).await,
    }
}

async fn run(cli: Cli) -> Result<(), Failure> {
    let output = Output { json: cli.json };
    let daemon = cli.daemon;
    if !daemon.is_consistent() {
        return Err(Failure::usage("more than one daemon is named").cure(
            "at most one of --proxy, --cache and --socket; --instance goes with the first two",
        ));
    }
    match cli.command {
        Command::Status { watch: None } => look::status(&daemon, output).await,
        Command::Status { watch: Some(every) } => watch::run(&daemon, output, every).await,
        Command::List => look::list(&daemon, output).await,
        Command::Show(show) if show.timeline => timeline::run(&daemon, output, &show).await,
        Command::Show(show) => look::show(&daemon, output, &show.snapshot).await,
        Command::Wait(wait) => wait::run(&daemon, output, &wait).await,
        Command::Drop { snapshots } => look::drop_all(&daemon, output, &snapshots).await,
        Command::Extract(extract) => extract::run(&daemon, output, &extract).await,
        Command::View(view) => view::run(&daemon, output, &view).await,
        Command::Push(push) => push::run(&daemon, output, &push).await,
        Command::Migrate(args) => migrate::run(&daemon, output, &args).await,
        Command::Restore(args) => restore::run(&daemon, output, &args).await,
        Command::Put(put) => put::run(&daemon, output, &put),
        Command::Get(get) => get::run(&daemon, output, &get).await,
        Command::Hook(hook) => hook::run(&daemon, &hook).await,
        Command::Finish(finish) => finish::run(&daemon, output, &finish),
        Command::Open(open) => open::run(&daemon, output, &open).await,
        Command::Generate { what, dir } => generate::run(what, &dir),
    }
}
