//! Rounds of pages on a link, in frames that are right each. What is wrong with one costs that round, and
//! what was held before it stays; what breaks the order costs the link.

use criu_image_relay::control::model::SnapshotState;
use criu_image_relay::criu::pages::Space;
use criu_image_relay::wire::message::{self, Message, SnapshotEnd, SnapshotList, Spaces};

use crate::criu::RECORDS;
use crate::daemons::Daemon;
use crate::link_at_cache::{Bystander, assert_broken};
use crate::proxy_standin::ProxyStandin;

const TASK: Space = Space::Task(7);
const PARENT: u32 = 1;
const LAZY: u32 = 2;
const PRESENT: u32 = 4;

/// A page.
const PAGE: &[u8] = &[7; 4096];

/// A round of `db` that brings three pages, up to the acknowledgement.
#[track_caller]
fn round(proxy: &mut ProxyStandin, snapshot: u32) {
    proxy.begin_round(snapshot, "db");
    proxy.space(snapshot, TASK);
    proxy.pages(snapshot, 0x1000, 3, PRESENT);
    proxy.page_data(snapshot, &PAGE.repeat(3));
    proxy.end(snapshot, 1, 3 * 4096);
    proxy.assert_acknowledged(snapshot);
}

/// Damages the round number 2 of `db`, which has a parent. What still comes of it is not held against the
/// link.
#[track_caller]
fn assert_failed(damage: impl FnOnce(&mut ProxyStandin), cause: &str) {
    let late = |proxy: &mut ProxyStandin| {
        proxy.page_data(2, PAGE);
        proxy.link.send(&Message::abort(2, "understood"));
    };
    assert_fails(damage, late, cause);
}

/// Ends that round in a way that is not right; after it nothing may come of it.
#[track_caller]
fn assert_bad_end(begin: impl FnOnce(&mut ProxyStandin), end: SnapshotEnd, cause: &str) {
    let damage = |proxy: &mut ProxyStandin| {
        begin(proxy);
        proxy.link.send(&Message::SnapshotEnd(end));
    };
    assert_fails(damage, |_| {}, cause);
}

#[track_caller]
fn assert_fails(
    damage: impl FnOnce(&mut ProxyStandin),
    late: impl FnOnce(&mut ProxyStandin),
    cause: &str,
) {
    let (mut cache, address) = Daemon::cache(&[]);
    let bystander = Bystander::begin(address);
    let mut proxy = ProxyStandin::connect(address);
    proxy.begin(0, "other");
    proxy.image(0, 0, "core-7.img", RECORDS);
    round(&mut proxy, 1);
    proxy.begin_round(2, "db");
    damage(&mut proxy);
    proxy.assert_aborted(2, cause);
    let peer = proxy.link.address();
    cache.assert_log(&["WARN", "a round of snapshot db from standin", &peer, "failed", cause]);
    late(&mut proxy);
    let db = cache.show("db").unwrap();
    assert_eq!((db.state, db.bytes), (SnapshotState::Paged, 3 * 4096));
    proxy.complete(0, 1, 1, RECORDS.len());
    round(&mut proxy, 3);
    cache.assert_alive();
    bystander.finish(address);
}

#[test]
fn pages_of_no_space_fail_their_round() {
    let cause = "pages at 0x1000 before any page space";
    assert_failed(|proxy| proxy.pages(2, 0x1000, 1, PRESENT), cause);
    assert_failed(|proxy| proxy.pages(2, 0x1000, 1, PARENT), cause);
}

#[test]
fn a_space_of_no_task_fails_its_round() {
    let space = message::Space { snapshot: 2, shmem: false, id: 1 << 32 };
    assert_failed(
        |proxy| proxy.link.send(&Message::Space(space)),
        "no task has the pid 4294967296",
    );
}

