//! The two clients of this directory: 5,000 images of a checkpoint with two pre-dumps, from 50
//! connections at once, through one thread at each side and unchanged.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use criu_image_relay::control::model::SnapshotState;
use criu_image_relay::criu::remote::{CACHE_SOCKET, PROXY_SOCKET, Reply};
use criu_image_relay::daemon::CONTROL_SOCKET;
use tempfile::TempDir;

use crate::client::{Connection, append_id, finish, read, write, write_of};
use crate::daemons::{Daemon, Settings, eventually};
use crate::hosts::Hosts;

const IMAGES: u64 = 5000;
const CONNECTIONS: &str = "50";
/// What one thread is, with some that a library may start for a moment.
const FEW_THREADS: u64 = 9;
pub(crate) const ROOM: Settings<'static> = &[("store.max-bytes", "\"1G\"")];

/// One of the two.
pub(crate) enum Client {
    Python,
    C(TempDir),
}

fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/remote").join(name)
}

impl Client {
    pub(crate) fn compiled() -> Client {
        let dir = tempfile::tempdir().unwrap();
        let mut cc = Command::new("cc");
        cc.args(["-O2", "-Wall", "-Wextra", "-Werror", "-pthread", "-o"]);
        cc.arg(dir.path().join("client")).arg(source("client.c"));
        let compiled = cc.output().expect("cc is needed");
        let complaints = String::from_utf8_lossy(&compiled.stderr);
        assert!(compiled.status.success(), "{complaints}");
        Client::C(dir)
    }

    /// What it is to do, with a list and snapshots of these ids.
    fn command(&self, what: &str, socket: &Path, list: &str, images: u64, ids: &[&str]) -> Command {
        let images = images.to_string();
        match self {
            Client::Python => {
                let mut command = Command::new("python3");
                command.arg(source("client.py")).arg(what).arg(socket);
                command.args(["--list", list, "--images", &images, "--connections", CONNECTIONS]);
                command.arg("--snapshots").args(ids);
                command
            }
            Client::C(dir) => {
                let mut command = Command::new(dir.path().join("client"));
                command.arg(what).arg(socket).args([list, &images, CONNECTIONS]).args(ids);
                command
            }
        }
    }

    /// Fills the snapshots at the proxy; it reads back some of the parents there.
    #[track_caller]
    pub(crate) fn fill(&self, hosts: &Hosts, list: &str, images: u64, ids: &[&str]) {
        let socket = hosts.proxy.dir().join(PROXY_SOCKET);
        succeeds(self.command("fill", &socket, list, images, ids), hosts);
    }

    /// Reads all of them at the cache, and says the end of the restore.
    #[track_caller]
    pub(crate) fn check(&self, hosts: &Hosts, list: &str, images: u64, ids: &[&str]) {
        let socket = hosts.cache.dir().join(CACHE_SOCKET);
        succeeds(self.command("check", &socket, list, images, ids), hosts);
        for id in ids {
            hosts.cache.assert_state(id, SnapshotState::Taken);
        }
    }
}

/// Runs a client to its end, and looks at the daemons' threads meanwhile and after.
#[track_caller]
fn succeeds(mut command: Command, hosts: &Hosts) {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut client = command.spawn().expect("the client can be started");
    let mut most = 0;
    while client.try_wait().unwrap().is_none() {
        most = most.max(threads(hosts));
        std::thread::sleep(Duration::from_millis(5));
    }
    let most = most.max(threads(hosts));
    let output = client.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    assert!(most <= FEW_THREADS, "{most} threads");
}

/// Those of the daemon that has more.
fn threads(hosts: &Hosts) -> u64 {
    hosts.proxy.threads().max(hosts.cache.threads())
}

/// How the snapshots stand in the cache after a fill.
#[track_caller]
fn assert_held(hosts: &Hosts, ids: &[&str]) {
    let images: u64 = ids
        .iter()
        .map(|id| {
            hosts.cache.assert_state(id, SnapshotState::Whole);
            hosts.cache.show(id).unwrap().images
        })
        .sum();
    assert_eq!(images, IMAGES);
}

#[test]
fn the_python_client_puts_5000_images_and_reads_them_back() {
    let hosts = Hosts::with(&[], ROOM);
    let ids = ["web-1", "web-2", "web-3"];
    Client::Python.fill(&hosts, "web", IMAGES, &ids);
    assert_held(&hosts, &ids);
    Client::Python.check(&hosts, "web", IMAGES, &ids);
}

