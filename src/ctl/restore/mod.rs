//! `restore`: a process goes on from a snapshot of the cache.

pub(super) mod args;
mod held;
mod pid_taken;
mod way;

use std::convert::Infallible;
use std::ffi::OsString;
use std::fs;
use std::future::{pending, ready};
use std::io::{self, Write};
use std::path::Path;
use std::time::Instant;

use serde_json::json;
use tokio::net::UnixListener;
use tokio::time::{sleep, timeout};

use self::args::Restore;
use self::held::{Held, RETRY, TRIES};
use self::pid_taken::PidTaken;
use self::way::Way;
use super::cli::{Daemon, Until, Wait};
use super::criu::{LOG, Run, log_tail};
use super::exit::{Exit, Failure};
use super::extract::accept_memory;
use super::interrupts::Interrupts;
use super::print::{Output, clean, size};
use super::{reach, view, wait};
use crate::control::model::{Role, Snapshot, SnapshotState};
use crate::control::{Client, ClientError, Reading};
use crate::criu::names::check_id;
use crate::criu::stream::SERVE_SOCKET;
use crate::daemon::handed_over::into_tokio;
use crate::sys::unix;

/// The view, in the work directory.
const VIEW: &str = "view";
/// Where CRIU writes the pid of what it has restored, unless a file is named for it.
const PIDFILE: &str = "restored.pid";

/// Restores, and prints what runs now.
pub(super) async fn run(daemon: &Daemon, output: Output, args: &Restore) -> Result<(), Failure> {
    let id = &args.snapshot;
    check_id(id).map_err(|bad| Failure::usage(bad.to_string()))?;
    let pidfile = args.pidfile.as_deref().map(std::path::absolute).transpose();
    let pidfile = pidfile.map_err(|error| Failure::usage(format!("--pidfile: {error}")))?;
    let mut interrupts = Interrupts::catch()?;
    let client = reach::only(daemon, Role::Cache, "restore").await?;
    let work_dir = args.criu.make_work_dir("restore")?;
    let dir = work_dir.path();
    let pidfile = pidfile.unwrap_or_else(|| dir.join(PIDFILE));

    let cache = client.path().to_owned();
    drop(client);
    let mut tries = 0;
    let (begun, way, snapshot) = loop {
        let (mut held, snapshot) = when_whole(&cache, args, &mut interrupts).await?;
        accept_memory(&cache, &snapshot, args.accept_changed_memory).await?;
        let way = Way::of(args, &snapshot);
        if let Some(why) = way.why() {
            let told = clean(&format!("snapshot {id} is restored from a view: {why}"));
            let _ = writeln!(io::stderr(), "{told}");
        }
        let begun = Instant::now();
        let run =
            CriuRun { cache: &cache, args, way: &way, snapshot: &snapshot, dir, pidfile: &pidfile };
        match run.prepare(&mut held, &mut interrupts).await {
            Ok(listener) => {
                run.restore(held, listener, &mut interrupts).await?;
                break (begun, way, snapshot);
            }
            // Nothing was restored, and a cache that is restarted has the snapshot again.
            Err(failure) if failure.is_daemon_gone() && tries < TRIES => {
                tell_gone(&failure);
                tries += 1;
            }
            Err(failure) => {
                held.failed();
                return Err(failure);
            }
        }
    };
    let pid: Option<u32> =
        fs::read_to_string(&pidfile).ok().and_then(|pid| pid.trim().parse().ok());
    let ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
    let (images, bytes) = (snapshot.images, snapshot.bytes);
    let result = json!({
        "snapshot": id, "pid": pid, "images": images, "bytes": bytes, "milliseconds": ms,
        "view": way.is_view(), "needs-view": way.why(),
    });
    output.print(&result, || {
        let pid = pid.map_or_else(String::new, |pid| format!(" as process {pid}"));
        format!("{}: runs{pid}, {images} images, {} in {ms} ms", clean(id), size(bytes))
    })
}

/// A run of CRIU on a snapshot that is whole.
struct CriuRun<'a> {
    cache: &'a Path,
    args: &'a Restore,
    way: &'a Way,
    snapshot: &'a Snapshot,
    dir: &'a Path,
    pidfile: &'a Path,
}

