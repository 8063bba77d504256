//! Caches that are none, or that stop being one in the middle of a dump. The dump fails towards the
//! source: CRIU's pipes are closed. Dumps to another cache go on.

use std::fs::File;
use std::io::Write;
use std::time::{Duration, Instant};

use criu_image_relay::control::model::SnapshotState;
use criu_image_relay::wire::frame;
use criu_image_relay::wire::message::{
    KeepAlive, Message, SnapshotAck, SnapshotReady, WITHDRAW, Welcome,
};

use crate::cache_standin::{CacheStandin, receive_until, receive_whole};
use crate::criu::{Criu, RECORDS, assert_unread};
use crate::daemons::{Daemon, Settings, eventually, unused_address};
use crate::hosts::Bystander;
use crate::link::Link;

/// A proxy whose configured cache is a stand-in, with a dump to another, real one beside it.
struct Stage {
    standin: CacheStandin,
    proxy: Daemon,
    _cache: Daemon,
    bystander: Bystander,
}

/// A dump through it, with half an image written.
struct Dump {
    criu: Criu,
    open: File,
}

impl Stage {
    fn set(settings: Settings<'_>) -> Stage {
        let standin = CacheStandin::listen();
        let proxy = Daemon::proxy(standin.address(), settings);
        let (cache, address) = Daemon::cache(&[]);
        let bystander = Bystander::begin(&proxy, &cache, address);
        Stage { standin, proxy, _cache: cache, bystander }
    }

    fn dump(&self, id: &str) -> Dump {
        let mut criu = Criu::in_dir_of(id, &self.proxy);
        let mut open = criu.create("core-7.img");
        open.write_all(&RECORDS[..10]).unwrap();
        Dump { criu, open }
    }

    /// A dump of which half an image has come over the link; the snapshot's number there.
    fn dump_and_link(&self) -> (Dump, Link, u32) {
        let dump = self.dump("web");
        let mut link = self.standin.welcome();
        let number = receive_until(&mut link, |message| matches!(message, Message::ImageData(_)));
        (dump, link, number)
    }

    /// The dump is over, and both its peers are named with the cause; the rest goes on.
    #[track_caller]
    fn assert_failed(mut self, mut dump: Dump, cause: &str) {
        dump.criu.assert_closed();
        assert_unread(&dump.open);
        self.proxy.assert_log(&["WARN", "snapshot web damaged", &Criu::peer(), cause]);
        let reason = self.proxy.assert_state("web", SnapshotState::Damaged);
        assert!(reason.contains(cause), "{reason}");
        self.proxy.assert_alive();
        self.bystander.finish();
        let mut fresh = Criu::in_dir_of("fresh", &self.proxy);
        fresh.write("core-7.img", RECORDS);
        fresh.complete();
        receive_whole(&mut self.standin.welcome());
        self.proxy.assert_log(&["snapshot fresh sent"]);
    }
}

/// The cache does not greet as it should, however often it is asked.
#[track_caller]
fn assert_no_link(greet: impl FnOnce(&mut Link), cause: &str) {
    let settings = [("link.give-up-after", "\"50ms\""), ("link.connect-timeout", "\"400ms\"")];
    let stage = Stage::set(&settings);
    let dump = stage.dump("web");
    let mut link = stage.standin.accept();
    greet(&mut link);
    let no_link = ["snapshot web damaged", "no link to the cache 127.0.0.1:", cause];
    stage.proxy.assert_log(&no_link);
    stage.assert_failed(dump, cause);
}

/// The link is up, and then the cache does something wrong.
#[track_caller]
fn assert_lost(settings: Settings<'_>, wrong: impl FnOnce(&mut Link, u32), cause: &str) {
    let stage = Stage::set(settings);
    let (dump, mut link, number) = stage.dump_and_link();
    wrong(&mut link, number);
    let address = stage.standin.address().to_string();
    stage.proxy.assert_log(&["link to", &address, "lost with 1 snapshots under way", cause]);
    stage.assert_failed(dump, cause);
}

