//! The real daemons as children of a test: in a directory of their own, on a port of their own, with
//! their logs in reach.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, ErrorKind};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use criu_image_relay::control::model::{Snapshot, SnapshotState, Status};
use criu_image_relay::control::{Client, ClientError, Reading};
use criu_image_relay::daemon::CONTROL_SOCKET;
use rustix::process::{Resource, getrlimit, setrlimit};
use tempfile::TempDir;

#[path = "../messages/log.rs"]
mod log;
#[path = "../messages/mod.rs"]
mod messages;

/// What has to happen at once has happened by then, also on a machine that is busy.
pub(crate) const SOON: Duration = Duration::from_secs(10);

/// What the proxy of a test calls itself.
pub(crate) const SOURCE: &str = "source";

/// A daemon that runs until it is dropped.
pub(crate) struct Daemon {
    child: Child,
    dir: TempDir,
    log: Log,
}

/// The lines that a daemon has logged so far.
#[derive(Clone, Default)]
struct Log(Arc<(Mutex<Vec<String>>, Condvar)>);

/// Keys of the configuration, in dotted form, and their values as TOML.
pub(crate) type Settings<'a> = &'a [(&'a str, &'a str)];

impl Daemon {
    /// A cache, and the address that it listens on.
    pub(crate) fn cache(settings: Settings<'_>) -> (Daemon, SocketAddr) {
        loop {
            let address = unused_address();
            if let Ok(cache) = Daemon::cache_at(address, settings, None) {
                return (cache, address);
            }
        }
    }

    /// A cache that may have so many open files.
    pub(crate) fn cache_with_files(files: u32, settings: Settings<'_>) -> (Daemon, SocketAddr) {
        loop {
            let address = unused_address();
            if let Ok(cache) = Daemon::cache_at(address, settings, Some(files)) {
                return (cache, address);
            }
        }
    }

    /// A cache on a certain address; an error if that is in use.
    pub(crate) fn cache_at(
        address: SocketAddr,
        settings: Settings<'_>,
        files: Option<u32>,
    ) -> Result<Daemon, String> {
        Daemon::cache_by(&exec_with_files(files), address, settings)
    }

    /// The same, started by `exec`: what a shell is to do with the command that follows.
    pub(crate) fn cache_by(
        exec: &str,
        address: SocketAddr,
        settings: Settings<'_>,
    ) -> Result<Daemon, String> {
        let listen = format!("{:?}", address.to_string());
        let base = [("listen", listen.as_str()), ("store.max-bytes", "\"64M\"")];
        Daemon::start(env!("CARGO_BIN_EXE_criu-image-cache"), &base, settings, exec)
    }

    /// A proxy that sends to `cache`.
    pub(crate) fn proxy(cache: SocketAddr, settings: Settings<'_>) -> Daemon {
        Daemon::proxy_with_files(None, cache, settings)
    }

    /// A proxy that may have so many open files.
    pub(crate) fn proxy_with_files(
        files: Option<u32>,
        cache: SocketAddr,
        settings: Settings<'_>,
    ) -> Daemon {
        Daemon::proxy_by(&exec_with_files(files), cache, settings).unwrap()
    }

    /// The same, started by `exec`: what a shell is to do with the command that follows.
    pub(crate) fn proxy_by(
        exec: &str,
        cache: SocketAddr,
        settings: Settings<'_>,
    ) -> Result<Daemon, String> {
        let (cache, name) = (format!("{:?}", cache.to_string()), format!("{SOURCE:?}"));
        let base = [("cache", cache.as_str()), ("name", name.as_str())];
        Daemon::start(env!("CARGO_BIN_EXE_criu-image-proxy"), &base, settings, exec)
    }

