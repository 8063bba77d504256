//! Restores that break the protocol. Each costs its own session only; the snapshot stays.

use std::fs::File;
use std::io::Read;
use std::net::SocketAddr;
use std::os::fd::AsFd;

use criu_image_relay::criu::stream::encode_request;

use crate::criu::{Criu, RECORDS, pipe};
use crate::daemons::Daemon;
use crate::proxy_standin::ProxyStandin;

/// More than a pipe holds, so that a restore has to read it piece by piece.
fn large() -> Vec<u8> {
    (0..3_000_000u32).map(|i| (i % 249).to_le_bytes()[0]).collect()
}

/// A cache that holds two whole snapshots, each with a `pages-1.img`; nobody sends any more.
fn cache_with_snapshots() -> (Daemon, SocketAddr) {
    let (cache, address) = Daemon::cache(&[("sessions.request-timeout", "\"300ms\"")]);
    let mut proxy = ProxyStandin::connect(address);
    proxy.whole(0, "web", "pages-1.img", &large());
    proxy.whole(1, "other", "pages-1.img", &large());
    (cache, address)
}

/// A restore that has read half of an image.
struct Bystander {
    restore: Criu,
    open: File,
    bytes: Vec<u8>,
}

impl Bystander {
    fn begin(cache: &Daemon) -> Bystander {
        let mut restore = Criu::in_dir_of("other", cache);
        let mut open = restore.open("pages-1.img");
        let mut bytes = vec![0; 1_000_000];
        open.read_exact(&mut bytes).unwrap();
        Bystander { restore, open, bytes }
    }

    #[track_caller]
    fn finish(mut self) {
        self.open.read_to_end(&mut self.bytes).unwrap();
        assert!(self.bytes == large(), "the other restore got {} bytes", self.bytes.len());
        assert_eq!(self.restore.read("inventory.img"), RECORDS);
        assert!(!self.restore.ask("cgroup.img"));
    }
}

/// A restore does something wrong after it has asked for its first image, which exists.
#[track_caller]
fn assert_refused(wrong: impl FnOnce(&mut Criu), named: &[&str]) {
    let (mut cache, _) = cache_with_snapshots();
    let bystander = Bystander::begin(&cache);
    let mut restore = Criu::in_dir_of("web", &cache);
    assert_eq!(restore.read("inventory.img"), RECORDS);
    wrong(&mut restore);
    restore.assert_closed();
    cache.assert_log(&[&["WARN", "\"web\"", &Criu::peer(), "a restore by"], named].concat());
    cache.assert_alive();
    bystander.finish();
    assert!(Criu::in_dir_of("web", &cache).read("pages-1.img") == large(), "the snapshot stays");
}

#[test]
fn a_request_longer_than_4_kib_ends_its_restore() {
    let wrong = |restore: &mut Criu| restore.say(&4097u32.to_le_bytes());
    assert_refused(wrong, &["a request of 4097 bytes; at most 4096 are accepted"]);
}

#[test]
fn names_that_are_no_file_names_end_their_restore() {
    for (name, why) in [
        ("/etc/passwd", "it contains a slash"),
        ("..", "it contains two dots in a row"),
        ("core\0.img", "it contains a NUL"),
        (&"n".repeat(256), "it is longer than 255 bytes"),
    ] {
        assert_refused(|restore| restore.request(name), &["a bad image name", why]);
    }
}

#[test]
fn a_reply_that_is_not_followed_by_a_descriptor_ends_its_restore() {
    let wrong = |restore: &mut Criu| {
        assert!(restore.ask("pages-1.img"));
        restore.pass(&[]);
    };
    assert_refused(wrong, &["pages-1.img", "no descriptor passed with the request"]);
}

#[test]
fn a_descriptor_that_comes_too_late_ends_its_restore() {
    let wrong = |restore: &mut Criu| assert!(restore.ask("pages-1.img"));
    assert_refused(wrong, &["pages-1.img", "did not come within 300ms"]);
}

