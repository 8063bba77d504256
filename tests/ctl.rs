//! `criu-imagectl` against a daemon that is a thread of this test, over the real control socket and
//! CRIU's real stream protocol.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use criu_image_relay::control::model::{
    Image, ImageFile, LinkStatus, Role, Snapshot, SnapshotState, Status, Withdrawn,
};
use criu_image_relay::control::{Backend, Open, OpenPages, Reading, Refusal, Withdraw, serve};
use criu_image_relay::criu::stream::{decode_request, encode_reply, request_len};
use criu_image_relay::daemon::sessions::{Peer, admit};
use criu_image_relay::sys::scm::receive_descriptor;
use criu_image_relay::timeline::{Phase, PhaseName};
use serde_json::Value;

/// A snapshot with its images in memory.
#[derive(Clone)]
struct Held {
    snapshot: Snapshot,
    images: BTreeMap<String, Vec<u8>>,
}

/// What the fake daemons of a test share: what is pushed to one can be extracted from the other.
#[derive(Clone, Default)]
struct Store(Arc<Mutex<BTreeMap<String, Held>>>);

impl Store {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Held>> {
        self.0.lock().unwrap()
    }

    fn put(&self, id: &str, state: SnapshotState, images: &[(&str, &[u8])]) {
        let images: BTreeMap<_, _> =
            images.iter().map(|(name, bytes)| ((*name).to_owned(), bytes.to_vec())).collect();
        let snapshot = Snapshot {
            id: id.to_owned(),
            state,
            reason: String::new(),
            peer: "hosta".to_owned(),
            images: images.len() as u64,
            bytes: images.values().map(|bytes| bytes.len() as u64).sum(),
            begun_ms: 1_000,
            ended_ms: 3_000,
            needs_view: String::new(),
            memory_may_have_changed: None,
        };
        self.lock().insert(id.to_owned(), Held { snapshot, images });
    }

    fn is(&self, id: &str, state: SnapshotState) -> bool {
        self.lock().get(id).is_some_and(|held| held.snapshot.state == state)
    }

    fn damage(&self, id: &str, reason: &str) {
        let mut held = self.lock();
        let snapshot = &mut held.get_mut(id).unwrap().snapshot;
        snapshot.state = SnapshotState::Damaged;
        reason.clone_into(&mut snapshot.reason);
    }
}

/// How a fake daemon misbehaves.
#[derive(Clone, Copy, PartialEq)]
enum Manner {
    Honest,
    /// Ends a capture at the second image; serves images without their last byte.
    CutsShort,
    /// A proxy that cannot reach its cache.
    HasNoLink,
}

struct Fake {
    role: Role,
    store: Store,
    manner: Manner,
    opened: Arc<Mutex<Vec<Open>>>,
    /// Where its images are to be viewed.
    files: PathBuf,
}

impl Backend for Fake {
    fn status(&self) -> Status {
        let held = self.store.lock();
        let count =
            |state| held.values().filter(|held| held.snapshot.state == state).count() as u64;
        Status {
            role: self.role,
            version: "0.1.0".to_owned(),
            started_ms: 1_000,
            sessions: 0,
            receiving: count(SnapshotState::Receiving),
            whole: count(SnapshotState::Whole),
            taken: count(SnapshotState::Taken),
            damaged: count(SnapshotState::Damaged),
            held_bytes: 0,
            max_bytes: 1 << 30,
            total_bytes: 0,
            rate: 0,
            links: Vec::new(),
        }
    }

    fn list(&self) -> Vec<Snapshot> {
        self.store.lock().values().map(|held| held.snapshot.clone()).collect()
    }

    fn show(&self, id: &str) -> Option<(Snapshot, Vec<Image>)> {
        let held = self.store.lock().get(id)?.clone();
        let image = |(name, bytes): (String, Vec<u8>)| Image {
            name,
            bytes: bytes.len() as u64,
            whole: true,
        };
        Some((held.snapshot, held.images.into_iter().map(image).collect()))
    }

    fn timeline(&self, id: &str) -> Option<Vec<Phase>> {
        let bytes = self.store.lock().get(id)?.snapshot.bytes;
        let names = match self.role {
            Role::Proxy => [PhaseName::Dump, PhaseName::Acknowledgement],
            Role::Cache => [PhaseName::Arrival, PhaseName::Restore],
        };
        let phase = |(begun_ms, name)| {
            let ended_ms = begun_ms + 500;
            Phase { name, begun_ms, ended_ms, bytes, failed: false }
        };
        Some([1_000, 2_000].into_iter().zip(names).map(phase).collect())
    }

    async fn drop_snapshot(&self, id: &str, _peer: Peer) -> Result<(), Refusal> {
        self.store.lock().remove(id).map(drop).ok_or(Refusal::NoSuchSnapshot)
    }

    async fn connect(&self, to: Option<&str>, _limit: Duration) -> Result<LinkStatus, Refusal> {
        let up = self.manner != Manner::HasNoLink;
        let why = if up { "connected" } else { "Connection refused (os error 111)" };
        Ok(LinkStatus { peer: to.unwrap_or("hostb:9996").to_owned(), up, why: why.to_owned() })
    }