    fn start(
        binary: &str,
        base: Settings<'_>,
        settings: Settings<'_>,
        exec: &str,
    ) -> Result<Daemon, String> {
        let dir = tempfile::tempdir().unwrap();
        // The port of the page server is one for all that do not ask for another.
        let base = [base, &[("pages.listen", "\"\"")]].concat();
        let all: BTreeMap<_, _> = base.iter().chain(settings).copied().collect();
        let lines = all.iter().map(|(key, value)| format!("{key} = {value}\n"));
        let config = dir.path().join("config.toml");
        fs::write(&config, lines.collect::<String>()).unwrap();

        let mut command = Command::new("sh");
        command.args(["-c", &format!("{exec} \"$@\""), "sh"]).arg(tried(binary));
        command.arg("--config").arg(config).arg("--work-dir").arg(dir.path());
        for variable in
            ["JOURNAL_STREAM", "NOTIFY_SOCKET", "LISTEN_FDS", "WATCHDOG_USEC", "LD_LIBRARY_PATH"]
        {
            command.env_remove(variable);
        }
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log = Log::default();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let writer = log.clone();
        std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                writer.push(line);
            }
            writer.push("(the log ends)".to_owned());
        });
        let mut daemon = Daemon { child, dir, log };
        let started =
            daemon.log.wait(|line| line.contains(" serves") || line.ends_with("log ends)"));
        match started {
            Some(line) if line.contains(" serves") => Ok(daemon),
            _ => {
                let _ = daemon.child.wait();
                Err(daemon.log.text())
            }
        }
    }

    /// Stops it as systemd does, and waits until it has. Gives all that it has logged.
    pub(crate) fn stop(mut self) -> String {
        self.terminate();
        assert!(self.child.wait().unwrap().success(), "{}", self.log.text());
        self.log.wait(|line| line.ends_with("log ends)"));
        self.log.text()
    }

    /// Tells it to stop.
    pub(crate) fn terminate(&self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    }

    /// Stops it for a while, as a machine does that is busy.
    pub(crate) fn pause(&self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
    }

    /// Lets it go on.
    pub(crate) fn go_on(&self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::CONT).unwrap();
    }

    /// The directory of its sockets.
    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Waits until one line of the log has all of these.
    pub(crate) fn assert_log(&self, parts: &[&str]) -> String {
        let all = |line: &str| parts.iter().all(|part| line.contains(part));
        match self.log.wait(all) {
            Some(line) => line,
            None => panic!("no line has all of {parts:?} in\n{}", self.log.text()),
        }
    }

    /// Waits until as many lines of the log have this, and finds that no more do by then.
    pub(crate) fn assert_logged(&self, part: &str, times: usize) {
        // What a daemon has written is read by a thread of this test a little later.
        eventually(|| self.count_log(part) >= times);
        assert_eq!(self.count_log(part), times, "{part} in\n{}", self.log.text());
    }

    /// How many lines of the log have this by now, of those that were read.
    pub(crate) fn count_log(&self, part: &str) -> usize {
        self.log.0.0.lock().unwrap().iter().filter(|line| line.contains(part)).count()
    }

    /// Whether it is alive.
    pub(crate) fn assert_alive(&mut self) {
        let ended = self.child.try_wait().unwrap();
        assert!(ended.is_none(), "{ended:?}\n{}", self.log.text());
    }

    /// How much memory it takes, without that of images.
    pub(crate) fn resident_bytes(&self) -> u64 {
        self.proc_status("RssAnon:") << 10
    }

    /// How much memory it has ever asked for, whether it used it or not.
    pub(crate) fn peak_bytes(&self) -> u64 {
        self.proc_status("VmPeak:") << 10
    }

    /// How long its event loop has run on a processor.
    pub(crate) fn cpu_time(&self) -> Duration {
        let said = fs::read_to_string(format!("/proc/{}/schedstat", self.child.id())).unwrap();
        Duration::from_nanos(said.split(' ').next().unwrap().parse().unwrap())
    }

    /// How many threads it has.
    pub(crate) fn threads(&self) -> u64 {
        self.proc_status("Threads:")
    }

    /// How many bytes the kernel holds for its memfds.
    pub(crate) fn memfd_bytes(&self) -> u64 {
        let open = fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap();
        let is_memfd = |to: PathBuf| to.to_string_lossy().starts_with("/memfd:");
        let memfds: BTreeMap<u64, u64> = open
            .map(|descriptor| descriptor.unwrap().path())
            .filter(|path| fs::read_link(path).is_ok_and(is_memfd))
            .map(|path| fs::metadata(path).unwrap())
            .map(|file| (file.ino(), file.blocks() * 512))
            .collect();
        memfds.values().sum()
    }

    /// Whether it has a memfd of that name: that of an image.
    pub(crate) fn has_memfd(&self, name: &str) -> bool {
        let open = fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap();
        let named = format!("/memfd:{name} ");
        let is_it = |to: PathBuf| to.to_string_lossy().starts_with(&named);
        open.flatten().any(|descriptor| fs::read_link(descriptor.path()).is_ok_and(is_it))
    }

    /// How many descriptors it has open.
    pub(crate) fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap().count()
    }

    fn proc_status(&self, field: &str) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let value = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
        value.split_whitespace().next().unwrap().parse().unwrap()
    }

    /// A snapshot as `criu-imagectl show` has it.
    pub(crate) fn show(&self, id: &str) -> Option<Snapshot> {
        match self.control(async |client| client.show(id).await) {
            Ok((snapshot, _)) => Some(snapshot),
            Err(ClientError::NoSuchSnapshot(_)) => None,
            Err(error) => panic!("{error}"),
        }
    }

    /// Waits until a snapshot has come into that state, and gives the reason for it.
    pub(crate) fn assert_state(&self, id: &str, state: SnapshotState) -> String {
        let mut last = None;
        let reached = eventually(|| {
            last = self.show(id);
            last.as_ref().is_some_and(|snapshot| snapshot.state == state)
        });
        assert!(reached, "{id} is {last:?}, not {state:?}\n{}", self.log.text());
        last.unwrap().reason
    }

    /// Waits until at least so many bytes of a snapshot have come.
    pub(crate) fn assert_receiving(&self, id: &str, bytes: u64) {
        let come = || self.show(id).is_some_and(|snapshot| snapshot.bytes >= bytes);
        assert!(eventually(come), "{bytes} bytes of {id} do not come\n{}", self.log.text());
    }

    /// Waits until an image has come whole, and has so many bytes.
    pub(crate) fn assert_image(&self, id: &str, name: &str, bytes: u64) {
        let come = || {
            let shown = self.control(async |client| client.show(id).await);
            shown.is_ok_and(|(_, images)| {
                images.iter().any(|i| i.name == name && i.whole && i.bytes == bytes)
            })
        };
        assert!(eventually(come), "{name} of {id} does not come\n{}", self.log.text());
    }

    /// Waits until so many bytes are held in memory.
    pub(crate) fn assert_held(&self, bytes: u64) {
        let mut held = 0;
        let reached = eventually(|| {
            held = self.status().held_bytes;
            held == bytes
        });
        assert!(reached, "{held} bytes are held, not {bytes}\n{}", self.log.text());
    }

    /// Every snapshot as `criu-imagectl list` has it.
    pub(crate) fn list(&self) -> Vec<Snapshot> {
        self.control(async |client| client.list().await).unwrap()
    }

    /// How many sessions are under way.
    pub(crate) fn sessions(&self) -> u64 {
        self.status().sessions
    }

    /// What `criu-imagectl status` has.
    pub(crate) fn status(&self) -> Status {
        self.control(async |client| client.status().await).unwrap()
    }

    /// Drops a snapshot.
    pub(crate) fn drop_snapshot(&self, id: &str) {
        self.control(async |client| client.drop_snapshot(id).await).unwrap();
    }

    /// A connection that speaks for the snapshot `id`, as `criu-imagectl open` makes it.
    pub(crate) fn open(&self, id: &str) -> UnixStream {
        self.open_to(id, None)
    }

    /// The same for a dump that goes to another cache than the configured one.
    pub(crate) fn open_to(&self, id: &str, cache: Option<SocketAddr>) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (to, theirs) = (cache.map(|cache| cache.to_string()), OwnedFd::from(theirs));
        self.control(async |client| client.open(id, to.as_deref(), Reading::Take, theirs).await)
            .unwrap();
        ours
    }

    /// A directory that is opened for the snapshot `id`, if the daemon will: its socket is `name` in there.
    pub(crate) fn try_open_directory(
        &self,
        id: &str,
        dir: &Path,
        name: &str,
    ) -> Result<(), ClientError> {
        let listener = criu_image_relay::sys::unix::bind(dir, name).unwrap();
        self.control(async |client| client.open(id, None, Reading::Take, listener.into()).await)
    }

    /// A connection that only looks at the snapshot `id`.
    pub(crate) fn look(&self, id: &str) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        self.control(async |client| client.open(id, None, Reading::Look, theirs.into()).await)
            .unwrap();
        ours
    }

    /// A connection to a directory that was opened for the snapshot `id`.
    pub(crate) fn opened(&self, id: &str) -> UnixStream {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("streamer-serve.sock");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        self.control(async |client| client.open(id, None, Reading::Take, listener.into()).await)
            .unwrap();
        UnixStream::connect(path).unwrap()
    }

    /// Whether a snapshot is listed in that state now.
    pub(crate) fn lists(&self, id: &str, state: SnapshotState) -> bool {
        self.show(id).is_some_and(|snapshot| snapshot.state == state)
    }

    /// A connection of a restore of the snapshot `id`, if the cache will.
    pub(crate) fn try_hold(
        &self,
        id: &str,
        again: bool,
        copy: bool,
    ) -> Result<UnixStream, ClientError> {
        let (ours, theirs) = UnixStream::pair().unwrap();
        self.control(async |client| client.hold(id, again, copy, false, theirs.into()).await)?;
        Ok(ours)
    }

    /// A connection on which pages of the snapshot `id` come, or are asked for.
    pub(crate) fn open_pages(&self, id: &str) -> UnixStream {
        self.open_pages_of(id, None)
    }

    /// The same, for pages that are based on those of the snapshot `parent`.
    pub(crate) fn open_pages_of(&self, id: &str, parent: Option<&str>) -> UnixStream {
        self.try_open_pages(id, parent).unwrap()
    }

    /// The same, if the daemon will.
    pub(crate) fn try_open_pages(
        &self,
        id: &str,
        parent: Option<&str>,
    ) -> Result<UnixStream, ClientError> {
        let (ours, theirs) = UnixStream::pair().unwrap();
        self.control(async |client| client.open_pages(id, parent, None, theirs.into()).await)?;
        Ok(ours)
    }

    /// An address on which pages of the snapshot `id` are listened for.
    pub(crate) fn listen_for_pages(&self, id: &str) -> SocketAddr {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let address = listener.local_addr().unwrap();
        self.control(async |client| client.open_pages(id, None, None, listener.into()).await)
            .unwrap();
        address
    }

    /// Calls it on its control socket.
    pub(crate) fn control<T>(
        &self,
        call: impl AsyncFnOnce(&mut Client) -> Result<T, ClientError>,
    ) -> Result<T, ClientError> {
        let socket: PathBuf = self.dir().join(CONTROL_SOCKET);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let talk = async { call(&mut Client::connect(socket).await?).await };
            tokio::time::timeout(SOON, talk).await.expect("the daemon answers")
        })
    }
}

