//! Proxies that ask the cache for pages: what they get, and what becomes of those that ask wrongly, or for what
//! is not theirs.

use criu_image_relay::control::model::SnapshotState;
use criu_image_relay::criu::page_server::answer::GET_MAX;
use criu_image_relay::criu::pages::{PAGE_SIZE, PageRange, Space};
use criu_image_relay::wire::message::{Message, PagesRequest, REGION_MAX, Region};
use criu_image_relay::wire::spaces::{pages_request, requested, space};
use rustix::io::Errno;

use crate::criu::{Criu, RECORDS};
use crate::daemons::Daemon;
use crate::lazy::{images, send};
use crate::link_at_cache::Bystander;
use crate::proxy_standin::ProxyStandin;

const TASK: Space = Space::Task(7);
const SHMEM: Space = Space::Shmem(1 << 40);
const PARENT: u32 = 1;
const PRESENT: u32 = 4;

/// Asks for any pages; gives the answer.
#[track_caller]
fn ask(proxy: &mut ProxyStandin, asked: PagesRequest) -> (Region, Vec<u8>) {
    let request = asked.request;
    proxy.link.send(&Message::PagesRequest(asked));
    match proxy.link.receive() {
        Some((Message::Region(region), bytes)) => {
            assert_eq!(region.request, request);
            (region, bytes)
        }
        other => panic!("{other:?} instead of a region"),
    }
}

fn pages_of(id: &str, of: Space, page: u64, pages: u64) -> PagesRequest {
    let (named, address) = (space(0, of), page * PAGE_SIZE);
    let (shmem, id_of_space, snapshot_id) = (named.shmem, named.id, id.to_owned());
    PagesRequest { request: 7, snapshot_id, shmem, id: id_of_space, address, pages }
}

/// How many pages there are from one on, and the numbers of those that come at once.
#[track_caller]
fn told(proxy: &mut ProxyStandin, of: Space, page: u64, pages: u64) -> (u64, Vec<u8>) {
    let (region, bytes) = ask(proxy, pages_of("web", of, page, pages));
    assert_eq!((region.error, region.reason.as_str()), (0, ""));
    assert_eq!(bytes.len() % 4096, 0);
    let number = |page: &[u8]| {
        assert!(page.iter().all(|byte| *byte == page[0]));
        page[0]
    };
    (region.size / PAGE_SIZE, bytes.chunks(4096).map(number).collect())
}

/// There are no such pages, and the link goes on.
#[track_caller]
fn assert_refused(proxy: &mut ProxyStandin, asked: PagesRequest, errno: Errno, why: &str) {
    let (region, bytes) = ask(proxy, asked);
    assert_eq!((region.error, region.size), (errno.raw_os_error().unsigned_abs(), 0), "{region:?}");
    assert!(region.reason.contains(why) && region.reason.len() <= 1024, "{region:?}");
    assert!(bytes.is_empty());
}

/// Pages in the current space of a round, each filled with its number.
fn bring(proxy: &mut ProxyStandin, snapshot: u32, page: u64, numbers: &[u8]) {
    proxy.pages(snapshot, page * PAGE_SIZE, numbers.len() as u64, PRESENT);
    let bytes: Vec<_> = numbers.iter().flat_map(|number| [*number; 4096]).collect();
    proxy.page_data(snapshot, &bytes);
}

/// Two rounds of `web`: pages 16 to 19 of a task, of which 18 came again, and 32; and one of shared memory.
fn rounds(proxy: &mut ProxyStandin) {
    proxy.begin_round(0, "web");
    proxy.space(0, TASK);
    bring(proxy, 0, 16, &[16, 17, 1, 19]);
    proxy.end(0, 1, 4 * 4096);
    proxy.assert_acknowledged(0);
    proxy.begin_round(1, "web");
    proxy.space(1, TASK);
    proxy.pages(1, 16 * PAGE_SIZE, 2, PARENT);
    bring(proxy, 1, 18, &[18]);
    proxy.pages(1, 19 * PAGE_SIZE, 1, PARENT);
    bring(proxy, 1, 32, &[32]);
    proxy.space(1, SHMEM);
    bring(proxy, 1, 0, &[5]);
    proxy.end(1, 2, 3 * 4096);
    proxy.assert_acknowledged(1);
}

#[test]
fn pages_are_answered_as_far_as_they_lie_together_however_they_came() {
    let (cache, address) = Daemon::cache(&[]);
    let mut proxy = ProxyStandin::connect(address);
    rounds(&mut proxy);
    let all = (1 << 52) - 1;
    for joined in [false, true] {
        if joined {
            proxy.begin(2, "web");
            proxy.complete(2, 0, 0, 0);
            cache.assert_state("web", SnapshotState::Whole);
        }
        for (of, page, pages, expected) in [
            (TASK, 16, 1, (1, &[16][..])),
            (TASK, 16, 2, (2, &[16, 17])),
            (TASK, 16, 4, (4, &[16, 17])),
            (TASK, 17, all - 17, (3, &[17])),
            (TASK, 18, 9, (2, &[18])),
            (TASK, 19, 1 << 32, (1, &[19])),
            (TASK, 32, all - 32, (1, &[32])),
            (SHMEM, 0, all, (1, &[5])),
        ] {
            let (there, came) = told(&mut proxy, of, page, pages);
            assert_eq!((there, &came[..]), expected, "{pages} from {page} of {of}, {joined}");
        }
    }
    // To ask is not to take.
    cache.assert_state("web", SnapshotState::Whole);
}

