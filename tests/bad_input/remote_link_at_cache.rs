//! Proxies that ask for parts of images in odd ways, or say odd things about lists.

use criu_image_relay::criu::remote::encode_id;
use criu_image_relay::wire::message::{
    ImageAck, ImageReady, Message, REGION_MAX, Region, RegionRequest, SnapshotList, SnapshotReady,
};
use rustix::io::Errno;

use crate::criu::RECORDS;
use crate::daemons::Daemon;
use crate::link_at_cache::{Bystander, assert_broken};
use crate::proxy_standin::ProxyStandin;

fn ask(proxy: &mut ProxyStandin, request: u32, of: (&str, &str), offset: u64, len: u32) {
    let (snapshot_id, name) = (of.0.to_owned(), of.1.to_owned());
    let request = RegionRequest { request, snapshot_id, name, offset, len };
    proxy.link.send(&Message::RegionRequest(request));
}

#[track_caller]
fn answer(proxy: &mut ProxyStandin) -> (Region, Vec<u8>) {
    match proxy.link.receive() {
        Some((Message::Region(region), bytes)) => (region, bytes),
        other => panic!("{other:?} instead of a region"),
    }
}

fn list(proxy: &mut ProxyStandin, snapshot: u32, list: &str) {
    proxy.link.send(&Message::SnapshotList(SnapshotList { snapshot, list: list.to_owned() }));
}

#[test]
fn parts_beyond_an_image_are_left_out_of_the_answer() {
    let (mut cache, address) = Daemon::cache(&[]);
    let bystander = Bystander::begin(address);
    let mut proxy = ProxyStandin::connect(address);
    let bytes: Vec<u8> = (0..300_000u32).map(|i| (i % 249).to_le_bytes()[0]).collect();
    proxy.whole(0, "web", "pages-1.img", &bytes);
    let end = bytes.len();
    for (offset, len, expected) in [
        (0, 0, 0..0),
        (0, 10, 0..10),
        (0, u32::MAX, 0..REGION_MAX),
        (299_990, 100, 299_990..end),
        (300_000, 1, 0..0),
        (300_001, u32::MAX, 0..0),
        (u64::MAX, u32::MAX, 0..0),
    ] {
        ask(&mut proxy, 7, ("web", "pages-1.img"), offset, len);
        let (region, came) = answer(&mut proxy);
        assert_eq!((region.request, region.error, region.size), (7, 0, 300_000));
        assert!(came == bytes[expected], "{} bytes from {offset}", came.len());
    }
    cache.assert_alive();
    bystander.finish(address);
}

#[test]
fn what_is_not_there_is_answered_and_ends_nothing() {
    let (mut cache, address) = Daemon::cache(&[]);
    let bystander = Bystander::begin(address);
    let mut proxy = ProxyStandin::connect(address);
    proxy.whole(0, "web", "core-7.img", RECORDS);
    let long = "n".repeat(4096);
    for of in [("web", "mm-7.img"), ("db", "core-7.img"), ("", ""), ("db", "parent")] {
        ask(&mut proxy, u32::MAX, of, 0, u32::MAX);
        let (region, came) = answer(&mut proxy);
        let missing = Errno::NOENT.raw_os_error().unsigned_abs();
        assert_eq!((region.request, region.error), (u32::MAX, missing), "{region:?}");
        assert!(!region.reason.is_empty() && came.is_empty());
    }
    // However long the names are, the reason fits.
    ask(&mut proxy, 1, (&long, &long), 0, 1);
    assert!(answer(&mut proxy).0.reason.len() <= 1024);
    cache.drop_snapshot("web");
    ask(&mut proxy, 2, ("web", "core-7.img"), 0, 1);
    assert_ne!(answer(&mut proxy).0.error, 0);
    cache.assert_alive();
    bystander.finish(address);
}

#[test]
fn an_image_that_is_damaged_while_a_part_of_it_is_waited_for_is_none() {
    let (_cache, address) = Daemon::cache(&[]);
    let (mut proxy, mut other) = (ProxyStandin::connect(address), ProxyStandin::connect(address));
    proxy.begin(0, "web");
    proxy.begin_image(0, 0, "pages-1.img");
    proxy.data(0, 0, 0, &[7; 100]);
    ask(&mut proxy, 1, ("web", "pages-1.img"), 0, 10);
    proxy.link.assert_quiet();
    ask(&mut other, 1, ("web", "pages-1.img"), 0, 10);
    other.link.assert_quiet();
    proxy.link.send(&Message::abort(0, "criu was killed"));
    for link in [&mut proxy, &mut other] {
        let (region, came) = answer(link);
        assert_eq!(region.error, Errno::IO.raw_os_error().unsigned_abs());
        assert!(region.reason.contains("criu was killed") && came.is_empty(), "{region:?}");
    }
}

