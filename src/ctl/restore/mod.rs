//! `restore`: a process goes on from a snapshot of the cache.

pub(super) mod args;
mod viewed;

use std::ffi::OsString;
use std::fs;
use std::future::ready;
use std::io::{self, Write};
use std::path::Path;
use std::time::Instant;

use serde_json::json;

use self::args::Restore;
use self::viewed::{VIEW, Viewed};
use super::cli::{Daemon, Until, Wait};
use super::criu::{LOG, Run};
use super::exit::{Exit, Failure};
use super::interrupts::Interrupts;
use super::print::{Output, clean, size};
use super::{reach, wait};
use crate::control::Reading;
use crate::control::model::{Role, Snapshot, SnapshotState};
use crate::criu::names::check_id;
use crate::criu::stream::SERVE_SOCKET;
use crate::sys::unix;

/// Where CRIU writes the pid of what it has restored, unless a file is named for it.
const PIDFILE: &str = "restored.pid";

/// Restores, and prints what runs now.
pub(super) async fn run(daemon: &Daemon, output: Output, args: &Restore) -> Result<(), Failure> {
    let id = &args.snapshot;
    check_id(id).map_err(|bad| Failure::usage(bad.to_string()))?;
    let pidfile = args.pidfile.as_deref().map(std::path::absolute).transpose();
    let pidfile = pidfile.map_err(|error| Failure::usage(format!("--pidfile: {error}")))?;
    let mut interrupts = Interrupts::catch()?;
    let mut client = reach::only(daemon, Role::Cache, "restore").await?;
    let work_dir = args.criu.make_work_dir("restore")?;
    let dir = work_dir.path();
    let pidfile = pidfile.unwrap_or_else(|| dir.join(PIDFILE));

    // Opened before it is there, the snapshot is kept for this restore.
    let listener = unix::bind(dir, SERVE_SOCKET).map_err(|error| {
        Failure::failed(format!("{}: {error}", dir.join(SERVE_SOCKET).display()))
    })?;
    let reading = if args.again { Reading::TakeAgain } else { Reading::Take };
    client.open(id, None, reading, listener.into()).await?;

    let snapshot = when_whole(client.path(), args, &mut interrupts).await?;
    let begun = Instant::now();
    restore(client.path(), args, &snapshot, dir, &pidfile, &mut interrupts).await?;
    let pid: Option<u32> =
        fs::read_to_string(&pidfile).ok().and_then(|pid| pid.trim().parse().ok());
    let ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
    let (images, bytes) = (snapshot.images, snapshot.bytes);
    let result = json!({
        "snapshot": id, "pid": pid, "images": images, "bytes": bytes, "milliseconds": ms,
    });
    output.print(&result, || {
        let pid = pid.map_or_else(String::new, |pid| format!(" as process {pid}"));
        format!("{}: runs{pid}, {images} images, {} in {ms} ms", clean(id), size(bytes))
    })
}

/// Restores a snapshot that is whole.
async fn restore(
    cache: &Path,
    args: &Restore,
    snapshot: &Snapshot,
    dir: &Path,
    pidfile: &Path,
    interrupts: &mut Interrupts,
) -> Result<(), Failure> {
    let mut viewed = None;
    if args.view {
        let made = interrupts.during(Viewed::make(cache, snapshot, dir)).await;
        viewed = Some(made.map_err(|_| interrupted(&args.snapshot, "restored"))??);
    }
    // A pid of before must not pass for the new one.
    remove(pidfile)?;
    // A restore cannot be called off: it is done in a moment, or fails by itself.
    let restored = criu(args, dir, pidfile).run(dir, interrupts, ready(())).await;
    restored
        .map_err(|failure| if failure.has_cure() { failure } else { once_more(args, failure) })?;
    if let Some(Err(failure)) = viewed.map(Viewed::taken) {
        let mut stderr = io::stderr();
        let _ = writeln!(stderr, "the process runs, but the cache could not be told: {failure}");
    }
    Ok(())
}

/// The snapshot, once it is whole.
async fn when_whole(
    cache: &Path,
    args: &Restore,
    interrupts: &mut Interrupts,
) -> Result<Snapshot, Failure> {
    let id = &args.snapshot;
    let cache = Daemon { socket: Some(cache.to_owned()), ..Daemon::default() };
    let wait = Wait { snapshot: id.clone(), timeout: args.timeout, until: Until::Whole };
    let waited = interrupts.during(wait::until(&cache, &wait)).await;
    let snapshot = waited.map_err(|_| interrupted(id, "whole"))??;
    // It was not when the socket was opened.
    if snapshot.state == SnapshotState::Taken && !args.again {
        let what = format!("another restore has taken snapshot {id}");
        let cure = format!("if that one has failed: criu-imagectl restore --again {id}");
        return Err(Failure::failed(what).cure(cure));
    }
    Ok(snapshot)
}

fn interrupted(id: &str, before: &str) -> Failure {
    Failure::new(Exit::Interrupted, format!("interrupted before snapshot {id} was {before}"))
}

/// Says what to do after a restore that failed.
fn once_more(args: &Restore, failure: Failure) -> Failure {
    let id = &args.snapshot;
    // Through the stream it is taken when it has been read, whatever comes of it.
    let options = match (args.view, args.again) {
        (false, _) => "--again",
        (true, false) => "--view",
        (true, true) => "--view --again",
    };
    failure.cure(format!(
        "it may be tried once more, unless its process runs somewhere: criu-imagectl restore {options} {id}"
    ))
}

fn criu(args: &Restore, dir: &Path, pidfile: &Path) -> Run {
    let mut arguments: Vec<OsString> = vec!["restore".into()];
    if args.view {
        arguments.extend(["-D".into(), dir.join(VIEW).into(), "-W".into(), dir.into()]);
    } else {
        arguments.extend(["--stream".into(), "-D".into(), dir.into()]);
    }
    arguments.extend(["-d", "-o", LOG, "--pidfile"].map(OsString::from));
    arguments.push(pidfile.into());
    arguments.extend(args.options.iter().cloned());
    let (program, what) = (args.criu.criu.clone(), "criu restore".to_owned());
    Run { program, what, arguments, environment: Vec::new() }
}

fn remove(pidfile: &Path) -> Result<(), Failure> {
    match fs::remove_file(pidfile) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Failure::failed(format!("{}: {error}", pidfile.display())))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ctl::cli::{Cli, Command};
    use clap::Parser;

    #[test]
    fn criu_restores_in_the_background_through_the_stream() {
        let words = ["criu-imagectl", "restore", "web", "--again", "--", "--shell-job", "-v4"];
        let Command::Restore(args) = Cli::try_parse_from(words).unwrap().command else { panic!() };
        assert!(args.again);
        assert_eq!(
            criu(&args, Path::new("/w"), Path::new("/run/web.pid")).line(),
            "criu restore --stream -D /w -d -o criu.log --pidfile /run/web.pid --shell-job -v4"
        );
    }

    #[test]
    fn a_view_lies_in_the_work_directory_beside_crius_logs() {
        let words = ["criu-imagectl", "restore", "--view", "web"];
        let Command::Restore(args) = Cli::try_parse_from(words).unwrap().command else { panic!() };
        assert_eq!(
            criu(&args, Path::new("/w"), Path::new("/w/pid")).line(),
            "criu restore -D /w/view -W /w -d -o criu.log --pidfile /w/pid"
        );
    }
}
