//! `hook`: CRIU's action script for `criu dump --stream`.
//!
//! CRIU passes the pages of its process by reference, and ends or thaws the process when it has written the last image. The
//! only thing that it waits for then is its script at post-dump: unless that ends with status 0, CRIU thaws the process
//! (`criu/cr-dump.c`). So the process is not touched before the cache has a copy of all of it.

use std::env;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use tokio::time::timeout;

use super::cli::{Daemon, duration};
use super::exit::{Exit, Failure};
use super::place;
use crate::control::Client;
use crate::control::model::Role;
use crate::criu::stream::CAPTURE_SOCKET;
use crate::daemon::CONTROL_SOCKET;

/// What follows the options in the help and the man page.
pub(super) const HELP: &str = "\
Example, on the source host, for every dump, in /etc/criu/default.conf:
  action-script criu-imagectl

CRIU gives its script no arguments. Without any, run by CRIU, criu-imagectl does what its command hook does; for options \
write a script of your own, with exec criu-imagectl --instance web hook --timeout 10s for example.

CRIU runs it at several moments of a dump; it does something at two of them. At pre-dump it tells the proxy that \
CRIU will wait, so that pages need not be copied on their way. At post-dump, when CRIU has handed over everything and \
the process is still frozen, it waits until the cache has acknowledged the snapshot. If that fails it ends with another \
status than 0: then CRIU fails too, and the process goes on as if there had been no dump. Dumps that do not go \
through a proxy, and restores, are left alone.";

/// Set by CRIU for its action scripts, and only for them.
const ACTION: &str = "CRTOOLS_SCRIPT_ACTION";
/// The directory of the images, as `/proc/PID/fd/N` with CRIU's pid.
const IMAGE_DIR: &str = "CRTOOLS_IMAGE_DIR";
/// How long a process stays frozen at most, as an option's value.
const DEFAULT_TIMEOUT: &str = "60s";
/// How much longer than it was told the proxy may take to answer.
const GRACE: Duration = Duration::from_secs(10);

/// `hook`
#[derive(Debug, Args)]
pub(super) struct Hook {
    /// At post-dump, let the process go on if the cache has not acknowledged it after this time, as in 30,
    /// 1.5s, 500ms, 10min, 2h
    #[arg(long, value_name = "DURATION", value_parser = duration, default_value = DEFAULT_TIMEOUT)]
    pub(super) timeout: Duration,
}

/// Whether CRIU runs this program as its action script: it gives no arguments.
pub(super) fn called_by_criu() -> bool {
    env::args_os().len() == 1 && env::var_os(ACTION).is_some()
}

/// Does what CRIU's action needs, as there are no options.
pub(super) async fn run_for_criu() -> Result<(), Failure> {
    let timeout = duration(DEFAULT_TIMEOUT).map_err(Failure::usage)?;
    run(&Daemon::default(), &Hook { timeout }).await
}

/// What CRIU wants of its script now.
#[derive(Debug, PartialEq, Eq)]
enum Action {
    /// It begins to dump.
    PreDump,
    /// It has handed over everything.
    PostDump,
    /// Nothing that is for us.
    Other,
}

/// Does what CRIU's action needs.
pub(super) async fn run(daemon: &Daemon, hook: &Hook) -> Result<(), Failure> {
    let action = env::var(ACTION).map_err(|_| {
        Failure::usage(format!("hook is for CRIU, which says in {ACTION} what happens"))
            .cure("criu dump … --action-script criu-imagectl")
    })?;
    let action = Action::of(&action);
    if action == Action::Other {
        return Ok(());
    }
    let dir = PathBuf::from(env::var_os(IMAGE_DIR).unwrap_or_default());
    // Other dumps write files, or send their pages and wait for the answer.
    if !dir.join(CAPTURE_SOCKET).exists() {
        return Ok(());
    }
    let pid = criu_pid(&dir).ok_or_else(|| {
        Failure::failed(format!("{IMAGE_DIR} is {} and not /proc/PID/fd/N", dir.display()))
    })?;
    let socket = control_socket(daemon, &dir);
    match action {
        Action::PreDump => {
            let announced = async { Client::connect(&socket).await?.expect_dump(pid).await };
            within(GRACE, announced).await
        }
        Action::PostDump => {
            let limit = hook.timeout;
            let finished = async { Client::connect(&socket).await?.finish_dump(pid, limit).await };
            within(limit + GRACE, async { finished.await.map(drop) }).await
        }
        Action::Other => Ok(()),
    }
    .map_err(|failure| match action {
        Action::PostDump => failure.cure("the process goes on here; its dump has failed"),
        _ => failure,
    })
}

/// A proxy that is stopped must not keep the process frozen.
async fn within(
    limit: Duration,
    call: impl Future<Output = Result<(), crate::control::ClientError>>,
) -> Result<(), Failure> {
    let Ok(called) = timeout(limit, call).await else {
        let what = format!("the proxy has not answered within {limit:?}");
        return Err(Failure::new(Exit::TimedOut, what));
    };
    Ok(called?)
}

impl Action {
    fn of(action: &str) -> Action {
        match action {
            "pre-dump" => Action::PreDump,
            "post-dump" => Action::PostDump,
            _ => Action::Other,
        }
    }
}

/// The pid in `/proc/PID/fd/N`.
fn criu_pid(dir: &Path) -> Option<i32> {
    let in_proc = dir.strip_prefix("/proc").ok()?;
    in_proc.iter().next()?.to_str()?.parse().ok()
}

/// The proxy behind CRIU's directory: the one that is named, the one beside whose socket its control socket lies, or that
/// of the system.
fn control_socket(daemon: &Daemon, dir: &Path) -> PathBuf {
    let beside = dir.join(CONTROL_SOCKET);
    match daemon {
        Daemon { socket: Some(socket), .. } => socket.clone(),
        Daemon { instance: None, .. } if beside.exists() => beside,
        Daemon { instance, .. } => place::control_socket(Role::Proxy, instance.as_deref()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn criu_is_found_by_the_directory_that_it_names() {
        assert_eq!(criu_pid(Path::new("/proc/4711/fd/1021")), Some(4711));
        for wrong in ["", "/srv/web", "/proc/self/fd/3", "/proc"] {
            assert_eq!(criu_pid(Path::new(wrong)), None, "{wrong}");
        }
    }

    #[test]
    fn only_the_beginning_and_the_end_of_a_dump_concern_it() {
        assert_eq!(Action::of("pre-dump"), Action::PreDump);
        assert_eq!(Action::of("post-dump"), Action::PostDump);
        for other in ["pre-stream", "pre-restore", "network-lock", "post-resume", ""] {
            assert_eq!(Action::of(other), Action::Other, "{other}");
        }
    }

    #[test]
    fn the_proxy_is_the_one_whose_sockets_are_in_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        let (plain, beside) = (Daemon::default(), dir.path().join(CONTROL_SOCKET));
        let system = place::control_socket(Role::Proxy, None);
        assert_eq!(control_socket(&plain, dir.path()), system);
        std::fs::write(&beside, "").unwrap();
        assert_eq!(control_socket(&plain, dir.path()), beside);
        let named = Daemon { socket: Some("/s".into()), ..Daemon::default() };
        assert_eq!(control_socket(&named, dir.path()), Path::new("/s"));
    }
}