#[test]
fn an_answer_in_another_protocol_is_no_link() {
    let answer = |link: &mut Link| link.say(b"HTTP/1.1 400 Bad Request\r\n\r\n");
    assert_no_link(answer, "does not speak the relay's protocol: its first bytes are \"HTTP/1.1");
}

#[test]
fn an_answer_in_another_version_is_no_link() {
    let answer = |link: &mut Link| link.say(b"CRIURLAY\x02\0\0\0");
    assert_no_link(answer, "the peer speaks version 2 of the link, this side speaks version 1");
}

#[test]
fn an_answer_that_is_no_welcome_is_no_link() {
    let answer = |message: Message| {
        move |link: &mut Link| link.say(&[&frame::preface()[..], &message.encode(0)].concat())
    };
    assert_no_link(answer(Message::KeepAlive(KeepAlive {})), "a KEEP_ALIVE instead of a welcome");
    assert_no_link(answer(Message::goodbye("go away")), "the cache refuses: go away");
    let garbage =
        |link: &mut Link| link.say(&[&frame::preface()[..], &[0xff; frame::HEADER_LEN]].concat());
    assert_no_link(garbage, "a message of 65535 bytes; at most 16384 are accepted");
}

#[test]
fn an_answer_that_does_not_come_in_time_is_no_link() {
    for part in [&b""[..], b"CRIUR", &frame::preface()] {
        // How long depends on what is left of link.give-up-after.
        assert_no_link(|link| link.say(part), "no answer within ");
    }
}

#[test]
fn whether_a_link_can_be_had_is_told_before_anything_is_sent() {
    let standin = CacheStandin::listen();
    let proxy = Daemon::proxy(standin.address(), &[]);
    let ask = |to: Option<&str>| {
        let limit = Duration::from_millis(if to.is_some() { 200 } else { 5_000 });
        proxy.control(async |client| client.connect_link(to, limit).await)
    };
    let nobody = unused_address().to_string();
    let link = ask(Some(&nobody)).unwrap();
    assert!(!link.up && link.peer == nobody, "{link:?}");
    assert!(link.why.starts_with("Connection refused"), "{link:?}");
    assert!(!ask(Some("192.0.2.1")).unwrap().up, "it is not to be trusted");
    assert!(ask(Some("a:b:c:d:")).is_err(), "no address");

    std::thread::scope(|scope| {
        // The cache is there at the second try.
        let welcomed = scope.spawn(|| {
            drop(standin.accept());
            standin.welcome()
        });
        assert!(ask(None).unwrap().up);
        let _link = welcomed.join().unwrap();
        assert!(ask(None).unwrap().up, "it is there already");
    });
    assert!(proxy.list().is_empty());
}

#[test]
fn who_withdraws_is_answered_soon_and_the_cache_is_told_when_there_is_a_link() {
    let address = unused_address();
    let proxy = Daemon::proxy(address, &[]);
    let begun = Instant::now();
    let withdrawn =
        proxy.control(async |client| client.withdraw("web", 7, "it was called off", None).await);
    let why = withdrawn.unwrap_err().to_string();
    assert!(why.contains("no link to the cache") && why.contains("within 4s"), "{why}");
    assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());

    let mut link = CacheStandin::listen_at(address).welcome_with(&[WITHDRAW]);
    let (message, _) = link.receive().expect("the cache is told");
    let Message::SnapshotWithdraw(told) = message else { panic!("{message:?}") };
    assert_eq!((told.id.as_str(), told.attempt), ("web", 7));
}

#[test]
fn a_goodbye_ends_the_dumps_under_way() {
    let goodbye = |link: &mut Link, _| link.send(&Message::goodbye("it is late"));
    assert_lost(&[], goodbye, "the cache ended it: it is late");
}

