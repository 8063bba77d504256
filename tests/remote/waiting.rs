//! Reads at the cache that come before the dump: they wait for it, and are answered at its end.

use std::io::Write;

use criu_image_relay::control::model::SnapshotState;
use criu_image_relay::criu::remote::{Reply, Request};
use rustix::io::Errno;

use crate::client::{
    Connection, append_id, assert_refused, decode_ids, finish, read, read_of, write,
};
use crate::daemons::{Daemon, eventually};
use crate::hosts::Hosts;

const READERS: u32 = 200;

fn name(k: u32) -> String {
    format!("tmpfs-dev-{k}.tar.gz.img")
}

/// Some are larger than what a socket or a pipe holds.
fn content(k: u32) -> Vec<u8> {
    (0..k * k * 10).map(|i| ((i + k) % 251).to_le_bytes()[0]).collect()
}

/// A read that the cache has got.
fn reader(cache: &Daemon, name: &str, pipe: bool) -> Connection {
    let mut reader = Connection::to_cache(cache);
    reader.ask(&read_of("web", name, pipe));
    reader
}

/// So many reads wait: what comes now, comes after them.
#[track_caller]
fn assert_waiting(cache: &Daemon, readers: u64) {
    let wait = || cache.sessions() == readers;
    assert!(eventually(wait), "{} reads wait, not {readers}", cache.sessions());
}

#[test]
fn reads_that_come_before_the_dump_wait_for_its_end_and_are_served() {
    let hosts = Hosts::start();
    let mut readers: Vec<_> =
        (0..READERS).map(|k| reader(&hosts.cache, &name(k), k % 2 == 1)).collect();
    let mut list = Connection::to_cache(&hosts.cache);
    list.ask(&Request::ReadList { list: "web".to_owned(), pipe: false });
    assert_waiting(&hosts.cache, u64::from(READERS) + 1);

    append_id(&hosts.proxy, "web", "web");
    for k in 0..READERS {
        write(&hosts.proxy, "web", &name(k), &content(k));
    }
    // The cache holds all there is to be read, and cannot know it.
    assert_waiting(&hosts.cache, u64::from(READERS) + 1);
    for reader in readers.iter().chain([&list]) {
        reader.assert_unanswered();
    }
    assert_eq!(finish(&hosts.proxy, "web", READERS.into()), Reply::done());
    for (k, reader) in (0..).zip(&mut readers) {
        assert!(reader.image(k % 2 == 1).unwrap() == content(k), "{} has changed", name(k));
    }
    assert_eq!(decode_ids(&list.image(false).unwrap()), ["web"]);
}

#[test]
fn a_name_that_never_comes_is_answered_at_the_end_of_the_dump_and_not_before() {
    let hosts = Hosts::start();
    let mut readers = [false, true].map(|pipe| reader(&hosts.cache, "cgroup.img", pipe));
    assert_waiting(&hosts.cache, 2);
    write(&hosts.proxy, "web", "core-7.raw", b"core");
    assert_waiting(&hosts.cache, 2);
    for reader in &readers {
        reader.assert_unanswered();
    }
    assert_eq!(finish(&hosts.proxy, "web", 1), Reply::done());
    for reader in &mut readers {
        assert_refused(&reader.reply(), Errno::NOENT, "has no image cgroup.img");
        // The connection is good for the next.
        reader.ask(&read_of("web", "core-7.raw", true));
        assert_eq!(reader.image(true).unwrap(), b"core");
    }
}

/// Who waits for a snapshot that turns out damaged hears why, and so does who comes later.
#[track_caller]
fn assert_damaged(reason: &str, damage: impl FnOnce(&Hosts)) {
    let hosts = Hosts::start();
    let mut readers =
        [("core-7.raw", false), ("core-7.raw", true), ("pages-1.img", false), ("cgroup.img", true)]
            .map(|(name, pipe)| reader(&hosts.cache, name, pipe));
    assert_waiting(&hosts.cache, 4);
    write(&hosts.proxy, "web", "core-7.raw", b"core");
    assert_waiting(&hosts.cache, 4);
    for reader in &readers {
        reader.assert_unanswered();
    }
    damage(&hosts);
    for reader in &mut readers {
        assert_refused(&reader.reply(), Errno::IO, reason);
        assert_eq!(reader.rest(), b"");
    }
    let late = read(Connection::to_cache(&hosts.cache), "web", "core-7.raw").unwrap_err();
    assert_refused(&late, Errno::IO, reason);
    hosts.cache.assert_state("web", SnapshotState::Damaged);
}

