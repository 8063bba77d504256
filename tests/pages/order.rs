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
    let mut client = PageClient::on(bench.proxy.open_pages("web"), Dialect::Long);
    assert!(client.open(TASK).unwrap());
    client.hole(TASK, 16 * PAGE_SIZE, 2).unwrap();
    client.pages(TASK, 18 * PAGE_SIZE, false, &filled(9)).unwrap();
    assert_eq!(client.close().unwrap(), HELD);
    bench.join("web");
    let pages = BTreeMap::from([(16, (1, false)), (17, (2, false)), (18, (9, false))]);
    bench.assert_holds("web", &Contained::from([(TASK, pages)]));
}