    async fn withdraw(&self, request: Withdraw) -> Result<Withdrawn, Refusal> {
        let known = self.store.lock().remove(&request.id);
        Ok(if known.is_some() { Withdrawn::Withdrawn } else { Withdrawn::Unknown })
    }

    fn open(&self, request: Open, socket: OwnedFd) -> Result<(), Refusal> {
        self.opened.lock().unwrap().push(request.clone());
        let (store, manner, role) = (self.store.clone(), self.manner, self.role);
        let id = request.id;
        let reading = request.reading;
        if role == Role::Cache && reading == Reading::Take && store.is(&id, SnapshotState::Taken) {
            return Err(Refusal::Refused(format!("a restore has taken snapshot {id}")));
        }
        if request.listening && role == Role::Cache {
            std::thread::spawn(move || {
                let listener = UnixListener::from(socket);
                listener.set_nonblocking(false).unwrap();
                for socket in listener.incoming() {
                    serve_images(socket.unwrap(), &id, &store, manner, reading);
                }
            });
            return Ok(());
        }
        if request.listening {
            // Somebody has to keep it open.
            std::mem::forget(socket);
            return Ok(());
        }
        if role == Role::Proxy {
            if store.lock().contains_key(&id) {
                return Err(Refusal::Refused(format!("snapshot {id} is there already")));
            }
            store.put(&id, SnapshotState::Awaited, &[]);
        }
        std::thread::spawn(move || {
            let socket = UnixStream::from(socket);
            socket.set_nonblocking(false).unwrap();
            match role {
                Role::Proxy => capture(socket, &id, &store, manner),
                Role::Cache => serve_images(socket, &id, &store, manner, reading),
            }
        });
        Ok(())
    }

    fn open_pages(&self, request: OpenPages, socket: OwnedFd) -> Result<(), Refusal> {
        assert!(request.listening);
        self.store.put(&request.id, SnapshotState::Paged, &[]);
        // Somebody has to keep it open.
        std::mem::forget(socket);
        Ok(())
    }

    fn view(&self, id: &str) -> Result<Vec<ImageFile>, Refusal> {
        let held = self.store.lock();
        let images = &held.get(id).ok_or(Refusal::NoSuchSnapshot)?.images;
        let file = |(name, bytes): (&String, &Vec<u8>)| ImageFile {
            name: name.clone(),
            bytes: bytes.len() as u64,
            path: self.files.join(name).display().to_string(),
        };
        Ok(images.iter().map(file).collect())
    }
}

fn next_request(socket: &mut UnixStream) -> Option<String> {
    let mut header = [0; 4];
    socket.read_exact(&mut header).ok()?;
    let mut message = vec![0; request_len(header).unwrap()];
    socket.read_exact(&mut message).unwrap();
    Some(decode_request(&message).unwrap())
}

fn next_pipe(socket: &UnixStream) -> Option<File> {
    loop {
        match receive_descriptor(socket) {
            Ok(end) => return end.map(File::from),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(error) => panic!("{error}"),
        }
    }
}

fn capture(mut socket: UnixStream, id: &str, store: &Store, manner: Manner) {
    let mut count = 0;
    while let Some(name) = next_request(&mut socket) {
        let Some(mut pipe) = next_pipe(&socket) else { return };
        count += 1;
        if manner == Manner::CutsShort && count == 2 {
            store.damage(id, "the quota is exhausted");
            return;
        }
        let mut bytes = Vec::new();
        pipe.read_to_end(&mut bytes).unwrap();
        let mut held = store.lock();
        let held = held.get_mut(id).unwrap();
        held.snapshot.images += 1;
        held.snapshot.bytes += bytes.len() as u64;
        held.snapshot.state = SnapshotState::Receiving;
        assert!(held.images.insert(name, bytes).is_none());
    }
    let mut held = store.lock();
    held.get_mut(id).unwrap().snapshot.state = SnapshotState::Whole;
}

fn serve_images(mut socket: UnixStream, id: &str, store: &Store, manner: Manner, reading: Reading) {
    let mut read = false;
    while let Some(name) = next_request(&mut socket) {
        let bytes = store.lock()[id].images.get(&name).cloned();
        socket.write_all(&encode_reply(bytes.is_some())).unwrap();
        let Some(bytes) = bytes else { continue };
        let Some(mut pipe) = next_pipe(&socket) else { return };
        let cut = usize::from(manner == Manner::CutsShort);
        pipe.write_all(&bytes[..bytes.len() - cut]).unwrap();
        read = true;
    }
    if read && reading != Reading::Look {
        store.lock().get_mut(id).unwrap().snapshot.state = SnapshotState::Taken;
    }
}

/// A fake daemon and a directory for the test's files.
struct Daemon {
    dir: tempfile::TempDir,
    socket: PathBuf,
    store: Store,
    opened: Arc<Mutex<Vec<Open>>>,
}

