//! Memory that is copied too late, what the daemons make of that, and CRIU's action script.

use std::io::Write;
use std::process::Command;
use std::time::Duration;

use criu_image_relay::control::ClientError;
use criu_image_relay::control::model::{Snapshot, SnapshotState};
use criu_image_relay::criu::images::INVENTORY;
use criu_image_relay::wire::message::{
    MEMORY_MAY_HAVE_CHANGED, Message, Outcome, SnapshotAck, SnapshotBegin, SnapshotEnd,
    SnapshotWithdrawn, WITHDRAW,
};

use crate::cache_standin::CacheStandin;
use crate::criu::{Criu, RECORDS};
use crate::daemons::{Daemon, eventually};
use crate::hosts::Hosts;
use crate::link::Link;
use crate::proxy_standin::ProxyStandin;

const LONG: Duration = Duration::from_secs(20);

/// The pid that the proxy sees as CRIU's.
fn criu_pid() -> i32 {
    std::process::id().try_into().unwrap()
}

/// CRIU hands over everything, and ends, while the proxy sees nothing of it.
fn dump_unseen(proxy: &Daemon) {
    proxy.pause();
    let mut dump = Criu::dump(proxy);
    dump.write("core-7.img", RECORDS);
    dump.write("pages-1.img", &[7; 8192]);
    dump.complete();
    proxy.go_on();
}

/// What the proxy says at the end of the next snapshot on a link.
fn end_of_snapshot(link: &mut Link) -> SnapshotEnd {
    loop {
        if let (Message::SnapshotEnd(end), _) = link.receive().expect("the snapshot goes on") {
            let SnapshotEnd { snapshot, images, bytes, .. } = end;
            link.send(&Message::SnapshotAck(SnapshotAck { snapshot, images, bytes }));
            return end;
        }
    }
}

#[test]
fn a_dump_that_is_copied_after_criu_has_ended_is_marked_and_one_copied_before_is_not() {
    let cache = CacheStandin::listen();
    let proxy = Daemon::proxy(cache.address(), &[]);
    dump_unseen(&proxy);
    let mut link = cache.welcome_with(&[MEMORY_MAY_HAVE_CHANGED]);
    assert!(end_of_snapshot(&mut link).memory_may_have_changed);
    proxy.assert_log(&["may have changed", "--action-script criu-imagectl", "no restore"]);

    let mut dump = Criu::dump(&proxy);
    dump.write("pages-1.img", &[7; 8192]);
    assert!(eventually(|| proxy.status().held_bytes > 0 || proxy.status().total_bytes > 16_000));
    // Whatever it asks for next shows that it has not asked for the last one.
    dump.write("core-7.img", RECORDS);
    let inventory = dump.create(INVENTORY);
    std::thread::sleep(Duration::from_millis(50));
    (&inventory).write_all(RECORDS).unwrap();
    drop((inventory, dump));
    assert!(!end_of_snapshot(&mut link).memory_may_have_changed);
}

#[test]
fn a_cache_of_0_1_0_is_not_told_and_the_journal_says_so() {
    let cache = CacheStandin::listen();
    let proxy = Daemon::proxy(cache.address(), &[]);
    dump_unseen(&proxy);
    let mut link = cache.welcome();
    assert!(!end_of_snapshot(&mut link).memory_may_have_changed);
    proxy.assert_log(&["may have changed", "the cache is of a version that does not know of this"]);
}

#[test]
fn criu_waits_for_a_link_and_pages_are_copied_as_soon_as_there_is_one() {
    let cache = CacheStandin::listen();
    let proxy = Daemon::proxy(cache.address(), &[]);
    let mut dump = Criu::dump(&proxy);
    // Much more than the pipe holds.
    let mut pages = dump.create("pages-1.img");
    let writes = std::thread::spawn(move || pages.write_all(&vec![7; 8 << 20]).unwrap());
    assert!(eventually(|| proxy.list().iter().any(|snapshot| snapshot.images == 1)));
    assert_eq!((proxy.status().held_bytes, writes.is_finished()), (0, false));
    let mut link = cache.welcome();
    writes.join().unwrap();
    dump.write("core-7.img", RECORDS);
    let inventory = dump.create(INVENTORY);
    std::thread::sleep(Duration::from_millis(50));
    (&inventory).write_all(RECORDS).unwrap();
    drop((inventory, dump));
    assert_eq!(end_of_snapshot(&mut link).bytes, (8 << 20) + 2 * RECORDS.len() as u64);
    assert!(eventually(|| proxy.status().held_bytes == 0));
}

