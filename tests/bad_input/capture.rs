//! Dumps that break the protocol, or do not end as they should. Each costs its own snapshot only.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;

use criu_image_relay::control::model::SnapshotState;
use criu_image_relay::criu::images::INVENTORY;
use criu_image_relay::criu::stream::encode_request;

use crate::criu::{Criu, RECORDS, assert_unread, pipe};
use crate::daemons::{SOURCE, eventually};
use crate::hosts::Hosts;

/// A dump through the shared socket does something wrong: it is ended, its pipes are closed, and
/// both logs tell who it was and what was wrong.
#[track_caller]
fn assert_refused(wrong: impl FnOnce(&mut Criu), named: &[&str]) {
    let mut hosts = Hosts::start();
    let bystander = hosts.bystander();
    let mut dump = Criu::dump(&hosts.proxy);
    let mut open = dump.create("pages-1.img");
    open.write_all(b"half").unwrap();
    wrong(&mut dump);
    dump.assert_closed();
    assert_unread(&open);
    let (snapshot, peer) = (format!("snapshot {SOURCE}-"), Criu::peer());
    hosts.proxy.assert_log(&[&["damaged", &snapshot, &peer], named].concat());
    hosts.cache.assert_log(&[&["damaged", &snapshot, "(127.0.0.1:"], named].concat());
    hosts.assert_undisturbed(bystander);
}

#[test]
fn a_request_longer_than_4_kib_ends_its_dump() {
    let wrong = |dump: &mut Criu| dump.say(&4097u32.to_le_bytes());
    assert_refused(wrong, &["a request of 4097 bytes; at most 4096 are accepted"]);
}

#[test]
fn a_request_that_does_not_decode_ends_its_dump() {
    let wrong = |dump: &mut Criu| {
        dump.say(b"\x03\0\0\0\xff\xff\xff");
        dump.pass(&[pipe().0.as_fd()]);
    };
    assert_refused(wrong, &["a request that is not a protobuf"]);
}

#[test]
fn names_that_are_no_file_names_end_their_dump() {
    for (name, why) in [
        ("etc/passwd", "it contains a slash"),
        ("..", "it contains two dots in a row"),
        ("core\0.img", "it contains a NUL"),
        ("", "it is empty"),
        (&"n".repeat(256), "it is longer than 255 bytes"),
    ] {
        assert_refused(|dump| drop(dump.try_create(name)), &["a bad image name", why]);
    }
}

#[test]
fn a_bad_name_is_refused_before_its_descriptor_comes() {
    let wrong = |dump: &mut Criu| dump.request("../core-7.img");
    assert_refused(wrong, &["a bad image name \"../core-7.img\""]);
}

#[test]
fn something_else_than_a_pipe_ends_its_dump() {
    let wrong = |dump: &mut Criu| {
        dump.request("core-7.img");
        dump.pass(&[File::open("/proc/self/exe").unwrap().as_fd()]);
    };
    assert_refused(wrong, &["image core-7.img: the descriptor passed is a regular file"]);
}

#[test]
fn the_wrong_end_of_a_pipe_ends_its_dump() {
    let wrong = |dump: &mut Criu| {
        dump.request("core-7.img");
        dump.pass(&[pipe().1.as_fd()]);
    };
    assert_refused(wrong, &["image core-7.img", "is the write end of a pipe, not the read end"]);
}

#[test]
fn a_request_without_a_descriptor_ends_its_dump() {
    let wrong = |dump: &mut Criu| {
        dump.request("core-7.img");
        dump.pass(&[]);
    };
    assert_refused(wrong, &["core-7.img", "no descriptor passed with the request"]);
}

#[test]
fn two_descriptors_for_one_image_end_their_dump() {
    let wrong = |dump: &mut Criu| {
        dump.request("core-7.img");
        dump.pass(&[pipe().0.as_fd(), pipe().0.as_fd()]);
    };
    assert_refused(wrong, &["core-7.img", "more than one descriptor passed with a request"]);
}

#[test]
fn an_image_opened_twice_at_once_ends_its_dump() {
    let wrong = |dump: &mut Criu| drop(dump.create("pages-1.img"));
    assert_refused(wrong, &["image pages-1.img is opened for writing twice at once"]);
}