impl CriuRun<'_> {
    /// Runs it, and tells the cache what has become of the snapshot.
    async fn restore(
        &self,
        held: Held,
        listener: Option<UnixListener>,
        interrupts: &mut Interrupts,
    ) -> Result<(), Failure> {
        let run = criu(self.args, self.way, self.dir, self.pidfile);
        // A restore cannot be called off: it is done in a moment, or fails by itself.
        let restored = tokio::select! {
            restored = run.run(self.dir, interrupts, ready(()), pending()) => restored,
            never = pass_on(listener, self.cache, &self.args.snapshot) => match never {},
        };
        match (restored, self.restored_pid()) {
            (Ok(()), _) => {
                if let Err(failure) = held.succeeded(self.snapshot).await {
                    let mut stderr = io::stderr();
                    let what = "the process runs, but the cache could not be told";
                    let _ = writeln!(stderr, "{what}: {failure}");
                }
                Ok(())
            }
            // The cache hears nothing, and takes the snapshot for restored.
            (Err(failure), Some(pid)) => Err(may_run(self.args, failure, pid)),
            (Err(failure), None) => {
                held.failed();
                Err(if failure.has_cure() {
                    failure
                } else {
                    once_more(self.args, self.dir, failure)
                })
            }
        }
    }

    /// Makes ready what CRIU reads: a view, or the socket, which is returned.
    async fn prepare(
        &self,
        held: &mut Held,
        interrupts: &mut Interrupts,
    ) -> Result<Option<UnixListener>, Failure> {
        let mut listener = None;
        if self.way.is_view() {
            let made = async {
                let mut client = Client::connect(self.cache).await?;
                view::make(&mut client, &self.args.snapshot, &self.dir.join(VIEW), false).await
            };
            let made = interrupts.during(made).await;
            made.map_err(|_| interrupted(&self.args.snapshot, "restored"))??;
        } else {
            let bound = unix::bind(self.dir, SERVE_SOCKET).and_then(into_tokio);
            listener = Some(bound.map_err(|error| {
                Failure::failed(format!("{}: {error}", self.dir.join(SERVE_SOCKET).display()))
            })?);
        }
        // Not before: the cache may have brought pages together for the view, and would hold them twice.
        held.hold(self.snapshot).await?;
        // A pid of before must not pass for the new one.
        remove(self.pidfile)?;
        Ok(listener)
    }

    /// The process that CRIU has restored, if it is there. CRIU writes its pid before it lets it run, and kills it when
    /// it fails after that; a CRIU that was killed does not.
    fn restored_pid(&self) -> Option<u32> {
        let pid = fs::read_to_string(self.pidfile).ok()?.trim().parse().ok()?;
        Path::new("/proc").join(format!("{pid}")).exists().then_some(pid)
    }
}

/// Has the cache serve whoever connects: CRIU. Reading does not take the snapshot.
async fn pass_on(listener: Option<UnixListener>, cache: &Path, id: &str) -> Infallible {
    let Some(listener) = listener else { return pending().await };
    loop {
        let passed = async {
            let (socket, _) = listener.accept().await.map_err(|error| {
                Failure::failed(format!("criu's connection is not accepted: {error}"))
            })?;
            let socket = socket.into_std().map_err(|error| {
                Failure::failed(format!("criu's connection cannot be passed on: {error}"))
            })?;
            let mut client = Client::connect(cache).await?;
            client.open(id, None, Reading::Look, socket.into()).await?;
            Ok::<_, Failure>(())
        };
        if let Err(failure) = passed.await {
            // The connection is closed, and CRIU fails.
            failure.report();
        }
    }
}

/// The snapshot, once it is whole, and the hold on it. A cache that is restarted meanwhile is asked again.
async fn when_whole(
    cache: &Path,
    args: &Restore,
    interrupts: &mut Interrupts,
) -> Result<(Held, Snapshot), Failure> {
    let id = &args.snapshot;
    let wait = Wait { snapshot: id.clone(), timeout: args.timeout, until: Until::Whole };
    let mut last = None;
    let waited = claim_until_whole(cache, args, &wait, &mut last);
    let waited = interrupts.during(async {
        match args.timeout {
            None => Some(waited.await),
            Some(limit) => timeout(limit, waited).await.ok(),
        }
    });
    let waited = waited.await.map_err(|_| interrupted(id, "whole"))?;
    let (held, snapshot) = waited.unwrap_or_else(|| Err(wait::timed_out(&wait, last.as_ref())))?;
    // It was not when the snapshot was claimed.
    if snapshot.state == SnapshotState::Taken && !args.again && !args.copy {
        let what = format!("another restore has taken snapshot {id}");
        let cure = format!("if that one has failed: criu-imagectl restore --again {id}");
        return Err(Failure::failed(what).cure(cure));
    }
    Ok((held, snapshot))
}

