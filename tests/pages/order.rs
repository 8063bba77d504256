//! Connections, rounds and snapshots in the orders that CRIU and its users may come upon.

use std::collections::BTreeMap;
use std::ops::Range;

use criu_image_relay::control::model::SnapshotState;
use criu_image_relay::criu::page_server::command::Command;
use criu_image_relay::criu::page_server::header::Dialect;
use criu_image_relay::criu::pages::{PAGE_SIZE, Space};

use crate::bench::{Bench, ROOMY};
use crate::criu::{Criu, RECORDS};
use crate::daemons::{Daemon, Settings, eventually};
use crate::forwarder::Forwarder;
use crate::model::{Contained, filled};
use crate::page_client::{HELD, PageClient};

const TASK: Space = Space::Task(1);

#[test]
fn a_round_that_the_cache_refuses_fails_at_once() {
    let bench = Bench::start();
    let socket = bench.proxy.open_pages_of("web", Some("nobody"));
    let mut client = PageClient::on(socket, Dialect::Long);
    client.command(Command::Open { space: TASK, answer: true }).unwrap();
    let cause = "the cache gave it up: the parent nobody cannot be used: no such snapshot is held";
    bench.proxy.assert_log(&["a round of snapshot web failed", cause]);
    assert_eq!(bench.proxy.assert_state("web", SnapshotState::Damaged), cause);
}

#[test]
fn a_client_that_waits_for_an_answer_hears_no_status_in_its_place() {
    let bench = Bench::start();
    let socket = bench.proxy.open_pages_of("web", Some("nobody"));
    // CRIU takes whatever is not 0 for yes.
    PageClient::on(socket, Dialect::Long).open(TASK).unwrap_err();
}

#[test]
fn a_connection_that_brings_nothing_leaves_its_snapshot_to_another() {
    let bench = Bench::start();
    let mut dump = Criu::in_dir_of("web", &bench.proxy);
    drop(bench.proxy.open_pages("web"));
    // The directory is still open.
    assert!(eventually(|| bench.proxy.sessions() == 1));
    dump.write("core-7.img", RECORDS);
    dump.complete();
    bench.cache.assert_state("web", SnapshotState::Whole);

    drop(bench.proxy.open_pages("db"));
    assert!(eventually(|| bench.proxy.show("db").is_none()));
    bench.join("db");
    bench.cache.assert_state("db", SnapshotState::Whole);
}

/// Daemons that are linked through a network that can fail.
fn bench_over(settings: Settings<'_>) -> (Bench, Forwarder) {
    let (cache, address) = Daemon::cache(ROOMY);
    let network = Forwarder::to(address);
    (Bench::of(Daemon::proxy(network.address, settings), cache), network)
}

/// Memory of one task: pages from 16 on with these numbers.
fn memory(numbers: Range<u64>) -> Contained {
    let pages = (16..).zip(numbers.map(|number| (number, false))).collect();
    Contained::from([(TASK, pages)])
}

/// Sends that memory, and says no end.
fn send(client: &mut PageClient, memory: &Contained) {
    for (space, pages) in memory {
        client.open(*space).unwrap();
        let bytes: Vec<_> = pages.values().map(|(number, _)| filled(*number)).collect();
        client.pages(*space, 16 * PAGE_SIZE, false, &bytes.concat()).unwrap();
    }
}

/// A round of snapshot `web` that the cache holds, and who may go on with the next.
fn held_round(bench: &Bench) -> PageClient {
    let mut client = PageClient::on(bench.proxy.open_pages("web"), Dialect::Long);
    send(&mut client, &memory(1..4));
    assert_eq!(client.force_close().unwrap(), HELD);
    client
}

