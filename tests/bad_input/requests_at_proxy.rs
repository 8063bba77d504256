//! Caches that ask the proxy for something, and that answer what it asks them for oddly: clients of the proxy's
//! page server that ask for pages.

use criu_image_relay::criu::page_server::command::Command;
use criu_image_relay::criu::page_server::header::Dialect;
use criu_image_relay::criu::pages::{PAGE_SIZE, PageRange, Space};
use criu_image_relay::wire::message::{
    Message, PagesRequest, REGION_MAX, REGIONS_MAX, Region, RegionRequest, SnapshotReady,
};
use criu_image_relay::wire::spaces::{pages_request, requested};
use rustix::io::Errno;

use crate::cache_standin::{CacheStandin, receive_until, receive_whole};
use crate::criu::{Criu, RECORDS};
use crate::daemons::{Daemon, Settings};
use crate::hosts::Bystander;
use crate::lazy::Lazy;
use crate::link::Link;

const TASK: Space = Space::Task(7);

/// A cache that says anything, and a dump to it of which one image has come; and a dump to another cache.
struct Stage {
    standin: CacheStandin,
    proxy: Daemon,
    link: Link,
    dump: Criu,
    _cache: Daemon,
    bystander: Bystander,
}

impl Stage {
    fn set(settings: Settings<'_>) -> Stage {
        let standin = CacheStandin::listen();
        let proxy = Daemon::proxy(standin.address(), settings);
        let (cache, address) = Daemon::cache(&[]);
        let bystander = Bystander::begin(&proxy, &cache, address);
        let mut dump = Criu::in_dir_of("dump", &proxy);
        dump.write("core-7.img", RECORDS);
        let mut link = standin.welcome();
        receive_until(&mut link, |message| matches!(message, Message::ImageEnd(_)));
        Stage { standin, proxy, link, dump, _cache: cache, bystander }
    }

    /// A client that asks for pages from 16 on, and the request that comes of it.
    fn asks(&mut self, pages: u64) -> (Lazy, PagesRequest) {
        let mut lazy = Lazy::of("web", &self.proxy, Dialect::Long);
        lazy.ask(0x10000, pages);
        let asked = self.asked();
        let range = PageRange::new(0x10000, pages).unwrap();
        assert_eq!(asked.snapshot_id, "web");
        assert_eq!(requested(&asked), Ok((TASK, range)));
        (lazy, asked)
    }

    #[track_caller]
    fn asked(&mut self) -> PagesRequest {
        match self.link.receive() {
            Some((Message::PagesRequest(request), _)) => request,
            other => panic!("{other:?} instead of a request"),
        }
    }

    /// The dump goes on to its end, and what goes elsewhere does, too.
    #[track_caller]
    fn assert_undisturbed(mut self) {
        self.dump.complete();
        loop {
            match self.link.receive().expect("the dump goes on").0 {
                Message::SnapshotEnd(end) => break assert!(end.complete && end.images == 2),
                Message::SnapshotAbort(abort) => panic!("{abort:?}"),
                _ => {}
            }
        }
        self.proxy.assert_alive();
        self.bystander.finish();
    }

    /// The link has ended for that reason, and with it the dump on it. The next one is good.
    #[track_caller]
    fn assert_lost(mut self, cause: &str) {
        self.dump.assert_closed();
        self.proxy.assert_log(&["link to", "lost with 1 snapshots under way", cause]);
        self.proxy.assert_alive();
        self.bystander.finish();
        let mut fresh = Criu::in_dir_of("fresh", &self.proxy);
        fresh.write("core-7.img", RECORDS);
        fresh.complete();
        receive_whole(&mut self.standin.welcome());
    }
}

fn region(request: u32, error: u32, reason: &str, size: u64) -> Message {
    Message::Region(Region { request, error, reason: reason.to_owned(), size })
}

fn any_image(request: u32) -> RegionRequest {
    let (snapshot_id, name) = ("web".to_owned(), "pages-1.img".to_owned());
    RegionRequest { request, snapshot_id, name, offset: 0, len: u32::MAX }
}