async fn claim_until_whole(
    cache: &Path,
    args: &Restore,
    wait: &Wait,
    last: &mut Option<Snapshot>,
) -> Result<(Held, Snapshot), Failure> {
    let daemon = Daemon { socket: Some(cache.to_owned()), ..Daemon::default() };
    let mut is_told = false;
    loop {
        let attempt = async {
            if is_told {
                must_not_be_given_up(cache, &wait.snapshot).await?;
            }
            // Claimed before it is there, the snapshot is kept for this restore.
            let held = Held::claim(cache, args).await?;
            let snapshot = wait::follow(&daemon, wait, last).await?;
            Ok::<_, Failure>((held, snapshot))
        };
        match attempt.await {
            Err(failure) if failure.is_daemon_gone() => {
                if !is_told {
                    tell_gone(&failure);
                }
                is_told = true;
            }
            outcome => return outcome,
        }
        // What was coming is lost with it.
        *last = None;
        sleep(RETRY).await;
    }
}

/// What this restore waited for may have failed while there was no cache that could have told it so. Who begins to wait now would wait
/// for another.
async fn must_not_be_given_up(cache: &Path, id: &str) -> Result<(), Failure> {
    match Client::connect(cache).await?.show(id).await {
        Ok((snapshot, _)) if snapshot.state == SnapshotState::Damaged => {
            Err(Failure::damaged(id, &clean(&snapshot.reason)))
        }
        Ok(_) | Err(ClientError::NoSuchSnapshot(_)) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn tell_gone(failure: &Failure) {
    let _ = writeln!(io::stderr(), "the cache has gone, and is waited for: {failure}");
}

fn interrupted(id: &str, before: &str) -> Failure {
    Failure::new(Exit::Interrupted, format!("interrupted before snapshot {id} was {before}"))
}

/// Says what to do when nobody knows whether the process runs.
fn may_run(args: &Restore, failure: Failure, pid: u32) -> Failure {
    let id = &args.snapshot;
    failure.cure(format!(
        "process {pid} was restored before that and is there: look whether it runs, the snapshot counts as taken. \
         If it does not: kill -9 {pid}; criu-imagectl restore --again {id}"
    ))
}

/// Says what to do after a restore that failed.
fn once_more(args: &Restore, dir: &Path, failure: Failure) -> Failure {
    let id = &args.snapshot;
    let options = [
        (args.view, "--view "),
        (args.stream, "--stream "),
        (args.again, "--again "),
        (args.copy, "--copy "),
    ];
    let options: String = options.iter().filter(|(is, _)| *is).map(|(_, option)| *option).collect();
    let again = format!("criu-imagectl restore {options}{id}");
    if let Some(taken) = PidTaken::find(&log_tail(dir)) {
        let cure = taken.cure();
        return failure.cure(format!(
            "{taken}\n  {cure}\n  Then, as the cache holds the snapshot as before: {again}"
        ));
    }
    failure
        .cure(format!("the cache holds the snapshot as before. When the cause is mended: {again}"))
}

fn criu(args: &Restore, way: &Way, dir: &Path, pidfile: &Path) -> Run {
    let mut arguments: Vec<OsString> = vec!["restore".into()];
    if way.is_view() {
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
            criu(&args, &Way::Stream, Path::new("/w"), Path::new("/run/web.pid")).line(),
            "criu restore --stream -D /w -d -o criu.log --pidfile /run/web.pid --shell-job -v4"
        );
    }

    #[test]
    fn a_view_lies_in_the_work_directory_beside_crius_logs() {
        let words = ["criu-imagectl", "restore", "--view", "web"];
        let Command::Restore(args) = Cli::try_parse_from(words).unwrap().command else { panic!() };
        assert_eq!(
            criu(&args, &Way::View(None), Path::new("/w"), Path::new("/w/pid")).line(),
            "criu restore -D /w/view -W /w -d -o criu.log --pidfile /w/pid"
        );
    }
}
