//! What is recorded: each thing that a proxy says, one after the other.

use std::io::{Read, Write};

use criu_image_relay::client::{Client, Error, Writer};
use criu_image_relay::control::model::SnapshotState;
use criu_image_relay::criu::page_server::command::Command;
use criu_image_relay::criu::page_server::header::Dialect;
use criu_image_relay::criu::pages::{PAGE_SIZE, Space};

use crate::criu::{Criu, RECORDS};
use crate::daemons::Daemon;
use crate::page_client::{HELD, PageClient};

const TASK: Space = Space::Task(7);
const PAGE: usize = 4096;
const ADDRESS: u64 = 0x10000;

/// Pages with these bytes.
fn pages(bytes: &[u8]) -> Vec<u8> {
    bytes.iter().flat_map(|byte| std::iter::repeat_n(*byte, PAGE)).collect()
}

/// Has a proxy go through it.
pub(crate) fn drive(proxy: &Daemon) {
    stream(proxy);
    rounds(proxy);
    names(proxy);
    given_up(proxy);
}

/// Whether a cache holds what is left of it.
#[track_caller]
pub(crate) fn assert_holds(cache: &Daemon) {
    for id in ["stream", "rounds", "names"] {
        cache.assert_state(id, SnapshotState::Whole);
    }
    cache.assert_state("given-up", SnapshotState::Damaged);
    assert_eq!(read(cache, "stream", "pages-1.img"), pages(&[1, 2]));
    assert_eq!(read(cache, "rounds", "pages-1.img"), pages(&[4, 9, 6]));
    assert_eq!(read(cache, "names", "a.img"), b"one and two");
}

/// An image of a snapshot, as anybody reads it by name.
#[track_caller]
fn read(daemon: &Daemon, id: &str, name: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut image = Client::at(daemon.dir()).open_read(id, name).unwrap();
    image.read_to_end(&mut bytes).unwrap();
    bytes
}

/// A dump as a stream.
fn stream(proxy: &Daemon) {
    let mut dump = Criu::in_dir_of("stream", proxy);
    for (name, bytes) in [("core-7.img", RECORDS), ("pages-1.img", &pages(&[1, 2]))] {
        dump.write(name, bytes);
        proxy.assert_image("stream", name, bytes.len() as u64);
    }
    dump.complete();
    proxy.assert_state("stream", SnapshotState::Whole);
}

/// Two rounds of pages, and the images that make them a snapshot.
fn rounds(proxy: &Daemon) {
    let mut client = PageClient::on(proxy.open_pages("rounds"), Dialect::Short);
    assert!(!client.open(TASK).unwrap());
    client.pages(TASK, ADDRESS, false, &pages(&[4, 5, 6])).unwrap();
    assert_eq!(client.force_close().unwrap(), HELD);
    assert!(client.open(TASK).unwrap());
    client.hole(TASK, ADDRESS, 1).unwrap();
    client.pages(TASK, ADDRESS + PAGE_SIZE, false, &pages(&[9])).unwrap();
    client.hole(TASK, ADDRESS + 2 * PAGE_SIZE, 1).unwrap();
    assert_eq!(client.close().unwrap(), HELD);
    // Who restores at the source asks for them.
    let mut lazy = PageClient::on(proxy.open_pages("rounds"), Dialect::Short);
    lazy.command(Command::Get { id: 7, address: ADDRESS, pages: 4 }).unwrap();
    assert_eq!(lazy.given(7, ADDRESS).unwrap(), pages(&[4, 9, 6]));
    drop(lazy);
    let mut dump = Criu::in_dir_of("rounds", proxy);
    dump.write("core-7.img", RECORDS);
    proxy.assert_image("rounds", "core-7.img", RECORDS.len() as u64);
    dump.complete();
    proxy.assert_state("rounds", SnapshotState::Whole);
}

/// Images by name, in a list of ids, and read back at the source.
fn names(proxy: &Daemon) {
    let client = Client::at(proxy.dir());
    client.push_id("list", "names").unwrap();
    let write = |opened: Result<Writer, Error>, bytes: &[u8]| {
        let mut image = opened.unwrap();
        image.write_all(bytes).unwrap();
        image.finish().unwrap();
    };
    write(client.open_write("names", "a.img"), b"one ");
    write(client.open_append("names", "a.img"), b"and ");
    write(client.open_append("names", "a.img"), b"two");
    client.finish_dump("names", Some(3)).unwrap();
    assert_eq!(client.ids("list").unwrap(), ["names"]);
    assert_eq!(read(proxy, "names", "a.img"), b"one and two");
    client.open_read("names", "b.img").unwrap_err();
}

/// A dump that ends before its time.
fn given_up(proxy: &Daemon) {
    let mut dump = Criu::in_dir_of("given-up", proxy);
    dump.write("core-7.img", RECORDS);
    proxy.assert_image("given-up", "core-7.img", RECORDS.len() as u64);
    drop(dump);
    proxy.assert_state("given-up", SnapshotState::Damaged);
}
