//! Clients that ask the proxy's page server for pages: what they get from the cache, and what becomes of those
//! that ask wrongly. None of them begins a round.

use criu_image_relay::control::model::SnapshotState;
use criu_image_relay::criu::page_server::command::Command;
use criu_image_relay::criu::page_server::header::{Dialect, Header};
use criu_image_relay::criu::pages::Space;

use crate::criu::{Criu, RECORDS};
use crate::daemons::{Daemon, eventually, unused_address};
use crate::hosts::Hosts;
use crate::lazy::{DIALECTS, Lazy, images, send};
use crate::page_client::{HELD, PageClient};
use crate::pages_at_proxy::{TASK, round};
use crate::proxy_standin::ProxyStandin;

/// The next round goes on from the one before: nothing has come between them.
#[track_caller]
fn assert_goes_on(client: &mut PageClient) {
    assert!(client.open(TASK).unwrap());
    client.hole(TASK, 0x1000, 3).unwrap();
    assert_eq!(client.force_close().unwrap(), HELD);
}

#[test]
fn pages_are_given_back_in_either_dialect_up_to_the_first_that_is_not_there() {
    let hosts = Hosts::start();
    let mut proxy = ProxyStandin::connect(hosts.address);
    send(&mut proxy, 1, "web", &images());
    for dialect in DIALECTS {
        let mut lazy = Lazy::of("web", &hosts.proxy, dialect);
        lazy.assert_given();
        for end in [Command::ForceClose, Command::Close] {
            lazy.say(end);
            assert_eq!(lazy.0.status().unwrap(), HELD);
            if end == Command::ForceClose {
                assert_eq!(lazy.get(0x20000, 1), [32], "the socket may be another's");
            }
        }
        lazy.assert_ended();
        hosts.proxy.assert_log(&["pages of snapshot web", "45056 bytes sent"]);
    }
    assert_eq!(hosts.cache.show("web").unwrap().state, SnapshotState::Whole);
    assert!(eventually(|| hosts.proxy.show("web").is_none()), "nothing was sent");
}

#[test]
fn pages_are_given_back_between_rounds_on_the_same_connection() {
    let mut hosts = Hosts::start();
    let bystander = hosts.bystander();
    let mut lazy = Lazy(round(&hosts, "web"));
    for _ in 0..2 {
        assert_eq!(lazy.get(0x2000, 9), [7, 7]);
        lazy.say(Command::ForceClose);
        assert_eq!(lazy.0.status().unwrap(), HELD);
        assert_goes_on(&mut lazy.0);
    }
    assert_eq!(hosts.proxy.show("web").unwrap().state, SnapshotState::Paged);
    // While another connection sends a round, the one before is given.
    let address = hosts.proxy.listen_for_pages("db");
    let mut sender = PageClient::at(address, Dialect::Short);
    let mut reader = Lazy::at(address);
    sender.open(TASK).unwrap();
    sender.pages(TASK, 0x1000, false, &[1; 4096]).unwrap();
    assert_eq!(sender.force_close().unwrap(), HELD);
    assert!(sender.open(TASK).unwrap());
    sender.pages(TASK, 0x1000, false, &[2; 4096]).unwrap();
    assert_eq!(reader.get(0x1000, 1), [1]);
    assert_eq!(sender.close().unwrap(), HELD);
    assert_eq!(reader.get(0x1000, 1), [2]);
    hosts.assert_undisturbed(bystander);
}