#[test]
fn a_marked_snapshot_is_refused_at_once_until_somebody_accepts_it() {
    let (cache, address) = Daemon::cache(&[]);
    let mut proxy = ProxyStandin::connect(address);
    proxy.begin(0, "web");
    proxy.image(0, 0, "core-7.img", RECORDS);
    proxy.image(0, 1, INVENTORY, RECORDS);
    let bytes = 2 * RECORDS.len() as u64;
    proxy.link.send(&Message::SnapshotEnd(SnapshotEnd {
        snapshot: 0,
        complete: true,
        images: 2,
        bytes,
        partial: false,
        memory_may_have_changed: true,
    }));
    proxy.assert_acknowledged(0);
    cache.assert_state("web", SnapshotState::Whole);
    assert_eq!(cache.show("web").unwrap().memory_may_have_changed, Some(true));

    let mut restore = Criu::restore(&cache);
    restore.request("core-7.img");
    restore.assert_closed();
    cache.assert_log(&["a restore by", "may have changed", "--accept-changed-memory web"]);
    // By name it is told apart from one that is damaged.
    let mut get = Command::new(env!("CARGO_BIN_EXE_criu-imagectl"));
    get.arg("--socket").arg(cache.dir().join("control.sock")).args(["get", "web", "core-7.img"]);
    let got = get.output().unwrap();
    let why = String::from_utf8(got.stderr).unwrap();
    assert_eq!(got.status.code(), Some(5), "{why}");
    assert!(got.stdout.is_empty() && why.contains("--accept-changed-memory"), "{why}");

    // One that came later is not held up.
    proxy.whole(1, "other", "core-8.img", RECORDS);
    assert!(Criu::restore(&cache).ask("core-8.img"));

    cache.control(async |client| client.accept_changed_memory("web").await).unwrap();
    cache.assert_log(&["snapshot web is given to restores", "accepts that"]);
    assert_eq!(Criu::restore(&cache).read("core-7.img"), RECORDS);
}

#[test]
fn the_hook_is_answered_when_the_cache_has_everything_and_again_when_it_asks_again() {
    let hosts = Hosts::start();
    hosts.proxy.control(async |client| client.expect_dump(criu_pid()).await).unwrap();
    let mut dump = Criu::dump(&hosts.proxy);
    dump.write("core-7.img", RECORDS);
    dump.write("pages-1.img", &[7; 8192]);
    dump.write(INVENTORY, RECORDS);
    // CRIU has not closed its socket: its script runs.
    for _ in 0..2 {
        let finish = hosts.proxy.control(async |client| client.finish_dump(criu_pid(), LONG).await);
        let snapshot = finish.unwrap();
        assert_eq!((snapshot.state, snapshot.images), (SnapshotState::Whole, 3));
        assert_eq!(snapshot.memory_may_have_changed, None);
        hosts.cache.assert_state(&snapshot.id, SnapshotState::Whole);
    }
    assert_eq!(Criu::restore(&hosts.cache).read("pages-1.img"), [7; 8192]);
}

#[test]
fn a_hook_that_is_announced_and_does_not_wait_makes_a_marked_snapshot() {
    let hosts = Hosts::start();
    hosts.proxy.control(async |client| client.expect_dump(criu_pid()).await).unwrap();
    let mut dump = Criu::dump(&hosts.proxy);
    dump.write("pages-1.img", &[7; 8192]);
    dump.complete();
    hosts.proxy.assert_log(&["may have changed", "did not wait at its post-dump"]);
    hosts.cache.assert_log(&["may have changed", "--action-script criu-imagectl"]);
}

