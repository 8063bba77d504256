//! A bed of two hosts, for tests and benchmarks: `tests/bed/hosts` in Rust.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// Source or destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Host {
    /// The source: the proxy runs here.
    A,
    /// The destination: the cache runs here.
    B,
}

impl Host {
    fn name(self) -> &'static str {
        match self {
            Host::A => "a",
            Host::B => "b",
        }
    }

    /// The daemon that runs on this host.
    pub(crate) fn daemon(self) -> &'static str {
        match self {
            Host::A => "criu-image-proxy",
            Host::B => "criu-image-cache",
        }
    }

    /// Its work-dir.
    pub(crate) fn work_dir(self) -> &'static str {
        match self {
            Host::A => "/run/criu-image/proxy",
            Host::B => "/run/criu-image/cache",
        }
    }
}

/// Both hosts.
pub(crate) const BOTH: [Host; 2] = [Host::A, Host::B];

/// What a workload says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Report {
    /// Its pid.
    pub pid: u64,
    /// How far it has counted.
    pub counter: u64,
    /// Of all its memory.
    pub checksum: String,
}

/// Two booted hosts; gone when dropped.
pub(crate) struct Bed {
    dir: tempfile::TempDir,
    /// Where the binaries are that are installed.
    build: PathBuf,
}

impl Bed {
    /// Boots the hosts, on which nothing of the relay is installed.
    pub(crate) fn boot() -> Bed {
        Bed::bare(None)
    }

    /// Boots the hosts, with nothing of the relay, from a tree or from the usual one.
    pub(crate) fn bare(rootfs: Option<&Path>) -> Bed {
        let bed = Bed { dir: tempfile::tempdir().unwrap(), build: build() };
        let mut up = bed.script("up");
        up.envs(rootfs.map(|tree| ("CRIU_IMAGE_RELAY_ROOTFS", tree)));
        succeeded(&"hosts up", &up.output().unwrap());
        bed
    }

    /// Boots the hosts, installs this build and starts its sockets, nothing else: the services start by themselves.
    pub(crate) fn up() -> Bed {
        Bed::up_with(build())
    }

    /// The same with the binaries of another build: `DIR/target/release` of another checkout.
    pub(crate) fn up_with(build: PathBuf) -> Bed {
        let mut bed = Bed::boot();
        bed.build = build;
        for host in BOTH {
            bed.hosts(&["install", host.name()]);
        }
        bed.trust();
        for (host, sockets) in [
            (Host::A, &["stream", "remote", "control"][..]),
            (Host::B, &["stream", "remote", "control", "link"]),
        ] {
            for socket in sockets {
                bed.ok(
                    host,
                    &["systemctl", "start", &format!("{}-{socket}.socket", host.daemon())],
                );
            }
        }
        bed
    }

    /// The least that two hosts have to be told: where the cache is, and that the network is to be trusted.
    pub(crate) fn trust(&self) {
        let address = self.hosts(&["addr", "b"]);
        self.configure(Host::A, "insecure", "true");
        self.configure(Host::A, "cache", &format!("{:?}", address.trim()));
        self.configure(Host::B, "insecure", "true");
    }

    /// Sets a key in the daemon's configuration; a running daemon is not told.
    pub(crate) fn configure(&self, host: Host, key: &str, value: &str) {
        let file = match host {
            Host::A => "proxy.toml",
            Host::B => "cache.toml",
        };
        let script = format!("s|^#\\?{key} = .*|{key} = {value}|");
        self.ok(host, &["sed", "-i", &script, &format!("/etc/criu-image-relay/{file}")]);
    }

    /// A command in a host, to be run as the caller likes.
    pub(crate) fn command<S: AsRef<OsStr>>(&self, host: Host, command: &[S]) -> Command {
        let mut run = self.script("run");
        run.arg(host.name()).args(command).stdin(Stdio::null());
        run
    }

    /// Runs a command in a host.
    pub(crate) fn run<S: AsRef<OsStr>>(&self, host: Host, command: &[S]) -> Output {
        self.command(host, command).output().unwrap()
    }

    /// Runs a command that has to succeed; returns what it printed.
    #[track_caller]
    pub(crate) fn ok<S: AsRef<OsStr> + std::fmt::Debug>(
        &self,
        host: Host,
        command: &[S],
    ) -> String {
        succeeded(&command, &self.run(host, command))
    }

    /// Copies what is in a directory of the machine into one of a host, or a file.
    pub(crate) fn copy(&self, host: Host, from: &Path, to: &str) {
        self.hosts(&["copy", host.name(), from.to_str().unwrap(), to]);
    }

    /// Starts a command that goes on by itself.
    pub(crate) fn spawn<S: AsRef<OsStr>>(&self, host: Host, command: &[S]) -> Child {
        let mut run = self.command(host, command);
        run.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// `criu dump` of a process on host A, with the work-dir for images; to be run or spawned.
    pub(crate) fn dump<'a>(pid: &'a str, dir: &'a str) -> [&'a str; 11] {
        ["criu", "dump", "--stream", "-D", dir, "-W", "/tmp", "-t", pid, "-o", "dump.log"]
    }