/// Where a binary of this build is in the build that is tried: this one, unless `CRIU_IMAGE_RELAY_BUILD` names another.
fn tried(binary: &str) -> PathBuf {
    let other = std::env::var_os("CRIU_IMAGE_RELAY_BUILD");
    let other = other.map(|build| Path::new(&build).join(Path::new(binary).file_name().unwrap()));
    other.unwrap_or_else(|| binary.into())
}

fn exec_with_files(files: Option<u32>) -> String {
    files.map_or("exec".to_owned(), |files| format!("ulimit -n {files}; exec"))
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if !std::thread::panicking() {
            log::check(&self.log.0.0.lock().unwrap());
        }
    }
}

impl Log {
    fn push(&self, line: String) {
        self.0.0.lock().unwrap().push(line);
        self.0.1.notify_all();
    }

    /// The first line that is wanted, when it comes.
    fn wait(&self, wanted: impl Fn(&str) -> bool) -> Option<String> {
        let find = |lines: &[String]| lines.iter().find(|line| wanted(line)).cloned();
        let lines = self.0.0.lock().unwrap();
        let found = self.0.1.wait_timeout_while(lines, SOON, |lines| find(lines).is_none());
        find(&found.unwrap().0)
    }

    fn text(&self) -> String {
        self.0.0.lock().unwrap().join("\n")
    }
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

/// Whether an error of reading so many bytes says that the daemon has closed the connection.
pub(crate) fn is_end(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::ConnectionReset | ErrorKind::UnexpectedEof)
}

/// This process may have as many open files as it is allowed at most.
pub(crate) fn have_many_files() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).unwrap();
}

/// An address that nobody listens on. Its port is none that the kernel gives to a connection.
pub(crate) fn unused_address() -> SocketAddr {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    loop {
        let start = u16::try_from(std::process::id() % 200).unwrap() * 100;
        let port = 10_000 + start + NEXT.fetch_add(1, Ordering::Relaxed) % 2_000;
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        if TcpListener::bind(address).is_ok() {
            return address;
        }
    }
}
