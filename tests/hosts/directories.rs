//! Snapshots as directories: out of the cache, and in at the proxy.

use crate::bed::{BOTH, Bed, Host, Report, wait_until};

#[test]
fn an_extracted_snapshot_is_a_plain_images_directory() {
    let bed = Bed::up();
    let pid = bed.workload(Host::A, "web", 32);
    let before = bed.ask(Host::A, "web", &pid);
    bed.ok(Host::A, &Bed::dump(&pid, Host::A.work_dir()));
    let id = bed.list(Host::B)[0]["id"].as_str().unwrap().to_owned();
    bed.ok(Host::B, &["criu-imagectl", "extract", "--snapshot", &id, "/tmp/images"]);

    let images = bed.ok(Host::B, &["ls", "/tmp/images"]);
    assert_eq!(images.lines().count() as u64, bed.list(Host::B)[0]["images"].as_u64().unwrap());
    for image in images.lines().filter(|name| !name.starts_with("pages-")) {
        let decoded = bed.ok(Host::B, &["crit", "decode", "-i", &format!("/tmp/images/{image}")]);
        assert!(decoded.contains("magic"), "{image}: {decoded}");
    }
    let state = bed.list(Host::B)[0]["state"].as_str().unwrap().to_owned();
    assert_eq!(state, "whole", "looking at a snapshot does not take it");

    bed.ok(Host::B, &["criu", "restore", "-d", "-D", "/tmp/images", "-o", "restore.log"]);
    assert_eq!(bed.ask(Host::B, "web", &pid).checksum, before.checksum);
}

#[test]
fn a_pushed_directory_restores_through_the_stream() {
    let bed = Bed::up();
    let pid = bed.workload(Host::A, "web", 32);
    let before = bed.ask(Host::A, "web", &pid);
    bed.ok(Host::A, &["mkdir", "/tmp/web"]);
    bed.ok(Host::A, &["criu", "dump", "-t", &pid, "-D", "/tmp/web", "-o", "dump.log"]);
    bed.ok(Host::A, &["criu-imagectl", "push", "/tmp/web"]);
    let list = bed.list(Host::B);
    assert_eq!((&list[0]["id"], &list[0]["state"]), (&"web".into(), &"whole".into()));

    bed.ok(Host::B, &Bed::restore(Host::B.work_dir()));
    assert_eq!(bed.ask(Host::B, "web", &pid).checksum, before.checksum);
}

#[test]
fn what_was_taken_is_restored_once_more_only_when_it_is_said() {
    let bed = Bed::up();
    let pid = bed.workload(Host::A, "web", 8);
    let before = bed.ask(Host::A, "web", &pid);
    for host in BOTH {
        bed.ok(host, &["mkdir", "/tmp/web"]);
        bed.ok(host, &["criu-imagectl", "open", "/tmp/web"]);
    }
    bed.ok(Host::A, &Bed::dump(&pid, "/tmp/web"));
    bed.ok(Host::B, &Bed::restore("/tmp/web"));
    bed.ok(Host::B, &["kill", "-KILL", &pid]);
    wait_until("it is gone", || !bed.lives(Host::B, &pid));

    let again = bed.run(Host::B, &Bed::restore("/tmp/web"));
    assert!(!again.status.success(), "the directory is spent");
    let refused = bed.run(Host::B, &["criu-imagectl", "open", "/tmp/web"]);
    let why = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(why.contains("a restore has taken snapshot web"), "{why}");

    bed.ok(Host::B, &["criu-imagectl", "open", "--again", "/tmp/web"]);
    bed.ok(Host::B, &Bed::restore("/tmp/web"));
    assert_eq!(bed.ask(Host::B, "web", &pid).checksum, before.checksum);
}

/// Dumps a workload, and gives its images as a view.
fn viewed(bed: &Bed, dir: &str) -> (String, Report) {
    let pid = bed.workload(Host::A, "web", 32);
    let before = bed.ask(Host::A, "web", &pid);
    bed.ok(Host::A, &Bed::dump(&pid, Host::A.work_dir()));
    let id = bed.list(Host::B)[0]["id"].as_str().unwrap().to_owned();
    bed.ok(Host::B, &["criu-imagectl", "view", "--snapshot", &id, dir]);
    (pid, before)
}

#[test]
fn a_view_restores_without_a_copy_of_the_pages() {
    let bed = Bed::up();
    let (pid, before) = viewed(&bed, "/tmp/images");
    let size: u64 = bed.ok(Host::B, &["du", "-sk", "/tmp/images"])[..]
        .split('\t')
        .next()
        .unwrap()
        .parse()
        .unwrap();
    assert!(size < 4096, "{size} KiB");
    bed.ok(Host::B, &["criu", "restore", "-d", "-D", "/tmp/images", "-o", "restore.log"]);
    assert_eq!(bed.ask(Host::B, "web", &pid).checksum, before.checksum);
}

#[test]
fn crius_lazy_pages_daemon_gets_its_pages_from_the_cache() {
    let bed = Bed::up();
    bed.ok(Host::B, &["systemctl", "start", "criu-image-cache-pages.socket"]);
    let (pid, before) = viewed(&bed, "/tmp/images");
    let lazy = ["--page-server", "--address", "127.0.0.1", "--port", "9995", "-D", "/tmp/images"];
    let mut command = vec!["systemd-run", "--unit=lazy", "criu", "lazy-pages", "-o", "lazy.log"];
    command.extend(lazy);
    bed.ok(Host::B, &command);
    let socket = ["test", "-S", "/tmp/images/lazy-pages.socket"];
    wait_until("the daemon listens", || bed.run(Host::B, &socket).status.success());
    let restore =
        ["criu", "restore", "--lazy-pages", "-d", "-D", "/tmp/images", "-o", "restore.log"];
    bed.ok(Host::B, &restore);
    assert_eq!(bed.ask(Host::B, "web", &pid).checksum, before.checksum);
    wait_until("the journal tells of it", || {
        let entries = bed.journal(Host::B, &["-u", "criu-image-cache"]);
        let told = entries.iter().find(|entry| entry["MESSAGE"].to_string().contains("asked for"));
        // What is not lazy, a few pages, the restore reads from the view.
        told.is_some_and(|told| {
            told["CRIU_BYTES"].as_str().unwrap().parse::<u64>().unwrap() > 32 << 20
        })
    });
}