#[test]
fn garbage_from_the_cache_ends_the_dumps_under_way() {
    for (said, cause) in [
        (&b"\xff\xff\xff\xff\xff\xff\xff\xff"[..], "a message of 65535 bytes"),
        (b"\x63\0\0\0\0\0\0\0", "a message of the unknown kind 99"),
        (b"\x08\0\x02\0\0\0\0\0\x12\x09", "a SNAPSHOT_ABORT that does not decode"),
    ] {
        assert_lost(&[], |link, _| link.say(said), cause);
    }
}

#[test]
fn what_only_a_proxy_says_ends_the_dumps_under_way() {
    let welcome = Message::Welcome(Welcome { name: String::new(), features: Vec::new() });
    let cause = "the cache broke the protocol: a WELCOME out of order";
    assert_lost(&[], |link, _| link.send(&welcome), cause);
}

#[test]
fn a_link_cut_in_the_middle_ends_the_dumps_under_way() {
    let cut = |link: &mut Link, _| link.shut(std::net::Shutdown::Both);
    assert_lost(&[], cut, "the peer closed the connection");
    let torn = |link: &mut Link, _| {
        link.say(b"\x04\0");
        link.shut(std::net::Shutdown::Write);
    };
    assert_lost(&[], torn, "the connection ended in the middle of a frame");
}

#[test]
fn a_cache_that_goes_silent_ends_the_dumps_under_way() {
    let standin = CacheStandin::listen();
    let proxy = Daemon::proxy(standin.address(), &[("link.keep-alive", "\"100ms\"")]);
    let mut dump = Criu::in_dir_of("web", &proxy);
    let open = dump.create("core-7.img");
    let _silent = standin.welcome();
    dump.assert_closed();
    assert_unread(&open);
    let cause = "nothing came from the peer for 300ms";
    proxy.assert_log(&["WARN", "snapshot web damaged", &Criu::peer(), cause]);
}

#[test]
fn a_cache_that_stops_reading_ends_the_dumps_under_way() {
    let standin = CacheStandin::listen();
    let proxy = Daemon::proxy(standin.address(), &[("link.keep-alive", "\"200ms\"")]);
    let mut dump = Criu::in_dir_of("web", &proxy);
    let mut open = dump.create("pages-1.img");
    let _full = standin.welcome();
    // More than all the buffers on the way hold; only an error ends it.
    let part = vec![7; 1 << 20];
    while open.write_all(&part).is_ok() {}
    dump.assert_closed();
    let cause = "nothing came from the peer for 600ms";
    proxy.assert_log(&["WARN", "snapshot web damaged", &Criu::peer(), cause]);
    let mut fresh = Criu::in_dir_of("fresh", &proxy);
    fresh.write("core-7.img", RECORDS);
    fresh.complete();
    receive_whole(&mut standin.welcome());
}

#[test]
fn an_abort_ends_the_dump_that_it_names_only() {
    let stage = Stage::set(&[]);
    let (mut dump, mut link, number) = stage.dump_and_link();
    let mut other = stage.dump("other");
    let other_number = receive_until(&mut link, |message| matches!(message, Message::ImageData(_)));
    link.send(&Message::abort(number, "quota exhausted"));
    dump.criu.assert_closed();
    assert_unread(&dump.open);
    let cause = "the cache gave it up: quota exhausted";
    stage.proxy.assert_log(&["WARN", "snapshot web damaged", &Criu::peer(), cause]);
    other.open.write_all(&RECORDS[10..]).unwrap();
    drop(other.open);
    other.criu.complete();
    acknowledge(&mut link, other_number, 2, 24);
    stage.proxy.assert_log(&["snapshot other sent"]);
    stage.bystander.finish();
}

/// Receives up to a snapshot's end, and answers it.
fn acknowledge(link: &mut Link, snapshot: u32, images: u64, bytes: u64) {
    receive_end(link, snapshot);
    link.send(&Message::SnapshotAck(SnapshotAck { snapshot, images, bytes }));
}