#[test]
fn pages_that_came_as_images_are_answered_alike() {
    let (_cache, address) = Daemon::cache(&[]);
    let mut proxy = ProxyStandin::connect(address);
    send(&mut proxy, 1, "web", &images());
    for _ in 0..2 {
        assert_eq!(told(&mut proxy, TASK, 16, 900), (5, vec![16, 17, 18, 19, 20]));
        assert_eq!(told(&mut proxy, TASK, 18, 2), (2, vec![18, 19]));
        assert_eq!(told(&mut proxy, TASK, 32, 1), (1, vec![32]));
    }
}

#[test]
fn what_is_told_and_what_comes_at_once_has_a_limit() {
    let (_cache, address) = Daemon::cache(&[]);
    let mut proxy = ProxyStandin::connect(address);
    proxy.begin_round(0, "web");
    proxy.space(0, TASK);
    let numbers: Vec<u8> = (0..1100u32).map(|page| (page % 251).to_le_bytes()[0]).collect();
    bring(&mut proxy, 0, 0, &numbers);
    proxy.end(0, 1, 1100 * 4096);
    proxy.assert_acknowledged(0);
    let at_once = REGION_MAX / 4096;
    for (page, pages, there) in
        [(0, 1100, GET_MAX), (0, 1 << 51, GET_MAX), (50, 1025, GET_MAX), (1000, 300, 100)]
    {
        let told = told(&mut proxy, TASK, page, pages);
        assert_eq!(told.0, there);
        let first = usize::try_from(page).unwrap();
        assert_eq!(told.1, &numbers[first..first + at_once]);
    }
    assert_eq!(told(&mut proxy, TASK, 1099, 300), (1, vec![(1099 % 251) as u8]));
}

#[test]
fn pages_that_are_not_there_or_cannot_be_are_answered_and_end_nothing() {
    let (mut cache, address) = Daemon::cache(&[]);
    let bystander = Bystander::begin(address);
    let mut proxy = ProxyStandin::connect(address);
    rounds(&mut proxy);
    let nobody = "n".repeat(16_000);
    for (asked, why) in [
        (pages_of("db", TASK, 16, 1), "no snapshot db is held"),
        (pages_of("", TASK, 16, 1), "no snapshot  is held"),
        (pages_of(&nobody, TASK, 16, 1), "no snapshot nnnn"),
        (pages_of("web", Space::Task(8), 16, 1), "snapshot web has no task 8"),
        (pages_of("web", Space::Task(0), 16, 1), "snapshot web has no task 0"),
        (pages_of("web", Space::Shmem(7), 16, 1), "snapshot web has no shared memory 7"),
        (pages_of("web", TASK, 15, 9), "task 7 of snapshot web has no page at 0xf000"),
        (pages_of("web", TASK, 20, 1 << 40), "task 7 of snapshot web has no page at 0x14000"),
        (pages_of("web", SHMEM, 1, 1), "has no page at 0x1000"),
    ] {
        assert_refused(&mut proxy, asked, Errno::NOENT, why);
    }
    let task = |pid, address, pages| PagesRequest {
        id: pid,
        address,
        pages,
        ..pages_of("web", TASK, 0, 0)
    };
    for (asked, why) in [
        (task(7, 0x10000, 0), "no pages at 0x10000"),
        (task(7, 0x10001, 1), "pages at 0x10001, which is not where a page begins"),
        (task(7, u64::MAX, 1), "which is not where a page begins"),
        (task(7, !0xfff, 1), "1 pages at 0xfffffffffffff000 end beyond 2^64"),
        (task(7, 0x10000, u64::MAX), "end beyond 2^64"),
        (task(7, 0x10000, 1 << 52), "end beyond 2^64"),
        (task(1 << 32, 0x10000, 1), "no task has the pid 4294967296"),
        (task(u64::MAX, 0x10000, 1), "no task has the pid"),
    ] {
        assert!(requested(&asked).is_err());
        assert_refused(&mut proxy, asked, Errno::INVAL, why);
    }
    assert_eq!(told(&mut proxy, TASK, 16, 2), (2, vec![16, 17]));
    cache.assert_alive();
    bystander.finish(address);
}