#[test]
fn a_client_that_needs_no_pages_has_begun_no_round() {
    let mut hosts = Hosts::start();
    let bystander = hosts.bystander();
    let address = hosts.proxy.listen_for_pages("web");
    let mut client = PageClient::at(address, Dialect::Long);
    client.open(TASK).unwrap();
    client.pages(TASK, 0x1000, false, &[7; 3 * 4096]).unwrap();
    assert_eq!(client.force_close().unwrap(), HELD);
    for end in [Command::Close, Command::ForceClose] {
        let mut lazy = Lazy::at(address);
        lazy.say(end);
        assert_eq!(lazy.0.status().unwrap(), HELD);
        lazy.assert_ended();
    }
    assert_goes_on(&mut client);
    assert_eq!(hosts.proxy.show("web").unwrap().state, SnapshotState::Paged);

    // Nor has it for a snapshot that can have no more rounds.
    let mut dump = Criu::dump_to(hosts.address, "web", &hosts.proxy);
    dump.write("core-7.img", RECORDS);
    dump.complete();
    hosts.proxy.assert_state("web", SnapshotState::Whole);
    let mut lazy = Lazy::of("web", &hosts.proxy, Dialect::Short);
    lazy.say(Command::Close);
    assert_eq!(lazy.0.status().unwrap(), HELD);
    lazy.assert_ended();
    assert!(eventually(|| hosts.proxy.show("web").is_none()));
    hosts.assert_undisturbed(bystander);
}

#[test]
fn a_wrong_command_among_gets_ends_its_session_and_no_round() {
    let mut hosts = Hosts::with(&[("sessions.request-timeout", "\"200ms\"")], &[]);
    let bystander = hosts.bystander();
    let mut beside = Lazy(round(&hosts, "web"));
    assert_eq!(beside.get(0x1000, 1), [7]);
    let address = hosts.proxy.listen_for_pages("beside");
    let mut client = PageClient::at(address, Dialect::Long);
    client.open(TASK).unwrap();
    client.pages(TASK, 0x1000, false, &[9; 3 * 4096]).unwrap();
    assert_eq!(client.force_close().unwrap(), HELD);

    let get = |vaddr, nr_pages, dst_id| Header { cmd: 7, nr_pages, vaddr, dst_id };
    let dump = Command::Open { space: Space::Task(7), answer: true }.header();
    for (header, said) in [
        (get(0x4000, 1, 7), "the cache: task 7 of snapshot beside has no page at 0x4000"),
        (get(0, 9, 7), "the cache: task 7 of snapshot beside has no page at 0x0"),
        (get(0x1000, 1, 8), "the cache: snapshot beside has no task 8"),
        (get(0x1000, 1, 0), "GET for 0, which is no task's id"),
        (get(0x1000, 1, 1 << 40), "GET for 1099511627776, which is no task's id"),
        (get(0x1001, 1, 7), "pages at 0x1001, which is not where a page begins"),
        (get(0x1000, 0, 7), "no pages at 0x1000"),
        (get(!0xfff, 1, 7), "end beyond 2^64"),
        (get(0x1000, u64::MAX / 2, 7), "end beyond 2^64"),
        (dump, "OPEN2 is what a dump says to a proxy, and not where pages are asked for"),
        (Header { cmd: 9, ..get(0, 0, 0) }, "unknown page server command 9"),
    ] {
        let mut lazy = Lazy::at(address);
        assert_eq!(lazy.get(0x1000, 1), [9]);
        lazy.say_header(header);
        lazy.assert_ended();
        hosts.proxy.assert_log(&["WARN", "a client for pages of snapshot beside", said]);
    }
    let mut torn = Lazy::at(address);
    assert_eq!(torn.get(0x1000, 1), [9]);
    torn.0.say(&[7; 11]).unwrap();
    drop(torn);
    hosts.proxy.assert_log(&["the connection was closed within a command"]);
    let mut late = Lazy::at(address);
    assert_eq!(late.get(0x1000, 1), [9]);
    late.0.say(&[7; 11]).unwrap();
    late.assert_ended();
    hosts.proxy.assert_log(&["the rest of a command did not come within 200ms"]);

    assert_goes_on(&mut client);
    assert_eq!(beside.get(0x3000, 1), [7]);
    hosts.assert_undisturbed(bystander);
}