impl Daemon {
    fn start(role: Role, store: &Store, manner: Manner) -> Daemon {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("control.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        listener.set_nonblocking(true).unwrap();
        let opened = Arc::default();
        let files = dir.path().join("fds");
        let fake = Fake { role, store: store.clone(), manner, opened: Arc::clone(&opened), files };
        std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            tokio::task::LocalSet::new().block_on(&runtime, async {
                let listener = tokio::net::UnixListener::from_std(listener).unwrap();
                serve(listener, |socket| admit(socket, &[]), fake).await;
            });
        });
        Daemon { dir, socket, store: store.clone(), opened }
    }

    fn honest(role: Role) -> Daemon {
        Daemon::start(role, &Store::default(), Manner::Honest)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs the command against this daemon.
    fn ctl(&self, arguments: &[&str]) -> Ran {
        Ran(self.command(arguments).output().unwrap())
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = imagectl();
        command.arg("--socket").arg(&self.socket).args(arguments);
        command
    }

    /// Nothing is left of a work directory.
    #[track_caller]
    fn is_clean(&self) {
        let left = fs::read_dir(self.dir.path()).unwrap().flatten();
        let left: Vec<_> = left.map(|entry| entry.file_name().into_string().unwrap()).collect();
        let of_a_run = |name: &String| name.starts_with("migrate-") || name.starts_with("restore-");
        assert!(!left.iter().any(of_a_run), "{left:?}");
    }

    /// A script in place of CRIU.
    fn criu(&self, script: &str) -> PathBuf {
        let path = self.path("criu");
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }
}

fn interrupt(process: &Child) {
    let pid = rustix::process::Pid::from_child(process);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
}

fn imagectl() -> Command {
    Command::new(env!("CARGO_BIN_EXE_criu-imagectl"))
}

struct Ran(Output);

impl Ran {
    #[track_caller]
    fn exits(self, code: i32) -> Ran {
        assert_eq!(self.0.status.code(), Some(code), "{}{}", self.out(), self.err());
        self
    }

    fn out(&self) -> String {
        String::from_utf8(self.0.stdout.clone()).unwrap()
    }

    fn err(&self) -> String {
        String::from_utf8(self.0.stderr.clone()).unwrap()
    }

    fn json(&self) -> Value {
        serde_json::from_slice(&self.0.stdout).unwrap()
    }

    #[track_caller]
    fn complains(self, of: &str) -> Ran {
        assert!(self.err().contains(of), "{}", self.err());
        assert_eq!(self.out(), "");
        self
    }
}

/// A directory as `criu dump -D` leaves it, with more pages than a pipe holds.
fn dumped(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    fs::create_dir(dir).unwrap();
    let pages: Vec<u8> = (0..3_000_001u32).map(|n| (n % 251) as u8).collect();
    let images = [
        ("inventory.img", b"inventory".to_vec()),
        ("pages-1.img", pages),
        ("core-7.img", b"core".to_vec()),
        ("empty.img", Vec::new()),
    ];
    for (name, bytes) in &images {
        fs::write(dir.join(name), bytes).unwrap();
    }
    fs::write(dir.join("dump.log"), "log").unwrap();
    fs::write(dir.join("stats-dump"), "stats").unwrap();
    images.into_iter().map(|(name, bytes)| (name.to_owned(), bytes)).collect()
}