#[test]
fn a_snapshot_that_has_no_pages_yet_or_none_any_more_has_none() {
    let (mut cache, address) = Daemon::cache(&[]);
    let bystander = Bystander::begin(address);
    let mut proxy = ProxyStandin::connect(address);
    let asked = || pages_of("web", TASK, 16, 1);
    let refused = |proxy: &mut ProxyStandin, errno, why| assert_refused(proxy, asked(), errno, why);

    let not_yet = "snapshot web: its pages have not come yet";
    let mut restore = Criu::in_dir_of("web", &cache);
    // It has no sender yet.
    refused(&mut proxy, Errno::NOENT, "no snapshot web is held");
    proxy.begin(0, "web");
    proxy.image(0, 0, images()[0].0, &images()[0].1);
    refused(&mut proxy, Errno::NOENT, not_yet);
    proxy.link.send(&Message::abort(0, "criu was killed"));
    refused(&mut proxy, Errno::IO, "snapshot web is damaged: criu was killed");
    proxy.begin_round(1, "web");
    refused(&mut proxy, Errno::NOENT, not_yet);
    proxy.space(1, TASK);
    bring(&mut proxy, 1, 16, &[9]);
    refused(&mut proxy, Errno::NOENT, not_yet);
    proxy.end(1, 1, 4096);
    proxy.assert_acknowledged(1);
    assert_eq!(told(&mut proxy, TASK, 16, 1), (1, vec![9]));

    // While images join, and while another round comes.
    proxy.begin(2, "web");
    assert_eq!(told(&mut proxy, TASK, 16, 1), (1, vec![9]));
    proxy.begin_round(3, "web");
    proxy.space(3, TASK);
    bring(&mut proxy, 3, 16, &[10]);
    assert_eq!(told(&mut proxy, TASK, 16, 1), (1, vec![9]));
    proxy.end(3, 1, 4096);
    proxy.assert_acknowledged(3);
    assert_eq!(told(&mut proxy, TASK, 16, 1), (1, vec![10]));
    proxy.complete(2, 0, 0, 0);
    assert_eq!(told(&mut proxy, TASK, 16, 1), (1, vec![10]));

    restore.read("inventory.img");
    restore.read("pages-1.img");
    drop(restore);
    cache.assert_state("web", SnapshotState::Taken);
    refused(&mut proxy, Errno::STALE, "a restore has taken snapshot web");
    cache.drop_snapshot("web");
    refused(&mut proxy, Errno::NOENT, "no snapshot web is held");
    cache.assert_alive();
    bystander.finish(address);
}

#[test]
fn pages_that_are_not_understood_cannot_be_asked_for() {
    let (_cache, address) = Daemon::cache(&[]);
    let mut proxy = ProxyStandin::connect(address);
    let [(name, mut pagemap), pages] = images();
    // A field of a later CRIU in an entry of its own.
    pagemap.extend(b"\x08\0\0\0\x08\x80\x80\x10\x10\x01\x30\x01");
    send(&mut proxy, 1, "web", &[(name, pagemap), pages]);
    for _ in 0..2 {
        let why = "pagemap-7.img: not understood";
        assert_refused(&mut proxy, pages_of("web", TASK, 16, 1), Errno::NOENT, why);
    }
}

#[test]
fn pages_of_another_host_are_not_there() {
    let (mut cache, address) = Daemon::cache(&[]);
    let bystander = Bystander::begin(address);
    let mut proxy = ProxyStandin::connect(address);
    rounds(&mut proxy);
    let mut other = ProxyStandin::connect_from([127, 0, 0, 2].into(), address);
    let asked = || pages_of("web", TASK, 16, 1);
    assert_refused(&mut other, asked(), Errno::NOENT, "no snapshot web is held");
    proxy.begin(2, "web");
    proxy.complete(2, 0, 0, 0);
    assert_refused(&mut other, asked(), Errno::NOENT, "no snapshot web is held");
    other.whole(0, "theirs", "core-7.img", RECORDS);
    assert_refused(&mut proxy, pages_of("theirs", TASK, 16, 1), Errno::NOENT, "no snapshot theirs");
    assert_eq!(told(&mut proxy, TASK, 16, 2), (2, vec![16, 17]));
    cache.assert_alive();
    bystander.finish(address);
}

#[test]
fn who_asks_for_more_pages_than_it_reads_loses_its_link_and_takes_no_memory() {
    let (mut cache, address) = Daemon::cache(&[]);
    let bystander = Bystander::begin(address);
    let mut proxy = ProxyStandin::connect(address);
    proxy.begin_round(0, "web");
    proxy.space(0, TASK);
    bring(&mut proxy, 0, 0, &[7; REGION_MAX / 4096]);
    proxy.end(0, 1, REGION_MAX);
    proxy.assert_acknowledged(0);
    let before = cache.resident_bytes();
    let range = PageRange::new(0, 64).unwrap();
    let ask = |request| pages_request(request, "web", TASK, range);
    let sent = (0..20_000).take_while(|request| proxy.link.try_send(&ask(*request))).count();
    assert!(sent > 1024);
    let peer = proxy.link.address();
    cache.assert_log(&["WARN", &peer, "it waits for more than 1024 regions at once"]);
    let grown = cache.resident_bytes().saturating_sub(before);
    assert!(grown < 8 << 20, "{grown} bytes");
    cache.assert_alive();
    bystander.finish(address);
    // What it has sent is held all the same.
    let mut again = ProxyStandin::connect(address);
    assert_eq!(told(&mut again, TASK, 0, 1), (1, vec![7]));
}
