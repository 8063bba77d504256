//! The daemons as processes, started in each of the ways there are.

use std::fs::{self, File};
use std::io::Read;
use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use criu_image_relay::daemon::CONTROL_SOCKET;
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};

pub(crate) const PROXY: &str = env!("CARGO_BIN_EXE_criu-image-proxy");
pub(crate) const CACHE: &str = env!("CARGO_BIN_EXE_criu-image-cache");
pub(crate) const CTL: &str = env!("CARGO_BIN_EXE_criu-imagectl");

/// What has to happen at once has happened by then, also on a machine that is busy.
pub(crate) const SOON: Duration = Duration::from_secs(20);

/// A child must not inherit what is meant for another.
static SPAWN: Mutex<()> = Mutex::new(());

/// Starts a process that inherits these descriptors, under the numbers that they have here.
pub(crate) fn spawn(command: &mut Command, inherited: &[BorrowedFd<'_>]) -> Child {
    let _alone = SPAWN.lock().unwrap();
    for fd in inherited {
        fcntl_setfd(fd, FdFlags::empty()).unwrap();
    }
    let child = command.spawn().unwrap();
    for fd in inherited {
        fcntl_setfd(fd, FdFlags::CLOEXEC).unwrap();
    }
    child
}

/// Runs a process to its end: its status, and what it said on stderr.
pub(crate) fn output(command: &mut Command, inherited: &[BorrowedFd<'_>]) -> (i32, String) {
    let child = spawn(command.stdin(Stdio::null()).stderr(Stdio::piped()), inherited);
    let output = child.wait_with_output().unwrap();
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
}

/// A command that nothing of the tests' own environment reaches, in a directory with an empty
/// configuration; paths are relative to that.
pub(crate) fn command(binary: &str, dir: &Path) -> Command {
    let mut command = Command::new(binary);
    for variable in ["JOURNAL_STREAM", "NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "WATCHDOG_USEC"]
    {
        command.env_remove(variable);
    }
    let config = dir.join("config.toml");
    if !config.exists() {
        // The port of the page server is one for all that do not ask for another.
        let room = "store.max-bytes = \"64M\"\n".repeat(usize::from(binary == CACHE));
        fs::write(config, format!("pages.listen = \"\"\n{room}")).unwrap();
    }
    command.current_dir(dir).args(["--config", "config.toml", "--work-dir", "."]);
    if binary == CACHE {
        command.args(["--port", &unused_port().to_string()]);
    }
    command.stdin(Stdio::null()).stdout(Stdio::null());
    command
}

/// How a daemon tells that it serves.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Way {
    /// The command returns.
    Daemon,
    /// A byte comes.
    StatusFd,
    /// Its sockets answer.
    Foreground,
}

pub(crate) const WAYS: [Way; 3] = [Way::Daemon, Way::StatusFd, Way::Foreground];

/// A daemon that serves, until this is dropped.
pub(crate) struct Running {
    /// Not for one in the background: it is init's child.
    child: Option<Child>,
    pub(crate) pid: Pid,
}

/// Starts a daemon with the pid file `pid` and the log file `log` in `dir`. The error is its exit
/// status and what it said on stderr.
pub(crate) fn start(way: Way, command: &mut Command, dir: &Path) -> Result<Running, (i32, String)> {
    command.args(["--pidfile", "pid", "--log-file", "log"]);
    match way {
        Way::Daemon => {
            let (status, said) = output(command.arg("--daemon"), &[]);
            if status != 0 {
                return Err((status, said));
            }
            assert_eq!(said, "");
            Ok(Running { child: None, pid: read_pid(dir).unwrap() })
        }
        Way::StatusFd => {
            let (ours, theirs) = pipe();
            command.args(["--status-fd", &theirs.as_raw_fd().to_string()]);
            let child = spawn(command.stderr(Stdio::piped()), &[theirs.as_fd()]);
            drop(theirs);
            let mut bytes = Vec::new();
            // To the end: the descriptor is closed as well.
            File::from(ours).read_to_end(&mut bytes).unwrap();
            if bytes.is_empty() {
                Err(failed(child))
            } else {
                assert_eq!(bytes, [0]);
                Ok(Running::from(child))
            }
        }
        Way::Foreground => {
            let mut child = spawn(command.stderr(Stdio::piped()), &[]);
            let pid = Pid::from_child(&child);
            let mut ended = false;
            assert!(eventually(|| {
                ended = child.try_wait().unwrap().is_some();
                let serves = fs::read_to_string(dir.join("log")).unwrap_or_default();
                ended || (read_pid(dir) == Some(pid) && serves.contains(" serves"))
            }));
            if ended { Err(failed(child)) } else { Ok(Running::from(child)) }
        }
    }
}

fn failed(child: Child) -> (i32, String) {
    let output = child.wait_with_output().unwrap();
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
}

impl From<Child> for Running {
    fn from(child: Child) -> Running {
        Running { pid: Pid::from_child(&child), child: Some(child) }
    }
}

impl Running {
    /// Starts a daemon that inherits descriptors, and waits until its control socket answers.
    pub(crate) fn with(command: &mut Command, dir: &Path, inherited: &[BorrowedFd<'_>]) -> Running {
        let running = Running::from(spawn(command.stderr(Stdio::null()), inherited));
        assert!(eventually(|| UnixStream::connect(dir.join(CONTROL_SOCKET)).is_ok()));
        running
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(self.pid, signal).unwrap();
    }

    pub(crate) fn is_alive(&mut self) -> bool {
        match &mut self.child {
            Some(child) => child.try_wait().unwrap().is_none(),
            None => test_kill_process(self.pid).is_ok(),
        }
    }

    /// The status that it exits with, soon.
    #[track_caller]
    pub(crate) fn status(mut self) -> ExitStatus {
        assert!(eventually(|| !self.is_alive()), "it does not end");
        self.child.as_mut().unwrap().wait().unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.is_alive() {
            let _ = kill_process(self.pid, Signal::KILL);
        }
        match &mut self.child {
            Some(child) => drop(child.wait()),
            None => drop(eventually(|| test_kill_process(self.pid).is_err())),
        }
    }
}

/// The pid in the pid file of `dir`, if there is one.
pub(crate) fn read_pid(dir: &Path) -> Option<Pid> {
    let text = fs::read_to_string(dir.join("pid")).ok()?;
    text.strip_suffix('\n')?.parse().ok().and_then(Pid::from_raw)
}

/// `criu-imagectl` for the daemon in `dir`.
pub(crate) fn ctl(dir: &Path, arguments: &[&str]) -> (i32, String) {
    let mut command = Command::new(CTL);
    command.arg("--socket").arg(dir.join(CONTROL_SOCKET)).args(arguments);
    output(command.stdout(Stdio::null()), &[])
}

/// What `criu-imagectl status` prints.
pub(crate) fn status(dir: &Path) -> String {
    let mut command = Command::new(CTL);
    command.arg("--socket").arg(dir.join(CONTROL_SOCKET)).arg("status").stdout(Stdio::piped());
    let output = spawn(&mut command, &[]).wait_with_output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

/// A directory as `criu dump -D` leaves it, as far as it matters here.
pub(crate) fn images(dir: &Path, bytes: &[u8]) -> PathBuf {
    let images = dir.join("web");
    fs::create_dir(&images).unwrap();
    fs::write(images.join("inventory.img"), RECORDS).unwrap();
    fs::write(images.join("pages-1.img"), bytes).unwrap();
    images
}

/// An image with one empty record: `IMG_COMMON`, a magic, the record.
pub(crate) const RECORDS: &[u8] = b"\x19\x43\x56\x54\x16\x31\x31\x58\x00\x00\x00\x00";

pub(crate) fn pipe() -> (OwnedFd, OwnedFd) {
    pipe_with(PipeFlags::CLOEXEC).unwrap()
}

/// Waits for what only asking tells.
pub(crate) fn eventually(mut come: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + SOON;
    while !come() {
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    true
}

/// A port that nobody listens on, and that is none which the kernel gives to a connection.
pub(crate) fn unused_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let start = 8_000 + u16::try_from(std::process::id() % 200).unwrap() * 10;
    loop {
        let port = start + NEXT.fetch_add(1, Ordering::Relaxed) % 2_000;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}