#[test]
fn a_cache_that_asks_for_something_hears_that_there_is_nothing() {
    let mut stage = Stage::set(&[]);
    let range = PageRange::new(0x10000, 1).unwrap();
    let odd = PagesRequest { request: 3, address: 1, pages: u64::MAX, ..PagesRequest::default() };
    for asked in [
        Message::RegionRequest(any_image(0)),
        Message::RegionRequest(RegionRequest { request: 1, ..RegionRequest::default() }),
        pages_request(2, "dump", TASK, range),
        Message::PagesRequest(odd),
        // Numbers that are no others.
        pages_request(u32::MAX, "web", Space::Shmem(u64::MAX), range),
        Message::RegionRequest(any_image(u32::MAX)),
    ] {
        let number = match &asked {
            Message::RegionRequest(request) => request.request,
            Message::PagesRequest(request) => request.request,
            _ => unreachable!(),
        };
        stage.link.send(&asked);
        let Some((Message::Region(region), bytes)) = stage.link.receive() else { panic!() };
        let missing = Errno::NOENT.raw_os_error().unsigned_abs();
        assert_eq!((region.request, region.error, region.size), (number, missing, 0));
        assert_eq!(region.reason, "this proxy keeps no images and no pages at the source");
        assert!(bytes.is_empty());
    }
    // The numbers of the other side are others.
    let (mut lazy, asked) = stage.asks(1);
    stage.link.send(&pages_request(asked.request, "web", TASK, range));
    let answer = stage.link.receive().unwrap().0;
    assert!(matches!(answer, Message::Region(region) if region.request == asked.request));
    stage.link.send_payload(&region(asked.request, 0, "", PAGE_SIZE), &[16; 4096]);
    assert_eq!(lazy.hear(0x10000), [16]);
    stage.assert_undisturbed();
}

#[test]
fn as_many_requests_as_may_wait_are_answered() {
    let mut stage = Stage::set(&[]);
    let most = u32::try_from(REGIONS_MAX).unwrap();
    let all: Vec<u8> =
        (0..most).flat_map(|n| Message::RegionRequest(any_image(n)).encode(0)).collect();
    stage.link.say(&all);
    for number in 0..most {
        let answer = stage.link.receive().unwrap().0;
        assert!(matches!(answer, Message::Region(region) if region.request == number));
    }
    stage.assert_undisturbed();
}

#[test]
fn a_cache_that_asks_more_than_it_reads_loses_its_link_and_takes_no_memory() {
    let mut stage = Stage::set(&[]);
    let before = stage.proxy.resident_bytes();
    let many: Vec<u8> =
        (0..1000).flat_map(|n| Message::RegionRequest(any_image(n)).encode(0)).collect();
    let said = (0..2000).take_while(|_| stage.link.try_say(&many)).count();
    assert!(said < 2000, "it is answered without end");
    let grown = stage.proxy.resident_bytes().saturating_sub(before);
    assert!(grown < 4 << 20, "{grown} bytes");
    stage.assert_lost("the cache waits for more than 1024 regions at once");
}

#[test]
fn an_answer_of_no_whole_pages_or_of_others_than_were_asked_for_ends_its_client() {
    let mut stage = Stage::set(&[]);
    for (size, len) in [
        (0, 0),
        (PAGE_SIZE, 0),
        (0, 4096),
        (PAGE_SIZE, 8192),
        (2 * PAGE_SIZE, 4097),
        (2 * PAGE_SIZE - 1, 4096),
        (3 * PAGE_SIZE, 4096),
        (u64::MAX, 8192),
    ] {
        let (mut lazy, asked) = stage.asks(2);
        stage.link.send_payload(&region(asked.request, 0, "", size), &vec![7; len]);
        lazy.assert_ended();
        let cause = format!("the cache sent {len} bytes of {size} for 2 pages");
        stage.proxy.assert_log(&["WARN", "pages of snapshot web", &cause]);
    }
    stage.assert_undisturbed();
}

#[test]
fn an_error_of_the_cache_ends_its_client_and_is_told_in_the_journal() {
    let mut stage = Stage::set(&[]);
    for (error, why) in
        [(2, "no such page"), (5, "it is damaged"), (u32::MAX, "odd"), (0x1_0002, "")]
    {
        let (mut lazy, asked) = stage.asks(1);
        stage.link.send(&region(asked.request, error, why, 0));
        lazy.assert_ended();
        stage.proxy.assert_log(&["WARN", "pages of snapshot web", &format!("the cache: {why}")]);
    }
    stage.assert_undisturbed();
}

