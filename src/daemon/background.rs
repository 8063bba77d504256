//! `--daemon`: the process that was started waits, and another of the same binary serves.
//!
//! It is started anew, not forked: after a fork(2) without exec(2) little is safe. It inherits the
//! terminal, so that what makes it fail is read there, and lets go of it once it serves.

use std::env;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};

use rustix::io::{FdFlags, fcntl_setfd};
use rustix::pipe::{PipeFlags, pipe_with};

use super::cli::Common;
use super::logging::JOURNAL;

/// Why there can be nothing in the background: the text for the user.
pub(super) fn objection(options: &Common, log_file: bool, from_systemd: bool) -> Option<String> {
    let why = if options.status_fd.is_some() {
        "--status-fd and a daemon in the background (--daemon, `daemon = true`) exclude each other: \
         with --daemon, the end of the command tells that it serves"
            .to_owned()
    } else if from_systemd {
        "systemd has handed over sockets and watches this process: a service needs no --daemon and \
         no `daemon = true`"
            .to_owned()
    } else if !log_file && !Path::new(JOURNAL).exists() {
        format!(
            "a daemon in the background needs --log-file FILE here: there is no journal ({JOURNAL})"
        )
    } else {
        return None;
    };
    Some(why)
}

/// Starts the daemon and waits until it serves or has failed; returns the status to exit with.
pub(super) fn start() -> io::Result<ExitCode> {
    let (ours, theirs) = pipe_with(PipeFlags::CLOEXEC)?;
    fcntl_setfd(&theirs, FdFlags::empty())?;
    let mut arguments = env::args_os();
    let mut command = Command::new("/proc/self/exe");
    if let Some(name) = arguments.next() {
        command.arg0(name);
    }
    command.args(arguments).arg(format!("--ready-fd={}", theirs.as_raw_fd()));
    let mut daemon = command.spawn()?;
    drop(theirs);
    match File::from(ours).read_exact(&mut [0]) {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            let status = daemon.wait()?;
            // It has said itself why, unless it was killed.
            let Some(code) = status.code() else {
                return Err(io::Error::other(format!("the daemon ended by {status}")));
            };
            Ok(u8::try_from(code)
                .ok()
                .filter(|code| *code != 0)
                .map_or(ExitCode::FAILURE, Into::into))
        }
        Err(error) => Err(error),
    }
}

/// Leaves the terminal's session and the directory. `name` is what ps(1) shows: the kernel took it
/// from the path, which was /proc/self/exe.
pub(super) fn enter(name: &str) -> io::Result<()> {
    rustix::process::setsid()?;
    env::set_current_dir("/")?;
    fs::write("/proc/self/comm", name)
}