#[test]
fn pages_of_a_snapshot_that_has_none_are_not_waited_for() {
    let mut hosts = Hosts::start();
    let bystander = hosts.bystander();
    let ask = |id: &str, cause: &str| {
        let mut lazy = Lazy::of(id, &hosts.proxy, Dialect::Short);
        lazy.ask(0x1000, 1);
        lazy.assert_ended();
        let of = format!("a client for pages of snapshot {id}");
        hosts.proxy.assert_log(&["WARN", &of, cause]);
        // The socket was all that there was of it.
        assert!(eventually(|| hosts.proxy.show(id).is_none()));
    };
    ask("nobody", "the cache: no snapshot nobody is held");
    let mut dump = Criu::dump_to(hosts.address, "images", &hosts.proxy);
    dump.write("core-7.img", RECORDS);
    dump.complete();
    hosts.cache.assert_state("images", SnapshotState::Whole);
    hosts.proxy.assert_state("images", SnapshotState::Whole);
    ask("images", "the cache: snapshot images has no task 7");
    hosts.assert_undisturbed(bystander);
}

#[test]
fn the_shared_socket_has_pages_of_its_own_connection_only() {
    let (cache, address) = Daemon::cache(&[]);
    let shared = unused_address();
    let listen = format!("{:?}", shared.to_string());
    let proxy = Daemon::proxy(address, &[("pages.listen", &listen)]);
    let mut standin = ProxyStandin::connect(address);
    send(&mut standin, 1, "web", &images());
    let mut lazy = Lazy::at(shared);
    lazy.ask(0x10000, 1);
    lazy.assert_ended();
    let cause = "GET on the shared page server, where each connection makes a snapshot";
    proxy.assert_log(&["WARN", cause, "criu-imagectl open --pages"]);
    assert!(eventually(|| proxy.sessions() == 0));

    let mut client = PageClient::at(shared, Dialect::Long);
    client.open(TASK).unwrap();
    client.pages(TASK, 0x1000, false, &[5; 4096]).unwrap();
    assert_eq!(client.force_close().unwrap(), HELD);
    assert_eq!(Lazy(client).get(0x1000, 1), [5]);
    cache.assert_state("web", SnapshotState::Whole);
}

#[test]
fn a_client_that_does_not_read_is_given_up() {
    let hosts = Hosts::with(&[("sessions.stall-timeout", "\"300ms\"")], &[]);
    let mut deaf = Lazy(round(&hosts, "web"));
    let ask = Command::Get { id: 7, address: 0x1000, pages: 3 };
    while deaf.0.command(ask).is_ok() {}
    hosts.proxy.assert_log(&["pages of snapshot web", "an answer was not read for 300ms"]);
    let mut next = Lazy::of("web", &hosts.proxy, Dialect::Long);
    assert_eq!(next.get(0x1000, 1), [7]);
}

#[test]
fn who_reads_pages_of_a_snapshot_that_is_dropped_gets_no_more() {
    let mut hosts = Hosts::start();
    let bystander = hosts.bystander();
    for at_cache in [true, false] {
        let mut lazy = Lazy(round(&hosts, "web"));
        assert_eq!(lazy.get(0x1000, 1), [7]);
        let cause = if at_cache {
            hosts.cache.drop_snapshot("web");
            lazy.ask(0x1000, 1);
            "the cache: no snapshot web is held"
        } else {
            hosts.proxy.drop_snapshot("web");
            "it was dropped by the operator"
        };
        lazy.assert_ended();
        hosts.proxy.assert_log(&["WARN", "a client for pages of snapshot web", cause]);
        assert!(eventually(|| hosts.cache.show("web").is_none()));
    }
    hosts.assert_undisturbed(bystander);
}

#[test]
fn without_a_link_there_are_no_pages() {
    let proxy = Daemon::proxy(unused_address(), &[("link.give-up-after", "\"100ms\"")]);
    let mut lazy = Lazy::of("web", &proxy, Dialect::Long);
    lazy.ask(0x1000, 1);
    lazy.assert_ended();
    proxy.assert_log(&["WARN", "was left without: no link to the cache"]);
}