fn utf8(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn a_directory_is_pushed_and_extracted_unchanged() {
    let store = Store::default();
    let proxy = Daemon::start(Role::Proxy, &store, Manner::Honest);
    let cache = Daemon::start(Role::Cache, &store, Manner::Honest);
    let images = dumped(&proxy.path("web"));
    let pushed = proxy.ctl(&["--json", "push", "--to", "hostb", utf8(&proxy.path("web"))]).exits(0);
    assert_eq!(pushed.json()["snapshot"], "web");
    assert_eq!(pushed.json()["images"], 4);
    assert_eq!(pushed.json()["skipped"], serde_json::json!(["dump.log", "stats-dump"]));
    assert!(pushed.err().contains("left behind, as they are no images: dump.log, stats-dump\n"));
    assert_eq!(store.lock()["web"].images, images);
    assert_eq!(proxy.opened.lock().unwrap()[0].to.as_deref(), Some("hostb"));

    let to = cache.path("new/web");
    cache.ctl(&["extract", utf8(&to)]).exits(0);
    let read = |entry: io::Result<fs::DirEntry>| {
        let entry = entry.unwrap();
        assert_eq!(entry.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap())
    };
    assert_eq!(fs::read_dir(&to).unwrap().map(read).collect::<BTreeMap<_, _>>(), images);
    assert_eq!(fs::metadata(&to).unwrap().permissions().mode() & 0o777, 0o700);
    assert_eq!(cache.opened.lock().unwrap()[0].reading, Reading::Look);

    cache.ctl(&["extract", utf8(&to)]).exits(1).complains("is there already");
    fs::write(to.join("core-7.img"), "other").unwrap();
    cache.ctl(&["extract", "--force", utf8(&to)]).exits(0);
    assert_eq!(fs::read(to.join("core-7.img")).unwrap(), images["core-7.img"]);
}

/// A snapshot whose pages can be viewed.
fn viewed(cache: &Daemon) -> [(&'static str, &'static [u8]); 3] {
    let images: [(&str, &[u8]); 3] =
        [("inventory.img", b"inventory"), ("pages-1.img", b"pages"), ("pagemap-7.img", b"map")];
    cache.store.put("web", SnapshotState::Whole, &images);
    fs::create_dir(cache.path("fds")).unwrap();
    fs::write(cache.path("fds/pages-1.img"), b"pages").unwrap();
    images
}

#[test]
fn a_view_has_small_images_as_files_and_pages_as_links() {
    let cache = Daemon::honest(Role::Cache);
    let images = viewed(&cache);
    let to = cache.path("new/web");
    let made = cache.ctl(&["--json", "view", utf8(&to)]).exits(0).json();
    let expected = serde_json::json!({
        "snapshot": "web", "dir": to, "images": 2, "bytes": 12, "links": 1, "linked-bytes": 5
    });
    assert_eq!(made, expected);
    for (name, bytes) in images {
        assert_eq!(fs::read(to.join(name)).unwrap(), bytes);
    }
    assert_eq!(fs::read_link(to.join("pages-1.img")).unwrap(), cache.path("fds/pages-1.img"));
    assert!(fs::symlink_metadata(to.join("pagemap-7.img")).unwrap().is_file());
    assert_eq!(fs::metadata(&to).unwrap().permissions().mode() & 0o777, 0o700);
    assert_eq!(cache.opened.lock().unwrap()[0].reading, Reading::Look);

    cache.ctl(&["view", utf8(&to)]).exits(1).complains("is there already");
    let told = cache.ctl(&["view", "--force", utf8(&to)]).exits(0).out();
    let said = "web: 2 images, 12 B, and 1 links to 5 B of pages in ";
    assert!(told.starts_with(said), "{told}");
}

#[test]
fn a_view_that_fails_leaves_nothing() {
    let cache = Daemon::honest(Role::Cache);
    viewed(&cache);
    fs::remove_file(cache.path("fds/pages-1.img")).unwrap();
    let to = cache.path("web");
    cache.ctl(&["view", utf8(&to)]).exits(1).complains("pages-1.img cannot be opened");
    assert!(!to.exists());
    cache.store.put("half", SnapshotState::Receiving, &[]);
    cache.ctl(&["view", utf8(&cache.path("half"))]).exits(1).complains("not whole");
    cache.ctl(&["view", utf8(&cache.path("none"))]).exits(4);
    let proxy = Daemon::honest(Role::Proxy);
    proxy.ctl(&["view", utf8(&to)]).exits(2).complains("command of the cache");
}

#[test]
fn a_session_that_the_proxy_ends_tells_its_reason() {
    let proxy = Daemon::start(Role::Proxy, &Store::default(), Manner::CutsShort);
    dumped(&proxy.path("web"));
    proxy.ctl(&["push", utf8(&proxy.path("web"))]).exits(5).complains("the quota is exhausted");
}

#[test]
fn what_cannot_be_pushed_is_refused_before_it_starts() {
    let proxy = Daemon::honest(Role::Proxy);
    let dir = proxy.path("web");
    dumped(&dir);
    std::os::unix::fs::symlink("../0", dir.join("parent")).unwrap();
    fs::write(dir.join("pagemap-7.img"), "").unwrap();
    proxy.ctl(&["push", utf8(&dir)]).exits(1).complains("incremental");
    fs::remove_file(dir.join("parent")).unwrap();
    fs::remove_file(dir.join("pagemap-7.img")).unwrap();
    proxy.store.put("web", SnapshotState::Whole, &[]);
    proxy.ctl(&["push", utf8(&dir)]).exits(1).complains("there already");
    fs::remove_file(dir.join("inventory.img")).unwrap();
    proxy.ctl(&["push", utf8(&dir)]).exits(1).complains("no inventory.img");
    proxy.ctl(&["extract", utf8(&dir)]).exits(2).complains("command of the cache");
}

#[test]
fn an_extraction_that_fails_leaves_nothing() {
    let cache = Daemon::start(Role::Cache, &Store::default(), Manner::CutsShort);
    let images: [(&str, &[u8]); 2] = [("core-7.img", b"core"), ("inventory.img", b"inventory")];
    cache.store.put("web", SnapshotState::Whole, &images);
    let to = cache.path("web");
    cache.ctl(&["extract", utf8(&to)]).exits(1).complains("3 bytes came, the cache has 4");
    assert!(!to.exists());
    cache.store.put("evil", SnapshotState::Whole, &[("../../core-7.img", b"core")]);
    cache.ctl(&["extract", utf8(&cache.path("evil"))]).exits(1).complains("slash");
    cache.store.put("half", SnapshotState::Receiving, &images);
    cache.ctl(&["extract", utf8(&cache.path("half"))]).exits(1).complains("not whole");
    cache.store.damage("half", "cut short");
    cache.ctl(&["extract", utf8(&cache.path("half"))]).exits(5).complains("cut short");
    cache.ctl(&["extract", utf8(&cache.path("none"))]).exits(4);
}

#[test]
fn snapshots_are_shown_and_dropped() {
    let cache = Daemon::honest(Role::Cache);
    cache.store.put("web", SnapshotState::Whole, &[("core-7.img", &[0; 2048])]);
    cache.store.put("db", SnapshotState::Receiving, &[]);
    cache.store.damage("db", "the link broke");
    let list = cache.ctl(&["list"]).exits(0).out();
    assert!(list.starts_with("ID"), "{list}");
    assert!(list.contains("2 KiB") && list.contains("the link broke"), "{list}");
    let list = cache.ctl(&["list", "--json"]).exits(0).json();
    assert_eq!(list[1]["id"], "web");
    assert_eq!(list[1]["daemon"], "cache");
    let status = cache.ctl(&["status"]).exits(0).out();
    assert!(status.contains("1 whole, 0 taken, 1 damaged"), "{status}");
    assert_eq!(cache.ctl(&["status", "--json"]).exits(0).json()[0]["role"], "cache");
    let shown = cache.ctl(&["show", "web"]).exits(0).out();
    assert!(shown.contains("core-7.img   2048  whole"), "{shown}");
    assert_eq!(cache.ctl(&["show", "web", "--json"]).json()["images"][0]["bytes"], 2048);

    cache.ctl(&["show", "none"]).exits(4).complains("\"none\"");
    cache.ctl(&["drop", "none", "web"]).exits(4);
    assert!(!cache.store.lock().contains_key("web"));
}

#[test]
fn a_timeline_is_told_drawn_and_joined_with_the_other_hosts() {
    let (proxy, cache) = (Daemon::honest(Role::Proxy), Daemon::honest(Role::Cache));
    for daemon in [&proxy, &cache] {
        daemon.store.put("web", SnapshotState::Whole, &[("core-7.img", &[7; 2048])]);
    }
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (file, picture) = (at("web.json"), at("web.svg"));
    let told = proxy.ctl(&["--json", "show", "web", "--timeline"]).exits(0).out();
    fs::write(&file, told).unwrap();

    let joined = ["show", "web", "--timeline", "--with", &file, "--svg", &picture];
    let text = cache.ctl(&joined).exits(0).out();
    assert!(text.contains("web: 1.50 s"), "{text}");
    let lines: Vec<_> = text.lines().skip(3).map(|line| line.split_whitespace().nth(1)).collect();
    let phases = ["dump", "arrival", "wait", "acknowledgement", "restore"];
    assert_eq!(lines, phases.map(Some));
    assert_eq!(fs::read_to_string(&picture).unwrap().matches("<rect").count(), 1 + phases.len());

    // What nobody here knows is told by the file alone.
    proxy.store.lock().clear();
    let alone = proxy.ctl(&["--json", "show", "web", "--timeline", "--with", &file]).exits(0);
    assert_eq!(alone.json()["phases"].as_array().unwrap().len(), 2);
    proxy.ctl(&["show", "web", "--timeline"]).exits(4).complains("\"web\"");
    fs::write(&file, "{}").unwrap();
    cache.ctl(&joined).exits(2).complains("show web --timeline > FILE");
    cache.ctl(&["show", "web", "--svg", &picture]).exits(2).complains("--timeline");
}

#[test]
fn waiting_ends_by_outcome() {
    let cache = Daemon::honest(Role::Cache);
    cache.ctl(&["wait", "web", "--timeout", "200ms"]).exits(6).complains("it has not come");
    let store = cache.store.clone();
    let later = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(200));
        store.put("web", SnapshotState::Receiving, &[]);
        std::thread::sleep(Duration::from_millis(200));
        store.put("web", SnapshotState::Whole, &[("core-7.img", b"core")]);
    });
    let waited = cache.ctl(&["wait", "web", "--timeout", "20"]).exits(0);
    assert_eq!(waited.out(), "web: whole, 1 images, 4 B in 2 s\n");
    later.join().unwrap();
    cache.ctl(&["wait", "web", "--for", "taken", "--timeout", "200ms"]).exits(6);
    cache.store.put("web", SnapshotState::Taken, &[]);
    cache.ctl(&["wait", "web", "--for", "taken"]).exits(0);
    cache.store.damage("web", "cut short");
    cache.ctl(&["wait", "web"]).exits(5).complains("cut short");

    cache.store.put("web", SnapshotState::Receiving, &[]);
    let store = cache.store.clone();
    let later = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(500));
        store.lock().remove("web");
    });
    let gone = cache.ctl(&["wait", "web", "--timeout", "20"]).exits(4);
    gone.complains("snapshot web was receiving and is gone");
    later.join().unwrap();
}

