//! Caches that say what no cache says, or not now, about named snapshots and parts of images.

use criu_image_relay::control::model::SnapshotState;
use criu_image_relay::wire::message::{
    ImageAck, ImageReady, Message, PagesForget, REGION_MAX, REGIONS_MAX, Region, RegionRequest,
    SnapshotAck, SnapshotReady,
};
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit, setrlimit};

use crate::cache_standin::{CacheStandin, receive_until, receive_whole};
use crate::criu::{Criu, RECORDS};
use crate::daemons::Daemon;
use crate::link::Link;
use crate::remote::{Remote, end_of, read_of, unheard_write_of, write_of};

/// A cache that says anything, and a writer whose image it has accepted.
struct Stage {
    standin: CacheStandin,
    proxy: Daemon,
    link: Link,
    writer: Remote,
}

impl Stage {
    fn set() -> Stage {
        let standin = CacheStandin::listen();
        let proxy = Daemon::proxy(standin.address(), &[]);
        let mut writer = Remote::at_proxy(&proxy);
        writer.ask(&write_of("web", "core-7.img"));
        let mut link = standin.welcome();
        receive_until(&mut link, |message| matches!(message, Message::ImageBegin(_)));
        link.send(&Message::SnapshotReady(SnapshotReady { snapshot: 0 }));
        link.send(&Message::ImageReady(ImageReady { snapshot: 0, image: 0 }));
        writer.assert_done();
        Stage { standin, proxy, link, writer }
    }

    /// Writes the image, and ends the snapshot.
    #[track_caller]
    fn complete(&mut self) {
        self.writer.say(RECORDS);
        self.writer.shut();
        let ended = |message: &Message| matches!(message, Message::ImageEnd(_));
        while !ended(&self.link.receive().expect("the image goes on").0) {}
        self.link.send(&Message::ImageAck(ImageAck { snapshot: 0, image: 0, size: 12 }));
        self.writer.assert_done();
        let mut client = Remote::at_proxy(&self.proxy);
        client.ask(&end_of("web"));
        let ended = |message: &Message| matches!(message, Message::SnapshotEnd(_));
        while !ended(&self.link.receive().expect("the snapshot goes on").0) {}
        self.link.send(&Message::SnapshotAck(SnapshotAck { snapshot: 0, images: 1, bytes: 12 }));
        client.assert_done();
        self.proxy.assert_alive();
    }

    /// A client that reads an image, and the request that comes of it.
    fn read(&mut self) -> (Remote, RegionRequest) {
        let mut reader = Remote::at_proxy(&self.proxy);
        reader.ask(&read_of("parent-1", "pages-1.img", false));
        let asked = self.asked();
        (reader, asked)
    }

    #[track_caller]
    fn asked(&mut self) -> RegionRequest {
        match self.link.receive() {
            Some((Message::RegionRequest(request), _)) => request,
            other => panic!("{other:?} instead of a request"),
        }
    }

    /// The link has ended for that reason, and the next one is good.
    #[track_caller]
    fn assert_lost(mut self, cause: &str) {
        self.writer.assert_refused(Errno::IO, &["snapshot web is damaged: the link to", cause]);
        self.writer.assert_closed();
        self.proxy.assert_log(&["link to", "lost with 1 snapshots under way", cause]);
        assert!(self.proxy.assert_state("web", SnapshotState::Damaged).contains(cause));
        self.proxy.assert_alive();
        let mut fresh = Criu::in_dir_of("fresh", &self.proxy);
        fresh.write("core-7.img", RECORDS);
        fresh.complete();
        receive_whole(&mut self.standin.welcome());
        self.proxy.assert_log(&["snapshot fresh sent"]);
    }
}

fn region(request: u32, error: u32, size: u64) -> Message {
    Message::Region(Region { request, error, reason: String::new(), size })
}

#[test]
fn answers_that_nobody_waits_for_are_passed_over() {
    let mut stage = Stage::set();
    for number in [0, 1, 7, u32::MAX] {
        let (snapshot, image) = (number, number);
        stage.link.send(&Message::SnapshotReady(SnapshotReady { snapshot }));
        stage.link.send(&Message::ImageReady(ImageReady { snapshot, image }));
        stage.link.send(&Message::ImageReady(ImageReady { snapshot: 0, image }));
        stage.link.send(&Message::ImageAck(ImageAck { snapshot, image: 9, size: number.into() }));
        stage.link.send_payload(&region(number, 0, 5), b"bytes");
        stage.link.send(&region(number, 2, 0));
        stage.link.send_payload(&region(number, 0, 1 << 20), &vec![7; REGION_MAX]);
    }
    stage.complete();
}

#[test]
fn a_region_over_the_limit_ends_its_link() {
    let mut stage = Stage::set();
    stage.link.say(&region(0, 0, 1 << 20).encode(REGION_MAX + 1));
    stage.assert_lost("a REGION with a payload of 262145 bytes");
}

