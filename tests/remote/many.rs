//! Thousands of connections at once: one thread serves them all, and whoever comes next.

use std::io::Write;

use criu_image_relay::control::model::SnapshotState;
use criu_image_relay::criu::remote::Reply;
use rustix::process::{Resource, getrlimit, setrlimit};

use crate::client::{
    Connection, append_id, finish, finish_restore, ids, read, read_of, write, write_of,
};
use crate::daemons::{Daemon, eventually};
use crate::hosts::Hosts;

const CONNECTIONS: u64 = 2000;
const ROOM: (&str, &str) = ("store.max-bytes", "\"1G\"");

/// Each connection is a descriptor here, and up to three at the proxy, which inherits the hard limit.
fn need_descriptors() {
    let mut limit = getrlimit(Resource::Nofile);
    let enough = limit.maximum.is_none_or(|maximum| maximum >= 4 * CONNECTIONS);
    assert!(enough, "a hard limit of open files of {} is needed: {limit:?}", 4 * CONNECTIONS);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).unwrap();
}

fn name(k: u64) -> String {
    format!("tmpfs-dev-{k}.tar.gz.img")
}

/// A whole migration beside what is going on, with one thread in each daemon.
#[track_caller]
fn assert_serves(hosts: &Hosts, id: &str) {
    append_id(&hosts.proxy, id, id);
    write(&hosts.proxy, id, "core-7.raw", b"core");
    assert_eq!(ids(Connection::to_proxy(&hosts.proxy), id), [id]);
    assert_eq!(finish(&hosts.proxy, id, 1), Reply::done());
    assert_eq!(read(Connection::to_cache(&hosts.cache), id, "core-7.raw").unwrap(), b"core");
    assert_eq!(finish_restore(&hosts.cache, id), Reply::done());
    assert_eq!((hosts.proxy.threads(), hosts.cache.threads()), (1, 1));
}

/// What the proxy has open.
fn assert_connections(proxy: &Daemon, at_least: usize) {
    let open = proxy.descriptors();
    assert!(open >= at_least, "{open} descriptors at the proxy, {at_least} connections");
}

#[test]
fn two_thousand_idle_connections_are_no_burden() {
    need_descriptors();
    let hosts = Hosts::with(&[], &[ROOM]);
    let mut connections = Vec::new();
    for k in 0..CONNECTIONS {
        let mut connection = Connection::to_proxy(&hosts.proxy);
        write_through_pipe(&mut connection, &name(k), &k.to_le_bytes());
        connections.push(connection);
    }
    assert_connections(&hosts.proxy, connections.len());
    assert_serves(&hosts, "beside");
    // None of them has been closed meanwhile, and each can write another.
    for (k, connection) in (CONNECTIONS..).zip(&mut connections) {
        write_through_pipe(connection, &name(k), &k.to_le_bytes());
    }
    assert_eq!(finish(&hosts.proxy, "web", 2 * CONNECTIONS), Reply::done());
    assert_all(&hosts.cache, 2 * CONNECTIONS);
}

#[test]
fn two_thousand_images_are_open_at_once() {
    need_descriptors();
    let hosts = Hosts::with(&[], &[ROOM]);
    let mut connections = Vec::new();
    for k in 0..CONNECTIONS {
        let mut connection = Connection::to_proxy(&hosts.proxy);
        connection.ask(&write_of("web", &name(k), true));
        connection.say(&k.to_le_bytes()[..4]);
        connections.push(connection);
    }
    hosts.cache.assert_receiving("web", 4 * CONNECTIONS);
    for connection in &mut connections {
        assert_eq!(connection.reply(), Reply::done());
    }
    assert_connections(&hosts.proxy, connections.len());
    assert_serves(&hosts, "beside");
    for (k, connection) in (0..CONNECTIONS).zip(&mut connections) {
        connection.assert_unanswered();
        connection.say(&k.to_le_bytes()[4..]);
        connection.shut_down();
    }
    for connection in &mut connections {
        assert_eq!(connection.reply(), Reply::done());
    }
    assert_eq!(finish(&hosts.proxy, "web", CONNECTIONS), Reply::done());
    assert_all(&hosts.cache, CONNECTIONS);
}

#[test]
fn two_thousand_readers_wait_at_once() {
    need_descriptors();
    let hosts = Hosts::with(&[], &[ROOM]);
    let mut readers: Vec<_> = (0..CONNECTIONS)
        .map(|k| {
            let mut reader = Connection::to_cache(&hosts.cache);
            reader.ask(&read_of("web", &name(k % 100), true));
            reader
        })
        .collect();
    assert!(eventually(|| hosts.cache.sessions() == CONNECTIONS));
    assert_serves(&hosts, "beside");
    for k in 0..100 {
        write(&hosts.proxy, "web", &name(k), &k.to_le_bytes());
    }
    assert_eq!(finish(&hosts.proxy, "web", 100), Reply::done());
    for (k, reader) in (0..).zip(&mut readers) {
        assert_eq!(reader.image(true).unwrap(), (k % 100_u64).to_le_bytes());
    }
}

fn write_through_pipe(connection: &mut Connection, name: &str, bytes: &[u8]) {
    connection.create("web", name);
    connection.pass_source().write_all(bytes).unwrap();
    connection.say(b".");
    assert_eq!(connection.reply(), Reply::done());
}

/// Each image holds its own number.
#[track_caller]
fn assert_all(cache: &Daemon, images: u64) {
    let whole = cache.show("web").unwrap();
    assert_eq!((whole.state, whole.images), (SnapshotState::Whole, images));
    for k in 0..images {
        assert_eq!(read(Connection::to_cache(cache), "web", &name(k)).unwrap(), k.to_le_bytes());
    }
}
