//! What a cache holds, over its end: as systemd's file descriptor store keeps it.

use std::collections::BTreeMap;
use std::fs;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, SendError, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use criu_image_relay::criu::stream::SERVE_SOCKET;
use criu_image_relay::daemon::CONTROL_SOCKET;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::process::Signal;

use crate::activated::activated;
use crate::run::{CACHE, PROXY, Running, command, ctl, eventually, images, status};
use crate::speak::restore;

/// What systemd keeps, by the names it is to have.
type Kept = Arc<Mutex<BTreeMap<String, OwnedFd>>>;

/// systemd, as far as it starts one cache on its sockets and keeps what that gives it.
struct Manager {
    dir: tempfile::TempDir,
    sockets: Vec<(&'static str, OwnedFd)>,
    link: SocketAddr,
    kept: Kept,
    /// Whoever holds it keeps the manager from reading what it is sent.
    reading: Arc<Mutex<()>>,
}

impl Manager {
    fn new() -> Manager {
        let dir = tempfile::tempdir().unwrap();
        let unix = |name| OwnedFd::from(UnixListener::bind(dir.path().join(name)).unwrap());
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let link = tcp.local_addr().unwrap();
        let sockets = vec![
            ("stream", unix(SERVE_SOCKET)),
            ("control", unix(CONTROL_SOCKET)),
            ("link", tcp.into()),
        ];
        let notices = UnixDatagram::bind(dir.path().join("notify")).unwrap();
        let kept = Kept::default();
        let reading = Arc::default();
        let (keeping, turn) = (kept.clone(), Arc::clone(&reading));
        std::thread::spawn(move || while take_notice(&notices, &turn, &keeping) {});
        Manager { dir, sockets, link, kept, reading }
    }

    fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Starts the cache with all that is kept, which `room` files may be.
    fn start(&self, room: &str) -> Running {
        let again = |fd: &OwnedFd| fd.try_clone().unwrap();
        let kept = self.kept.lock().unwrap();
        let kept = kept.iter().map(|(name, fd)| (name.as_str(), again(fd)));
        let all = self.sockets.iter().map(|(name, fd)| (*name, again(fd)));
        let all: Vec<_> = all.chain(kept).collect();
        let inherited: Vec<_> = all.iter().map(|(_, fd)| fd.as_fd()).collect();
        let mut command = activated(CACHE, self.dir(), &all);
        command.env("NOTIFY_SOCKET", self.dir().join("notify")).env("FDSTORE", room);
        command.args(["--log-file", "log"]);
        let cache = Running::with(&mut command, self.dir(), &inherited);
        // Its sockets accept before it does.
        assert!(eventually(|| status(self.dir()).contains("criu-image-cache")));
        cache
    }

    /// Sends a snapshot `web` to the cache, which acknowledges it.
    fn send(&self, pages: &[u8]) {
        self.send_as("web", pages);
    }

    fn send_as(&self, id: &str, pages: &[u8]) {
        let source = tempfile::tempdir().unwrap();
        let mut proxy = command(PROXY, source.path());
        proxy.args(["--address", "127.0.0.1", "--port", &self.link.port().to_string()]);
        let _proxy = Running::with(&mut proxy, source.path(), &[]);
        let images = images(source.path(), pages);
        let push = ["push", "--snapshot", id, images.to_str().unwrap()];
        assert_eq!(ctl(source.path(), &push), (0, String::new()));
    }

    fn names(&self) -> Vec<String> {
        self.kept.lock().unwrap().keys().cloned().collect()
    }

    fn record_begins_with(&self, head: [u8; 8]) -> bool {
        let kept = self.kept.lock().unwrap();
        let mut seen = [0; 8];
        let record = fs::File::from(kept["record-1"].try_clone().unwrap());
        record.read_exact_at(&mut seen, 0).unwrap();
        seen == head
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir().join("log")).unwrap()
    }
}