#[test]
fn a_writer_that_dies_within_an_acknowledged_image_damages_what_is_waited_for() {
    assert_damaged("image pages-1.img: its writer went away in the middle of it", |hosts| {
        let mut writer = Connection::to_proxy(&hosts.proxy);
        writer.create("web", "pages-1.img");
        writer.say(b"half");
        hosts.cache.assert_receiving("web", 8);
    });
}

#[test]
fn a_writer_that_dies_before_it_has_said_the_end_of_its_pipe_damages_what_is_waited_for() {
    assert_damaged("image pages-1.img: its writer went away in the middle of it", |hosts| {
        let mut writer = Connection::to_proxy(&hosts.proxy);
        writer.create("web", "pages-1.img");
        writer.pass_source().write_all(b"half").unwrap();
        hosts.cache.assert_receiving("web", 8);
    });
}

#[test]
fn images_that_were_written_and_did_not_come_damage_what_is_waited_for() {
    assert_damaged("its writer opened 2 images, 1 have come", |hosts| {
        let refusal = finish(&hosts.proxy, "web", 2);
        assert_refused(&refusal, Errno::IO, "its writer opened 2 images, 1 have come");
    });
}

#[test]
fn a_proxy_that_dies_damages_what_is_waited_for() {
    let (cache, address) = Daemon::cache(&[]);
    let proxy = Daemon::proxy(address, &[]);
    let mut reader = reader(&cache, "core-7.raw", false);
    assert_waiting(&cache, 1);
    write(&proxy, "web", "core-7.raw", b"core");
    reader.assert_unanswered();
    drop(proxy);
    assert_refused(&reader.reply(), Errno::IO, "snapshot web is damaged");
}

#[test]
fn a_reader_that_leaves_while_it_waits_or_reads_ends_its_own_read_only() {
    let hosts = Hosts::start();
    let bytes = content(200);
    let left = reader(&hosts.cache, "pages-1.img", false);
    let mut stays = reader(&hosts.cache, "pages-1.img", true);
    assert_waiting(&hosts.cache, 2);
    drop(left);
    assert_waiting(&hosts.cache, 1);
    write(&hosts.proxy, "web", "pages-1.img", &bytes);
    assert_eq!(finish(&hosts.proxy, "web", 1), Reply::done());
    for pipe in [false, true] {
        let mut impatient = reader(&hosts.cache, "pages-1.img", pipe);
        assert_eq!(impatient.reply(), Reply::found(bytes.len() as u64));
    }
    assert!(stays.image(true).unwrap() == bytes);
    assert!(read(Connection::to_cache(&hosts.cache), "web", "pages-1.img").unwrap() == bytes);
}

#[test]
fn an_image_that_is_being_written_is_waited_for_at_the_proxy_and_one_that_is_not_is_not() {
    let hosts = Hosts::start();
    let mut writer = Connection::to_proxy(&hosts.proxy);
    writer.create("web", "pages-1.img");
    writer.say(b"half");
    hosts.cache.assert_receiving("web", 4);
    let mut reader = Connection::to_proxy(&hosts.proxy);
    reader.ask(&read_of("web", "pages-1.img", true));
    let none = read(Connection::to_proxy(&hosts.proxy), "web", "core-7.raw").unwrap_err();
    assert_refused(&none, Errno::NOENT, "has no image core-7.raw");
    reader.assert_unanswered();
    writer.say(b" and half");
    writer.shut_down();
    assert_eq!(writer.reply(), Reply::done());
    assert_eq!(reader.image(true).unwrap(), b"half and half");
}
