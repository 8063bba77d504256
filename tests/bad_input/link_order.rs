//! Frames that are right each, in an order or with counts that are not.

use criu_image_relay::control::model::SnapshotState;
use criu_image_relay::wire::message::{Message, SnapshotAck, SnapshotBegin, SnapshotEnd};

use crate::criu::RECORDS;
use crate::daemons::Daemon;
use crate::link_at_cache::{Bystander, assert_broken};
use crate::proxy_standin::ProxyStandin;

/// What breaks the order ends the link, with a goodbye.
#[track_caller]
fn assert_violation(violate: impl FnOnce(&mut ProxyStandin), cause: &str) {
    let goodbye = assert_broken(&[], violate, cause);
    assert!(goodbye.expect("a goodbye").contains(cause));
}

/// What is wrong with one snapshot damages that one; another on the same link completes.
#[track_caller]
fn assert_damaged(damage: impl FnOnce(&mut ProxyStandin), id: &str, cause: &str) {
    let (mut cache, address) = Daemon::cache(&[("store.max-images", "3")]);
    let bystander = Bystander::begin(address);
    let mut proxy = ProxyStandin::connect(address);
    proxy.begin(0, "other");
    proxy.image(0, 0, "core-7.img", RECORDS);
    damage(&mut proxy);
    proxy.assert_aborted(1, cause);
    let peer = proxy.link.address();
    cache.assert_log(&["WARN", id, &peer, cause]);
    // What is under way of it is not held against the link.
    proxy.data(1, 0, 0, &[7; 10]);
    proxy.link.send(&Message::abort(1, "understood"));
    proxy.complete(0, 1, 1, RECORDS.len());
    cache.assert_alive();
    bystander.finish(address);
}

#[test]
fn data_without_a_beginning_ends_its_link() {
    let data =
        |snapshot, image| move |proxy: &mut ProxyStandin| proxy.data(snapshot, image, 0, b"x");
    assert_violation(data(5, 0), "a IMAGE_DATA for snapshot number 5, which is not under way");
    assert_violation(data(0, 5), "a IMAGE_DATA for image number 5 of snapshot web");
    assert_violation(
        |proxy| proxy.begin_image(5, 0, "core-7.img"),
        "a IMAGE_BEGIN for snapshot number 5, which is not under way",
    );
    assert_violation(|proxy| proxy.end_image(0, 5, 0), "a IMAGE_END for image number 5");
    assert_violation(|proxy| proxy.end(5, 0, 0), "a SNAPSHOT_END for snapshot number 5");
    assert_violation(
        |proxy| proxy.link.send(&Message::abort(5, "?")),
        "a SNAPSHOT_ABORT for snapshot number 5",
    );
}

#[test]
fn a_gap_in_an_image_ends_its_link() {
    for offset in [0, 99, 101, u64::MAX] {
        let cause = format!("image core-7.img of snapshot web goes on at byte {offset}, but 100");
        assert_violation(|proxy| proxy.data(0, 0, offset, b"x"), &cause);
    }
}

#[test]
fn a_number_used_twice_ends_its_link() {
    assert_violation(|proxy| proxy.begin(0, "db"), "snapshot number 0 begun twice on one link");
    let again = |proxy: &mut ProxyStandin| proxy.begin_image(0, 0, "mm-7.img");
    assert_violation(again, "image number 0 of snapshot web begun twice");
    let ended = |proxy: &mut ProxyStandin| {
        proxy.end_image(0, 0, 100);
        proxy.data(0, 0, 100, b"x");
    };
    assert_violation(ended, "image number 0 of snapshot web, which is not open");
}

#[test]
fn what_only_a_cache_says_ends_its_link() {
    let ack = Message::SnapshotAck(SnapshotAck { snapshot: 0, images: 0, bytes: 0 });
    assert_violation(|proxy| proxy.link.send(&ack), "a SNAPSHOT_ACK out of order");
}

#[test]
fn more_or_fewer_bytes_than_announced_damage_their_snapshot() {
    for size in [0, 9, 11] {
        let damage = |proxy: &mut ProxyStandin| {
            proxy.begin(1, "web");
            proxy.begin_image(1, 0, "core-7.img");
            proxy.data(1, 0, 0, &[7; 10]);
            proxy.end_image(1, 0, size);
        };
        let cause = format!("image core-7.img has {size} bytes as announced, but 10 have come");
        assert_damaged(damage, "snapshot web from standin", &cause);
    }
}

#[test]
fn an_image_opened_twice_at_once_damages_its_snapshot() {
    let damage = |proxy: &mut ProxyStandin| {
        proxy.begin(1, "web");
        proxy.begin_image(1, 0, "core-7.img");
        proxy.begin_image(1, 1, "core-7.img");
    };
    let cause = "image core-7.img is opened for writing twice at once";
    assert_damaged(damage, "snapshot web from standin", cause);
}

