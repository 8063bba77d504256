//! Clients of the cache's page server: what they get, and what becomes of those that ask wrongly.

use criu_image_relay::control::model::SnapshotState;
use criu_image_relay::criu::page_server::command::Command;
use criu_image_relay::criu::page_server::header::{Dialect, Header};
use criu_image_relay::criu::pages::Space;

use crate::daemons::{Daemon, Settings, unused_address};
use crate::hosts::Hosts;
use crate::lazy::{DIALECTS, Lazy, TASK, images, send};
use crate::page_client::HELD;
use crate::proxy_standin::ProxyStandin;

/// A cache that holds the snapshot `web`.
fn cache(settings: Settings<'_>) -> (Daemon, ProxyStandin) {
    let (cache, address) = Daemon::cache(settings);
    let mut proxy = ProxyStandin::connect(address);
    send(&mut proxy, 1, "web", &images());
    (cache, proxy)
}

#[test]
fn pages_are_given_to_either_dialect_up_to_the_first_that_is_not_there() {
    let (cache, _proxy) = cache(&[]);
    for dialect in DIALECTS {
        let mut lazy = Lazy::of("web", &cache, dialect);
        lazy.assert_given();
        for end in [Command::ForceClose, Command::Close] {
            lazy.say(end);
            assert_eq!(lazy.0.status().unwrap(), HELD);
        }
        lazy.assert_ended();
        cache.assert_log(&["pages of snapshot web", "45056 bytes sent"]);
    }
    let state = cache.show("web").unwrap().state;
    assert_eq!(state, SnapshotState::Whole, "it does not count as taken");
}

#[test]
fn commands_may_come_before_the_answers_are_read() {
    let (cache, _proxy) = cache(&[]);
    let mut lazy = Lazy::of("web", &cache, Dialect::Short);
    for _ in 0..200 {
        lazy.ask(0x10000, 5);
    }
    for _ in 0..200 {
        assert_eq!(lazy.hear(0x10000), [16, 17, 18, 19, 20]);
    }
    lazy.say(Command::Close);
}

#[test]
fn pages_stay_as_long_as_who_reads_them() {
    let (cache, _proxy) = cache(&[]);
    let mut lazy = Lazy::of("web", &cache, Dialect::Long);
    assert_eq!(lazy.get(0x10000, 1), [16]);
    cache.drop_snapshot("web");
    assert_eq!(lazy.get(0x20000, 1), [32]);
    drop(lazy);
    cache.assert_held(0);
}

#[test]
fn the_shared_socket_serves_the_one_snapshot_that_has_the_task() {
    let address = unused_address();
    let listen = format!("{:?}", address.to_string());
    let (cache, mut proxy) = cache(&[("pages.listen", &listen)]);
    let mut lazy = Lazy::at(address);
    assert_eq!(lazy.get(0x10000, 2), [16, 17]);
    send(&mut proxy, 2, "web/2", &images());
    assert_eq!(lazy.get(0x12000, 1), [18], "it goes on with the one that it has");

    let mut other = Lazy::at(address);
    other.ask(0x10000, 1);
    other.assert_ended();
    cache.assert_log(&["snapshots web, web/2 all have a task 7"]);

    let mut nobody = Lazy::at(address);
    nobody.say(Command::Get { id: 8, address: 0x10000, pages: 1 });
    nobody.assert_ended();
    cache.assert_log(&["no whole snapshot has a task 8"]);

    assert_eq!(Lazy::of("web/2", &cache, Dialect::Short).get(0x10000, 1), [16]);
}

#[test]
fn a_client_waits_until_its_snapshot_is_whole() {
    let (cache, address) = Daemon::cache(&[]);
    let mut proxy = ProxyStandin::connect(address);
    proxy.begin(1, "web");
    let [pagemap, pages] = images();
    proxy.image(1, 0, pagemap.0, &pagemap.1);
    cache.assert_image("web", pagemap.0, pagemap.1.len() as u64);
    let mut lazy = Lazy::of("web", &cache, Dialect::Short);
    lazy.ask(0x10000, 1);
    let mut left = Lazy::of("web", &cache, Dialect::Short);
    left.ask(0x10000, 1);
    drop(left);
    cache.assert_log(&["the client left while it waited"]);
    proxy.image(1, 1, pages.0, &pages.1);
    proxy.complete(1, 99, 2, pagemap.1.len() + pages.1.len());
    assert_eq!(lazy.hear(0x10000), [16]);
}

