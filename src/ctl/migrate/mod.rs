//! `migrate`: a process moves in rounds, and stands still only for the last one.
//!
//! `plan` decides, `memory` counts, `commands` says what CRIU is to do; `migration` does it. The process runs
//! on here whatever fails: CRIU kills it when its action script, `hand_over`, has come back with the
//! cache's acknowledgement of the whole snapshot, and not before.

mod alone;
pub(super) mod args;
mod beforehand;
mod commands;
mod decision;
pub(super) mod hand_over;
mod memory;
mod migration;
mod plan;
mod report;

use std::env;
use std::path::PathBuf;

use serde_json::json;

use self::alone::Alone;
use self::args::Migrate;
use self::commands::Commands;
use self::hand_over::HandOver;
use self::migration::Migration;
use self::report::Outcome;
use super::cli::Daemon;
use super::criu::Run;
use super::exit::{Exit, Failure};
use super::interrupts::Interrupts;
use super::print::Output;
use super::reach;
use crate::control::model::Role;
use crate::criu::names::check_id;

/// Migrates, and prints the summary.
pub(super) async fn run(daemon: &Daemon, output: Output, args: &Migrate) -> Result<(), Failure> {
    let id = snapshot_id(args)?;
    if args.dry_run {
        return dry_run(output, args, id);
    }
    let mut interrupts = Interrupts::catch()?;
    let client = reach::only(daemon, Role::Proxy, "migrate").await?;
    let _alone = Alone::claim(args.tree)?;
    let mut migration = Migration::prepare(args, id, client, &mut interrupts).await?;
    let summary = match migration.run(&mut interrupts).await {
        Ok(summary) => summary,
        Err(failure) => return Err(migration.broken_off(failure, &mut interrupts).await),
    };
    output.print(&summary, || summary.text())?;
    match summary.outcome {
        Outcome::Migrated | Outcome::Copied => Ok(()),
        Outcome::GivenUp { why } => {
            migration.give_up(&why, &mut interrupts).await;
            Err(Failure::new(Exit::OutOfReach, why).cure(format!(
                "allow more with --max-downtime, or make the dump all the same with --force; process {} \
                 was not frozen and runs on here",
                args.tree
            )))
        }
    }
}

/// The id that is given, or one made of the process's name and pid.
fn snapshot_id(args: &Migrate) -> Result<String, Failure> {
    let tree = args.tree;
    let name = memory::name(tree).map_err(|error| {
        Failure::failed(format!("there is no process {tree}: {error}")).cure("ps -e")
    })?;
    let id = args.snapshot.clone().unwrap_or_else(|| format!("{name}-{tree}"));
    check_id(&id)
        .map_err(|bad| Failure::usage(bad.to_string()).cure("name one with --snapshot"))?;
    Ok(id)
}

/// Prints what would be run, with as many rounds as it takes to see how they follow each other.
fn dry_run(output: Output, args: &Migrate, id: String) -> Result<(), Failure> {
    let work_dir = args.criu.work_dir.clone().unwrap_or_else(|| "WORK-DIR".into());
    let commands = |rounds| Commands { args, work_dir: &work_dir, page_server: None, rounds };
    let rounds = args.max_rounds.min(2);
    let mut runs: Vec<Run> = Vec::new();
    if rounds > 0 {
        runs.push(commands(0).check());
        runs.extend((0..rounds).map(|n| commands(n).round()));
    }
    let last = commands(rounds);
    let (socket, to, dir) = (PathBuf::new(), args.to.clone(), last.dir());
    let hand_over = HandOver { socket, snapshot: id, to, dir, attempt: 0 };
    runs.push(last.dump(&hand_over, &this_program()?));
    let lines: Vec<_> = runs.iter().map(Run::line).collect();
    output.print(&json!({ "commands": lines }), || lines.join("\n"))
}

fn this_program() -> Result<PathBuf, Failure> {
    env::current_exe()
        .map_err(|error| Failure::failed(format!("the way to this program is not known: {error}")))
}