#[test]
fn a_socket_is_opened_in_a_directory() {
    let proxy = Daemon::honest(Role::Proxy);
    let dir = proxy.path(&"long".repeat(40)).join("web");
    proxy.ctl(&["open", utf8(&dir)]).exits(1).complains("No such file");
    fs::create_dir_all(&dir).unwrap();
    let opened = proxy.ctl(&["open", utf8(&dir), "--to", "hostb:1"]).exits(0);
    let dump = format!("criu dump --stream -D {}", utf8(&dir.canonicalize().unwrap()));
    let command = format!("{dump} -t PID --action-script criu-imagectl\n");
    assert_eq!(opened.out(), command);
    let expected = Open {
        copy: false,
        id: "web".to_owned(),
        parent: None,
        attempt: 0,
        to: Some("hostb:1".to_owned()),
        reading: Reading::Take,
        view: false,
        listening: true,
    };
    assert_eq!(*proxy.opened.lock().unwrap(), [expected]);
    let socket = dir.join("streamer-capture.sock");
    assert_eq!(fs::metadata(socket).unwrap().permissions().mode() & 0o777, 0o600);
    // Somebody listens there now.
    proxy.ctl(&["open", utf8(&dir)]).exits(1).complains("listens there");

    let cache = Daemon::honest(Role::Cache);
    let dir = cache.path("db");
    fs::create_dir(&dir).unwrap();
    cache.ctl(&["open", "--to", "hostb", utf8(&dir)]).exits(2).complains("--to");
    drop(UnixListener::bind(dir.join("streamer-serve.sock")).unwrap());
    let opened = cache.ctl(&["--json", "open", "--snapshot", "x", utf8(&dir)]).exits(0).json();
    assert_eq!(opened["snapshot"], "x");
}

