//! Scrapes while images and pages move, and what they say afterwards.

use std::io::Write;
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use criu_image_relay::control::model::SnapshotState;
use criu_image_relay::criu::page_server::header::Dialect;
use criu_image_relay::criu::pages::Space;
use criu_image_relay::daemon::CONTROL_SOCKET;

use crate::bed::Bed;
use crate::criu::{Criu, RECORDS};
use crate::daemons::eventually;
use crate::page_client::{HELD, PageClient};
use crate::scrape::Scrape;

/// What a large image holds; half of it fits a pipe, so that no write waits.
const PAGES: &[u8] = &[7; 60_000];
const HALF: u64 = 30_000;
const PAGE: usize = 4096;

#[track_caller]
fn eventually_is(mut scrape: impl FnMut() -> Scrape, name: &str, labels: &[(&str, &str)], is: u64) {
    let mut last = 0;
    let come = eventually(|| {
        last = scrape().count(name, labels);
        last == is
    });
    assert!(come, "{name} {labels:?} is {last}, not {is}");
}

#[test]
fn a_transfer_is_seen_on_its_way_and_at_its_end() {
    let bed = Bed::start();
    let (proxy, cache) = (&bed.hosts.proxy, &bed.hosts.cache);
    let peer = bed.hosts.address.to_string();
    let mut dump = Criu::in_dir_of("web", proxy);
    dump.write("core-7.img", RECORDS);
    let mut open = dump.create("pages-1.img");
    open.write_all(&PAGES[..30_000]).unwrap();
    cache.assert_receiving("web", HALF);

    let [at_proxy, at_cache] = [bed.proxy(), bed.cache()];
    assert_eq!(at_proxy.count("snapshots", &[("state", "receiving")]), 1);
    assert_eq!(at_proxy.count("sessions", &[]), 1);
    assert_eq!(at_proxy.count("link_up", &[("peer", &peer)]), 1);
    assert_eq!(at_cache.count("snapshots", &[("state", "receiving")]), 1);
    for scrape in [&at_proxy, &at_cache] {
        assert_eq!(scrape.count("links", &[]), 1);
        assert_eq!(scrape.count("link_bytes_total", &[]), HALF + RECORDS.len() as u64);
    }
    // One page for the small image, and those of what has come of the large one.
    assert_eq!(at_cache.count("held_bytes", &[]), 9 * 4096);
    assert_eq!(at_cache.count("quota_bytes", &[]), 64 << 20);

    open.write_all(&PAGES[30_000..]).unwrap();
    drop(open);
    dump.complete();
    proxy.assert_state("web", SnapshotState::Whole);
    let [at_proxy, at_cache] = [bed.proxy(), bed.cache()];
    assert_eq!(at_proxy.count("snapshots", &[("state", "whole")]), 1);
    assert_eq!(at_proxy.count("snapshots_ended_total", &[("outcome", "sent")]), 1);
    assert_eq!(at_proxy.count("dump_duration_seconds_count", &[("protocol", "stream")]), 1);
    assert!(at_proxy.seconds("dump_duration_seconds_sum", &[("protocol", "stream")]) > 0.0);
    assert_eq!(at_cache.count("snapshots_ended_total", &[("outcome", "whole")]), 1);
    assert_eq!(at_cache.count("receive_duration_seconds_count", &[]), 1);
    assert_eq!(at_cache.count("restore_duration_seconds_count", &[]), 0);

    let mut restore = Criu::in_dir_of("web", cache);
    assert!(restore.read("pages-1.img") == PAGES);
    drop(restore);
    eventually_is(|| bed.cache(), "snapshots", &[("state", "taken")], 1);
    let at_cache = bed.cache();
    assert_eq!(at_cache.count("snapshots_taken_total", &[]), 1);
    assert_eq!(at_cache.count("restore_duration_seconds_count", &[]), 1);
    assert_eq!(at_cache.count("read_bytes_total", &[]), 60_000);
    cache.drop_snapshot("web");
    let at_cache = bed.cache();
    assert_eq!(at_cache.count("snapshots_forgotten_total", &[("reason", "dropped")]), 1);
    assert_eq!(at_cache.count("held_bytes", &[]), 0);
}