#[test]
fn a_hook_fails_in_plain_words_and_its_snapshot_is_given_up() {
    let cache = CacheStandin::listen();
    let proxy = Daemon::proxy(cache.address(), &[]);
    let finish = |limit| proxy.control(async |client| client.finish_dump(criu_pid(), limit).await);
    let refused = |limit| match finish(limit) {
        Err(ClientError::Refused(why)) => why,
        other => panic!("{other:?}"),
    };
    let why = refused(LONG);
    assert!(why.starts_with("no dump of a CRIU with pid"), "{why}");

    // CRIU has not handed over everything: nothing is acknowledged.
    let mut dump = Criu::dump(&proxy);
    dump.write("core-7.img", RECORDS);
    let _link = cache.welcome();
    let why = refused(LONG);
    assert!(why.contains("without writing inventory.img"), "{why}");
    drop(dump);

    // The cache does not acknowledge.
    proxy.control(async |client| client.expect_dump(criu_pid()).await).unwrap();
    let mut dump = Criu::dump(&proxy);
    dump.write("core-7.img", RECORDS);
    dump.write(INVENTORY, RECORDS);
    let why = refused(Duration::from_millis(300));
    let waited = "CRIU's action script has waited 300ms for the cache; whether the cache has it is not known";
    assert!(why.starts_with(waited), "{why}");
    dump.assert_closed();
}

/// All of a dump whose action script waits, for 300 ms.
fn hooked_dump(proxy: &Daemon) -> Criu {
    proxy.control(async |client| client.expect_dump(criu_pid()).await).unwrap();
    let mut dump = Criu::dump(proxy);
    dump.write("core-7.img", RECORDS);
    dump.write(INVENTORY, RECORDS);
    dump
}

fn hook_fails(proxy: &Daemon) -> String {
    let limit = Duration::from_millis(300);
    match proxy.control(async |client| client.finish_dump(criu_pid(), limit).await) {
        Err(ClientError::Refused(why)) => why,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_hook_that_fails_when_all_was_sent_has_the_cache_give_up_that_dump() {
    for (outcome, told) in [
        (Outcome::Withdrawn, "the cache has dropped its copy"),
        (Outcome::Unknown, "the cache has no copy"),
        (Outcome::Taken, "the process may run twice"),
    ] {
        let cache = CacheStandin::listen();
        let proxy = Daemon::proxy(cache.address(), &[]);
        let dump = hooked_dump(&proxy);
        let mut link = cache.welcome_with(&[WITHDRAW]);
        std::thread::scope(|scope| {
            let hook = scope.spawn(|| hook_fails(&proxy));
            let (mut begun, mut all_said) = (SnapshotBegin::default(), false);
            let withdraw = loop {
                match link.receive().expect("the link goes on").0 {
                    Message::SnapshotBegin(said) => begun = said,
                    Message::SnapshotEnd(end) => all_said = end.complete,
                    Message::SnapshotWithdraw(withdraw) => break withdraw,
                    _ => {}
                }
            };
            assert!(all_said && begun.attempt != 0, "{begun:?}");
            assert_eq!((&withdraw.id, withdraw.attempt), (&begun.id, begun.attempt));
            let (request, outcome) = (withdraw.request, outcome.into());
            link.send(&Message::SnapshotWithdrawn(SnapshotWithdrawn { request, outcome }));
            let why = hook.join().unwrap();
            assert!(why.contains("has waited 300ms") && why.contains(told), "{why}");
        });
        drop(dump);
    }
}

#[test]
fn what_a_failed_hook_sent_becomes_no_second_copy_at_a_cache_that_goes_on_later() {
    let hosts = Hosts::start();
    // The link is up.
    let before = hooked_dump(&hosts.proxy);
    let finish = hosts.proxy.control(async |client| client.finish_dump(criu_pid(), LONG).await);
    let before = (before, finish.unwrap().id);
    hosts.cache.pause();
    let dump = hooked_dump(&hosts.proxy);
    let why = hook_fails(&hosts.proxy);
    assert!(why.contains("the cache has not acknowledged it within 300ms"), "{why}");
    hosts.cache.go_on();
    let list = || hosts.cache.control(async |client| client.list().await).unwrap();
    assert!(eventually(|| {
        list().iter().any(|snapshot| snapshot.reason.contains("runs on at the source"))
    }));
    for Snapshot { id, state, .. } in list() {
        let other = id == before.1;
        assert_eq!(state, if other { SnapshotState::Whole } else { SnapshotState::Damaged });
    }
    drop((before, dump));
}