#[test]
fn a_page_server_is_opened_beside_the_socket() {
    let proxy = Daemon::honest(Role::Proxy);
    let dir = proxy.path("web");
    fs::create_dir(&dir).unwrap();
    let opened = proxy.ctl(&["--json", "open", "--pages", "--parent", "old", utf8(&dir)]).exits(0);
    let port = opened.json()["port"].as_u64().unwrap();
    std::net::TcpStream::connect(("127.0.0.1", u16::try_from(port).unwrap())).unwrap();
    assert_eq!(opened.json()["commands"].as_array().unwrap().len(), 6);
    assert_eq!(proxy.store.lock()["web"].snapshot.state, SnapshotState::Paged);

    let dir = proxy.path("taken");
    fs::create_dir(&dir).unwrap();
    let taken = format!("--pages=127.0.0.1:{port}");
    proxy.ctl(&["open", &taken, utf8(&dir)]).exits(1).complains("Address already in use");
    proxy.ctl(&["open", "--parent", "old", utf8(&dir)]).exits(2).complains("--pages");
    proxy.ctl(&["open", "--pages=here", utf8(&dir)]).exits(2).complains("--pages");
    let cache = Daemon::honest(Role::Cache);
    let for_a_dump = ["open", "--pages", "--parent", "old", utf8(&dir)];
    cache.ctl(&for_a_dump).exits(2).complains("--parent");
    let opened = cache.ctl(&["open", "--pages", utf8(&dir)]).exits(0).out();
    assert!(opened.contains("criu lazy-pages -D"), "{opened}");
}

/// Migrates a process that only sleeps, with a script in place of CRIU.
fn migrate_with(proxy: &Daemon, criu: &str, options: &[&str]) -> Ran {
    let script = proxy.criu(criu);
    let mut process = Command::new("sleep").arg("60").spawn().unwrap();
    let pid = process.id().to_string();
    let mut arguments = vec!["migrate", "-t", &pid, "--snapshot", "web", "--criu", utf8(&script)];
    arguments.extend(["--work-dir", utf8(proxy.dir.path())]);
    arguments.extend(options);
    let ran = proxy.ctl(&arguments);
    process.kill().unwrap();
    process.wait().unwrap();
    proxy.is_clean();
    ran
}

#[test]
fn a_migration_that_fails_says_why_and_leaves_nothing() {
    let proxy = Daemon::honest(Role::Proxy);
    let ran = migrate_with(&proxy, "", &["--criu", "/nonexistent/criu"]).exits(2);
    assert!(ran.err().contains("--criu"), "{}", ran.err());

    let failing = "[ $1 = check ] || { echo 'Error (criu/x.c:1): no' >&2; exit 1; }";
    let ran = migrate_with(&proxy, failing, &[]).exits(1).complains("Error (criu/x.c:1): no");
    assert!(ran.err().contains("runs on here"), "{}", ran.err());
    assert!(proxy.store.lock().is_empty());

    let silent = migrate_with(&proxy, "exit 0", &[]).exits(1);
    silent.complains("stats-dump: No such file");
    let garbage = "[ $1 = check ] || echo garbage-garbage >$5/stats-dump";
    migrate_with(&proxy, garbage, &[]).exits(1).complains("does not begin as CRIU's statistics do");
}

#[test]
fn a_migration_without_a_link_to_its_cache_does_not_begin() {
    let proxy = Daemon::start(Role::Proxy, &Store::default(), Manner::HasNoLink);
    let ran = proxy.path("ran");
    let criu = format!("touch {}", utf8(&ran));
    for (options, cache) in [(&[][..], "hostb:9996"), (&["--to", "hostc:1"], "hostc:1")] {
        let told = migrate_with(&proxy, &criu, options).exits(3);
        let why = format!("there is no link to the cache {cache}: Connection refused");
        let told = told.complains(&why).err();
        assert!(told.contains("was not touched") && told.contains("--to"), "{told}");
    }
    assert!(!ran.exists() && proxy.store.lock().is_empty());
}

#[test]
fn without_tracking_only_the_final_dump_is_made() {
    let proxy = Daemon::honest(Role::Proxy);
    let ran = migrate_with(&proxy, "[ $1 = dump ]", &["--max-downtime", "1h", "--json"]).exits(0);
    assert_eq!(ran.json()["outcome"], "migrated");
    assert_eq!(ran.json()["rounds"], serde_json::json!([]));
    assert!(ran.err().contains("mem_dirty_track"), "{}", ran.err());
    let ran = migrate_with(&proxy, "[ $1 = dump ]", &["--max-downtime", "0"]).exits(7);
    assert!(ran.err().contains("was not frozen"), "{}", ran.err());
    assert!(proxy.store.lock().is_empty());
}

