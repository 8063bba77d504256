//! Proxies that are none, or that stop being one in the middle. Each loses its link and what was
//! under way on it; other links go on.

use std::io::Write;
use std::net::{Shutdown, SocketAddr, TcpStream};

use criu_image_relay::control::model::SnapshotState;
use criu_image_relay::wire::frame::{self, Header};
use criu_image_relay::wire::message::{Hello, ImageData, KeepAlive, Message};

use crate::criu::RECORDS;
use crate::daemons::{Daemon, Settings};
use crate::link::Link;
use crate::proxy_standin::ProxyStandin;

/// A snapshot half sent over a link of its own.
pub(crate) struct Bystander(ProxyStandin);

impl Bystander {
    pub(crate) fn begin(address: SocketAddr) -> Bystander {
        let mut proxy = ProxyStandin::connect(address);
        proxy.begin(0, "bystander");
        proxy.begin_image(0, 0, "pages-1.img");
        proxy.data(0, 0, 0, &[7; 1000]);
        Bystander(proxy)
    }

    /// The rest of it, and a fresh snapshot over a fresh link.
    #[track_caller]
    pub(crate) fn finish(mut self, address: SocketAddr) {
        self.0.data(0, 0, 1000, &[7; 1000]);
        self.0.end_image(0, 0, 2000);
        self.0.complete(0, 1, 1, 2000);
        ProxyStandin::connect(address).whole(0, "fresh", "core-7.img", RECORDS);
    }
}

/// Says something in the place of a greeting; gives the goodbye, if there is one.
#[track_caller]
fn assert_refused(settings: Settings<'_>, said: &[u8], cause: &str) -> Option<String> {
    let (mut cache, address) = Daemon::cache(settings);
    let bystander = Bystander::begin(address);
    let mut link = Link::new(TcpStream::connect(address).unwrap());
    link.say(said);
    link.receive_preface();
    let goodbye = link.assert_closed();
    cache.assert_log(&["WARN", &link.address(), "is refused", cause]);
    cache.assert_alive();
    bystander.finish(address);
    goodbye
}

/// Breaks a link on which half of an image has come.
#[track_caller]
pub(crate) fn assert_broken(
    settings: Settings<'_>,
    break_it: impl FnOnce(&mut ProxyStandin),
    cause: &str,
) -> Option<String> {
    let (mut cache, address) = Daemon::cache(settings);
    let bystander = Bystander::begin(address);
    let mut proxy = ProxyStandin::connect(address);
    proxy.begin(0, "web");
    proxy.begin_image(0, 0, "core-7.img");
    proxy.data(0, 0, 0, &[7; 100]);
    cache.assert_receiving("web", 100);
    break_it(&mut proxy);
    let goodbye = proxy.link.assert_closed();
    let peer = proxy.link.address();
    cache.assert_log(&["WARN", "snapshot web from standin", &peer, "damaged", cause]);
    assert!(cache.assert_state("web", SnapshotState::Damaged).contains(cause));
    cache.assert_alive();
    bystander.finish(address);
    goodbye
}

fn preface_and(message: &[u8]) -> Vec<u8> {
    [&frame::preface()[..], message].concat()
}

#[test]
fn another_protocol_is_refused_without_a_word() {
    let goodbye = assert_refused(&[], b"GET / HTTP/1.1\r\n\r\n", "does not speak the relay's");
    assert_eq!(goodbye, None);
}

#[test]
fn another_version_is_refused_with_a_goodbye() {
    let cause = "the peer speaks version 2 of the link, this side speaks version 1";
    let goodbye = assert_refused(&[], b"CRIURLAY\x02\0\0\0", cause);
    assert!(goodbye.unwrap().contains(cause));
}

#[test]
fn a_link_that_begins_without_a_hello_is_refused() {
    let keep_alive = preface_and(&Message::KeepAlive(KeepAlive {}).encode(0));
    let goodbye = assert_refused(&[], &keep_alive, "a KEEP_ALIVE instead of a HELLO");
    assert!(goodbye.unwrap().contains("instead of a HELLO"));
}

#[test]
fn a_hello_that_does_not_come_in_time_is_not_waited_for() {
    for said in [&b""[..], b"CRIUR", &frame::preface(), &preface_and(b"\x01\0\x40\0")] {
        let settings = [("link.hello-timeout", "\"200ms\"")];
        let goodbye = assert_refused(&settings, said, "no HELLO within 200ms");
        assert!(goodbye.unwrap().contains("no HELLO"));
    }
}