#[test]
fn pages_that_cannot_be_fail_their_round() {
    let top = 0u64.wrapping_sub(4096);
    for (address, pages, flags, cause) in [
        (0x1001, 1, PRESENT, "pages at 0x1001, which is not where a page begins"),
        (0x1000, 0, PRESENT, "no pages at 0x1000"),
        (0x1000, u64::MAX, PRESENT, "pages at 0x1000 end beyond 2^64"),
        (top, 1, PRESENT, "1 pages at 0xfffffffffffff000 end beyond 2^64"),
        (0x1000, 1, 0, "pages at 0x1000: no flag at all"),
        (0x1000, 1, 8, "pages at 0x1000: unknown flags 0x8"),
        (0x1000, 1, PRESENT | PARENT, "pages at 0x1000: the flags PE_PRESENT and PE_PARENT"),
        (0x1000, 1, LAZY, "pages at 0x1000 are still at the source"),
        (0x4000, 1, PARENT, "address 0x4000 of page space task 7 is said to be in the parent"),
    ] {
        let damage = |proxy: &mut ProxyStandin| {
            proxy.space(2, TASK);
            proxy.pages(2, address, pages, flags);
        };
        assert_failed(damage, cause);
    }
}

#[test]
fn pages_of_a_space_that_the_parent_lacks_fail_their_round() {
    let damage = |proxy: &mut ProxyStandin| {
        proxy.space(2, Space::Shmem(7));
        proxy.pages(2, 0x1000, 1, PARENT);
    };
    assert_failed(
        damage,
        "address 0x1000 of page space shared memory 7 is said to be in the parent",
    );
}

#[test]
fn an_address_that_comes_twice_fails_its_round() {
    for flags in [PARENT, PRESENT] {
        let damage = |proxy: &mut ProxyStandin| {
            proxy.space(2, TASK);
            proxy.pages(2, 0x1000, 2, PARENT);
            proxy.pages(2, 0x2000, 1, flags);
            proxy.page_data(2, if flags == PRESENT { PAGE } else { return });
        };
        assert_failed(damage, "address 0x2000 of page space task 7 came twice");
    }
}

/// Announces two pages, and brings one and a part of the other.
fn half(proxy: &mut ProxyStandin) {
    proxy.space(2, TASK);
    proxy.pages(2, 0x4000, 2, PRESENT);
    proxy.page_data(2, &[7; 5000]);
}

#[test]
fn pages_that_were_announced_and_do_not_come_fail_their_round() {
    let cause = "3192 bytes of the pages that were announced did not come";
    let next: [fn(&mut ProxyStandin); 3] = [
        |proxy| proxy.pages(2, 0x8000, 1, PRESENT),
        |proxy| proxy.pages(2, 0x1000, 1, PARENT),
        |proxy| proxy.space(2, Space::Task(8)),
    ];
    for next in next {
        let damage = |proxy: &mut ProxyStandin| {
            half(proxy);
            next(proxy);
        };
        assert_failed(damage, cause);
    }
    assert_bad_end(half, end(1, 5000), cause);
}

fn end(spaces: u64, bytes: u64) -> SnapshotEnd {
    SnapshotEnd { snapshot: 2, complete: true, images: spaces, bytes, ..SnapshotEnd::default() }
}

#[test]
fn counts_that_are_not_true_fail_their_round() {
    let one_page = |proxy: &mut ProxyStandin| {
        proxy.space(2, TASK);
        proxy.pages(2, 0x1000, 1, PRESENT);
        proxy.page_data(2, PAGE);
    };
    for (spaces, bytes) in [(0, 4096), (2, 4096), (1, 4095), (1, 8192), (0, 0)] {
        let cause = format!(
            "{spaces} page spaces with {bytes} bytes were announced, 1 with 4096 have come"
        );
        assert_bad_end(one_page, end(spaces, bytes), &cause);
    }
    let cause = "its end came without the mark of completeness";
    assert_bad_end(one_page, SnapshotEnd { complete: false, ..end(1, 4096) }, cause);
}

/// What breaks the order on a link on which four pages of a round are announced.
#[track_caller]
fn assert_violation(violate: impl FnOnce(&mut ProxyStandin), cause: &str) {
    let violate = |proxy: &mut ProxyStandin| {
        round(proxy, 1);
        proxy.begin_round(2, "db");
        proxy.space(2, TASK);
        proxy.pages(2, 0x1000, 4, PRESENT);
        violate(proxy);
    };
    let goodbye = assert_broken(&[], violate, cause);
    assert!(goodbye.expect("a goodbye").contains(cause));
}

