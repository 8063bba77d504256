//! What the log is told once, however often it happens, and what it is told at the end.

use std::io::Write;

use criu_image_relay::control::model::SnapshotState;
use criu_image_relay::wire::message::Message;

use crate::cache_standin::{CacheStandin, receive_until};
use crate::criu::{Criu, RECORDS, assert_unread};
use crate::daemons::{Daemon, unused_address};
use crate::proxy_standin::ProxyStandin;
use crate::remote;

const PIECE: &[u8] = &[7; 8 << 10];

#[test]
fn a_sender_that_waits_for_each_piece_is_told_of_once() {
    let settings = [("store.max-bytes", "\"64K\""), ("store.quota-wait", "\"15s\"")];
    let (cache, address) = Daemon::cache(&settings);
    let mut others = ProxyStandin::connect(address);
    for number in 0..15 {
        others.whole(number, &format!("other-{number}"), "core-7.img", RECORDS);
    }
    // One page is left, for the image itself.
    cache.assert_held(60 << 10);
    let mut web = ProxyStandin::connect(address);
    web.begin(0, "web");
    web.begin_image(0, 0, "pages-1.img");
    for piece in 0..4 {
        web.data(0, 0, piece * PIECE.len() as u64, PIECE);
        web.link.assert_quiet();
        let come = cache.show("web").unwrap().bytes;
        assert_eq!(come, piece * PIECE.len() as u64, "the next piece waits");
        for other in [2 * piece, 2 * piece + 1] {
            cache.drop_snapshot(&format!("other-{other}"));
        }
        cache.assert_receiving("web", (piece + 1) * PIECE.len() as u64);
    }
    cache.assert_log(&["WARN", "snapshot web waits for room", &web.link.address()]);
    cache.assert_logged("waits for room", 1);
}

#[test]
fn a_link_that_is_lost_again_and_again_is_told_of_once() {
    let standin = CacheStandin::listen();
    let proxy = Daemon::proxy(standin.address(), &[]);
    for id in ["one", "two", "three"] {
        let mut criu = Criu::in_dir_of(id, &proxy);
        let open = criu.create("core-7.img");
        (&open).write_all(&RECORDS[..10]).unwrap();
        let mut link = standin.welcome();
        receive_until(&mut link, |message| matches!(message, Message::ImageData(_)));
        drop(link);
        proxy.assert_log(&["WARN", &format!("snapshot {id} damaged"), "broke"]);
        assert_unread(&open);
    }
    proxy.assert_logged("lost with 1 snapshots under way", 1);
    proxy.assert_logged("is up again", 1);
    proxy.assert_logged("(standin) is up", 2); // The first time, and again.
}

#[test]
fn a_cache_that_is_not_there_is_told_of_once_and_when_it_is_back() {
    let address = unused_address();
    let proxy = Daemon::proxy(address, &[("link.give-up-after", "\"50ms\"")]);
    let missing = format!("no link to {address}, given up after 50ms");
    for id in ["one", "two"] {
        let mut criu = Criu::in_dir_of(id, &proxy);
        criu.write("core-7.img", RECORDS);
        proxy.assert_log(&["WARN", &format!("snapshot {id} damaged"), "refused"]);
        proxy.assert_log(&["WARN", &missing, "refused"]);
    }
    proxy.assert_logged(&missing, 1);
    let _cache = Daemon::cache_at(address, &[], None).unwrap();
    let mut criu = Criu::in_dir_of("three", &proxy);
    criu.write("core-7.img", RECORDS);
    criu.complete();
    proxy.assert_log(&["snapshot three sent"]);
    proxy.assert_log(&["link to", &address.to_string(), "is up again"]);
}

#[test]
fn who_drops_a_snapshot_is_named() {
    let (cache, address) = Daemon::cache(&[]);
    ProxyStandin::connect(address).whole(0, "web", "core-7.img", RECORDS);
    cache.drop_snapshot("web");
    cache.assert_log(&["INFO", "snapshot web dropped by the operator", &Criu::peer()]);
}

#[test]
fn what_is_lost_with_a_daemon_is_told_at_its_end() {
    let (cache, address) = Daemon::cache(&[]);
    let proxy = Daemon::proxy(address, &[]);
    ProxyStandin::connect(address).whole(0, "whole", "core-7.img", RECORDS);
    remote::write(&proxy, "web", "core-7.img", RECORDS);
    proxy.assert_state("web", SnapshotState::Receiving);
    let said = proxy.stop();
    for part in ["criu-image-proxy stops: 1 sending", "snapshot web is given up: the proxy was"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    let said = cache.stop();
    let lost = "snapshot whole is lost: the cache was stopped before a restore took it";
    for part in ["criu-image-cache stops: ", lost, "criu-image-cache has stopped: "] {
        assert!(said.contains(part), "{part}: {said}");
    }
}

#[test]
fn sessions_that_are_cut_off_at_the_end_are_told_of() {
    let (_cache, address) = Daemon::cache(&[]);
    let proxy = Daemon::proxy(address, &[]);
    let mut criu = Criu::in_dir_of("web", &proxy);
    let open = criu.create("core-7.img");
    proxy.assert_state("web", SnapshotState::Receiving);
    proxy.terminate();
    proxy.assert_log(&["INFO", "criu-image-proxy stops: 1 sending"]);
    let said = proxy.stop();
    for part in ["1 sessions are cut off: the daemon was told to stop", "snapshot web is given up"]
    {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert_unread(&open);
}