#[test]
fn a_second_hello_ends_its_link() {
    let hello = Message::Hello(Hello::default());
    let goodbye = assert_broken(&[], |proxy| proxy.link.send(&hello), "a HELLO out of order");
    assert!(goodbye.unwrap().contains("a HELLO out of order"));
}

#[test]
fn lengths_over_the_limits_end_their_link() {
    for (header, cause) in [
        (b"\x04\0\x01\x40\0\0\0\0", "a message of 16385 bytes; at most 16384 are accepted"),
        (b"\x0a\0\0\0\x01\0\0\x01", "a payload of 16777217 bytes; at most 16777216 are accepted"),
        (b"\xff\xff\xff\xff\xff\xff\xff\xff", "a message of 65535 bytes"),
    ] {
        let goodbye = assert_broken(&[], |proxy| proxy.link.say(header), cause);
        assert!(goodbye.unwrap().contains(cause));
    }
}

#[test]
fn messages_that_do_not_decode_end_their_link() {
    for (said, cause) in [
        (&b"\x63\0\0\0\0\0\0\0"[..], "a message of the unknown kind 99"),
        (b"\0\0\0\0\0\0\0\0", "a message of the unknown kind 0"),
        (b"\x05\0\x02\0\0\0\0\0\x12\x09", "a SNAPSHOT_BEGIN that does not decode"),
        (b"\x05\0\x03\0\0\0\0\0\x12\x01\xff", "a SNAPSHOT_BEGIN that does not decode"),
        (b"\x04\0\0\0\x01\0\0\0x", "a KEEP_ALIVE with a payload of 1 bytes"),
        (b"\x0a\0\0\0\0\0\0\0", "a IMAGE_DATA with a payload of 0 bytes"),
    ] {
        let goodbye = assert_broken(&[], |proxy| proxy.link.say(said), cause);
        assert!(goodbye.unwrap().contains(cause));
    }
}

/// The first bytes of a frame of data, as many as are asked for.
fn part_of_data(len: usize) -> Vec<u8> {
    let data = Message::ImageData(ImageData { snapshot: 0, image: 0, offset: 100 });
    [data.encode(1000), vec![7; 1000]].concat()[..len].to_vec()
}

#[test]
fn a_link_that_ends_in_the_middle_of_a_frame_is_torn() {
    for len in [1, Header { kind: 1, message_len: 0, payload_len: 0 }.encode().len(), 10, 500] {
        let tear = |proxy: &mut ProxyStandin| {
            proxy.link.say(&part_of_data(len));
            proxy.link.shut(Shutdown::Write);
        };
        assert_broken(&[], tear, "the connection ended in the middle of a frame");
    }
}

#[test]
fn a_link_that_ends_between_two_frames_damages_what_was_under_way() {
    let end = |proxy: &mut ProxyStandin| proxy.link.shut(Shutdown::Write);
    assert_broken(&[], end, "the peer closed the connection");
    let goodbye = |proxy: &mut ProxyStandin| proxy.link.send(&Message::goodbye("enough"));
    assert_broken(&[], goodbye, "the peer ended it: enough");
}

#[test]
fn a_peer_that_stalls_in_the_middle_of_a_frame_is_gone() {
    for len in [3, 10, 500] {
        let (cache, address) = Daemon::cache(&[("link.keep-alive", "\"100ms\"")]);
        let mut proxy = ProxyStandin::connect(address);
        proxy.begin(0, "web");
        proxy.begin_image(0, 0, "core-7.img");
        proxy.data(0, 0, 0, &[7; 100]);
        proxy.link.say(&part_of_data(len));
        proxy.link.assert_closed();
        let (peer, cause) = (proxy.link.address(), "nothing came from the peer for 300ms");
        cache.assert_log(&["WARN", "snapshot web from standin", &peer, "damaged", cause]);
        ProxyStandin::connect(address).whole(0, "fresh", "core-7.img", RECORDS);
    }
}

#[test]
fn a_stalled_link_holds_no_other_up() {
    let (_cache, address) = Daemon::cache(&[]);
    let mut stalled = ProxyStandin::connect(address);
    stalled.link.say(&Message::KeepAlive(KeepAlive {}).encode(0)[..3]);
    let mut silent = TcpStream::connect(address).unwrap();
    silent.write_all(b"CRI").unwrap();
    ProxyStandin::connect(address).whole(0, "web", "core-7.img", RECORDS);
}
