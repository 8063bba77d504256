//! The daemons' figures, scraped by an ordinary user while a process moves.

use std::time::Instant;

use crate::bed::{BOTH, Bed, Host, finish, wait_until};
use crate::scrape::Scrape;

fn url(host: Host) -> &'static str {
    match host {
        Host::A => "http://127.0.0.1:9998/metrics",
        Host::B => "http://127.0.0.1:9994/metrics",
    }
}

/// The user that Prometheus is.
const PROMETHEUS: &str = "65534";

/// Scrapes once; with a second argument again and again until there is such a file, and once more. Prints
/// the scrapes at its end, with a line between them: nobody reads before.
const SCRAPER: &str = "import os, sys, time, urllib.request
scrapes = []
over = False
while not over:
    over = len(sys.argv) == 2 or os.path.exists(sys.argv[2])
    scrapes.append(urllib.request.urlopen(sys.argv[1], timeout=5).read().decode())
    time.sleep(0.05)
print('next\\n'.join(scrapes), end='')
";

fn scraper<'a>(host: Host, more: &[&'a str]) -> Vec<&'a str> {
    let user = ["setpriv", "--reuid", PROMETHEUS, "--regid", PROMETHEUS, "--clear-groups"];
    [&user[..], &["python3", "-c", SCRAPER, url(host)], more].concat()
}

/// Serves the figures on both hosts, to Prometheus alone.
fn serve_figures(bed: &Bed) {
    for host in BOTH {
        bed.ok(host, &["systemctl", "start", &format!("{}-metrics.socket", host.daemon())]);
        assert!(!bed.run(host, &scraper(host, &[])).status.success(), "a stranger is served");
        wait_until("the refusal is in the journal", || {
            let refused = bed.journal(host, &["-u", host.daemon(), "PRIORITY=4"]);
            let why = "its uid, 65534, is not in allow-uids, nor in metrics.allow-uids";
            refused.iter().any(|entry| entry["MESSAGE"].as_str().unwrap().ends_with(why))
        });
        let file = if host == Host::A { "proxy" } else { "cache" };
        let file = format!("/etc/criu-image-relay/{file}.toml");
        let script = "/^\\[metrics\\]/,/^\\[log\\]/s|^#allow-uids = .*|allow-uids = [65534]|";
        bed.ok(host, &["sed", "-i", script, &file]);
        bed.ok(host, &["systemctl", "reload", host.daemon()]);
        wait_until("the user may read the figures", || {
            bed.run(host, &scraper(host, &[])).status.success()
        });
        // And nothing else, even in the group.
        let member = ["setpriv", "--reuid", PROMETHEUS, "--regid", "criu-image", "--clear-groups"];
        let status = bed.run(host, &[&member[..], &["criu-imagectl", "status"]].concat());
        assert!(!status.status.success());
    }
}

#[test]
fn figures_are_off_until_their_socket_is_started() {
    let bed = Bed::up();
    for host in BOTH {
        bed.ctl(host, &["status"]);
        let socket = format!("{}-metrics.socket", host.daemon());
        let active = bed.run(host, &["systemctl", "is-active", &socket]);
        assert_eq!(String::from_utf8_lossy(&active.stdout).trim(), "inactive");
        assert!(!bed.run(host, &["python3", "-c", SCRAPER, url(host)]).status.success());
    }
}

#[test]
fn a_migration_is_seen_in_the_figures_of_both_hosts() {
    let bed = Bed::up();
    serve_figures(&bed);
    let pid = bed.workload(Host::A, "web", 512);
    let before = bed.ask(Host::A, "web", &pid);
    let scrapers = BOTH.map(|host| bed.spawn(host, &scraper(host, &["/tmp/enough"])));
    let begun = Instant::now();
    bed.ok(Host::A, &Bed::hooked_dump(&pid, Host::A.work_dir()));
    let id = bed.list(Host::A)[0]["id"].as_str().unwrap().to_owned();
    bed.ctl(Host::A, &["wait", &id]);
    let dumped = begun.elapsed().as_secs_f64();
    let begun = Instant::now();
    bed.ok(Host::B, &Bed::restore(Host::B.work_dir()));
    let restored = begun.elapsed().as_secs_f64();
    bed.ctl(Host::B, &["wait", &id, "--for", "taken"]);
    for host in BOTH {
        bed.ok(host, &["touch", "/tmp/enough"]);
    }
    let [proxy, cache] = scrapers.map(|scraper| {
        let texts = finish(scraper);
        texts.split("next\n").map(Scrape::parse).collect::<Vec<_>>()
    });
    assert_eq!(bed.ask(Host::B, "web", &pid).checksum, before.checksum);

    for scrapes in [&proxy, &cache] {
        let moved = |scrape: &Scrape| scrape.count("link_bytes_total", &[]);
        assert!(scrapes.iter().any(|scrape| {
            let on_its_way = scrape.count("snapshots", &[("state", "receiving")]) == 1;
            on_its_way && (1..512 << 20).contains(&moved(scrape))
        }));
        assert!(scrapes.iter().map(moved).is_sorted(), "a counter goes back");
        assert!(moved(scrapes.last().unwrap()) > 512 << 20);
    }
    let (proxy, cache) = (proxy.last().unwrap(), cache.last().unwrap());
    assert_eq!(proxy.count("snapshots_ended_total", &[("outcome", "sent")]), 1);
    assert_eq!(cache.count("snapshots_ended_total", &[("outcome", "whole")]), 1);
    assert_eq!(cache.count("snapshots_taken_total", &[]), 1);
    // On the socket for figures, and on that for control.
    assert!(cache.count("refusals_total", &[("reason", "uid")]) >= 2, "{cache:?}");
    // The durations are those of what the commands did, and the larger part of them.
    for (scrape, name, took) in
        [(proxy, "dump_duration_seconds", dumped), (cache, "restore_duration_seconds", restored)]
    {
        assert_eq!(scrape.count(&format!("{name}_count"), &[]), 1);
        let sum = scrape.seconds(&format!("{name}_sum"), &[]);
        assert!((took / 10.0..took).contains(&sum), "{name}: {sum} s of {took} s");
    }
}
