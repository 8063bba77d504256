//! Connections, rounds and snapshots in the orders that CRIU and its users may come upon.

use criu_image_relay::control::model::SnapshotState;
use criu_image_relay::criu::page_server::command::Command;
use criu_image_relay::criu::page_server::header::Dialect;
use criu_image_relay::criu::pages::Space;

use crate::bench::Bench;
use crate::client::PageClient;
use crate::criu::{Criu, RECORDS};
use crate::daemons::eventually;

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
