//! Many who come and say nothing. Whoever has something to say gets in.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use criu_image_relay::control::INTERFACE;
use criu_image_relay::control::model::SnapshotState;
use criu_image_relay::criu::page_server::header::Dialect;
use criu_image_relay::daemon::CONTROL_SOCKET;
use criu_image_relay::wire::frame;
use criu_image_relay::wire::message::{Hello, Message, SnapshotAbort};

use crate::criu::RECORDS;
use crate::daemons::{Daemon, SOON, eventually, have_many_files, unused_address};
use crate::hosts::Hosts;
use crate::lazy::{Lazy, images, send};
use crate::link::Link;
use crate::page_client::{HELD, PageClient};
use crate::pages_at_proxy::{PAGE, TASK};
use crate::proxy_standin::ProxyStandin;

#[test]
fn silent_connections_hold_no_links() {
    let settings = [("link.max", "2"), ("link.hello-timeout", "\"1h\"")];
    let (_cache, address) = Daemon::cache(&settings);
    let connect = || TcpStream::connect(address).unwrap();
    let mut silent: Vec<_> = (0..100).map(|_| connect()).collect();
    for stream in &mut silent[..50] {
        stream.write_all(&frame::preface()).unwrap();
    }
    ProxyStandin::connect(address).whole(0, "web", "core-7.img", RECORDS);
}

#[test]
fn the_oldest_silent_connection_makes_way_for_a_new_one() {
    have_many_files();
    let (cache, address) = Daemon::cache_with_files(4096, &[("link.hello-timeout", "\"1h\"")]);
    let connect = || TcpStream::connect(address).unwrap();
    let silent: Vec<_> = (0..1024).map(|_| connect()).collect();
    // Each of them is served, in the order in which they came.
    let mut last = &silent[1023];
    last.set_read_timeout(Some(SOON)).unwrap();
    last.read_exact(&mut [0; frame::PREFACE_LEN]).unwrap();
    let mut proxy = ProxyStandin::connect(address);
    proxy.whole(0, "web", "core-7.img", RECORDS);
    assert!(eventually(|| is_over(&silent[0])), "the oldest still has its place");
    assert!(!is_over(&silent[1]));
    cache.status();
}

/// Whether the daemon has closed a connection. What it said before is passed over.
fn is_over(mut stream: &TcpStream) -> bool {
    stream.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
    loop {
        match stream.read(&mut [0; 64]) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(error) => return error.kind() != std::io::ErrorKind::WouldBlock,
        }
    }
}

#[test]
fn a_proxy_that_is_one_too_many_is_welcome_when_another_has_gone() {
    let (_cache, address) = Daemon::cache(&[("link.max", "1")]);
    let up = ProxyStandin::connect(address);
    let mut waits = Link::new(TcpStream::connect(address).unwrap());
    waits.say(&frame::preface());
    waits.send(&Message::Hello(Hello { name: "waits".to_owned(), features: Vec::new() }));
    waits.receive_preface();
    waits.assert_quiet();
    drop(up);
    let (welcome, _) = waits.receive().unwrap();
    assert!(matches!(welcome, Message::Welcome(_)), "{welcome:?}");
}

