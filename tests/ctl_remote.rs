//! `criu-imagectl put`, `get` and `finish` against the real daemons: images by name, in and out.
#![allow(clippy::unwrap_used)]

// What only the tests of bad input need of it is not used here.
#[allow(dead_code)]
#[path = "bad_input/daemons.rs"]
mod daemons;

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use criu_image_relay::client::{Client, Error};
use criu_image_relay::control::model::SnapshotState;
use daemons::Daemon;
use serde_json::{Value, json};

/// A source and a destination, and a directory for the test's files.
struct Pair {
    proxy: Daemon,
    cache: Daemon,
    dir: tempfile::TempDir,
}

impl Pair {
    fn start() -> Pair {
        let (cache, address) = Daemon::cache(&[]);
        let proxy = Daemon::proxy(address, &[]);
        Pair { proxy, cache, dir: tempfile::tempdir().unwrap() }
    }

    /// A file of the test.
    fn file(&self, name: &str, bytes: &[u8]) -> String {
        let path = self.path(name);
        fs::write(&path, bytes).unwrap();
        utf8(&path)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn at_proxy(&self, arguments: &[&str]) -> Ran {
        Ran(ctl(&self.proxy, arguments).output().unwrap())
    }

    fn at_cache(&self, arguments: &[&str]) -> Ran {
        Ran(ctl(&self.cache, arguments).output().unwrap())
    }

    /// Gets an image from the cache as bytes.
    #[track_caller]
    fn get(&self, snapshot: &str, image: &str) -> Vec<u8> {
        self.at_cache(&["get", snapshot, image]).exits(0).0.stdout
    }
}

fn imagectl() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_criu-imagectl"));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn ctl(daemon: &Daemon, arguments: &[&str]) -> Command {
    let mut command = imagectl();
    command.arg("--socket").arg(daemon.dir().join("control.sock")).args(arguments);
    command
}

/// Starts a command that puts its stdin as an image, and gives it the beginning.
fn put_stdin(daemon: &Daemon, arguments: &[&str], bytes: &[u8]) -> Child {
    let mut child = ctl(daemon, arguments).stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.as_mut().unwrap().write_all(bytes).unwrap();
    child
}

struct Ran(Output);

impl Ran {
    #[track_caller]
    fn exits(self, code: i32) -> Ran {
        let ended = format!("{} bytes, {}", self.0.stdout.len(), self.err());
        assert_eq!(self.0.status.code(), Some(code), "{ended}");
        self
    }

    fn err(&self) -> String {
        String::from_utf8(self.0.stderr.clone()).unwrap()
    }