#[test]
fn two_descriptors_for_one_image_end_their_restore() {
    let wrong = |restore: &mut Criu| {
        assert!(restore.ask("pages-1.img"));
        restore.pass(&[pipe().1.as_fd(), pipe().1.as_fd()]);
    };
    assert_refused(wrong, &["pages-1.img", "more than one descriptor passed with a request"]);
}

#[test]
fn something_else_than_a_pipe_ends_its_restore() {
    let wrong = |restore: &mut Criu| {
        assert!(restore.ask("pages-1.img"));
        restore.pass(&[File::open("/dev/null").unwrap().as_fd()]);
    };
    assert_refused(wrong, &["image pages-1.img", "a character device, not a pipe"]);
}

#[test]
fn the_wrong_end_of_a_pipe_ends_its_restore() {
    let wrong = |restore: &mut Criu| {
        assert!(restore.ask("pages-1.img"));
        restore.pass(&[pipe().0.as_fd()]);
    };
    assert_refused(wrong, &["image pages-1.img", "is the read end of a pipe, not the write end"]);
}

#[test]
fn a_session_that_ends_within_a_request_is_a_failed_restore() {
    let (cache, _) = cache_with_snapshots();
    let bystander = Bystander::begin(&cache);
    let mut restore = Criu::in_dir_of("web", &cache);
    assert_eq!(restore.read("inventory.img"), RECORDS);
    restore.say(&encode_request("pages-1.img")[..7]);
    drop(restore);
    let why = "the socket was closed in the middle of a request";
    cache.assert_log(&["\"web\"", &Criu::peer(), why]);
    bystander.finish();
}

/// CRIU does so for nftables images.
#[test]
fn a_pipe_closed_early_by_its_reader_ends_that_image_only() {
    let (cache, _) = cache_with_snapshots();
    let bystander = Bystander::begin(&cache);
    let mut restore = Criu::in_dir_of("web", &cache);
    let mut open = restore.open("pages-1.img");
    open.read_exact(&mut [0; 10]).unwrap();
    drop(open);
    assert_eq!(restore.read("inventory.img"), RECORDS);
    assert!(restore.read("pages-1.img") == large(), "asked again, the image is whole");
    drop(restore);
    cache.assert_log(&["snapshot web taken"]);
    bystander.finish();
}

#[test]
fn an_image_that_nobody_reads_holds_nothing_up() {
    let (cache, _) = cache_with_snapshots();
    let bystander = Bystander::begin(&cache);
    let mut restore = Criu::in_dir_of("web", &cache);
    let _unread = restore.open("pages-1.img");
    assert!(restore.read("pages-1.img") == large(), "the same image, asked again");
    assert_eq!(restore.read("inventory.img"), RECORDS);
    bystander.finish();
}

#[test]
fn peers_that_come_and_go_without_a_request_are_no_restores() {
    let (cache, _) = cache_with_snapshots();
    for _ in 0..20 {
        drop(Criu::restore(&cache));
    }
    assert_eq!(Criu::restore(&cache).read("inventory.img"), RECORDS);
    cache.assert_log(&["WARN", "a restore by", "it has not read pages-1.img to the end"]);
    let log = cache.stop();
    assert_eq!(log.matches("a restore by").count(), 1, "the one that has read:\n{log}");
    let (served, _) = log.split_once("criu-image-cache stops").unwrap();
    assert_eq!(served.matches("WARN").count(), 1, "of that one:\n{log}");
}

#[test]
fn a_log_line_names_its_snapshot_once_however_long_the_restore() {
    let (cache, _) = cache_with_snapshots();
    let mut restore = Criu::restore(&cache);
    for _ in 0..50 {
        assert!(!restore.ask("cgroup.img"));
    }
    assert!(restore.read("pages-1.img") == large());
    drop(restore);
    let line = cache.assert_log(&["snapshot web taken"]);
    assert!(line.matches("\"web\"").count() <= 2, "{line}");
}
