//! What becomes of a snapshot by what its restore does, says or leaves unsaid; and who gets it.

use std::net::SocketAddr;

use criu_image_relay::control::model::SnapshotState;
use criu_image_relay::criu::stream::{HELD_BY_RESTORE, RESTORE_FAILED};
use criu_image_relay::wire::message::Message;

use crate::criu::{Criu, RECORDS};
use crate::daemons::Daemon;
use crate::proxy_standin::ProxyStandin;

const PAGES: &[u8] = &[7; 8192];

/// A cache that holds the whole snapshot `web`, with pages.
fn cache() -> (Daemon, SocketAddr) {
    let (cache, address) = Daemon::cache(&[]);
    ProxyStandin::connect(address).whole(0, "web", "pages-1.img", PAGES);
    (cache, address)
}

/// A restore that says what becomes of it.
fn held(cache: &Daemon, again: bool) -> Criu {
    let mut held = Criu::new(cache.try_hold("web", again, false).unwrap());
    assert!(!held.ask(HELD_BY_RESTORE));
    held
}

/// CRIU reads everything on a connection that only looks.
#[track_caller]
fn read_all(cache: &Daemon) {
    let mut criu = Criu::new(cache.look("web"));
    assert_eq!(criu.read("inventory.img"), RECORDS);
    assert!(criu.read("pages-1.img") == PAGES);
}

#[test]
fn a_restore_by_the_stream_alone_takes_its_snapshot_when_it_has_read_all_pages() {
    let (cache, _) = cache();
    let mut restore = Criu::restore(&cache);
    assert_eq!(restore.read("inventory.img"), RECORDS);
    drop(restore);
    cache
        .assert_log(&["WARN", "snapshot web is not taken: it has not read pages-1.img to the end"]);
    cache.assert_state("web", SnapshotState::Whole);

    let mut restore = Criu::restore(&cache);
    assert!(restore.read("pages-1.img") == PAGES, "it is whole, and given to the next one");
    drop(restore);
    cache.assert_log(&["snapshot web taken: 8192 bytes of 1 images read"]);
    cache.assert_state("web", SnapshotState::Taken);
}

#[test]
fn a_restore_that_says_that_it_failed_costs_nothing() {
    let (cache, _) = cache();
    for again in [false, true] {
        let mut held = held(&cache, again);
        read_all(&cache);
        assert!(!held.ask(RESTORE_FAILED));
        drop(held);
        cache.assert_log(&["WARN", "has failed: snapshot web is whole and may be restored"]);
        cache.assert_state("web", SnapshotState::Whole);
        assert_eq!(cache.count_log("taken"), 0, "nor was it taken meanwhile");
    }
    assert!(held(&cache, false).read("inventory.img") == RECORDS);
    cache.assert_state("web", SnapshotState::Taken);

    // That one has succeeded, whatever becomes of another.
    let mut failed = held(&cache, true);
    assert!(!failed.ask(RESTORE_FAILED));
    drop(failed);
    cache.assert_log(&["WARN", "has failed: snapshot web is taken, as before"]);
    cache.assert_state("web", SnapshotState::Taken);
    let refused = cache.try_hold("web", false, false).unwrap_err().to_string();
    assert!(refused.contains("a restore has taken snapshot web"), "{refused}");
}

#[test]
fn a_restore_that_succeeded_or_has_gone_without_a_word_takes_its_snapshot() {
    let (cache, _) = cache();
    let mut succeeded = held(&cache, false);
    read_all(&cache);
    cache.assert_state("web", SnapshotState::Whole);
    assert_eq!(succeeded.read("inventory.img"), RECORDS);
    drop(succeeded);
    cache.assert_log(&["snapshot web taken: its restore has succeeded"]);
    cache.assert_state("web", SnapshotState::Taken);

    drop(held(&cache, true));
    cache.assert_log(&["WARN", "it has gone without a word, and its process may run"]);
    cache.assert_log(&["snapshot web counts as taken"]);
    cache.assert_state("web", SnapshotState::Taken);
}

#[test]
fn a_second_restore_of_one_snapshot_is_refused_by_name_unless_it_is_a_copy() {
    let (cache, address) = Daemon::cache(&[]);
    let mut first = Criu::new(cache.try_hold("web", false, false).unwrap());
    first.request(HELD_BY_RESTORE);
    // While it is awaited, and when it is whole.
    for _ in 0..2 {
        let refused = cache.try_hold("web", false, false).unwrap_err().to_string();
        assert!(refused.contains("another restore has snapshot web"), "{refused}");
        // A directory can be opened, but CRIU is not served in it.
        let mut plain = Criu::new(cache.opened("web"));
        plain.request("inventory.img");
        plain.assert_closed();
        cache.assert_log(&["WARN", "a restore by", "another restore has snapshot web"]);
        let mut copy = Criu::new(cache.try_hold("web", false, true).unwrap());
        copy.request(HELD_BY_RESTORE);
        if !cache.lists("web", SnapshotState::Whole) {
            copy.assert_waits();
            ProxyStandin::connect(address).whole(0, "web", "pages-1.img", PAGES);
        }
        assert!(!copy.reply().unwrap());
        assert!(!copy.ask(RESTORE_FAILED));
    }
    assert!(!first.reply().unwrap());
    assert_eq!(first.read("inventory.img"), RECORDS);
    drop(first);
    cache.assert_state("web", SnapshotState::Taken);
    let refused = cache.try_hold("web", false, false).unwrap_err().to_string();
    assert!(refused.contains("a restore has taken snapshot web"), "{refused}");
}

#[test]
fn what_is_gone_cannot_be_restored_again_and_that_is_said_at_once() {
    let (cache, _) = cache();
    let gone = cache.try_hold("db", true, false).unwrap_err().to_string();
    assert!(gone.contains("no snapshot is called \"db\""), "{gone}");
    assert!(!cache.lists("db", SnapshotState::Awaited));
    assert!(cache.try_hold("web", true, false).is_ok());
}

#[test]
fn a_restore_for_which_nothing_comes_is_told_of_and_ended_in_time() {
    let (cache, address) = Daemon::cache(&[("store.restore-wait", "\"3s\"")]);
    let mut proxy = ProxyStandin::connect(address);
    proxy.begin(0, "web");
    proxy.link.send(&Message::abort(0, "criu was killed"));
    cache.assert_state("web", SnapshotState::Damaged);
    proxy.begin(1, "coming");
    let mut coming = Criu::in_dir_of("coming", &cache);
    let (mut shared, mut named) = (Criu::restore(&cache), Criu::in_dir_of("db", &cache));
    coming.request("core-7.img");
    named.request("core-7.img");
    // The one that is coming is kept for the one that has asked for it.
    shared.request("core-7.img");
    for what in ["snapshot db", "a snapshot that is not kept for another"] {
        cache.assert_log(&["INFO", "waits for", what, "3s (store.restore-wait)", "web is damaged"]);
    }
    for restore in [&mut shared, &mut named] {
        restore.assert_closed();
    }
    cache.assert_log(&["WARN", "no snapshot came for it within 3s (store.restore-wait)"]);
    // What comes is waited for.
    coming.assert_waits();
    proxy.image(1, 0, "core-7.img", RECORDS);
    proxy.complete(1, 1, 1, RECORDS.len());
    assert!(coming.reply().unwrap());
}