#[test]
fn a_bad_image_name_damages_its_snapshot() {
    for (name, why) in [("../x", "slash"), ("..", "two dots"), ("a\0", "NUL"), ("", "empty")] {
        let damage = |proxy: &mut ProxyStandin| {
            proxy.begin(1, "web");
            proxy.begin_image(1, 0, name);
        };
        assert_damaged(damage, "snapshot web from standin", why);
    }
}

#[test]
fn a_bad_snapshot_id_is_refused() {
    let long = "n".repeat(4097);
    for (id, why) in [("", "it is empty"), ("a\0", "a NUL"), (&long, "longer than 4096")] {
        assert_damaged(|proxy| proxy.begin(1, id), "a bad snapshot id", why);
    }
}

#[test]
fn a_snapshot_that_is_there_already_is_refused() {
    let damage = |proxy: &mut ProxyStandin| proxy.begin(1, "other");
    assert_damaged(
        damage,
        "snapshot other is refused",
        "a snapshot other is being received already",
    );
}

#[test]
fn more_images_than_a_snapshot_may_have_damage_it() {
    let damage = |proxy: &mut ProxyStandin| {
        proxy.begin(1, "web");
        (0..4).for_each(|i| proxy.begin_image(1, i, &format!("core-{i}.img")));
    };
    assert_damaged(damage, "snapshot web from standin", "more than 3 images");
}

/// The end of a snapshot that is not as it was announced. After it, nothing may come of it.
#[track_caller]
fn assert_bad_end(end: SnapshotEnd, cause: &str) {
    let (mut cache, address) = Daemon::cache(&[]);
    let bystander = Bystander::begin(address);
    let mut proxy = ProxyStandin::connect(address);
    proxy.begin(0, "web");
    proxy.begin(1, "other");
    proxy.image(0, 0, "inventory.img", RECORDS);
    proxy.image(0, 1, "core-7.img", RECORDS);
    proxy.link.send(&Message::SnapshotEnd(end));
    proxy.assert_aborted(0, cause);
    cache.assert_log(&[
        "WARN",
        "snapshot web from standin",
        &proxy.link.address(),
        "damaged",
        cause,
    ]);
    assert!(cache.assert_state("web", SnapshotState::Damaged).contains(cause));
    proxy.complete(1, 0, 0, 0);
    cache.assert_alive();
    bystander.finish(address);
}

#[test]
fn counts_that_are_not_true_damage_their_snapshot() {
    for (images, bytes) in [(1, 24), (3, 24), (2, 23), (2, 25), (0, 0)] {
        let end =
            SnapshotEnd { snapshot: 0, complete: true, images, bytes, ..SnapshotEnd::default() };
        let cause =
            format!("{images} images with {bytes} bytes were announced, 2 with 24 have come");
        assert_bad_end(end, &cause);
    }
}

#[test]
fn an_end_that_is_not_complete_damages_its_snapshot() {
    let end = SnapshotEnd {
        snapshot: 0,
        complete: false,
        images: 2,
        bytes: 24,
        ..SnapshotEnd::default()
    };
    assert_bad_end(end, "its end came without the mark of completeness");
}

#[test]
fn an_end_with_an_image_open_damages_its_snapshot() {
    let (cache, address) = Daemon::cache(&[]);
    let mut proxy = ProxyStandin::connect(address);
    proxy.begin(0, "web");
    proxy.image(0, 0, "inventory.img", RECORDS);
    proxy.begin_image(0, 1, "core-7.img");
    proxy.end(0, 1, RECORDS.len());
    proxy.assert_aborted(0, "it ended while image core-7.img was still open");
    cache.assert_log(&["snapshot web from standin", "damaged", "core-7.img was still open"]);
    proxy.whole(1, "fresh", "core-7.img", RECORDS);
}

/// A peer that begins snapshot after snapshot, none of them good, and listens to nothing, takes no
/// memory for it.
#[test]
fn refused_snapshots_cost_the_cache_no_memory() {
    let (mut cache, address) = Daemon::cache(&[("link.keep-alive", "\"1s\"")]);
    let bystander = Bystander::begin(address);
    let before = cache.resident_bytes();
    let mut proxy = ProxyStandin::connect(address);
    for snapshot in 0..50_000 {
        if !proxy.link.try_send(&begin_bad(snapshot)) {
            break;
        }
    }
    let grown = cache.resident_bytes().saturating_sub(before);
    assert!(grown < 4 << 20, "the cache has grown by {} KiB", grown >> 10);
    cache.assert_alive();
    drop(proxy);
    bystander.finish(address);
}

fn begin_bad(snapshot: u32) -> Message {
    Message::SnapshotBegin(SnapshotBegin {
        snapshot,
        id: "\n".repeat(200),
        ..SnapshotBegin::default()
    })
}