#[test]
fn more_bytes_of_pages_than_announced_end_their_link() {
    let cause = "16385 bytes of pages of snapshot db, of which 16384 bytes were announced";
    assert_violation(|proxy| proxy.page_data(2, &vec![7; 16385]), cause);
    let of_one_run = |proxy: &mut ProxyStandin| {
        proxy.page_data(2, &PAGE.repeat(4));
        proxy.page_data(2, &[7]);
    };
    let cause = "1 bytes of pages of snapshot db, of which 0 bytes were announced";
    assert_violation(of_one_run, cause);
    let of_two_runs = |proxy: &mut ProxyStandin| {
        proxy.page_data(2, &PAGE.repeat(4));
        proxy.pages(2, 0x5000, 1, PRESENT);
        proxy.page_data(2, PAGE);
        proxy.page_data(2, &[7]);
    };
    assert_violation(of_two_runs, cause);
}

#[test]
fn images_for_a_round_and_pages_for_images_end_their_link() {
    let list = SnapshotList { snapshot: 2, list: String::new() };
    let round = |kind| format!("a {kind} for snapshot number 2, which is a round of pages");
    assert_violation(|proxy| proxy.begin_image(2, 0, "core-7.img"), &round("IMAGE_BEGIN"));
    assert_violation(|proxy| proxy.data(2, 0, 0, b"x"), &round("IMAGE_DATA"));
    assert_violation(|proxy| proxy.end_image(2, 0, 0), &round("IMAGE_END"));
    assert_violation(
        |proxy| proxy.link.send(&Message::SnapshotList(list)),
        &round("SNAPSHOT_LIST"),
    );
    let images = |kind| format!("a {kind} for snapshot number 0, which has images");
    assert_violation(|proxy| proxy.space(0, TASK), &images("SPACE"));
    assert_violation(|proxy| proxy.pages(0, 0x1000, 1, PRESENT), &images("PAGES"));
    assert_violation(|proxy| proxy.page_data(0, PAGE), &images("PAGE_DATA"));
}

#[test]
fn pages_of_no_round_end_their_link() {
    for number in [1, 9] {
        let none = |kind| format!("a {kind} for snapshot number {number}, which is not under way");
        assert_violation(|proxy| proxy.space(number, TASK), &none("SPACE"));
        assert_violation(|proxy| proxy.pages(number, 0x1000, 1, PRESENT), &none("PAGES"));
        assert_violation(|proxy| proxy.page_data(number, PAGE), &none("PAGE_DATA"));
    }
}

#[test]
fn what_only_a_cache_says_of_rounds_ends_its_link() {
    let spaces = Message::Spaces(Spaces { snapshot: 2, tasks: vec![7], shmems: Vec::new() });
    assert_violation(|proxy| proxy.link.send(&spaces), "a SPACES out of order");
}

#[test]
fn a_broken_link_leaves_what_was_held() {
    let (cache, address) = Daemon::cache(&[]);
    let mut proxy = ProxyStandin::connect(address);
    round(&mut proxy, 1);
    proxy.begin_round(2, "db");
    half(&mut proxy);
    drop(proxy);
    cache.assert_log(&["a round of snapshot db from standin", "failed"]);
    assert_eq!(cache.show("db").unwrap().state, SnapshotState::Paged);
    cache.assert_held(3 * 4096);
}

/// A second round of a snapshot is refused while one is under way, and costs that one nothing.
#[test]
fn two_rounds_of_a_snapshot_at_once_are_refused() {
    let (cache, address) = Daemon::cache(&[]);
    let (mut proxy, mut other) = (ProxyStandin::connect(address), ProxyStandin::connect(address));
    round(&mut proxy, 1);
    proxy.begin_round(2, "db");
    half(&mut proxy);
    cache.assert_held(5 * 4096);
    let cause = "a round of pages of snapshot db is being received already";
    other.begin_round(1, "db");
    other.assert_aborted(1, cause);
    cache.assert_log(&["WARN", "snapshot db is refused", cause]);
    proxy.page_data(2, &[7; 3192]);
    proxy.end(2, 1, 8192);
    proxy.assert_acknowledged(2);
    round(&mut other, 2);
}
