//! The cache's quota: who comes when it is used up waits, and is given up after a while. Who fits
//! beside it is not concerned.

use criu_image_relay::control::model::SnapshotState;
use criu_image_relay::criu::images::INVENTORY;
use criu_image_relay::wire::message::Message;

use crate::criu::{Criu, RECORDS};
use crate::daemons::{Daemon, Settings};
use crate::hosts::Hosts;
use crate::proxy_standin::ProxyStandin;

const QUOTA: (&str, &str) = ("store.max-bytes", "\"64K\"");
/// Longer than any test waits for anything.
const LONG: Settings<'static> =
    &[QUOTA, ("store.quota-wait", "\"15s\""), ("link.keep-alive", "\"1min\"")];
const SHORT: Settings<'static> = &[QUOTA, ("store.quota-wait", "\"400ms\"")];

/// Ten pages.
const PAGES: &[u8] = &[7; 40 << 10];

/// A cache that holds the snapshot "first", of eleven pages out of sixteen, and a link on which
/// "web" waits for ten.
fn waiting(settings: Settings<'_>) -> (Daemon, ProxyStandin, ProxyStandin) {
    let (cache, address) = Daemon::cache(settings);
    let (mut first, mut web) = (ProxyStandin::connect(address), ProxyStandin::connect(address));
    first.whole(0, "first", "pages-1.img", PAGES);
    cache.assert_held(44 << 10);
    web.begin(0, "web");
    web.begin_image(0, 0, "pages-1.img");
    web.data(0, 0, 0, PAGES);
    (cache, first, web)
}

#[test]
fn a_sender_waits_at_the_quota_and_goes_on_when_bytes_are_freed() {
    let (cache, mut first, mut web) = waiting(LONG);
    cache.assert_state("web", SnapshotState::Receiving);
    web.end_image(0, 0, PAGES.len());
    web.image(0, 1, INVENTORY, RECORDS);
    web.end(0, 2, PAGES.len() + RECORDS.len());
    // What fits beside it does not wait.
    first.whole(1, "small", "core-7.img", RECORDS);
    web.link.assert_quiet();
    cache.drop_snapshot("first");
    web.assert_acknowledged(0);
    cache.assert_held((44 + 4) << 10);
    assert!(Criu::in_dir_of("web", &cache).read("pages-1.img") == PAGES);
}

#[test]
fn a_dump_waits_at_the_quota_and_goes_on_when_bytes_are_freed() {
    let hosts = Hosts::with(&[], LONG);
    for id in ["first", "second"] {
        let mut dump = Criu::in_dir_of(id, &hosts.proxy);
        dump.write("pages-1.img", PAGES);
        dump.complete();
        if id == "first" {
            hosts.cache.assert_held(44 << 10);
        }
    }
    hosts.cache.assert_state("second", SnapshotState::Receiving);
    assert_eq!(hosts.cache.count_log("snapshot second is whole"), 0);
    hosts.cache.drop_snapshot("first");
    hosts.cache.assert_log(&["snapshot second is whole"]);
    hosts.proxy.assert_log(&["snapshot second sent"]);
}

#[test]
fn a_quota_exhausted_for_too_long_damages_the_snapshot_that_waits() {
    let (mut cache, mut first, mut web) = waiting(SHORT);
    let cause = "image pages-1.img: quota exhausted: 49152 of 65536 bytes (store.max-bytes) \
                 were held for 400ms";
    web.assert_aborted(0, cause);
    let peer = web.link.address();
    cache.assert_log(&["WARN", "snapshot web from", &peer, "damaged", cause]);
    assert!(cache.assert_state("web", SnapshotState::Damaged).contains(cause));
    // The same link is good for what fits, and so are others; what is whole stays.
    web.whole(1, "small", "core-7.img", RECORDS);
    first.whole(1, "other", "core-7.img", RECORDS);
    assert!(Criu::in_dir_of("first", &cache).read("pages-1.img") == PAGES);
    cache.assert_alive();
}

#[test]
fn a_snapshot_larger_than_the_quota_is_damaged_at_once() {
    let (cache, address) = Daemon::cache(LONG);
    let mut proxy = ProxyStandin::connect(address);
    let cause = "image pages-1.img: quota exhausted: the snapshot needs more than \
                 store.max-bytes, 65536 bytes";
    proxy.begin(0, "web");
    proxy.begin_image(0, 0, "pages-1.img");
    proxy.data(0, 0, 0, &vec![7; 70_000]);
    proxy.assert_aborted(0, cause);
    // And when it grows to that bit by bit.
    proxy.begin(1, "db");
    proxy.begin_image(1, 0, "core-7.img");
    proxy.data(1, 0, 0, PAGES);
    proxy.begin_image(1, 1, "pages-1.img");
    proxy.data(1, 1, 0, PAGES);
    proxy.assert_aborted(1, cause);
    let peer = proxy.link.address();
    cache.assert_log(&["WARN", "snapshot web from", &peer, "damaged", cause]);
    cache.assert_log(&["WARN", "snapshot db from", &peer, "damaged", cause]);
    cache.assert_held(0);
    proxy.whole(2, "other", "pages-1.img", PAGES);
}

#[test]
fn what_is_damaged_gives_its_bytes_back_to_who_waits() {
    let (cache, address) = Daemon::cache(LONG);
    let (mut lost, mut web) = (ProxyStandin::connect(address), ProxyStandin::connect(address));
    lost.begin(0, "lost");
    lost.begin_image(0, 0, "pages-1.img");
    lost.data(0, 0, 0, PAGES);
    cache.assert_held(40 << 10);
    web.begin(0, "web");
    web.image(0, 0, "pages-1.img", PAGES);
    web.link.assert_quiet();
    lost.link.send(&Message::abort(0, "criu was killed"));
    web.complete(0, 1, 1, PAGES.len());
}

#[test]
fn a_sender_that_leaves_while_it_waits_gives_its_bytes_back() {
    let (cache, address) = Daemon::cache(LONG);
    let (mut gone, mut web) = (ProxyStandin::connect(address), ProxyStandin::connect(address));
    gone.begin(0, "gone");
    gone.begin_image(0, 0, "pages-1.img");
    gone.data(0, 0, 0, &PAGES[..28 << 10]);
    web.begin(0, "web");
    web.begin_image(0, 0, "pages-1.img");
    web.data(0, 0, 0, &PAGES[..28 << 10]);
    cache.assert_held(56 << 10);
    // Each of the two wants what the other has.
    gone.data(0, 0, 28 << 10, &PAGES[28 << 10..]);
    web.data(0, 0, 28 << 10, &PAGES[28 << 10..]);
    web.end_image(0, 0, PAGES.len());
    web.link.assert_quiet();
    drop(gone);
    web.complete(0, 1, 1, PAGES.len());
    cache.assert_state("gone", SnapshotState::Damaged);
}

#[test]
fn a_snapshot_dropped_while_it_waits_is_ended() {
    let (cache, _first, mut web) = waiting(LONG);
    cache.assert_receiving("web", 0);
    cache.drop_snapshot("web");
    web.assert_aborted(0, "it was dropped by the operator");
    web.whole(1, "small", "core-7.img", RECORDS);
}
