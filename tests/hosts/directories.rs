//! Snapshots as directories: out of the cache, and in at the proxy.

use criu_image_relay::criu::pagemap::{Pagemap, Placed};
use criu_image_relay::criu::pages::{Contents, pages_image};

use crate::bed::{BOTH, Bed, Host, Report, wait_until};

#[test]
fn an_extracted_snapshot_is_a_plain_images_directory() {
    let bed = Bed::up();
    let pid = bed.workload(Host::A, "web", 32);
    let before = bed.ask(Host::A, "web", &pid);
    bed.ok(Host::A, &Bed::hooked_dump(&pid, Host::A.work_dir()));
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
    bed.ok(Host::A, &Bed::hooked_dump(&pid, "/tmp/web"));
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
    bed.ok(Host::A, &Bed::hooked_dump(&pid, Host::A.work_dir()));
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

/// Restores a workload of 32 MiB from a directory; its pages come from the page server of the host's daemon.
#[track_caller]
fn restore_lazily(bed: &Bed, host: Host, port: &str, dir: &str) {
    let lazy = ["--page-server", "--address", "127.0.0.1", "--port", port, "-D", dir];
    let mut command = vec!["systemd-run", "--unit=lazy", "criu", "lazy-pages", "-o", "lazy.log"];
    command.extend(lazy);
    bed.ok(host, &command);
    let socket = format!("{dir}/lazy-pages.socket");
    wait_until("the daemon listens", || bed.run(host, &["test", "-S", &socket]).status.success());
    let restore = ["criu", "restore", "--lazy-pages", "-d", "-D", dir, "-o", "restore.log"];
    bed.ok(host, &restore);
}

/// The journal says that they were all asked for. What is not lazy, a few pages, is in the directory.
#[track_caller]
fn assert_asked_for(bed: &Bed, host: Host) {
    // It ends when the process has all its pages, but once in a while CRIU's daemon does not notice that.
    bed.run(host, &["systemctl", "stop", "lazy"]);
    wait_until("the journal tells of it", || {
        let entries = bed.journal(host, &["-u", host.daemon()]);
        let told = entries.iter().find(|entry| entry["MESSAGE"].to_string().contains("asked for"));
        told.is_some_and(|told| {
            told["CRIU_BYTES"].as_str().unwrap().parse::<u64>().unwrap() > 32 << 20
        })
    });
}

#[test]
fn crius_lazy_pages_daemon_gets_its_pages_from_the_cache() {
    let bed = Bed::up();
    bed.ok(Host::B, &["systemctl", "start", "criu-image-cache-pages.socket"]);
    let (pid, before) = viewed(&bed, "/tmp/images");
    restore_lazily(&bed, Host::B, "9995", "/tmp/images");
    assert_eq!(bed.ask(Host::B, "web", &pid).checksum, before.checksum);
    assert_asked_for(&bed, Host::B);
}

/// Wipes the pages that may be restored lazily out of a directory of images.
fn wipe_lazy_pages(bed: &Bed, host: Host, dir: &str, pid: &str) {
    let read = |name: &str| bed.run(host, &["cat", &format!("{dir}/{name}")]).stdout;
    let pagemap = Pagemap::decode(&read(&format!("pagemap-{pid}.img"))).unwrap();
    let name = pages_image(pagemap.pages_id);
    let mut pages = read(&name);
    for Placed { run, offset } in pagemap.layout().unwrap().runs {
        if run.contents() == (Contents::Present { lazy: true }) {
            let (start, len) = (usize::try_from(offset).unwrap(), run.payload_len());
            pages[start..start + usize::try_from(len).unwrap()].fill(0);
        }
    }
    let wiped = tempfile::tempdir().unwrap();
    std::fs::write(wiped.path().join(name), pages).unwrap();
    bed.copy(host, wiped.path(), dir);
}

#[test]
fn a_process_goes_on_at_its_source_with_the_pages_that_the_cache_has() {
    let bed = Bed::up();
    let pid = bed.workload(Host::A, "web", 32);
    let before = bed.ask(Host::A, "web", &pid);
    bed.ok(Host::A, &["mkdir", "/tmp/web", "/tmp/back"]);
    bed.ok(Host::A, &["criu", "dump", "-t", &pid, "-D", "/tmp/web", "-o", "dump.log"]);
    bed.ok(Host::A, &["criu-imagectl", "push", "/tmp/web"]);
    wipe_lazy_pages(&bed, Host::A, "/tmp/web", &pid);

    let open = ["open", "--pages", "--snapshot", "web", "/tmp/back"];
    let port = bed.ctl(Host::A, &open)["port"].as_u64().unwrap().to_string();
    restore_lazily(&bed, Host::A, &port, "/tmp/web");
    assert_eq!(bed.ask(Host::A, "web", &pid).checksum, before.checksum);
    assert_asked_for(&bed, Host::A);
    assert_eq!(bed.list(Host::B)[0]["state"], "whole", "who asks for pages does not take them");
}