#[test]
fn the_c_client_puts_5000_images_and_reads_them_back() {
    let hosts = Hosts::with(&[], ROOM);
    let (client, ids) = (Client::compiled(), ["web-1", "web-2", "web-3"]);
    client.fill(&hosts, "web", IMAGES, &ids);
    assert_held(&hosts, &ids);
    client.check(&hosts, "web", IMAGES, &ids);
}

#[test]
fn what_one_client_puts_the_other_reads() {
    let hosts = Hosts::with(&[], ROOM);
    let client = Client::compiled();
    // The list without a name, and ids as the old clients have them.
    let ids = ["/srv/ckpt/1", "/srv/ckpt/2", "/srv/ckpt/3"];
    Client::Python.fill(&hosts, "", IMAGES, &ids);
    client.check(&hosts, "", IMAGES, &ids);
    let others = ["db/1", "db/2", "db/3"];
    client.fill(&hosts, "db", IMAGES, &others);
    Client::Python.check(&hosts, "db", IMAGES, &others);
}

#[test]
fn a_client_that_finds_an_image_changed_says_so() {
    let hosts = Hosts::with(&[], ROOM);
    append_id(&hosts.proxy, "web", "web-1");
    write(&hosts.proxy, "web-1", "tmpfs-dev-0-0.tar.gz.img", b"");
    write(&hosts.proxy, "web-1", "tmpfs-dev-0-1.tar.gz.img", b"?");
    assert_eq!(finish(&hosts.proxy, "web-1", 2), Reply::done());
    let socket = hosts.cache.dir().join(CACHE_SOCKET);
    for client in [Client::compiled(), Client::Python] {
        let output = client.command("check", &socket, "web", 2, &["web-1"]).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(complaint.contains("1 bytes instead of 1, or other ones"), "{complaint}");
    }
}

/// 64 MiB that have been written and not ended are at the cache, and nowhere else.
#[track_caller]
fn assert_forwarded(through_pipe: bool) {
    const MIB: u64 = 1 << 20;
    let hosts = Hosts::with(&[], &[("store.max-bytes", "\"256M\"")]);
    let mut connection = Connection::to_proxy(&hosts.proxy);
    let mut pipe = None;
    connection.ask(&write_of("web", "pages-1.img", true));
    assert_eq!(connection.reply(), Reply::done());
    if through_pipe {
        pipe = Some(connection.pass_source());
    }
    let chunk: Vec<u8> = (0..MIB).map(|i| (i % 251).to_le_bytes()[0]).collect();
    for _ in 0..64 {
        match &mut pipe {
            Some(pipe) => pipe.write_all(&chunk).unwrap(),
            None => connection.say(&chunk),
        }
    }
    // What a pipe or a socket holds may still be there.
    let most = || held_bytes(&hosts.cache) >= 63 * MIB;
    assert!(eventually(most), "{} bytes are held", held_bytes(&hosts.cache));
    connection.assert_unanswered();
    assert_eq!(hosts.cache.show("web").unwrap().state, SnapshotState::Receiving);
    assert!(hosts.proxy.resident_bytes() < 16 * MIB, "the proxy keeps what it sends");

    match pipe {
        Some(pipe) => {
            drop(pipe);
            connection.say(b".");
        }
        None => connection.shut_down(),
    }
    assert_eq!(connection.reply(), Reply::done());
    assert_eq!(finish(&hosts.proxy, "web", 1), Reply::done());
    let bytes = read(Connection::to_cache(&hosts.cache), "web", "pages-1.img").unwrap();
    assert!(bytes == chunk.repeat(64), "other bytes came than were written");
}

/// As an operator sees it.
fn held_bytes(cache: &Daemon) -> u64 {
    let mut command = Command::new(env!("CARGO_BIN_EXE_criu-imagectl"));
    command.args(["--json", "--socket"]).arg(cache.dir().join(CONTROL_SOCKET)).arg("status");
    let output = command.output().unwrap();
    let status: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    status[0]["held_bytes"].as_u64().unwrap()
}

#[test]
fn an_image_on_the_socket_is_at_the_cache_while_it_is_written() {
    assert_forwarded(false);
}

#[test]
fn an_image_through_a_pipe_is_at_the_cache_while_it_is_written() {
    assert_forwarded(true);
}