#[test]
fn idle_clients_keep_nobody_from_the_control_socket() {
    have_many_files();
    let (cache, address) = Daemon::cache_with_files(4096, &[]);
    let mut proxy = ProxyStandin::connect(address);
    proxy.begin(0, "web");
    cache.assert_state("web", SnapshotState::Receiving);
    let connect = || UnixStream::connect(cache.dir().join(CONTROL_SOCKET)).unwrap();

    // One of them is not idle, though it came first and says nothing: it watches.
    let mut watches = connect();
    watches.set_read_timeout(Some(SOON)).unwrap();
    let call =
        format!(r#"{{"method":"{INTERFACE}.Watch","parameters":{{"id":"web"}},"more":true}}"#);
    watches.write_all(&[call.as_bytes(), b"\0"].concat()).unwrap();
    assert!(next_reply(&mut watches).contains("receiving"));
    let mut idle: Vec<_> = (0..300).map(|_| connect()).collect();
    for half_a_call in &mut idle[200..] {
        half_a_call.write_all(b"{\"method\":").unwrap();
    }

    for _ in 0..3 {
        cache.status();
    }
    proxy.image(0, 0, "core-7.img", RECORDS);
    proxy.complete(0, 1, 1, RECORDS.len());
    while !next_reply(&mut watches).contains("whole") {}
    idle[0].set_read_timeout(Some(SOON)).unwrap();
    assert_eq!(idle[0].read(&mut [0]).unwrap(), 0, "the oldest makes way");
}

/// One reply to a call.
fn next_reply(stream: &mut UnixStream) -> String {
    let (mut reply, mut byte) = (Vec::new(), [0]);
    // No further: what follows belongs to the next reply.
    while stream.read(&mut byte).unwrap() == 1 && byte != [0] {
        reply.extend(byte);
    }
    let reply = String::from_utf8(reply).unwrap();
    assert!(!reply.is_empty(), "the conversation has ended");
    reply
}

#[test]
fn the_messages_that_a_peer_causes_without_end_are_summed_up() {
    let (cache, address) = Daemon::cache(&[]);
    let mut proxy = ProxyStandin::connect(address);
    for snapshot in 0..500 {
        proxy.begin(snapshot, "web");
        let reason = format!("given up ({snapshot})");
        proxy.link.send(&Message::SnapshotAbort(SnapshotAbort { snapshot, reason }));
    }
    proxy.whole(500, "db", "core-7.img", RECORDS);
    cache.assert_logged("given up (", 100);
    let log = cache.stop();
    let told: Vec<_> = log.lines().filter(|line| line.contains("given up (")).collect();
    assert_eq!(told.len(), 101);
    let sum =
        "400 more messages about 127.0.0.1 were left out within a minute, the first of them: ";
    assert!(told[100].contains(sum) && told[100].contains("given up (100)"), "{}", told[100]);
}

#[test]
fn of_many_refused_links_some_are_logged_and_then_how_many_more_there_were() {
    let (cache, address) = Daemon::cache(&[]);
    for _ in 0..300 {
        let mut stranger = TcpStream::connect(address).unwrap();
        stranger.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        assert!(eventually(|| is_over(&stranger)), "it is not refused");
    }
    let log = cache.stop();
    assert_eq!(log.lines().filter(|line| line.contains("is refused:")).count(), 101);
    assert!(log.contains("200 more messages about 127.0.0.1 were left out"), "{log}");
}

#[test]
fn silent_clients_of_a_page_server_make_way_and_those_at_work_do_not() {
    let address = unused_address();
    let listen = format!("{:?}", address.to_string());
    let (cache, link) = Daemon::cache(&[("pages.listen", &listen), ("sessions.max", "3")]);
    let mut proxy = ProxyStandin::connect(link);
    send(&mut proxy, 1, "web", &images());
    cache.assert_state("web", SnapshotState::Whole);
    let mut works = Lazy::at(address);
    assert_eq!(works.get(0x10000, 1), [16]);
    let silent: Vec<_> = (0..100).map(|_| TcpStream::connect(address).unwrap()).collect();
    for _ in 0..3 {
        Lazy::at(address).assert_given();
    }
    assert!(eventually(|| is_over(&silent[0])), "the oldest still has its place");
    works.assert_given();

    // All places are taken by such as work: now a further one waits.
    let mut also = [Lazy::at(address), Lazy::at(address)];
    for lazy in &mut also {
        lazy.assert_given();
    }
    let mut waits = Lazy::at(address);
    waits.ask(0x10000, 1);
    works.assert_given();
    drop(also);
    assert_eq!(waits.hear(0x10000), [16]);
}

#[test]
fn silent_clients_of_the_proxys_page_server_make_way_and_a_round_goes_on() {
    let address = unused_address();
    let listen = format!("{:?}", address.to_string());
    let hosts = Hosts::with(&[("pages.listen", &listen), ("sessions.max", "2")], &[]);
    let mut dump = PageClient::at(address, Dialect::Long);
    assert!(!dump.open(TASK).unwrap());
    let silent: Vec<_> = (0..50).map(|_| TcpStream::connect(address).unwrap()).collect();
    let mut another = PageClient::at(address, Dialect::Long);
    assert!(!another.open(TASK).unwrap());
    assert!(eventually(|| is_over(&silent[0])), "the oldest still has its place");
    for client in [&mut dump, &mut another] {
        client.pages(TASK, 0x1000, false, PAGE).unwrap();
        assert_eq!(client.force_close().unwrap(), HELD);
    }
    drop(hosts);
}