#[test]
fn an_acknowledgement_before_the_end_ends_its_dump() {
    let stage = Stage::set(&[]);
    let (mut dump, mut link, snapshot) = stage.dump_and_link();
    link.send(&Message::SnapshotAck(SnapshotAck { snapshot, images: 1, bytes: 10 }));
    dump.criu.assert_closed();
    assert_unread(&dump.open);
    let cause = "the cache acknowledged it too early";
    stage.proxy.assert_log(&["WARN", "snapshot web damaged", &Criu::peer(), cause]);
    stage.bystander.finish();
}

#[test]
fn an_acknowledgement_of_something_else_is_none() {
    let stage = Stage::set(&[]);
    let (mut dump, mut link, number) = stage.dump_and_link();
    dump.open.write_all(&RECORDS[10..]).unwrap();
    drop(dump.open);
    dump.criu.complete();
    acknowledge(&mut link, number, 1, 12);
    stage.proxy.assert_log(&["WARN", "snapshot web damaged", &Criu::peer(), "acknowledged"]);
    stage.bystander.finish();
}

#[test]
fn an_acknowledgement_that_does_not_come_in_time_is_not_waited_for() {
    let stage = Stage::set(&[("link.ack-timeout", "\"200ms\"")]);
    let (mut dump, mut link, number) = stage.dump_and_link();
    dump.open.write_all(&RECORDS[10..]).unwrap();
    drop(dump.open);
    dump.criu.complete();
    receive_end(&mut link, number);
    let cause = "no acknowledgement within 200ms";
    stage.proxy.assert_log(&["WARN", "snapshot web damaged", &Criu::peer(), cause]);
    assert!(stage.proxy.assert_state("web", SnapshotState::Damaged).contains(cause));
    stage.bystander.finish();
}

#[test]
fn a_cache_that_only_keeps_its_link_alive_loses_it() {
    let stage = Stage::set(&[("link.ack-timeout", "\"300ms\"")]);
    let (mut dump, mut link, number) = stage.dump_and_link();
    dump.open.write_all(&RECORDS[10..]).unwrap();
    drop(dump.open);
    dump.criu.complete();
    receive_end(&mut link, number);
    let closed = || !link.try_send(&Message::KeepAlive(KeepAlive {}));
    assert!(eventually(closed), "the proxy keeps a link that answers nothing");
    let address = stage.standin.address().to_string();
    let cause = "the cache has answered nothing for 300ms";
    stage.proxy.assert_log(&["link to", &address, cause]);
    assert!(stage.proxy.status().links.iter().any(|link| !link.up && link.why == cause));
    let mut fresh = Criu::in_dir_of("fresh", &stage.proxy);
    fresh.write("core-7.img", RECORDS);
    fresh.complete();
    receive_whole(&mut stage.standin.welcome());
    stage.proxy.assert_log(&["snapshot fresh sent"]);
    stage.bystander.finish();
}

#[test]
fn an_answer_that_is_overdue_alone_leaves_the_link_to_others() {
    let stage = Stage::set(&[("link.ack-timeout", "\"1s\"")]);
    let (mut dump, mut link, number) = stage.dump_and_link();
    let other = stage.dump("other");
    let other_number = receive_until(&mut link, |message| matches!(message, Message::ImageData(_)));
    dump.open.write_all(&RECORDS[10..]).unwrap();
    drop(dump.open);
    dump.criu.complete();
    receive_end(&mut link, number);
    link.send(&Message::SnapshotReady(SnapshotReady { snapshot: other_number }));
    stage.proxy.assert_log(&["snapshot web damaged", "no acknowledgement within 1s"]);
    let Dump { criu, mut open } = other;
    open.write_all(&RECORDS[10..]).unwrap();
    drop(open);
    criu.complete();
    acknowledge(&mut link, other_number, 2, 24);
    stage.proxy.assert_log(&["snapshot other sent"]);
    stage.bystander.finish();
}

fn receive_end(link: &mut Link, snapshot: u32) {
    loop {
        match link.receive().expect("the snapshot goes on").0 {
            Message::SnapshotEnd(end) if end.snapshot == snapshot => return,
            _ => {}
        }
    }
}