#[test]
fn a_round_is_not_held_before_the_cache_says_so() {
    let (bench, network) = bench_over(&[]);
    let mut client = PageClient::on(bench.proxy.open_pages("web"), Dialect::Short);
    for end in [Command::ForceClose, Command::Close] {
        send(&mut client, &memory(1..4));
        network.hold_answers();
        client.command(end).unwrap();
        bench.cache.assert_log(&["a round of snapshot web is held: 12288 bytes"]);
        client.assert_waits();
        network.release_answers();
        assert_eq!(client.status().unwrap(), HELD);
    }
}

#[test]
fn a_cache_that_does_not_say_so_in_time_has_not_held_a_round() {
    let (bench, network) = bench_over(&[("link.ack-timeout", "\"300ms\"")]);
    let mut client = PageClient::on(bench.proxy.open_pages("web"), Dialect::Short);
    send(&mut client, &memory(1..4));
    network.hold_answers();
    assert_ne!(client.force_close().unwrap(), HELD);
    client.assert_failed();
    bench.proxy.assert_log(&["a round of snapshot web failed", "no acknowledgement within 300ms"]);
    network.release_answers();
}

/// The cache holds a round of which CRIU hears that it failed: the next one is based on it, which is what
/// the kernel's notes are about.
#[test]
fn a_round_of_which_the_acknowledgement_is_lost_is_a_parent() {
    let (bench, network) = bench_over(&[]);
    let mut client = PageClient::on(bench.proxy.open_pages("web"), Dialect::Long);
    send(&mut client, &memory(1..4));
    network.hold_answers();
    client.command(Command::Close).unwrap();
    bench.cache.assert_log(&["a round of snapshot web is held"]);
    network.cut();
    assert_ne!(client.status().unwrap(), HELD);
    bench.proxy.assert_log(&["a round of snapshot web failed"]);

    network.release_answers();
    let mut client = PageClient::on(bench.proxy.open_pages_of("web", Some("web")), Dialect::Long);
    assert!(client.open(TASK).unwrap());
    client.hole(TASK, 16 * PAGE_SIZE, 2).unwrap();
    client.pages(TASK, 18 * PAGE_SIZE, false, &filled(9)).unwrap();
    assert_eq!(client.close().unwrap(), HELD);
    bench.join("web");
    let pages = BTreeMap::from([(16, (1, false)), (17, (2, false)), (18, (9, false))]);
    bench.assert_holds("web", &Contained::from([(TASK, pages)]));
}

#[test]
fn rounds_follow_each_other_on_one_connection_and_on_several() {
    let bench = Bench::start();
    let address = bench.proxy.listen_for_pages("web");
    let mut first = PageClient::at(address, Dialect::Short);
    let mut second = PageClient::at(address, Dialect::Long);
    for round in 0..6 {
        // Each is based on the one before it, wherever that came.
        let client = if round % 3 == 0 { &mut second } else { &mut first };
        assert_eq!(client.open(TASK).unwrap(), round > 0);
        client.pages(TASK, 16 * PAGE_SIZE, false, &filled(round)).unwrap();
        if round > 0 {
            client.hole(TASK, 17 * PAGE_SIZE, round).unwrap();
        }
        let added = (17 + round) * PAGE_SIZE;
        client.pages(TASK, added, false, &filled(100 + round)).unwrap();
        assert_eq!(client.force_close().unwrap(), HELD);
    }
    bench.join("web");
    let pages = [5, 100, 101, 102, 103, 104, 105].map(|number| (number, false));
    bench.assert_holds("web", &Contained::from([(TASK, (16..).zip(pages).collect())]));
}

#[test]
fn nothing_comes_on_a_connection_after_close() {
    let bench = Bench::start();
    let mut client = PageClient::on(bench.proxy.open_pages("web"), Dialect::Short);
    send(&mut client, &memory(1..4));
    client.command(Command::Close).unwrap();
    client.command(Command::Open { space: TASK, answer: true }).unwrap();
    assert_eq!(client.status().unwrap(), HELD);
    client.assert_failed();
    assert_eq!(bench.cache.show("web").unwrap().state, SnapshotState::Paged);
}