    /// The same with the action script that has CRIU wait for the cache.
    pub(crate) fn hooked_dump<'a>(pid: &'a str, dir: &'a str) -> [&'a str; 13] {
        let [criu, rest @ ..] = Bed::dump(pid, dir);
        let mut hooked = [criu; 13];
        hooked[1..11].copy_from_slice(&rest);
        hooked[11..].copy_from_slice(&["--action-script", "criu-imagectl"]);
        hooked
    }

    /// Stops the cache when there is a link to it. Returns its pid.
    pub(crate) fn stuck_cache(&self) -> String {
        let other = self.workload(Host::A, "other", 8);
        self.ok(Host::A, &Bed::hooked_dump(&other, Host::A.work_dir()));
        self.ok(Host::B, &Bed::restore(Host::B.work_dir()));
        let cache = self.daemon_pid(Host::B);
        self.ok(Host::B, &["kill", "-STOP", &cache]);
        cache
    }

    /// `criu restore` on host B.
    pub(crate) fn restore(dir: &str) -> [&str; 10] {
        ["criu", "restore", "-d", "--stream", "-D", dir, "-W", "/tmp", "-o", "restore.log"]
    }

    /// Starts a workload of `mib` MiB as the unit `name`; returns its pid when it is ready.
    #[track_caller]
    pub(crate) fn workload(&self, host: Host, name: &str, mib: u32) -> String {
        let mib = mib.to_string();
        self.hosts(&["workload", host.name(), name, &mib, "--seed", &mib]).trim().to_owned()
    }

    /// Starts another of the bed's programs: `threads`, or one that was copied to `/usr/bin` and takes the same options.
    #[track_caller]
    pub(crate) fn start(&self, program: &str, host: Host, name: &str, mib: u32) -> String {
        let mib = mib.to_string();
        self.hosts(&["start", host.name(), program, name, &mib]).trim().to_owned()
    }

    /// Makes a workload report, wherever it is now.
    #[track_caller]
    pub(crate) fn ask(&self, host: Host, name: &str, pid: &str) -> Report {
        let json = self.hosts(&["ask", host.name(), name, pid]);
        let report: Value = serde_json::from_str(&json).unwrap();
        Report {
            pid: report["pid"].as_u64().unwrap(),
            counter: report["counter"].as_u64().unwrap(),
            checksum: report["checksum"].as_str().unwrap().to_owned(),
        }
    }

    /// Makes one report everything that it says of itself.
    #[track_caller]
    pub(crate) fn report(&self, host: Host, name: &str, pid: &str) -> Value {
        serde_json::from_str(&self.hosts(&["ask", host.name(), name, pid])).unwrap()
    }

    /// Whether a process is there.
    pub(crate) fn lives(&self, host: Host, pid: &str) -> bool {
        self.run(host, &["test", "-d", &format!("/proc/{pid}")]).status.success()
    }

    /// The main process of the host's daemon.
    pub(crate) fn daemon_pid(&self, host: Host) -> String {
        let pid = self.ok(host, &["systemctl", "show", "-P", "MainPID", host.daemon()]);
        pid.trim().to_owned()
    }

    /// What `criu-imagectl --json` answers.
    #[track_caller]
    pub(crate) fn ctl(&self, host: Host, arguments: &[&str]) -> Value {
        let mut command = vec!["criu-imagectl", "--json"];
        command.extend(arguments);
        serde_json::from_str(&self.ok(host, &command)).unwrap()
    }

    /// The snapshots that the host's daemon lists.
    #[track_caller]
    pub(crate) fn list(&self, host: Host) -> Vec<Value> {
        self.ctl(host, &["list"]).as_array().unwrap().clone()
    }

    /// The daemon's journal, the entries that match, as journald keeps them.
    pub(crate) fn journal(&self, host: Host, matching: &[&str]) -> Vec<Value> {
        self.ok(host, &["journalctl", "--sync"]);
        let mut command = vec!["journalctl", "--no-pager", "-o", "json"];
        command.extend(matching);
        let lines = self.ok(host, &command);
        lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// Takes the link between the hosts down.
    pub(crate) fn cut(&self) {
        self.hosts(&["cut"]);
    }

    /// Takes it up again.
    pub(crate) fn mend(&self) {
        self.hosts(&["mend"]);
    }

    #[track_caller]
    fn hosts(&self, arguments: &[&str]) -> String {
        let (command, rest) = arguments.split_first().unwrap();
        succeeded(&arguments, &self.script(command).args(rest).output().unwrap())
    }

    /// A command of `tests/bed/hosts` for this bed, to be run as the caller likes.
    pub(crate) fn script(&self, command: &str) -> Command {
        let mut script = Command::new(repository().join("tests/bed/hosts"));
        script.arg(command).arg(self.dir.path()).env("CRIU_IMAGE_RELAY_BUILD", &self.build);
        script
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for host in BOTH {
                let journal =
                    self.run(host, &["journalctl", "--no-pager", "-n", "40", "-u", "criu-image-*"]);
                eprintln!("journal of host {}:", host.name());
                eprintln!("{}", String::from_utf8_lossy(&journal.stdout));
            }
        }
        let _ = self.script("down").status();
    }
}

/// Waits for something that is about to happen.
#[track_caller]
pub(crate) fn wait_until(what: &str, mut happened: impl FnMut() -> bool) {
    let limit = Instant::now() + Duration::from_secs(30);
    while !happened() {
        assert!(Instant::now() < limit, "this did not happen in 30 s: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Waits for a command that was spawned, and tells what it said if it failed.
#[track_caller]
pub(crate) fn finish(child: Child) -> String {
    succeeded(&"a command started before", &child.wait_with_output().unwrap())
}

#[track_caller]
fn succeeded(command: &dyn std::fmt::Debug, output: &Output) -> String {
    let (out, err) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}: {}\n{out}\n{err}", output.status);
    out.into_owned()
}

pub(crate) fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The directory of the binaries under test: those that cargo built for this very test.
pub(crate) fn build() -> PathBuf {
    Path::new(env!("CARGO_BIN_EXE_criu-image-proxy")).parent().unwrap().to_owned()
}
