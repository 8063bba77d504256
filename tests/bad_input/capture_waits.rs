//! Dumps that wait: for CRIU to write, for a cache to come.

use std::io::Write;
use std::time::{Duration, Instant};

use criu_image_relay::control::model::SnapshotState;

use crate::criu::{Criu, RECORDS, assert_unread};
use crate::daemons::{Daemon, unused_address};
use crate::hosts::Hosts;

#[test]
fn an_image_that_stalls_ends_its_dump() {
    let hosts = Hosts::with(&[("sessions.stall-timeout", "\"300ms\"")], &[]);
    // Between two images nothing stalls, however long it takes.
    let mut other = Criu::in_dir_of("other", &hosts.proxy);
    other.write("core-7.img", RECORDS);
    let mut dump = Criu::in_dir_of("web", &hosts.proxy);
    let mut open = dump.create("pages-1.img");
    open.write_all(b"half").unwrap();
    dump.assert_closed();
    assert_unread(&open);
    let why = "image pages-1.img: nothing was written for 300ms";
    hosts.proxy.assert_log(&["snapshot web damaged", &Criu::peer(), why]);
    hosts.cache.assert_log(&["snapshot web from", "damaged", why]);
    other.complete();
    hosts.cache.assert_log(&["snapshot other is whole"]);
    let mut fresh = Criu::in_dir_of("fresh", &hosts.proxy);
    fresh.write("core-7.img", RECORDS);
    fresh.complete();
    hosts.cache.assert_log(&["snapshot fresh is whole"]);
}

/// CRIU keeps files.img open from the first task to the last, and writes nothing to it while it
/// writes the pages of a large task: that is no stall.
#[test]
fn an_image_that_stands_still_while_another_is_written_is_no_stall() {
    let hosts = Hosts::with(&[("sessions.stall-timeout", "\"400ms\"")], &[]);
    let mut dump = Criu::in_dir_of("web", &hosts.proxy);
    let mut files = dump.create("files.img");
    files.write_all(&RECORDS[..8]).unwrap();
    let mut pages = dump.create("pages-1.img");
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(1200) {
        pages.write_all(&[7; 4096]).expect("the dump goes on");
        std::thread::sleep(Duration::from_millis(50));
    }
    drop(pages);
    files.write_all(&RECORDS[8..]).unwrap();
    drop(files);
    dump.complete();
    hosts.cache.assert_log(&["snapshot web is whole"]);
}

#[test]
fn a_dump_without_a_cache_fails_towards_the_source() {
    let proxy = Daemon::proxy(unused_address(), &[("link.give-up-after", "\"300ms\"")]);
    let (cache, address) = Daemon::cache(&[]);
    let mut other = Criu::dump_to(address, "other", &proxy);
    other.write("core-7.img", RECORDS);
    let mut dump = Criu::in_dir_of("web", &proxy);
    let open = dump.create("core-7.img");
    dump.assert_closed();
    assert_unread(&open);
    let why = "no link to the cache 127.0.0.1:";
    proxy.assert_log(&["snapshot web damaged", &Criu::peer(), why, "within 300ms", "refused"]);
    assert!(proxy.assert_state("web", SnapshotState::Damaged).contains(why));
    other.complete();
    cache.assert_log(&["snapshot other is whole"]);
}

#[test]
fn dumps_that_wait_for_the_same_cache_are_given_up_at_the_same_time() {
    let proxy = Daemon::proxy(unused_address(), &[("link.give-up-after", "\"1s\"")]);
    let begun = Instant::now();
    let mut dumps: Vec<_> = (0..4)
        .map(|i| {
            let mut dump = Criu::in_dir_of(&format!("web-{i}"), &proxy);
            (dump.create("core-7.img"), dump)
        })
        .collect();
    for (open, dump) in &mut dumps {
        dump.assert_closed();
        assert_unread(open);
    }
    let taken = begun.elapsed();
    assert!(taken < Duration::from_millis(2500), "the last was given up after {taken:?}");
}

#[test]
fn a_dump_waits_for_its_cache_to_come() {
    let address = unused_address();
    let proxy = Daemon::proxy(address, &[]);
    let mut dump = Criu::in_dir_of("web", &proxy);
    let mut open = dump.create("core-7.img");
    open.write_all(RECORDS).unwrap();
    dump.assert_waits();
    let cache = Daemon::cache_at(address, &[], None).unwrap();
    drop(open);
    dump.complete();
    cache.assert_log(&["snapshot web is whole"]);
    proxy.assert_log(&["snapshot web sent", &Criu::peer()]);
}

#[test]
fn a_bad_request_needs_no_cache_to_be_refused() {
    let proxy = Daemon::proxy(unused_address(), &[("link.give-up-after", "\"1min\"")]);
    let mut dump = Criu::dump(&proxy);
    dump.say(&[0xff; 4]);
    dump.assert_closed();
    proxy.assert_log(&[&Criu::peer(), "a request of 4294967295 bytes"]);
}