/// As a dump does that has a parent of another name.
#[test]
fn a_chain_of_ids_keeps_only_its_last() {
    let bench = Bench::start();
    let mut parent: Option<String> = None;
    for round in 1..5 {
        let id = format!("web-{round}");
        let socket = bench.proxy.open_pages_of(&id, parent.as_deref());
        let mut client = PageClient::on(socket, Dialect::Long);
        assert_eq!(client.open(TASK).unwrap(), parent.is_some());
        client.pages(TASK, 16 * PAGE_SIZE, false, &filled(round)).unwrap();
        if let Some(parent) = &parent {
            client.hole(TASK, 17 * PAGE_SIZE, 2).unwrap();
            // As long as the child may fail.
            assert_eq!(bench.cache.assert_state(parent, SnapshotState::Paged), "");
        } else {
            let bytes = [filled(10), filled(11)].concat();
            client.pages(TASK, 17 * PAGE_SIZE, false, &bytes).unwrap();
        }
        assert_eq!(client.close().unwrap(), HELD);
        if let Some(parent) = parent.replace(id.clone()) {
            assert!(bench.cache.show(&parent).is_none());
            let superseded = format!("the pages of {parent} are superseded by those of {id}");
            bench.cache.assert_log(&[&superseded]);
        }
        bench.cache.assert_held(3 * PAGE_SIZE);
    }
    bench.join("web-4");
    let pages = [4, 10, 11].map(|number| (number, false));
    bench.assert_holds("web-4", &Contained::from([(TASK, (16..).zip(pages).collect())]));
}

#[test]
fn a_parent_that_has_images_is_kept_and_so_is_that_of_a_round_that_fails() {
    let bench = Bench::start();
    let mut client = PageClient::on(bench.proxy.open_pages("whole"), Dialect::Long);
    send(&mut client, &memory(1..4));
    assert_eq!(client.close().unwrap(), HELD);
    bench.join("whole");
    bench.cache.assert_state("whole", SnapshotState::Whole);

    let socket = bench.proxy.open_pages_of("child", Some("whole"));
    let mut client = PageClient::on(socket, Dialect::Long);
    assert!(client.open(TASK).unwrap());
    client.hole(TASK, 16 * PAGE_SIZE, 2).unwrap();
    assert_eq!(client.close().unwrap(), HELD);

    let socket = bench.proxy.open_pages_of("grandchild", Some("child"));
    let mut client = PageClient::on(socket, Dialect::Long);
    assert!(client.open(TASK).unwrap());
    drop(client);
    bench.cache.assert_state("grandchild", SnapshotState::Damaged);
    bench.cache.assert_state("child", SnapshotState::Paged);

    // Without the parent, the child has all of its pages.
    bench.assert_holds("whole", &memory(1..4));
    bench.cache.drop_snapshot("whole");
    bench.join("child");
    bench.assert_holds("child", &memory(1..3));
}

#[test]
fn rounds_of_different_snapshots_come_at_once() {
    let bench = Bench::start();
    let ids = ["web", "db", "queue"];
    let mut clients = ids.map(|id| PageClient::on(bench.proxy.open_pages(id), Dialect::Long));
    for round in 0..3 {
        for client in &mut clients {
            assert_eq!(client.open(TASK).unwrap(), round > 0);
            client.announce(TASK, 16 * PAGE_SIZE, false, 2).unwrap();
        }
        // Piece by piece, each within the pages of the others.
        for piece in 0..4 {
            for (number, client) in (0..).zip(&mut clients) {
                let bytes = [filled(number), filled(10 * number + round)].concat();
                client.say(&bytes[piece * 2048..][..2048]).unwrap();
            }
        }
        for client in &mut clients {
            assert_eq!(client.force_close().unwrap(), HELD);
        }
    }
    for (number, id) in (0..).zip(ids) {
        bench.join(id);
        let pages = BTreeMap::from([(16, (number, false)), (17, (10 * number + 2, false))]);
        bench.assert_holds(id, &Contained::from([(TASK, pages)]));
    }
}

