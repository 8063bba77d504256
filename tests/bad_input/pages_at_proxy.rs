//! Clients of the proxy's page server that break the rules: each costs its session and its round. What
//! the cache held before the round stays.

use std::io;

use criu_image_relay::control::model::SnapshotState;
use criu_image_relay::criu::page_server::command::Command;
use criu_image_relay::criu::page_server::header::{Dialect, Header};
use criu_image_relay::criu::pages::{Contents, PAGE_SIZE, Run, Space};

use crate::hosts::Hosts;
use crate::page_client::{HELD, PageClient};

pub(crate) const TASK: Space = Space::Task(7);
const OTHER: Space = Space::Task(9);
const TASK_ID: u64 = 0x701;

const ADD: u32 = 6;
const PRESENT: u32 = 4 << 16;

/// A page.
pub(crate) const PAGE: &[u8] = &[7; 4096];

/// A round of three pages.
pub(crate) fn round(hosts: &Hosts, id: &str) -> PageClient {
    let mut client = PageClient::on(hosts.proxy.open_pages(id), Dialect::Long);
    assert!(!client.open(TASK).unwrap(), "nothing is held, or a round has failed");
    client.pages(TASK, 0x1000, false, &PAGE.repeat(3)).unwrap();
    assert_eq!(client.force_close().unwrap(), HELD);
    client
}

/// The three pages are held, and those of a fresh round of all are next.
#[track_caller]
pub(crate) fn assert_left(hosts: &Hosts, id: &str) {
    let left = hosts.cache.show(id).unwrap();
    assert_eq!((left.state, left.bytes), (SnapshotState::Paged, 3 * PAGE_SIZE));
    round(hosts, id);
}

/// What a client says after it has opened a space that has a parent.
type Say = fn(&mut PageClient) -> io::Result<()>;

fn header(
    client: &mut PageClient,
    cmd: u32,
    vaddr: u64,
    nr_pages: u64,
    dst_id: u64,
) -> io::Result<()> {
    client.header(Header { cmd, nr_pages, vaddr, dst_id })
}

fn run(client: &mut PageClient, space: Space, page: u64, contents: Contents) -> io::Result<()> {
    let run = Run::new(page * PAGE_SIZE, 1, contents).unwrap();
    client.command(Command::Pages { space, run })
}

#[rustfmt::skip] // a table
const BROKEN: &[(Say, &str)] = &[
    (|client| header(client, 9, 0, 0, TASK_ID), "unknown page server command 9"),
    (|client| header(client, 0x1025, 0, 0, 0), "unknown page server command 4133"),
    (|client| header(client, 4 | PRESENT, 0, 0, TASK_ID), "OPEN2 with the flags 0x4"),
    (|client| header(client, 4, 0x1000, 1, TASK_ID), "OPEN2 with 1 pages at 0x1000"),
    (|client| header(client, 4, 0, 0, 0x703), "OPEN2 for 0x703, which is neither a task's id"),
    (|client| header(client, ADD | PRESENT, 0x1000, 0, TASK_ID), "ADD_F for task 7: no pages at 0x1000"),
    (|client| header(client, ADD | PRESENT, 0x1010, 1, TASK_ID), "ADD_F for task 7: pages at 0x1010, which is not"),
    (|client| header(client, ADD | PRESENT, 0x1000, u64::MAX, TASK_ID), "pages at 0x1000 end beyond 2^64"),
    (|client| header(client, ADD | PRESENT, 0x1000, 1 << 52, TASK_ID), "pages at 0x1000 end beyond 2^64"),
    (|client| header(client, ADD | PRESENT, !0xfff, 1, TASK_ID), "1 pages at 0xfffffffffffff000 end beyond 2^64"),
    (|client| header(client, ADD, 0x1000, 1, TASK_ID), "ADD_F for task 7, 1 pages at 0x1000: no flag at all"),
    (|client| header(client, ADD | PRESENT | 1 << 16, 0x1000, 1, TASK_ID), "PE_PRESENT and PE_PARENT together"),
    (|client| run(client, OTHER, 1, Contents::Parent), "pages of task 9 at 0x1000, which is not open"),
    (|client| run(client, OTHER, 1, Contents::Present { lazy: false }), "pages of task 9 at 0x1000, which is not open"),
    (|client| run(client, TASK, 1, Contents::Lazy), "pages of task 7 are to stay at the source: a lazy dump"),
    (|client| client.command(Command::Open { space: TASK, answer: true }), "task 7 opened twice in one round"),
    (|client| client.command(Command::Get { id: 7, address: 0x1000, pages: 1 }), "GET on a connection on which a dump"),
    (|client| {
        client.hole(TASK, 0x2000, 1)?;
        client.hole(TASK, 0x1000, 1)
    }, "pages of task 7 at 0x1000, below 0x3000, where the last ones ended"),
    (|client| {
        client.pages(TASK, 0x1000, false, PAGE)?;
        client.pages(TASK, 0x1000, false, PAGE)
    }, "pages of task 7 at 0x1000, below 0x2000, where the last ones ended"),
    (|client| {
        client.open(OTHER)?;
        client.hole(OTHER, 0x1000, 1)
    }, "pages of task 9 at 0x1000 are said to be in a parent that there is not"),
    // The cache knows which pages the parent has.
    (|client| {
        client.hole(TASK, 0x3000, 2)?;
        client.command(Command::Close)
    }, "address 0x4000 of page space task 7 is said to be in the parent, which does not have it"),
];