fn take_notice(socket: &UnixDatagram, reading: &Mutex<()>, kept: &Kept) -> bool {
    drop(reading.lock());
    let mut text = [0; 4096];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received =
        recvmsg(socket, &mut [IoSliceMut::new(&mut text)], &mut ancillary, RecvFlags::CMSG_CLOEXEC);
    let Ok(received) = received else { return false };
    let text = std::str::from_utf8(&text[..received.bytes]).unwrap();
    let field = |name| text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    let files = ancillary.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(files) => Some(files),
        _ => None,
    });
    let mut kept = kept.lock().unwrap();
    for file in files.flatten() {
        assert_eq!(field("FDSTORE"), Some("1"));
        kept.insert(field("FDNAME").unwrap().to_owned(), file);
    }
    if field("FDSTOREREMOVE") == Some("1") {
        kept.remove(field("FDNAME").unwrap());
    }
    true
}

/// Longer than what is in a record.
fn pages() -> Vec<u8> {
    (0u32..50_000).flat_map(u32::to_le_bytes).collect()
}

#[test]
fn what_was_acknowledged_outlives_a_cache_that_is_killed_or_stopped() {
    for signal in [Signal::KILL, Signal::TERM] {
        let manager = Manager::new();
        let cache = manager.start("4096");
        manager.send(&pages());
        assert_eq!(manager.names(), ["image-0", "record-1"]);
        cache.signal(signal);
        cache.status();

        let cache = manager.start("4096");
        assert!(manager.log().contains("snapshot web is held again"), "{}", manager.log());
        assert!(!manager.log().contains("is lost"), "{}", manager.log());
        assert_eq!(ctl(manager.dir(), &["show", "web", "--timeline"]).0, 0);
        // And once more, with nothing in between.
        cache.signal(signal);
        cache.status();
        let cache = manager.start("4096");
        assert_eq!(restore(manager.dir(), "pages-1.img"), pages());
        // Its record says so.
        assert!(eventually(|| manager.record_begins_with(*b"criukp\0\x02")));
        assert_eq!(manager.names(), ["image-0", "record-1"]);
        cache.signal(signal);
        cache.status();
        let _cache = manager.start("4096");
        let again = "snapshot web is held again, as one that was taken";
        assert!(manager.log().contains(again), "{}", manager.log());
        let dir = manager.dir().join("directory");
        fs::create_dir(&dir).unwrap();
        let open = |again: &[&str]| {
            let words = [&["open", "--snapshot", "web"], again, &[dir.to_str().unwrap()]].concat();
            ctl(manager.dir(), &words).0
        };
        assert_eq!(open(&[]), 1, "it is not restored twice in silence");
        assert_eq!(open(&["--again"]), 0, "{signal:?}");
        assert_eq!(restore(&dir, "pages-1.img"), pages());
    }
}

#[test]
fn what_was_taken_is_kept_for_its_time_and_not_longer() {
    let manager = Manager::new();
    let config = "pages.listen = \"\"\nstore.keep = \"taken\"\n";
    fs::write(manager.dir().join("config.toml"), config).unwrap();
    let cache = manager.start("4096");
    manager.send(&pages());
    assert_eq!(restore(manager.dir(), "pages-1.img"), pages());
    assert!(eventually(|| manager.names().is_empty()), "{:?}", manager.names());
    cache.signal(Signal::KILL);
    cache.status();
    let _cache = manager.start("4096");
    assert_eq!(ctl(manager.dir(), &["show", "web"]).0, 4);
}

#[test]
fn what_is_dropped_is_not_kept() {
    let manager = Manager::new();
    let _cache = manager.start("4096");
    manager.send(&pages());
    assert_eq!(ctl(manager.dir(), &["drop", "web"]).0, 0);
    assert!(eventually(|| manager.names().is_empty()));
}

