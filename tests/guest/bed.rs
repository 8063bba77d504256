//! The guest, for tests: `tests/bed/guest` in Rust.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Condvar, Mutex, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// What is emulated takes its time, but not this long.
const LIMIT: Duration = Duration::from_secs(120);

/// Also the first boot ever, which makes the guest's disk.
const BOOT_LIMIT: Duration = Duration::from_secs(600);

/// How many commands the guest runs at once; one more is for `tests/bed/guest run`.
const AGENTS: usize = 5;

/// The CRIUs in the guest.
pub(crate) const CRIUS: [&str; 2] = ["criu", "criu-4.2"];

/// The guest that all tests of this process share. It is booted by the first that asks for it.
pub(crate) fn guest() -> &'static Guest {
    static GUEST: OnceLock<Guest> = OnceLock::new();
    GUEST.get_or_init(Guest::boot)
}

/// A booted guest.
pub(crate) struct Guest {
    dir: PathBuf,
    /// Those that have nothing to do.
    agents: Mutex<Vec<BufReader<UnixStream>>>,
    freed: Condvar,
    /// The guest ends when this is closed: with this process, however that ends.
    _life: ChildStdin,
}

/// What came of a command.
#[derive(Debug)]
pub(crate) struct Ran {
    /// As the shell has it: 128 and more for a signal.
    pub status: i64,
    pub stdout: String,
    pub stderr: String,
}

impl Guest {
    fn boot() -> Guest {
        let begin = Instant::now();
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("guest");
        // A guest of the run before may still be about to end: its sockets must not be met.
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).unwrap();
        let mut child = Command::new(repository().join("tests/bed/guest"))
            .arg("boot")
            .arg(&dir)
            .env("CRIU_IMAGE_RELAY_BUILD", build())
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let agents = (0..AGENTS).map(|number| connect(&dir, number, &mut child)).collect();
        let life = child.stdin.take().unwrap();
        let guest = Guest { dir, agents: Mutex::new(agents), freed: Condvar::new(), _life: life };
        guest.ok("true");
        eprintln!("the guest is up after {:.1} s", begin.elapsed().as_secs_f64());
        guest
    }

    /// Runs a command of the shell as root. What it leaves in the background goes on.
    #[track_caller]
    pub(crate) fn run(&self, command: &str) -> Ran {
        self.run_with(command, "")
    }

    /// The same with this on stdin.
    #[track_caller]
    pub(crate) fn run_with(&self, command: &str, stdin: &str) -> Ran {
        let agents = self.agents.lock().unwrap();
        let mut agents = self.freed.wait_while(agents, |agents| agents.is_empty()).unwrap();
        let mut agent = agents.pop().unwrap();
        drop(agents);
        let request = json!({"command": command, "stdin": stdin});
        writeln!(agent.get_mut(), "{request}").unwrap();
        let mut line = String::new();
        let end = agent.read_line(&mut line);
        // An agent that has not answered is not asked again.
        assert!(line.ends_with('\n'), "{command}: {end:?}\n{}", self.console());
        self.agents.lock().unwrap().push(agent);
        self.freed.notify_one();
        let answer: Value = serde_json::from_str(&line).unwrap();
        let text = |key: &str| answer[key].as_str().unwrap().to_owned();
        Ran {
            status: answer["status"].as_i64().unwrap(),
            stdout: text("stdout"),
            stderr: text("stderr"),
        }
    }

    /// Runs a command that has to succeed; returns what it printed.
    #[track_caller]
    pub(crate) fn ok(&self, command: &str) -> String {
        self.succeeded(command, self.run(command))
    }

    /// Starts a command that has no descriptor from outside, so that CRIU can dump it, in a session of its own. What it says is
    /// in `log`.
    #[track_caller]
    pub(crate) fn start(&self, command: &str, log: &str) {
        self.ok(&format!("setsid --fork {command} </dev/null >{log} 2>&1"));
    }

    /// Runs a CRIU with images in `dir`, which is made; it has to succeed. The end of its log is told if it fails.
    #[track_caller]
    pub(crate) fn criu(&self, criu: &str, action: &str, dir: &str, options: &str) {
        let log = format!("{dir}/{action}.log");
        let command = format!(
            "mkdir -p {dir}; {criu} {action} -D {dir} -v3 -o {action}.log {options} ||
             {{ status=$?; grep -E 'Error|Warn' {log} || tail -n 20 {log}; exit $status; }} >&2"
        );
        self.ok(&command);
    }

    /// Writes a file.
    #[track_caller]
    pub(crate) fn write(&self, path: &str, text: &str) {
        let command = format!("mkdir -p $(dirname {path}); cat >{path}");
        self.succeeded(&command, self.run_with(&command, text));
    }

    #[track_caller]
    fn succeeded(&self, command: &str, ran: Ran) -> String {
        let Ran { status, stdout, stderr } = ran;
        assert!(
            status == 0,
            "{command}: exit status {status}\n{stdout}\n{stderr}\n{}",
            self.console()
        );
        stdout
    }

    fn console(&self) -> String {
        let log = fs::read(self.dir.join("console.log")).unwrap_or_default();
        let log = String::from_utf8_lossy(&log).into_owned();
        let lines: Vec<&str> = log.lines().collect();
        let last = lines[lines.len().saturating_sub(20)..].join("\n");
        format!("--- the guest's console:\n{last}")
    }
}

/// Waits for something in the guest that is about to happen.
#[track_caller]
pub(crate) fn wait_until(what: &str, mut happened: impl FnMut() -> bool) {
    let limit = Instant::now() + LIMIT;
    while !happened() {
        assert!(Instant::now() < limit, "this did not happen in {} s: {what}", LIMIT.as_secs());
        thread::sleep(Duration::from_millis(50));
    }
}

/// Connects to an agent, which may be heard of before the guest runs.
fn connect(dir: &Path, number: usize, child: &mut Child) -> BufReader<UnixStream> {
    let limit = Instant::now() + BOOT_LIMIT;
    // The path of a socket may have 107 bytes only: the directory's own may be too long.
    let open = File::open(dir).unwrap();
    let path = format!("/proc/self/fd/{}/agent.{number}", open.as_raw_fd());
    loop {
        if let Ok(agent) = UnixStream::connect(&path) {
            agent.set_read_timeout(Some(LIMIT)).unwrap();
            return BufReader::new(agent);
        }
        let ended = child.try_wait().unwrap();
        assert!(ended.is_none(), "tests/bed/guest has ended: {ended:?}");
        assert!(Instant::now() < limit, "the guest does not start");
        thread::sleep(Duration::from_millis(20));
    }
}

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The directory of the binaries under test: those that cargo built for this very test.
pub(crate) fn build() -> PathBuf {
    Path::new(env!("CARGO_BIN_EXE_criu-image-proxy")).parent().unwrap().to_owned()
}