#[test]
fn what_a_scrape_shows_is_what_status_tells() {
    let bed = Bed::start();
    let mut dump = Criu::in_dir_of("web", &bed.hosts.proxy);
    dump.write("core-7.img", RECORDS);
    dump.complete();
    bed.hosts.proxy.assert_state("web", SnapshotState::Whole);
    for (status, scrape) in
        [(bed.hosts.proxy.status(), bed.proxy()), (bed.hosts.cache.status(), bed.cache())]
    {
        let started = scrape.seconds("start_time_seconds", &[]) * 1e3;
        assert_eq!(format!("{started:.0}"), status.started_ms.to_string());
        assert_eq!(scrape.count("build_info", &[("version", &status.version)]), 1);
        assert_eq!(scrape.count("sessions", &[]), status.sessions);
        assert_eq!(scrape.count("link_bytes_total", &[]), status.total_bytes);
        assert_eq!(scrape.count("snapshots", &[("state", "whole")]), status.whole);
        assert_eq!(scrape.count("held_bytes", &[]), status.held_bytes);
        assert_eq!(scrape.count("quota_bytes", &[]), status.max_bytes);
    }
}

#[test]
fn rounds_count_by_their_end_and_the_last_one_is_a_part_of_its_dump() {
    const TASK: Space = Space::Task(7);
    let bed = Bed::start();
    let proxy = &bed.hosts.proxy;
    let mut client = PageClient::on(proxy.open_pages("web"), Dialect::Long);
    let mut round = || {
        client.open(TASK).unwrap();
        client.pages(TASK, 0x1000, false, &[7; PAGE]).unwrap();
        client.force_close().unwrap()
    };
    assert_eq!(round(), HELD);
    for scrape in [bed.proxy(), bed.cache()] {
        assert_eq!(scrape.count("rounds_total", &[("outcome", "held")]), 1);
        assert_eq!(scrape.count("rounds_total", &[("outcome", "failed")]), 0);
        assert_eq!(scrape.count("round_duration_seconds_count", &[]), 1);
        assert_eq!(scrape.count("snapshots", &[("state", "paged")]), 1);
        assert_eq!(scrape.count("snapshots_ended_total", &[("outcome", "damaged")]), 0);
    }
    // The process stands still from here on.
    let pause = Duration::from_millis(300);
    let last = Instant::now();
    assert_eq!(round(), HELD);
    thread::sleep(pause);
    let mut dump = Criu::in_dir_of("web", proxy);
    dump.write("core-7.img", RECORDS);
    dump.complete();
    proxy.assert_state("web", SnapshotState::Whole);
    let longest = last.elapsed().as_secs_f64();
    let sum = bed.proxy().seconds("dump_duration_seconds_sum", &[("protocol", "stream")]);
    assert!((pause.as_secs_f64()..=longest).contains(&sum), "{sum} s, at most {longest} s");

    let mut client = PageClient::on(proxy.open_pages("db"), Dialect::Long);
    client.open(TASK).unwrap();
    drop(client);
    eventually_is(|| bed.proxy(), "rounds_total", &[("outcome", "failed")], 1);
    eventually_is(|| bed.cache(), "rounds_total", &[("outcome", "failed")], 1);
    assert_eq!(bed.cache().count("snapshots_ended_total", &[("outcome", "damaged")]), 1);
}

#[test]
fn images_by_name_are_a_dump_of_another_protocol() {
    let bed = Bed::start();
    let mut ctl = Command::new(env!("CARGO_BIN_EXE_criu-imagectl"));
    ctl.arg("--socket").arg(bed.hosts.proxy.dir().join(CONTROL_SOCKET));
    ctl.args(["put", "--list", "--finish", "web", "/etc/hostname"]).stdin(Stdio::null());
    assert!(ctl.status().unwrap().success());
    let scrape = bed.proxy();
    assert_eq!(scrape.count("dump_duration_seconds_count", &[("protocol", "remote")]), 1);
    assert_eq!(scrape.count("dump_duration_seconds_count", &[("protocol", "stream")]), 0);
    assert_eq!(scrape.count("snapshots_ended_total", &[("outcome", "sent")]), 1);
}

