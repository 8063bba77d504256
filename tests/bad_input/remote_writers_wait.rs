//! Writers that stop, and writers whose cache or link fails: who listens is told why, the others find
//! their pipe or socket closed.

use std::fs::File;
use std::io::Write;

use criu_image_relay::control::model::SnapshotState;
use criu_image_relay::criu::remote::{Reply, encode_id};
use rustix::io::Errno;

use crate::criu::{RECORDS, assert_unread};
use crate::daemons::{Daemon, unused_address};
use crate::hosts::Hosts;
use crate::remote::{
    Remote, Stage, append_to, begin, end, unheard_write_of, whole, write, write_of,
};

/// An image through a pipe of a client that listens to nothing, half written.
fn unheard(proxy: &Daemon, id: &str, name: &str) -> (Remote, File) {
    let mut writer = Remote::at_proxy(proxy);
    writer.ask(&unheard_write_of(id, name));
    let mut pages = writer.create();
    pages.write_all(b"half").unwrap();
    (writer, pages)
}

#[test]
fn an_image_that_stalls_damages_its_snapshot() {
    let hosts = Hosts::with(&[("sessions.stall-timeout", "\"300ms\"")], &[]);
    let cause = "image pages-1.img: nothing was written for 300ms";
    let mut half = begin(&hosts.proxy, "half", "pages-1.img");
    half.say(b"half");
    // Not even whether it comes through a pipe.
    let mut nothing = begin(&hosts.proxy, "nothing", "pages-1.img");
    let (_open, pages) = unheard(&hosts.proxy, "pipe", "pages-1.img");
    for writer in [&mut half, &mut nothing] {
        writer.assert_refused(Errno::IO, &[cause]);
        writer.assert_closed();
    }
    assert_unread(&pages);
    for id in ["half", "nothing", "pipe"] {
        hosts.proxy.assert_log(&["WARN", &format!("snapshot {id} damaged"), cause]);
        assert!(hosts.cache.assert_state(id, SnapshotState::Damaged).contains(cause));
    }
    whole(&hosts.proxy, "fresh", "core-7.img", RECORDS);
}

#[test]
fn a_snapshot_that_nobody_writes_to_is_damaged_and_its_memory_given_back() {
    let stage = Stage::with(&[("remote.idle-timeout", "\"1s\"")], &[]);
    stage.hosts.cache.assert_held(4096);
    write(&stage.hosts.proxy, "web", "pages-1.img", &[7; 8192]);
    stage.hosts.cache.assert_held(3 * 4096);
    stage.assert_damaged("web", "nobody wrote to it for 1s, and its end did not come");
    stage.hosts.cache.assert_held(4096);
    let ended = end(&stage.hosts.proxy, "web");
    assert!(ended.reason.contains("nobody wrote to it"), "{ended:?}");
    stage.assert_undisturbed();
}

#[test]
fn a_snapshot_larger_than_the_quota_fails_its_writers() {
    let stage = Stage::with(&[], &[("store.max-bytes", "\"64K\"")]);
    let proxy = &stage.hosts.proxy;
    let cause = "image pages-1.img: quota exhausted: the snapshot needs more than";
    let mut listening = begin(proxy, "web", "core-7.img");
    let (_client, pages) = unheard(proxy, "web", "mm-7.img");
    let mut large = begin(proxy, "web", "pages-1.img");
    large.try_say(&vec![7; 100_000]);
    for writer in [&mut listening, &mut large] {
        writer.assert_refused(Errno::IO, &["the cache gave it up", cause]);
        writer.assert_closed();
    }
    assert_unread(&pages);
    stage.assert_damaged("web", cause);
    stage.hosts.cache.assert_held(4096);
    stage.assert_undisturbed();
}

#[test]
fn a_snapshot_dropped_at_the_cache_fails_its_writers() {
    let stage = Stage::set();
    let (proxy, cache) = (&stage.hosts.proxy, &stage.hosts.cache);
    let mut listening = begin(proxy, "web", "core-7.img");
    let (_client, mut pages) = unheard(proxy, "web", "pages-1.img");
    cache.assert_receiving("web", 4);
    cache.drop_snapshot("web");
    pages.write_all(b" and half").unwrap();
    listening.assert_refused(Errno::IO, &["it was dropped by the operator"]);
    listening.assert_closed();
    assert_unread(&pages);
    let reason = proxy.assert_state("web", SnapshotState::Damaged);
    assert!(reason.contains("the cache gave it up: it was dropped by the operator"), "{reason}");
    assert_eq!(cache.show("web"), None);
    stage.assert_undisturbed();
}