#[test]
fn what_breaks_the_rules_costs_its_round_and_no_other() {
    let mut hosts = Hosts::start();
    let bystander = hosts.bystander();
    let mut beside = round(&hosts, "beside");
    for (number, (say, cause)) in BROKEN.iter().enumerate() {
        let id = format!("web-{number}-");
        let mut client = round(&hosts, &id);
        assert!(client.open(TASK).unwrap());
        say(&mut client).unwrap();
        client.assert_failed();
        hosts.proxy.assert_log(&["WARN", &format!("a round of snapshot {id} failed after"), cause]);
        assert!(hosts.proxy.assert_state(&id, SnapshotState::Damaged).contains(cause), "{cause}");
        assert_left(&hosts, &id);
    }
    assert!(beside.open(TASK).unwrap());
    assert_eq!(beside.force_close().unwrap(), HELD);
    hosts.assert_undisturbed(bystander);
}

#[test]
fn a_client_that_is_none_begins_no_round() {
    let mut hosts = Hosts::start();
    let bystander = hosts.bystander();
    round(&hosts, "web");
    let neither = "fits neither the 24 bytes of CRIU up to 4.1 nor the 32 of later ones";
    for (said, cause) in [
        (&b"GET / HTTP/1.1\r\nHost: relay\r\n"[..], "unknown page server command 17735"),
        (&[0; 32], "unknown page server command 0"),
        (b"\x04\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\x01\x07\0\0\0\0\0\0", neither),
        (b"\x23\x10\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x01\x07\0\0\0\0\0\0", neither),
        (
            b"\x06\0\x04\0\x01\0\0\0\0\x10\0\0\0\0\0\0\x01\x07\0\0\0\0\0\0",
            "ADD_F as the first command",
        ),
    ] {
        let mut client = PageClient::on(hosts.proxy.open_pages("web"), Dialect::Short);
        client.say(said).unwrap();
        client.assert_failed();
        hosts.proxy.assert_log(&["WARN", "criu_snapshot=\"web\"", "the session ended", cause]);
    }
    let mut torn = PageClient::on(hosts.proxy.open_pages("web"), Dialect::Short);
    torn.say(b"\x04\0\0\0").unwrap();
    drop(torn);
    hosts.proxy.assert_log(&["the session ended", "the connection was closed within a command"]);
    // None of them was a round, so that the next one still has a parent.
    let mut client = PageClient::on(hosts.proxy.open_pages_of("web", Some("web")), Dialect::Short);
    assert!(client.open(TASK).unwrap());
    client.hole(TASK, 0x1000, 3).unwrap();
    assert_eq!(client.close().unwrap(), HELD);
    hosts.assert_undisturbed(bystander);
}

#[test]
fn a_client_that_leaves_within_a_round_costs_that_round() {
    let mut hosts = Hosts::start();
    let bystander = hosts.bystander();
    let left: [(&str, Say, &str); 3] = [
        ("a", |_| Ok(()), "the connection was closed within a round, without CLOSE"),
        ("b", |client| client.say(&[4; 31]), "the connection was closed within a command"),
        (
            "c",
            |client| {
                client.announce(TASK, 0x1000, false, 4)?;
                client.say(&[7; 5000])
            },
            "the connection was closed within pages",
        ),
    ];
    for (id, say, cause) in left {
        let mut client = round(&hosts, id);
        assert!(client.open(TASK).unwrap());
        say(&mut client).unwrap();
        drop(client);
        hosts.proxy.assert_log(&["WARN", &format!("a round of snapshot {id} failed"), cause]);
        hosts.cache.assert_log(&["WARN", &format!("a round of snapshot {id} from"), cause]);
        assert_left(&hosts, id);
    }
    hosts.assert_undisturbed(bystander);
}

#[test]
fn more_spaces_than_there_may_be_cost_their_round() {
    let mut hosts = Hosts::start();
    let bystander = hosts.bystander();
    let mut client = round(&hosts, "web");
    let open = |pid| Command::Open { space: Space::Task(pid), answer: false }.header();
    let all = (1..=65_537).flat_map(|pid| open(pid).encode(Dialect::Long).unwrap());
    // It need not take all of them.
    let _ = client.say(&all.collect::<Vec<_>>());
    client.assert_failed();
    let cause = "more than 65536 spaces opened in one round";
    hosts.proxy.assert_log(&["WARN", "a round of snapshot web failed", cause]);
    assert_left(&hosts, "web");
    hosts.assert_undisturbed(bystander);
}