#[test]
fn a_second_round_of_a_snapshot_at_once_is_refused() {
    let bench = Bench::start();
    let address = bench.proxy.listen_for_pages("web");
    let mut first = PageClient::at(address, Dialect::Short);
    send(&mut first, &memory(1..4));

    // By the proxy, where it is asked to open a socket.
    let refused = bench.proxy.try_open_pages("web", None).unwrap_err().to_string();
    assert!(refused.contains("snapshot web is awaited or being sent already"), "{refused}");
    // And by the cache, where both come on one socket.
    let mut second = PageClient::at(address, Dialect::Short);
    second.open(TASK).unwrap_err();
    let cause = "a round of pages of snapshot web is being received already";
    bench.proxy.assert_log(&["a round of snapshot web failed", cause]);

    // The first one does not notice.
    assert_eq!(first.force_close().unwrap(), HELD);
    assert!(first.open(TASK).unwrap());
    first.hole(TASK, 16 * PAGE_SIZE, 3).unwrap();
    assert_eq!(first.close().unwrap(), HELD);
    assert_eq!(bench.proxy.show("web").unwrap().state, SnapshotState::Paged);
    bench.join("web");
    bench.assert_holds("web", &memory(1..4));
}

/// As `criu dump --stream --page-server` in a directory that was opened for both.
#[test]
fn a_dump_that_sends_images_and_pages_at_once_is_whole_at_both_ends() {
    let bench = Bench::start();
    let mut dump = Criu::in_dir_of("web", &bench.proxy);
    let mut client = PageClient::on(bench.proxy.open_pages("web"), Dialect::Short);
    dump.write("core-7.img", RECORDS);
    bench.cache.assert_image("web", "core-7.img", RECORDS.len() as u64);
    send(&mut client, &memory(1..4));
    assert_eq!(client.close().unwrap(), HELD);
    dump.complete();
    bench.proxy.assert_state("web", SnapshotState::Whole);
    bench.assert_holds("web", &memory(1..4));
}

#[test]
fn images_that_end_before_a_round_has_are_no_snapshot() {
    let bench = Bench::start();
    let mut dump = Criu::in_dir_of("web", &bench.proxy);
    let mut client = PageClient::on(bench.proxy.open_pages("web"), Dialect::Short);
    dump.write("core-7.img", RECORDS);
    bench.cache.assert_image("web", "core-7.img", RECORDS.len() as u64);
    send(&mut client, &memory(1..4));
    dump.complete();
    let cause = "its end came while a round of its pages was still coming";
    assert!(bench.cache.assert_state("web", SnapshotState::Damaged).contains(cause));
    assert_ne!(client.close().ok(), Some(HELD));
    bench.cache.assert_held(0);
}

#[test]
fn pages_of_a_snapshot_that_is_given_up_at_the_proxy_are_not_held() {
    let bench = Bench::start();
    let _client = held_round(&bench);
    bench.proxy.drop_snapshot("web");
    bench.cache.assert_held(0);
    assert!(eventually(|| bench.cache.show("web").is_none()));

    // Also while images are coming to join them.
    let _client = held_round(&bench);
    let mut dump = Criu::in_dir_of("web", &bench.proxy);
    dump.write("core-1.img", RECORDS);
    bench.cache.assert_state("web", SnapshotState::Receiving);
    bench.proxy.drop_snapshot("web");
    bench.cache.assert_held(0);
    assert!(eventually(|| bench.cache.show("web").is_none()));

    // What is whole is nobody's to give up at the proxy.
    let _client = held_round(&bench);
    bench.join("web");
    bench.proxy.assert_state("web", SnapshotState::Whole);
    bench.proxy.drop_snapshot("web");
    bench.cache.assert_state("web", SnapshotState::Whole);
}