#[test]
fn a_wrong_command_ends_its_session_only() {
    let mut hosts = Hosts::with(&[], &[("sessions.request-timeout", "\"200ms\"")]);
    let bystander = hosts.bystander();
    let mut proxy = ProxyStandin::connect(hosts.address);
    send(&mut proxy, 1, "web", &images());
    let mut beside = Lazy::of("web", &hosts.cache, Dialect::Long);
    assert_eq!(beside.get(0x10000, 1), [16]);

    let get = |vaddr, nr_pages, dst_id| Header { cmd: 7, nr_pages, vaddr, dst_id };
    let top = !0xfff;
    let dump = Command::Open { space: Space::Task(7), answer: true }.header();
    for (header, said) in [
        (get(0x15000, 1, TASK), "task 7 has no page at 0x15000"),
        (get(0xf000, 9, TASK), "task 7 has no page at 0xf000"),
        (get(0x10000, 1, 8), "the snapshot has no task 8"),
        (get(0x10000, 1, 0), "GET for 0, which is no task's id"),
        (get(0x10000, 1, 1 << 40), "GET for 1099511627776, which is no task's id"),
        (get(0x10001, 1, TASK), "pages at 0x10001, which is not where a page begins"),
        (get(0x10000, 0, TASK), "no pages at 0x10000"),
        (get(top, 1, TASK), "end beyond 2^64"),
        (get(0x10000, u64::MAX / 2, TASK), "end beyond 2^64"),
        (dump, "OPEN2 is what a dump says to a proxy"),
        (Header { cmd: 9, ..get(0, 0, 0) }, "unknown page server command 9"),
    ] {
        let mut lazy = Lazy::of("web", &hosts.cache, Dialect::Long);
        // After it the dialect is known.
        assert_eq!(lazy.get(0x10000, 1), [16]);
        lazy.say_header(header);
        lazy.assert_ended();
        hosts.cache.assert_log(&["pages of snapshot web", said]);
    }
    for first in [[0xff; 24], [0; 24]] {
        let mut lazy = Lazy::of("web", &hosts.cache, Dialect::Long);
        lazy.0.say(&first).unwrap();
        lazy.assert_ended();
    }
    hosts.cache.assert_log(&["unknown page server command 65535"]);

    let mut torn = Lazy::of("web", &hosts.cache, Dialect::Short);
    torn.0.say(&[7; 11]).unwrap();
    drop(torn);
    hosts.cache.assert_log(&["the connection was closed within a command"]);
    let mut late = Lazy::of("web", &hosts.cache, Dialect::Short);
    late.0.say(&[7; 11]).unwrap();
    late.assert_ended();
    hosts.cache.assert_log(&["the rest of a command did not come within 200ms"]);

    assert_eq!(beside.get(0x20000, 1), [32]);
    hosts.assert_undisturbed(bystander);
}

#[test]
fn a_client_that_does_not_read_is_given_up() {
    let (cache, _proxy) = cache(&[("sessions.stall-timeout", "\"300ms\"")]);
    let mut deaf = Lazy::of("web", &cache, Dialect::Short);
    let ask = Command::Get { id: TASK, address: 0x10000, pages: 5 };
    while deaf.0.command(ask).is_ok() {}
    cache.assert_log(&["an answer was not read for 300ms"]);
    assert_eq!(Lazy::of("web", &cache, Dialect::Long).get(0x10000, 1), [16]);
}

#[test]
fn what_is_not_understood_is_no_page_server_s_and_still_restored() {
    let (cache, address) = Daemon::cache(&[]);
    let mut proxy = ProxyStandin::connect(address);
    let [(name, mut pagemap), pages] = images();
    // A field of a later CRIU in an entry of its own.
    pagemap.extend(b"\x08\0\0\0\x08\x80\x80\x10\x10\x01\x30\x01");
    send(&mut proxy, 1, "web", &[(name, pagemap), pages]);
    let mut lazy = Lazy::of("web", &cache, Dialect::Short);
    lazy.ask(0x10000, 1);
    lazy.assert_ended();
    cache.assert_log(&["pagemap-7.img: not understood", "has the field 6"]);
    let mut restore = crate::criu::Criu::in_dir_of("web", &cache);
    assert_eq!(restore.read("pages-1.img").len(), 6 * 4096);
}