#[test]
fn more_parts_waited_for_at_once_than_are_kept_end_their_link() {
    let (mut cache, address) = Daemon::cache(&[]);
    let bystander = Bystander::begin(address);
    let mut proxy = ProxyStandin::connect(address);
    proxy.begin(0, "web");
    proxy.begin_image(0, 0, "core-7.img");
    proxy.data(0, 0, 0, &[7; 100]);
    for request in 0..1025 {
        ask(&mut proxy, request, ("web", "core-7.img"), 0, 1);
    }
    let cause = "it waits for more than 1024 regions at once";
    loop {
        match proxy.link.receive().expect("a goodbye").0 {
            // What is waited for is damaged with the link, and some of it answered before that.
            Message::Goodbye(goodbye) => break assert!(goodbye.reason.contains(cause)),
            Message::Region(region) => assert_ne!(region.error, 0),
            other => panic!("{other:?} instead of a goodbye"),
        }
    }
    let peer = proxy.link.address();
    cache.assert_log(&["WARN", "snapshot web from standin", &peer, "damaged", cause]);
    cache.assert_alive();
    bystander.finish(address);
}

#[test]
fn what_only_a_cache_says_ends_its_link() {
    let ready = Message::SnapshotReady(SnapshotReady { snapshot: 0 });
    let image_ready = Message::ImageReady(ImageReady { snapshot: 0, image: 0 });
    let image_ack = Message::ImageAck(ImageAck { snapshot: 0, image: 0, size: 100 });
    for (said, kind) in
        [(ready, "SNAPSHOT_READY"), (image_ready, "IMAGE_READY"), (image_ack, "IMAGE_ACK")]
    {
        let cause = format!("a {kind} out of order");
        let goodbye = assert_broken(&[], |proxy| proxy.link.send(&said), &cause);
        assert!(goodbye.unwrap().contains(&cause));
    }
}

#[test]
fn a_region_that_the_cache_has_not_asked_for_ends_its_link() {
    for request in [0, 7, u32::MAX] {
        let region = Message::Region(Region { request, ..Region::default() });
        let say = |proxy: &mut ProxyStandin| proxy.link.send_payload(&region, b"bytes");
        let cause = format!("a REGION for the request number {request}, which was not made");
        let goodbye = assert_broken(&[], say, &cause);
        assert!(goodbye.unwrap().contains(&cause));
    }
}

#[test]
fn a_list_for_a_snapshot_that_is_not_under_way_ends_its_link() {
    for snapshot in [1, u32::MAX] {
        let cause = format!("a SNAPSHOT_LIST for snapshot number {snapshot}, which is not under");
        let goodbye = assert_broken(&[], |proxy| list(proxy, snapshot, "chain"), &cause);
        assert!(goodbye.unwrap().contains(&cause));
    }
}

#[test]
fn bad_names_of_lists_damage_the_snapshot_that_was_to_stand_there() {
    let (mut cache, address) = Daemon::cache(&[]);
    let bystander = Bystander::begin(address);
    let mut proxy = ProxyStandin::connect(address);
    let long = "n".repeat(4097);
    for (number, name) in ["a\n", "\0", &long].into_iter().enumerate() {
        let number = u32::try_from(number).unwrap();
        proxy.begin(number, "web");
        list(&mut proxy, number, name);
        proxy.assert_aborted(number, "a bad name of a list");
        // What is under way of it is not held against the link.
        list(&mut proxy, number, "chain");
        proxy.link.send(&Message::abort(number, "understood"));
    }
    ask(&mut proxy, 0, ("chain", "parent"), 0, 100);
    assert_ne!(answer(&mut proxy).0.error, 0);
    cache.assert_alive();
    bystander.finish(address);
}

#[test]
fn lists_hold_no_more_than_the_store_may() {
    let (_cache, address) = Daemon::cache(&[("store.max-snapshots", "3")]);
    let mut proxy = ProxyStandin::connect(address);
    proxy.begin(0, "web");
    proxy.begin(1, "other");
    for name in ["", "a", "b", "c"] {
        list(&mut proxy, 0, name);
    }
    proxy.assert_aborted(0, "the lists of ids hold 3 already, the store's limit");
    proxy.image(1, 0, "core-7.img", RECORDS);
    proxy.complete(1, 1, 1, RECORDS.len());
    for name in ["", "a", "b"] {
        ask(&mut proxy, 0, (name, "parent"), 0, 100);
        assert_eq!(answer(&mut proxy).1, encode_id("web"));
    }
}