#[test]
fn pages_come_piece_by_piece_and_may_be_gone_in_the_middle() {
    let mut stage = Stage::set(&[]);
    let piece = REGION_MAX as u64 / PAGE_SIZE;
    let (mut lazy, first) = stage.asks(2 * piece);
    // A piece is more than its socket holds.
    let reader = std::thread::spawn(move || {
        let numbers = lazy.hear(0x10000);
        (lazy, numbers)
    });
    let all = 2 * piece - 1;
    stage.link.send_payload(&region(first.request, 0, "", all * PAGE_SIZE), &vec![1; REGION_MAX]);
    let second = stage.asked();
    assert_ne!(second.request, first.request);
    let rest = PageRange::new(0x10000 + REGION_MAX as u64, piece - 1).unwrap();
    assert_eq!(requested(&second), Ok((TASK, rest)), "no more than there is");
    stage.link.send_payload(&region(second.request, 0, "", rest.bytes()), &[2; 4096]);
    let third = stage.asked();
    let bytes = vec![3; REGION_MAX - 2 * 4096];
    stage.link.send_payload(&region(third.request, 0, "", rest.bytes() - PAGE_SIZE), &bytes);
    let (mut lazy, numbers) = reader.join().unwrap();
    assert_eq!(numbers.len() as u64, all);
    let piece = usize::try_from(piece).unwrap();
    assert_eq!(numbers, [vec![1; piece], vec![2], vec![3; piece - 2]].concat());

    for (error, size, cause) in [
        (0, PAGE_SIZE, "pages that the cache had a moment ago are no longer there"),
        (2, 0, "the cache: gone"),
    ] {
        lazy.ask(0x10000, 3);
        let first = stage.asked();
        stage.link.send_payload(&region(first.request, 0, "", 3 * PAGE_SIZE), &[1; 4096]);
        let second = stage.asked();
        let payload = vec![2; usize::try_from(size).unwrap()];
        stage.link.send_payload(&region(second.request, error, "gone", size), &payload);
        let came = lazy.0.rest();
        assert_eq!(came.len(), 32 + 4096, "what was promised does not come");
        stage.proxy.assert_log(&["WARN", "pages of snapshot web", cause]);
        lazy = Lazy::of("web", &stage.proxy, Dialect::Long);
    }
    stage.assert_undisturbed();
}

#[test]
fn an_answer_that_does_not_come_is_not_waited_for_and_may_come_later() {
    let mut stage = Stage::set(&[("link.ack-timeout", "\"1s\"")]);
    let (mut lazy, asked) = stage.asks(1);
    // The cache is not stuck: it has a word for the dump, the first snapshot on the link.
    stage.link.send(&Message::SnapshotReady(SnapshotReady { snapshot: 0 }));
    lazy.assert_ended();
    stage.proxy.assert_log(&["WARN", "pages of snapshot web", "did not answer within 1s"]);
    stage.link.send_payload(&region(asked.request, 0, "", PAGE_SIZE), &[7; 4096]);
    let (mut next, asked) = stage.asks(1);
    stage.link.send_payload(&region(asked.request, 0, "", PAGE_SIZE), &[8; 4096]);
    assert_eq!(next.hear(0x10000), [8]);
    stage.assert_undisturbed();
}

#[test]
fn a_link_that_breaks_ends_who_waits_for_pages_on_it() {
    let mut stage = Stage::set(&[]);
    let (mut lazy, _) = stage.asks(1);
    let mut silent = Lazy::of("web", &stage.proxy, Dialect::Short);
    stage.link.send(&Message::goodbye("it is late"));
    lazy.assert_ended();
    stage.proxy.assert_log(&["WARN", "a client for pages", "the link to the cache broke"]);
    // One that had not asked yet asks on the next link.
    silent.ask(0x10000, 1);
    stage.link = stage.standin.welcome();
    let asked = stage.asked();
    stage.link.send_payload(&region(asked.request, 0, "", PAGE_SIZE), &[9; 4096]);
    assert_eq!(silent.hear(0x10000), [9]);
    silent.say(Command::Close);
    stage.proxy.assert_alive();
    stage.bystander.finish();
}