#[test]
fn a_snapshot_dropped_at_the_proxy_fails_its_writers_and_may_begin_anew() {
    let stage = Stage::set();
    let (proxy, cache) = (&stage.hosts.proxy, &stage.hosts.cache);
    let mut listening = begin(proxy, "web", "core-7.img");
    let (_client, pages) = unheard(proxy, "web", "pages-1.img");
    cache.assert_receiving("web", 4);
    proxy.drop_snapshot("web");
    listening.assert_refused(Errno::IO, &["snapshot web is damaged", "operator"]);
    listening.assert_closed();
    assert_unread(&pages);
    assert!(cache.assert_state("web", SnapshotState::Damaged).contains("operator"));
    whole(proxy, "web", "core-7.img", RECORDS);
    assert_eq!(Remote::at_cache(cache).read("web", "core-7.img").unwrap(), RECORDS);
    stage.assert_undisturbed();
}

#[test]
fn more_images_than_a_snapshot_may_have_damage_it() {
    let stage = Stage::with(&[], &[("store.max-images", "3")]);
    for name in ["core-7.img", "mm-7.img", "core-7.img"] {
        write(&stage.hosts.proxy, "web", name, RECORDS);
    }
    let mut writer = Remote::at_proxy(&stage.hosts.proxy);
    writer.ask(&write_of("web", "fs-7.img"));
    writer.assert_refused(Errno::IO, &["the cache gave it up: more than 3 images"]);
    writer.assert_closed();
    stage.assert_damaged("web", "more than 3 images");
    stage.assert_undisturbed();
}

#[test]
fn a_link_that_breaks_fails_the_writers_and_the_next_link_serves_new_ones() {
    let Hosts { mut proxy, cache, address } = Hosts::start();
    let mut listening = begin(&proxy, "web", "core-7.img");
    let (_client, pages) = unheard(&proxy, "web", "pages-1.img");
    cache.assert_receiving("web", 4);
    drop(cache);
    let cause = "snapshot web is damaged: the link to 127.0.0.1:";
    listening.assert_refused(Errno::IO, &[cause, "broke"]);
    listening.assert_closed();
    assert_unread(&pages);
    proxy.assert_log(&["WARN", "snapshot web damaged", "the link to 127.0.0.1:", "broke"]);
    proxy.assert_alive();
    let cache = Daemon::cache_at(address, &[], None).unwrap();
    assert_ne!(end(&proxy, "web"), Reply::done());
    whole(&proxy, "web", "core-7.img", RECORDS);
    assert_eq!(Remote::at_cache(&cache).read("web", "core-7.img").unwrap(), RECORDS);
}

#[test]
fn without_a_cache_clients_are_refused_after_a_while() {
    let mut proxy = Daemon::proxy(unused_address(), &[("link.give-up-after", "\"300ms\"")]);
    let cause = "no link to the cache 127.0.0.1:";
    let mut listening = Remote::at_proxy(&proxy);
    listening.ask(&write_of("web", "core-7.img"));
    let (_client, pages) = unheard(&proxy, "db", "pages-1.img");
    let mut listing = Remote::at_proxy(&proxy);
    listing.ask(&append_to("chain"));
    listing.say(&encode_id("listed"));
    listening.assert_refused(Errno::IO, &[cause, "within 300ms"]);
    listening.assert_closed();
    assert_unread(&pages);
    listing.assert_done();
    listing.assert_refused(Errno::IO, &[cause]);
    listing.assert_closed();
    let read = Remote::at_proxy(&proxy).read("web", "core-7.img").unwrap_err();
    assert!(read.reason.contains(cause), "{read:?}");
    for id in ["web", "db", "listed"] {
        assert!(proxy.assert_state(id, SnapshotState::Damaged).contains(cause));
    }
    proxy.assert_alive();
}