#[test]
fn a_manager_that_reads_nothing_for_a_while_holds_up_nobody_who_does_not_rely_on_it() {
    let manager = Manager::new();
    let _cache = manager.start("4096");
    manager.send(&pages());
    let reading = manager.reading.lock().unwrap();
    // As full as the messages of thousands of files make it.
    let other = UnixDatagram::unbound().unwrap();
    other.connect(manager.dir().join("notify")).unwrap();
    other.set_nonblocking(true).unwrap();
    // The manager may be about to read one more.
    for _ in 0..20 {
        while other.send(b"STATUS=").is_ok() {}
        std::thread::sleep(Duration::from_millis(5));
    }
    // Once that is answered the snapshot does not come back, whatever becomes of the cache: so it waits.
    let dir = manager.dir().to_owned();
    let dropping = std::thread::spawn(move || ctl(&dir, &["drop", "web"]).0);
    assert!(eventually(|| ctl(manager.dir(), &["show", "web"]).0 == 4));
    let (dir, (told, answers)) = (manager.dir().to_owned(), channel());
    let asking = std::thread::spawn(move || {
        let begun = Instant::now();
        // The daemon has notices of its own once a second.
        while begun.elapsed() < Duration::from_millis(2500) {
            told.send(status(&dir).contains("criu-image-cache"))?;
        }
        Ok::<(), SendError<bool>>(())
    });
    while !asking.is_finished() {
        match answers.recv_timeout(Duration::from_secs(10)) {
            Ok(answered) => assert!(answered),
            Err(error) => assert_eq!(error, RecvTimeoutError::Disconnected, "nobody is answered"),
        }
    }
    assert_eq!(manager.names(), ["image-0", "record-1"]);
    assert!(!dropping.is_finished(), "it is answered before systemd knows of it");
    drop(reading);
    assert_eq!(dropping.join().unwrap(), 0);
    assert!(eventually(|| manager.names().is_empty()), "{:?}", manager.names());
}

#[test]
fn what_there_is_no_room_for_is_held_and_said_to_be_lost_with_the_cache() {
    let manager = Manager::new();
    let cache = manager.start("1");
    manager.send(&pages());
    let warning = "snapshot web would be lost if the cache stopped: it is 2 files, and systemd keeps 0 of 1 already";
    let log = manager.log();
    let told = log.lines().find(|line| line.contains(warning)).unwrap_or_else(|| panic!("{log}"));
    assert!(
        told.contains("criu_peer="),
        "a flood of one sender's is to hide nobody else's: {told}"
    );
    assert_eq!(manager.names(), [""; 0]);
    cache.signal(Signal::TERM);
    cache.status();
    assert!(manager.log().contains("snapshot web is lost"), "{}", manager.log());
}

#[test]
fn what_there_was_no_room_for_is_kept_when_others_have_gone() {
    let manager = Manager::new();
    let cache = manager.start("3");
    manager.send_as("first", &pages());
    manager.send_as("second", &pages());
    let warning = "snapshot second would be lost if the cache stopped: it is 2 files, and systemd keeps 2 of 3 already";
    assert!(manager.log().contains(warning), "{}", manager.log());
    assert_eq!(ctl(manager.dir(), &["drop", "first"]).0, 0);
    assert!(eventually(|| manager.names().len() == 2 && manager.names()[0] != "image-0"));
    cache.signal(Signal::TERM);
    cache.status();
    assert!(manager.log().contains("snapshot second is left"), "{}", manager.log());
    assert_eq!(manager.log().matches("would be lost").count(), 1, "{}", manager.log());
    let _cache = manager.start("3");
    assert_eq!(ctl(manager.dir(), &["show", "second"]).0, 0);
}

#[test]
fn what_nobody_knows_any_more_is_forgotten_and_what_is_spoilt_is_told() {
    let manager = Manager::new();
    let cache = manager.start("4096");
    manager.send(&pages());
    cache.signal(Signal::KILL);
    cache.status();
    // Killed between a file and its record; and a file that has lost a part.
    let mut kept = manager.kept.lock().unwrap();
    let orphan = kept["image-0"].try_clone().unwrap();
    kept.insert("image-7".to_owned(), orphan);
    fs::File::from(kept["image-0"].try_clone().unwrap()).set_len(4096).unwrap();
    drop(kept);

    let _cache = manager.start("4096");
    let lost = "snapshot web is lost: systemd kept it, but image pages-1.img cannot be held again: its bytes are not all there";
    assert!(manager.log().contains(lost), "{}", manager.log());
    assert!(eventually(|| manager.names().is_empty()), "{:?}", manager.names());
    manager.send(&pages());
    assert_eq!(manager.names(), ["image-8", "record-9"]);
}

#[test]
fn a_proxy_has_no_use_for_files_that_were_kept() {
    let manager = Manager::new();
    let file = tempfile::tempfile().unwrap();
    let kept = [("image-0", OwnedFd::from(file))];
    let mut command = activated(PROXY, manager.dir(), &kept);
    let (status, said) = crate::run::output(&mut command, &[kept[0].1.as_fd()]);
    assert_eq!(status, 1, "{said}");
    assert!(said.contains("systemd handed over a socket named \"image-0\""), "{said}");
}
