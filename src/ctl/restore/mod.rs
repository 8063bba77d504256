//! `restore`: a process goes on from a snapshot of the cache.

pub(super) mod args;

use std::ffi::OsString;
use std::fs;
use std::future::ready;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::json;

use self::args::Restore;
use super::cli::{Daemon, Until, Wait};
use super::criu::{LOG, Run};
use super::exit::{Exit, Failure};
use super::interrupts::Interrupts;
use super::print::{Output, clean, size};
use super::{reach, wait};
use crate::control::Reading;
use crate::control::model::Role;
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

    let cache = Daemon { socket: Some(client.path().to_owned()), ..Daemon::default() };
    let wait = Wait { snapshot: id.clone(), timeout: args.timeout, until: Until::Whole };
    let waited = interrupts.during(wait::until(&cache, &wait)).await;
    let snapshot = waited.map_err(|_| {
        Failure::new(Exit::Interrupted, format!("interrupted before snapshot {id} was whole"))
    })??;

    let begun = Instant::now();
    // A pid of before must not pass for the new one.
    remove(&pidfile)?;
    // A restore cannot be called off: it is done in a moment, or fails by itself.
    criu(args, dir, &pidfile).run(dir, &mut interrupts, ready(())).await.map_err(|failure| {
        failure.cure(format!(
            "it may be tried once more, unless its process runs somewhere: criu-imagectl restore --again \
             {id}"
        ))
    })?;
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

fn criu(args: &Restore, dir: &Path, pidfile: &Path) -> Run {
    let mut arguments: Vec<OsString> =
        vec!["restore".into(), "--stream".into(), "-D".into(), dir.into()];
    arguments.extend(["-d", "-o", LOG, "--pidfile"].map(OsString::from));
    arguments.push(pidfile.into());
    arguments.extend(args.options.iter().cloned());
    let (program, what) = (args.criu.criu.clone(), "criu restore".to_owned());
    Run { program, what, arguments, environment: Vec::new() }
}

fn remove(pidfile: &PathBuf) -> Result<(), Failure> {
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
}