#[test]
fn what_only_a_proxy_says_ends_its_link() {
    let mut stage = Stage::set();
    stage.link.send(&Message::PagesForget(PagesForget::default()));
    stage.assert_lost("the cache broke the protocol: a PAGES_FORGET out of order");
}

#[test]
fn a_region_with_more_bytes_than_the_image_has_is_no_image() {
    let mut stage = Stage::set();
    for size in [0, 1, 4] {
        let (mut reader, asked) = stage.read();
        stage.link.send_payload(&region(asked.request, 0, size), b"bytes");
        reader.assert_refused(Errno::IO, &["pages-1.img", "the cache"]);
        reader.assert_closed();
    }
    stage.complete();
}

#[test]
fn an_errno_that_is_none_is_an_input_output_error() {
    let mut stage = Stage::set();
    for error in [4096, 5000, 0x1_0002, 0x8000_0000, u32::MAX] {
        let (mut reader, asked) = stage.read();
        stage.link.send(&region(asked.request, error, 0));
        reader.assert_refused(Errno::IO, &[]);
        reader.assert_closed();
    }
    let (mut reader, asked) = stage.read();
    stage.link.send(&region(asked.request, 116, 0));
    reader.assert_refused(Errno::STALE, &[]);
    stage.complete();
}

#[test]
fn an_image_that_becomes_shorter_while_it_is_read_ends_its_read() {
    let mut stage = Stage::set();
    let (mut reader, asked) = stage.read();
    stage.link.send_payload(&region(asked.request, 0, 1 << 20), &vec![7; REGION_MAX]);
    assert_eq!(reader.reply().size, Some(1 << 20));
    let mut first = vec![0; REGION_MAX];
    reader.read_exactly(&mut first);
    let next = stage.asked();
    assert_eq!(next.offset, REGION_MAX as u64);
    stage.link.send(&region(next.request, 0, 10));
    assert_eq!(reader.rest(), b"");
    let cause = "image pages-1.img was replaced while it was read";
    stage.proxy.assert_log(&["WARN", "the session of a client", &Criu::peer(), cause]);
    stage.complete();
}

#[test]
fn an_acknowledgement_before_the_end_damages_its_snapshot() {
    let mut stage = Stage::set();
    stage.link.send(&Message::SnapshotAck(SnapshotAck { snapshot: 0, images: 1, bytes: 12 }));
    stage.writer.say(RECORDS);
    stage.writer.shut();
    let ended = |message: &Message| matches!(message, Message::ImageEnd(_));
    while !ended(&stage.link.receive().expect("the image goes on").0) {}
    stage.link.send(&Message::ImageAck(ImageAck { snapshot: 0, image: 0, size: 12 }));
    stage.writer.assert_done();
    let mut client = Remote::at_proxy(&stage.proxy);
    client.ask(&end_of("web"));
    client.assert_refused(Errno::IO, &["the cache acknowledged it too early"]);
    stage.proxy.assert_state("web", SnapshotState::Damaged);
}

/// A chunk that is on its way when the link breaks is not what went wrong.
#[test]
fn a_link_cut_while_bytes_are_on_their_way_is_the_reason_that_is_told() {
    let mut stage = Stage::set();
    let mut full = Remote::at_proxy(&stage.proxy);
    full.ask(&unheard_write_of("web", "pages-1.img"));
    let pages = full.create();
    // More than all the buffers on the way hold, from a writer that does not mind.
    let writing = std::thread::spawn(move || {
        let (mut pages, part) = (pages, vec![7; 1 << 20]);
        while std::io::Write::write_all(&mut pages, &part).is_ok() {}
    });
    let come = |message: &Message| matches!(message, Message::ImageData(_));
    while !come(&stage.link.receive().expect("the image goes on").0) {}
    full.assert_waits();
    stage.link.shut(std::net::Shutdown::Both);
    writing.join().unwrap();
    stage.assert_lost("the peer closed the connection");
}

/// The cache ends a link on which more is asked for, and with it what is under way there.
#[test]
fn more_readers_than_a_cache_answers_at_once_wait_their_turn() {
    let mut stage = Stage::set();
    let mut files = getrlimit(Resource::Nofile);
    files.current = files.maximum;
    setrlimit(Resource::Nofile, files).unwrap();
    let mut readers: Vec<_> = (0..REGIONS_MAX + 6)
        .map(|_| {
            let mut reader = Remote::at_proxy(&stage.proxy);
            reader.ask(&read_of("parent-1", "pages-1.img", false));
            reader
        })
        .collect();
    let asked: Vec<_> = (0..REGIONS_MAX).map(|_| stage.asked().request).collect();
    stage.link.assert_quiet();
    // What nobody waits for any more is asked for all the same.
    readers.drain(..10);
    stage.link.assert_quiet();
    for request in &asked[..4] {
        stage.link.send(&region(*request, 2, 0));
    }
    (0..4).for_each(|_| drop(stage.asked()));
    stage.link.assert_quiet();
    stage.complete();
}