#[test]
fn a_session_that_ends_within_a_request_is_a_failed_dump() {
    let mut hosts = Hosts::start();
    let bystander = hosts.bystander();
    for cut in [2, 4, 9, encode_request("core-7.img").len()] {
        let id = format!("cut-{cut}");
        let mut dump = Criu::in_dir_of(&id, &hosts.proxy);
        let open = dump.create("pages-1.img");
        dump.say(&encode_request("core-7.img")[..cut]);
        drop(dump);
        assert_unread(&open);
        let why = "the socket was closed in the middle of a request";
        hosts.proxy.assert_log(&["damaged", &id, &Criu::peer(), why]);
        hosts.cache.assert_log(&["damaged", &id, "(127.0.0.1:", why]);
    }
    hosts.assert_undisturbed(bystander);
}

#[test]
fn a_request_that_comes_too_slowly_ends_its_dump() {
    let mut hosts = Hosts::with(&[("sessions.request-timeout", "\"200ms\"")], &[]);
    let bystander = hosts.bystander();
    for (id, said) in [("torn", &b"\x0c\0"[..]), ("alone", &encode_request("core-7.img"))] {
        let mut dump = Criu::in_dir_of(id, &hosts.proxy);
        let open = dump.create("pages-1.img");
        dump.say(said);
        dump.assert_closed();
        assert_unread(&open);
        let why = "the rest of a request did not come within 200ms";
        hosts.proxy.assert_log(&["damaged", id, &Criu::peer(), why]);
    }
    hosts.assert_undisturbed(bystander);
}

#[test]
fn a_dump_that_ends_without_an_inventory_is_damaged() {
    let mut hosts = Hosts::start();
    let bystander = hosts.bystander();
    let mut dump = Criu::in_dir_of("web", &hosts.proxy);
    dump.write("core-7.img", RECORDS);
    drop(dump);
    let why = "CRIU closed the session without writing inventory.img";
    hosts.proxy.assert_log(&["snapshot web damaged", &Criu::peer(), why]);
    hosts.cache.assert_log(&["snapshot web from", "damaged", why]);
    assert!(hosts.cache.assert_state("web", SnapshotState::Damaged).contains(why));
    hosts.assert_undisturbed(bystander);
}

#[test]
fn an_inventory_cut_short_is_damaged_by_the_cache() {
    let mut hosts = Hosts::start();
    let bystander = hosts.bystander();
    for len in [0, 3, 8, 11] {
        let id = format!("cut-{len}");
        let mut dump = Criu::in_dir_of(&id, &hosts.proxy);
        dump.write("core-7.img", RECORDS);
        dump.write(INVENTORY, &RECORDS[..len]);
        drop(dump);
        let why = "image inventory.img is cut short";
        hosts.cache.assert_log(&["damaged", &id, "(127.0.0.1:", why]);
        hosts.proxy.assert_log(&["damaged", &id, &Criu::peer(), "the cache gave it up", why]);
    }
    hosts.assert_undisturbed(bystander);
}

#[test]
fn a_dump_may_write_an_image_again_once_it_has_ended() {
    let hosts = Hosts::start();
    let mut dump = Criu::in_dir_of("web", &hosts.proxy);
    dump.write("core-7.img", &RECORDS[..10]);
    hosts.cache.assert_image("web", "core-7.img", 10);
    dump.write("core-7.img", RECORDS);
    dump.complete();
    hosts.cache.assert_log(&["snapshot web is whole"]);
    assert_eq!(Criu::in_dir_of("web", &hosts.cache).read("core-7.img"), RECORDS);
}

#[test]
fn dumps_that_begin_in_the_same_moment_are_snapshots_of_their_own() {
    let hosts = Hosts::start();
    let mut dumps: Vec<_> = (0..20).map(|_| Criu::dump(&hosts.proxy)).collect();
    let open: Vec<_> = dumps.iter_mut().map(|dump| dump.create("core-7.img")).collect();
    for (dump, mut open) in dumps.into_iter().zip(open) {
        open.write_all(RECORDS).unwrap();
        drop(open);
        dump.complete();
    }
    let all = || hosts.cache.count_log("is whole") == 20;
    assert!(eventually(all), "{} of 20 snapshots are whole", hosts.cache.count_log("is whole"));
}