    fn out(&self) -> String {
        String::from_utf8(self.0.stdout.clone()).unwrap()
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

fn utf8(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

/// More than any pipe holds, and no two pages of it are alike.
fn pages(len: u32) -> Vec<u8> {
    (0..len).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

#[test]
fn what_is_put_is_what_is_got() {
    let pair = Pair::start();
    let big = pages(20 << 20);
    let files = [pair.file("pages-1.img", &big), pair.file("empty.img", b"")];
    let put = pair.at_proxy(&["--json", "put", "--list", "web", &files[0], &files[1]]).exits(0);
    let told = put.json();
    assert_eq!((&told["snapshot"], &told["images"]), (&json!("web"), &json!(2)));
    assert_eq!(told["bytes"], 20 << 20);
    assert!(told["milliseconds"].is_u64());

    let mut stdin = put_stdin(&pair.proxy, &["put", "--name", "tar.img", "web", "-"], b"one, ");
    drop(stdin.stdin.take());
    Ran(stdin.wait_with_output().unwrap()).exits(0);
    let rest = pair.file("rest", b"two");
    pair.at_proxy(&["put", "--append", "--name", "tar.img", "web", &rest]).exits(0);
    // What is at the cache can be read at the proxy, before the dump has ended.
    let back = pair.at_proxy(&["get", "web", "tar.img"]).exits(0);
    assert_eq!(back.0.stdout, b"one, two");
    let ended = pair.at_proxy(&["--json", "finish", "--images", "4", "web"]).exits(0);
    assert_eq!(ended.json(), json!({ "snapshot": "web", "state": "whole" }));

    assert!(pair.get("web", "pages-1.img") == big);
    assert_eq!(pair.get("web", "empty.img"), b"");
    assert_eq!(pair.get("web", "tar.img"), b"one, two");

    let to = pair.path("new/web");
    let dir = utf8(&to);
    let names = ["pages-1.img", "empty.img", "tar.img"];
    let arguments = [&["--json", "get", "--to", &dir, "web"][..], &names].concat();
    let got = pair.at_cache(&arguments).exits(0).json();
    let bytes = (20 << 20) + 8;
    assert_eq!(got, json!({ "snapshot": "web", "dir": to, "images": 3, "bytes": bytes }));
    assert!(fs::read(to.join("pages-1.img")).unwrap() == big);
    assert_eq!(fs::read(to.join("tar.img")).unwrap(), b"one, two");
    let mode_of = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode_of(&to), mode_of(&to.join("empty.img"))), (0o700, 0o600));
    let again = ["get", "--to", &dir, "web", "tar.img"];
    pair.at_cache(&again).exits(1).complains("is there already");
    pair.at_cache(&[&again[..], &["--force"]].concat()).exits(0);
}

#[test]
fn a_list_tells_the_snapshots_in_their_order() {
    let pair = Pair::start();
    let image = pair.file("pages-1.img", b"pages");
    assert_eq!(pair.at_proxy(&["get", "--ids"]).exits(0).out(), "");
    for id in ["web/1", "web/2"] {
        pair.at_proxy(&["put", "--list=chain", "--finish", id, &image]).exits(0);
    }
    for daemon in [&pair.proxy, &pair.cache] {
        let ids = Ran(ctl(daemon, &["get", "--ids=chain"]).output().unwrap()).exits(0);
        assert_eq!(ids.out(), "web/1\nweb/2\n");
    }
    let ids = pair.at_cache(&["--json", "get", "--ids=chain"]).exits(0).json();
    assert_eq!(ids, json!(["web/1", "web/2"]));

    // The end of a restore takes those before it, too.
    assert_eq!(pair.at_cache(&["finish", "web/2"]).exits(0).out(), "web/2: taken\n");
    pair.cache.assert_state("web/1", SnapshotState::Taken);
    pair.at_cache(&["get", "web/1", "pages-1.img"]).exits(1).complains("has taken");
    pair.at_cache(&["finish", "none"]).exits(4).complains("no snapshot none");
    pair.at_proxy(&["finish", "none"]).exits(4).complains("no dump of none");
    pair.at_cache(&["finish", "--images", "1", "web/2"]).exits(2).complains("--images");
}

#[test]
fn that_an_image_is_missing_is_said_when_the_dump_has_ended() {
    let pair = Pair::start();
    let get = |image| ctl(&pair.cache, &["get", "web", image]).spawn().unwrap();
    let (mut there, mut missing) = (get("pages-1.img"), get("pages-2.img"));
    let image = pair.file("pages-1.img", b"pages");
    pair.at_proxy(&["put", "web", &image]).exits(0);
    assert!(there.try_wait().unwrap().is_none() && missing.try_wait().unwrap().is_none());
    // At the proxy it is said at once.
    pair.at_proxy(&["get", "web", "pages-2.img"]).exits(4).complains("no image pages-2.img");
    pair.at_proxy(&["finish", "web"]).exits(0);
    assert_eq!(Ran(there.wait_with_output().unwrap()).exits(0).0.stdout, b"pages");
    let missing = Ran(missing.wait_with_output().unwrap()).exits(4);
    missing.complains("snapshot web has no image pages-2.img");

    let to = pair.path("web");
    pair.at_cache(&["get", "--to", &utf8(&to), "web", "pages-1.img", "pages-2.img"]).exits(4);
    assert!(!to.exists());
}

#[test]
fn a_view_shows_the_memory_of_the_cache() {
    let pair = Pair::start();
    let (large, small) = (pair.file("pages-1.img", &pages(1 << 20)), pair.file("a.img", b"small"));
    pair.at_proxy(&["put", "--list", "--finish", "web", &large, &small]).exits(0);
    let to = pair.path("view");
    pair.at_cache(&["view", "--snapshot", "web", &utf8(&to)]).exits(0);
    assert_eq!(fs::read(to.join("a.img")).unwrap(), b"small");
    assert!(fs::read_link(to.join("pages-1.img")).unwrap().starts_with("/proc"));
    assert!(fs::read(to.join("pages-1.img")).unwrap() == pages(1 << 20));
    pair.cache.drop_snapshot("web");
    pair.cache.assert_held(0);
    pair.at_cache(&["view", "--force", "--snapshot", "web", &utf8(&to)]).exits(4);
}

#[test]
fn a_put_that_is_killed_damages_the_snapshot() {
    let pair = Pair::start();
    let begun = pages(1 << 20);
    let mut put =
        put_stdin(&pair.proxy, &["put", "--list", "--name", "pages-1.img", "web", "-"], &begun);
    pair.cache.assert_receiving("web", 1 << 19);
    let image = pair.file("pages-1.img", b"pages");
    pair.at_proxy(&["put", "web", &image]).exits(1).complains("is being written already");
    put.kill().unwrap();
    put.wait().unwrap();
    pair.proxy.assert_state("web", SnapshotState::Damaged);
    pair.cache.assert_state("web", SnapshotState::Damaged);
    pair.at_cache(&["get", "web", "pages-1.img"]).exits(5).complains("snapshot web is damaged");
    let refused = pair.at_proxy(&["put", "web", &image]).exits(5);
    refused.complains("begin it anew: criu-imagectl put --list web");

    // As it says.
    pair.at_proxy(&["put", "--list", "--finish", "web", &image]).exits(0);
    assert_eq!(pair.get("web", "pages-1.img"), b"pages");
}

#[test]
fn a_wrong_count_and_a_torn_image_damage_the_snapshot() {
    let pair = Pair::start();
    let image = pair.file("pages-1.img", b"pages");
    pair.at_proxy(&["put", "web", &image]).exits(0);
    pair.at_proxy(&["finish", "--images", "7", "web"]).exits(5).complains("opened 7 images");
    pair.at_cache(&["get", "web", "pages-1.img"]).exits(5).complains("is damaged");
    let cut = pair.file("core-7.img", b"cut short");
    pair.at_proxy(&["put", "--finish", "db", &cut]).exits(5).complains("core-7.img is cut short");
}

#[test]
fn the_library_writes_and_reads_on_the_socket_too() {
    let pair = Pair::start();
    let (bytes, dir) = (pages(3_000_001), pair.path(&"long".repeat(40)));
    fs::create_dir(&dir).unwrap();
    std::os::unix::fs::symlink(pair.proxy.dir().join("img-proxy.sock"), dir.join("img-proxy.sock"))
        .unwrap();
    std::os::unix::fs::symlink(pair.cache.dir().join("img-cache.sock"), dir.join("img-cache.sock"))
        .unwrap();
    // One work-dir with the sockets of both.
    let client = Client::at(&dir).on_socket();
    client.push_id("", "web").unwrap();
    for (client, name) in [(client.clone(), "a.img"), (client.clone().acknowledged(false), "b.img")]
    {
        let mut image = client.open_write("web", name).unwrap();
        image.write_all(&bytes).unwrap();
        image.finish().unwrap();
    }
    client.finish_dump("web", Some(2)).unwrap();
    for name in ["a.img", "b.img"] {
        let mut read = Vec::new();
        std::io::copy(&mut client.open_read("web", name).unwrap(), &mut read).unwrap();
        assert!(read == bytes);
    }
    assert!(matches!(client.open_read("web", "c.img"), Err(Error::NotFound(_))));
    assert_eq!(client.ids("").unwrap(), ["web"]);
    client.finish_restore("web").unwrap();
    assert!(matches!(client.open_read("web", "a.img"), Err(Error::Refused { .. })));
}

#[test]
fn a_daemon_that_is_not_there_and_wrong_usage_are_told_apart() {
    let pair = Pair::start();
    let image = pair.file("pages-1.img", b"pages");
    let nowhere = utf8(&pair.path("control.sock"));
    let run = |arguments: &[&str]| Ran(imagectl().args(arguments).output().unwrap());
    run(&["--socket", &nowhere, "put", "web", &image]).exits(3).complains("img-proxy.sock");
    run(&["--socket", &nowhere, "get", "web", "a"]).exits(3).complains("img-cache.sock");
    run(&["--socket", &nowhere, "finish", "web"]).exits(3).complains("--work-dir");
    if !Path::new("/run/criu-image").exists() {
        run(&["put", "web", &image]).exits(3).complains("criu-image-proxy-remote.socket");
        run(&["get", "--ids"]).exits(3).complains("criu-image-cache-remote.socket");
        run(&["finish", "web"]).exits(3).complains("criu-image-cache-remote.socket");
    }

    let other = pair.path("other");
    fs::create_dir(&other).unwrap();
    let same = utf8(&other.join("pages-1.img"));
    fs::write(&same, "").unwrap();
    let list = pair.file("parent", b"");
    for (arguments, what) in [
        (&["put", "web"][..], "nothing to put"),
        (&["put", "--finish", "web"], "criu-imagectl finish web"),
        (&["put", "web", "-"], "--name"),
        (&["put", "--name", "a", "web", &image, &same], "one image"),
        (&["put", "web", &image, &same], "two files are called"),
        (&["put", "--name", "a/b", "web", &image], "slash"),
        (&["put", "web", &list], "the list of ids"),
        (&["put", "", &image], "empty"),
        (&["get", "web", "a", "b"], "--to DIR"),
        (&["get", "--json", "web", "a"], "no JSON"),
        (&["get", "--to", "x", "web", "a/b"], "slash"),
        (&["get", "web"], "<IMAGE>"),
        (&["get", "--ids", "web"], "--ids"),
        (&["get"], "<SNAPSHOT>"),
    ] {
        pair.at_proxy(arguments).exits(2).complains(what);
    }
    run(&["--cache", "put", "web", &image]).exits(2).complains("command of the proxy");
    pair.at_proxy(&["put", "web", &utf8(&other)]).exits(1).complains("is a directory");
    pair.at_proxy(&["put", "web", &utf8(&pair.path("none"))]).exits(1).complains("No such file");
    assert!(pair.proxy.show("web").is_none(), "nothing was begun");
}