#[test]
fn a_migration_that_is_interrupted_leaves_no_criu_behind() {
    let proxy = Daemon::honest(Role::Proxy);
    let asked = proxy.path("asked");
    let criu =
        proxy.criu(&format!("echo $$ >{0}.new; mv {0}.new {0}; exec sleep 60", utf8(&asked)));
    // Not this one: other tests move its children.
    let mut process = Command::new("sleep").arg("60").spawn().unwrap();
    let tree = process.id().to_string();
    let migrate =
        ["migrate", "-t", &tree, "--criu", utf8(&criu), "--work-dir", utf8(proxy.dir.path())];
    let mut command = proxy.command(&migrate);
    let migrating = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let pid = loop {
        match fs::read_to_string(&asked) {
            Ok(pid) => break pid,
            Err(_) => std::thread::sleep(Duration::from_millis(1)),
        }
    };
    interrupt(&migrating);
    Ran(migrating.wait_with_output().unwrap()).exits(8).complains("interrupted");
    // Whoever is its parent now may not have heard of it yet.
    let stat = Path::new("/proc").join(pid.trim()).join("stat");
    let runs = || fs::read_to_string(&stat).is_ok_and(|stat| !stat.contains(") Z "));
    let limit = std::time::Instant::now() + Duration::from_secs(10);
    while runs() {
        assert!(std::time::Instant::now() < limit, "it was asked, and it sleeps on");
        std::thread::sleep(Duration::from_millis(1));
    }
    proxy.is_clean();
    process.kill().unwrap();
    process.wait().unwrap();
}

#[test]
fn a_hand_over_is_not_made_for_other_scripts_or_after_it_was_called_off() {
    let proxy = Daemon::honest(Role::Proxy);
    let dir = proxy.path("1");
    dumped(&dir);
    let asked = serde_json::json!({
        "socket": proxy.socket, "snapshot": "web", "attempt": 7, "to": null, "dir": dir,
    });
    let hand_over = |action: &str| {
        let mut command = imagectl();
        command.env("CRTOOLS_SCRIPT_ACTION", action);
        command.env("CRIU_IMAGECTL_HAND_OVER", asked.to_string());
        Ran(command.output().unwrap())
    };
    hand_over("network-lock").exits(0);
    assert!(proxy.store.lock().is_empty());
    let decision = proxy.path("decision");
    std::os::unix::fs::symlink("called-off", &decision).unwrap();
    hand_over("post-dump").exits(8).complains("called off");
    fs::remove_file(&decision).unwrap();
    hand_over("post-dump").exits(0);
    assert_eq!(proxy.store.lock()["web"].snapshot.state, SnapshotState::Whole);
}

#[test]
fn a_dry_run_prints_commands_and_a_restore_waits_no_longer_than_it_may() {
    let own = std::process::id().to_string();
    let dry = Ran(imagectl().args(["migrate", "-t", &own, "--dry-run"]).output().unwrap()).exits(0);
    assert_eq!(dry.out().lines().count(), 4, "{}", dry.out());
    assert!(dry.out().contains("--prev-images-dir ../2"), "{}", dry.out());
    Ran(imagectl().args(["migrate", "-t", "4194305", "--dry-run"]).output().unwrap())
        .exits(1)
        .complains("no process 4194305");

    let cache = Daemon::honest(Role::Cache);
    let parent = utf8(cache.dir.path());
    let restore = ["restore", "web", "--timeout", "200ms", "--work-dir", parent];
    cache.ctl(&restore).exits(6).complains("it has not come");
    cache.store.put("web", SnapshotState::Whole, &[("core-7.img", b"core")]);
    let no_criu = ["restore", "web", "--criu", "/nonexistent", "--work-dir", parent];
    cache.ctl(&no_criu).exits(1).complains("/nonexistent cannot be run");
}

/// Restores the snapshot `web` from a view, with a script in place of CRIU.
fn restore_with(cache: &Daemon, criu: &str, options: &[&str]) -> Ran {
    let script = cache.criu(criu);
    let mut arguments = vec!["--json", "restore", "--view", "web", "--criu", utf8(&script)];
    arguments.extend(["--work-dir", utf8(cache.dir.path())]);
    arguments.extend(options);
    let ran = cache.ctl(&arguments);
    cache.is_clean();
    ran
}

