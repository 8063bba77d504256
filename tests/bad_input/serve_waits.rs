//! Restores that wait: for their snapshot to be whole; and images that wait to be read.

use std::io::Read;
use std::time::{Duration, Instant};

use criu_image_relay::control::model::SnapshotState;
use criu_image_relay::wire::message::Message;

use crate::criu::{Criu, RECORDS};
use crate::daemons::{Daemon, eventually};
use crate::proxy_standin::ProxyStandin;

#[test]
fn an_image_is_said_to_be_missing_only_once_the_snapshot_is_whole() {
    let (cache, address) = Daemon::cache(&[]);
    let mut proxy = ProxyStandin::connect(address);
    proxy.begin(0, "web");
    proxy.image(0, 0, "core-7.img", RECORDS);
    cache.assert_image("web", "core-7.img", 12);
    let mut missing = Criu::in_dir_of("web", &cache);
    let mut there = Criu::new(cache.try_hold("web", false, true).unwrap());
    missing.request("cgroup.img");
    there.request("core-7.img");
    missing.assert_waits();
    there.assert_waits();
    proxy.complete(0, 1, 1, RECORDS.len());
    assert!(!missing.reply().unwrap());
    assert_eq!(missing.read("core-7.img"), RECORDS);
    assert!(there.reply().unwrap());
}

#[test]
fn a_restore_waits_for_a_dump_that_has_not_begun() {
    let (cache, address) = Daemon::cache(&[]);
    let (mut shared, mut named) = (Criu::restore(&cache), Criu::in_dir_of("db", &cache));
    shared.request("core-7.img");
    named.request("core-7.img");
    named.assert_waits();
    shared.assert_waits();
    let mut proxy = ProxyStandin::connect(address);
    proxy.whole(0, "web", "core-7.img", RECORDS);
    assert!(shared.reply().unwrap());
    named.assert_waits();
    proxy.whole(1, "db", "core-7.img", RECORDS);
    assert!(named.reply().unwrap());
}

#[test]
fn a_restore_of_a_snapshot_that_becomes_damaged_is_ended_at_once() {
    let (cache, address) = Daemon::cache(&[]);
    let mut proxy = ProxyStandin::connect(address);
    proxy.begin(0, "web");
    proxy.begin(1, "other");
    proxy.image(0, 0, "core-7.img", RECORDS);
    cache.assert_image("web", "core-7.img", 12);
    let (mut named, mut other) = (Criu::in_dir_of("web", &cache), Criu::in_dir_of("other", &cache));
    named.request("core-7.img");
    named.assert_waits();
    other.request("core-7.img");
    proxy.link.send(&Message::abort(0, "criu was killed"));
    named.assert_closed();
    let why = "snapshot web is damaged: criu was killed";
    cache.assert_log(&["a restore by", "\"web\"", &Criu::peer(), why]);
    // One that comes later is told as soon.
    let mut late = Criu::in_dir_of("web", &cache);
    late.request("core-7.img");
    late.assert_closed();
    other.assert_waits();
    proxy.image(1, 0, "core-7.img", RECORDS);
    proxy.complete(1, 1, 1, RECORDS.len());
    assert!(other.reply().unwrap());
}

#[test]
fn what_a_restore_waited_for_in_vain_is_not_listed_when_it_has_gone() {
    let (cache, _) = Daemon::cache(&[]);
    let held = cache.try_hold("web", false, false).unwrap();
    let mut asking = Criu::in_dir_of("db", &cache);
    asking.request("core-7.img");
    asking.assert_waits();
    for id in ["web", "db"] {
        assert!(cache.lists(id, SnapshotState::Awaited), "{id}");
    }
    drop((held, asking));
    assert!(eventually(|| cache.list().is_empty()), "{:?}", cache.list());

    // A directory that is open is there for the next one.
    let mut opened = Criu::new(cache.opened("job"));
    opened.request("core-7.img");
    opened.assert_waits();
    drop(opened);
    let left = || cache.count_log("the peer left while it waited") == 2;
    assert!(eventually(left));
    assert!(cache.lists("job", SnapshotState::Awaited));
}

#[test]
fn a_restore_killed_while_it_waits_leaves_its_snapshot_to_the_next() {
    let (cache, address) = Daemon::cache(&[]);
    let mut proxy = ProxyStandin::connect(address);
    proxy.begin(0, "web");
    proxy.image(0, 0, "core-7.img", RECORDS);
    cache.assert_image("web", "core-7.img", 12);
    let mut killed = Criu::restore(&cache);
    killed.request("core-7.img");
    killed.assert_waits();
    drop(killed);
    cache.assert_log(&["a restore by", &Criu::peer(), "left while it waited"]);
    let mut next = Criu::restore(&cache);
    next.request("core-7.img");
    next.assert_waits();
    proxy.complete(0, 1, 1, RECORDS.len());
    assert!(next.reply().unwrap());
}

/// A byte out of turn must not hide that the peer has gone.
#[test]
fn a_restore_killed_after_it_spoke_out_of_turn_leaves_its_snapshot_to_the_next() {
    let (cache, address) = Daemon::cache(&[]);
    let mut proxy = ProxyStandin::connect(address);
    proxy.begin(0, "web");
    proxy.image(0, 0, "core-7.img", RECORDS);
    cache.assert_image("web", "core-7.img", 12);
    let mut killed = Criu::restore(&cache);
    killed.request("core-7.img");
    killed.request("mm-7.img");
    killed.assert_waits();
    drop(killed);
    cache.assert_log(&["a restore by", &Criu::peer(), "left while it waited"]);
}

#[test]
fn an_image_not_read_to_its_end_is_given_up_after_the_session() {
    let (cache, address) = Daemon::cache(&[("sessions.stall-timeout", "\"300ms\"")]);
    let mut proxy = ProxyStandin::connect(address);
    proxy.whole(0, "web", "pages-1.img", &vec![7; 3_000_000]);
    let mut restore = Criu::restore(&cache);
    let unread = restore.open("pages-1.img");
    drop(restore);
    cache.assert_log(&["WARN", "\"web\"", &Criu::peer(), "pages-1.img", "300ms"]);
    drop(unread);
    // It was not restored, so the next restore gets it.
    let mut next = Criu::restore(&cache);
    assert_eq!(next.read("pages-1.img").len(), 3_000_000);
}

/// Nobody can tell an image that is closed early from one that has ended.
#[test]
fn an_image_read_slowly_but_steadily_is_read_to_its_end() {
    let (cache, address) = Daemon::cache(&[("sessions.stall-timeout", "\"400ms\"")]);
    let mut proxy = ProxyStandin::connect(address);
    let size = 3_000_000;
    proxy.whole(0, "web", "pages-1.img", &vec![7; size]);
    let mut restore = Criu::restore(&cache);
    let mut open = restore.open("pages-1.img");
    drop(restore);
    let (mut read, mut part, begun) = (0, vec![0; 100_000], Instant::now());
    loop {
        let len = open.read(&mut part).unwrap();
        if len == 0 {
            break;
        }
        read += len;
        if begun.elapsed() < Duration::from_millis(1200) {
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    assert_eq!(read, size);
    cache.assert_state("web", SnapshotState::Taken);
}