#[test]
fn what_fails_and_who_is_refused_is_counted() {
    let bed = Bed::with(&[("link.hello-timeout", "\"300ms\"")]);
    let (proxy, cache) = (&bed.hosts.proxy, &bed.hosts.cache);
    let mut dump = Criu::in_dir_of("web", proxy);
    dump.write("core-7.img", RECORDS);
    drop(dump);
    eventually_is(|| bed.proxy(), "snapshots_ended_total", &[("outcome", "damaged")], 1);
    eventually_is(|| bed.cache(), "snapshots_ended_total", &[("outcome", "damaged")], 1);

    // One that would take the place of another.
    Criu::in_dir_of("db", proxy).complete();
    proxy.assert_state("db", SnapshotState::Whole);
    let mut other = Criu::in_dir_of("db", proxy);
    let _image = other.try_create("core-7.img");
    eventually_is(|| bed.cache(), "snapshots_ended_total", &[("outcome", "refused")], 1);

    // A link on which somebody says what is no preface, and one on which nobody says anything.
    let _silent = TcpStream::connect(bed.hosts.address).unwrap();
    let mut link = TcpStream::connect(bed.hosts.address).unwrap();
    link.write_all(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    eventually_is(|| bed.cache(), "refusals_total", &[("reason", "protocol")], 1);
    eventually_is(|| bed.cache(), "refusals_total", &[("reason", "stalled")], 1);
    let mut restore = Criu::in_dir_of("db", cache);
    restore.say(&[0xff; 4]);
    eventually_is(|| bed.cache(), "refusals_total", &[("reason", "protocol")], 2);
    let scrape = bed.cache();
    for reason in ["uid", "host", "unknown"] {
        assert_eq!(scrape.count("refusals_total", &[("reason", reason)]), 0, "{reason}");
    }
}

#[test]
fn who_waits_for_room_is_seen() {
    let bed = Bed::with(&[("store.max-bytes", "\"64K\""), ("store.quota-wait", "\"1min\"")]);
    let proxy = &bed.hosts.proxy;
    let dump = |id| {
        let mut dump = Criu::in_dir_of(id, proxy);
        dump.write("pages-1.img", &PAGES[..40_000]);
        dump.complete();
    };
    dump("first");
    proxy.assert_state("first", SnapshotState::Whole);
    dump("second");
    eventually_is(|| bed.cache(), "quota_waiting", &[], 1);
    bed.hosts.cache.drop_snapshot("first");
    eventually_is(|| bed.cache(), "snapshots_ended_total", &[("outcome", "whole")], 2);
    assert_eq!(bed.cache().count("quota_waiting", &[]), 0);
}

#[test]
fn many_may_scrape_at_once() {
    let bed = Bed::start();
    let mut dump = Criu::in_dir_of("web", &bed.hosts.proxy);
    dump.write("core-7.img", RECORDS);
    bed.hosts.cache.assert_image("web", "core-7.img", RECORDS.len() as u64);
    let texts: Vec<_> = thread::scope(|scope| {
        let scrapes: Vec<_> = (0..40).map(|_| scope.spawn(|| bed.proxy_text())).collect();
        scrapes.into_iter().map(|scrape| scrape.join().unwrap()).collect()
    });
    let receiving = |text| Scrape::parse(text).count("snapshots", &[("state", "receiving")]);
    assert_eq!(receiving(&texts[0]), 1);
    assert!(texts.iter().all(|text| *text == texts[0]), "they differ");
    dump.complete();
    bed.hosts.proxy.assert_state("web", SnapshotState::Whole);
}