#[test]
fn a_snapshot_that_is_viewed_is_taken_when_criu_has_restored_it_and_not_before() {
    let cache = Daemon::honest(Role::Cache);
    viewed(&cache);
    let failing = "echo 'Error (criu/x.c:1): no' >&2; exit 1";
    let failed = restore_with(&cache, failing, &[]).exits(1).complains("Error (criu/x.c:1): no");
    assert!(failed.err().contains("criu-imagectl restore --view web"), "{}", failed.err());
    assert!(cache.store.is("web", SnapshotState::Whole));

    // restore -D VIEW -W DIR -d -o LOG --pidfile FILE
    let (ctl, socket) = (env!("CARGO_BIN_EXE_criu-imagectl"), cache.socket.display());
    let restoring = format!(
        "[ $1 = restore ] && [ $2 = -D ] && [ $4 = -W ] && [ $9 = --pidfile ] &&
         [ \"$(cat $3/inventory.img $3/pages-1.img)\" = inventorypages ] && [ -L $3/pages-1.img ] &&
         {ctl} --json --socket {socket} show web | grep -q '\"state\": \"whole\"' && echo 4711 >${{10}}"
    );
    let restored = restore_with(&cache, &restoring, &[]).exits(0).json();
    assert_eq!((&restored["snapshot"], &restored["pid"]), (&"web".into(), &4711.into()));
    assert_eq!((&restored["images"], &restored["bytes"]), (&3.into(), &17.into()));
    assert!(cache.store.is("web", SnapshotState::Taken));

    restore_with(&cache, &restoring, &[]).exits(1).complains("has taken snapshot web");
    let failed = restore_with(&cache, "exit 1", &["--again"]).exits(1);
    assert!(failed.err().contains("restore --view --again web"), "{}", failed.err());
    restore_with(&cache, "exit 0", &["--again"]).exits(0);
}

#[test]
fn criu_is_not_run_on_what_cannot_be_viewed() {
    let cache = Daemon::honest(Role::Cache);
    let ran = cache.path("ran");
    let criu = format!("touch {}", utf8(&ran));
    restore_with(&cache, &criu, &["--timeout", "200ms"]).exits(6).complains("it has not come");
    viewed(&cache);
    fs::remove_file(cache.path("fds/pages-1.img")).unwrap();
    restore_with(&cache, &criu, &[]).exits(1).complains("pages-1.img cannot be opened");
    assert!(cache.store.is("web", SnapshotState::Whole));
    cache.store.damage("web", "cut short");
    restore_with(&cache, &criu, &[]).exits(5).complains("cut short");
    assert!(!ran.exists());
}

#[test]
fn a_restore_that_waits_ends_when_it_is_interrupted_or_another_has_taken_the_snapshot() {
    for options in [&[][..], &["--view"]] {
        let cache = Daemon::honest(Role::Cache);
        let mut restore = vec!["restore", "web", "--work-dir", utf8(cache.dir.path())];
        restore.extend(options);
        let begin = |number| {
            let mut command = cache.command(&restore);
            let waiting = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
            while cache.opened.lock().unwrap().len() < number {
                std::thread::sleep(Duration::from_millis(1));
            }
            waiting
        };
        let waiting = begin(1);
        interrupt(&waiting);
        let ended = Ran(waiting.wait_with_output().unwrap()).exits(8);
        ended.complains("interrupted before snapshot web was whole");
        cache.is_clean();

        let waiting = begin(2);
        cache.store.put("web", SnapshotState::Taken, &[]);
        let ended = Ran(waiting.wait_with_output().unwrap()).exits(1);
        ended.complains("another restore has taken snapshot web");
        cache.is_clean();
    }
}

#[test]
fn a_daemon_that_is_not_there_and_wrong_usage_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let nowhere = dir.path().join("control.sock");
    let run = |arguments: &[&str]| Ran(imagectl().args(arguments).output().unwrap());
    run(&["--socket", utf8(&nowhere), "status"]).exits(3).complains(utf8(&nowhere));
    drop(UnixListener::bind(&nowhere).unwrap());
    run(&["--socket", utf8(&nowhere), "list"]).exits(3).complains("refused");
    run(&["--proxy", "--cache", "status"]).exits(2);
    run(&["--cache", "push", "/tmp"]).exits(2).complains("command of the proxy");
    run(&["fly"]).exits(2);
    run(&["extract", "--snapshot", "", "x"]).exits(2).complains("empty");
    let help = run(&["--help"]).exits(0).out();
    assert!(help.contains("6  timed out"), "{help}");
}

#[test]
fn garbage_on_the_control_socket_harms_nobody() {
    let cache = Daemon::honest(Role::Cache);
    for garbage in [&b"\xff\x00\xff"[..], &vec![b'x'; 1 << 20], b"{\"method\":"] {
        let mut peer = UnixStream::connect(&cache.socket).unwrap();
        let _ = peer.write_all(garbage);
    }
    cache.ctl(&["status"]).exits(0);
}

#[test]
fn a_reader_that_has_read_enough_is_no_error() {
    let cache = Daemon::honest(Role::Cache);
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    drop(reader);
    let mut command = imagectl();
    command.arg("--socket").arg(&cache.socket).arg("status").stdout(writer);
    let ran = Ran(command.output().unwrap()).exits(0);
    assert_eq!(ran.err(), "");
}

#[test]
fn packagers_get_man_pages_and_completions() {
    let dir = tempfile::tempdir().unwrap();
    for what in ["man", "completions"] {
        let mut command = imagectl();
        Ran(command.args(["generate", what]).arg(dir.path()).output().unwrap()).exits(0);
    }
    for file in [
        "criu-imagectl.1",
        "criu-imagectl-push.1",
        "criu-image-proxy.8",
        "criu-image-cache.8",
        "criu-imagectl.bash",
        "_criu-imagectl",
        "criu-imagectl.fish",
    ] {
        assert!(dir.path().join(file).exists(), "{file}");
    }
    assert!(!dir.path().join("criu-imagectl-generate.1").exists());
}
