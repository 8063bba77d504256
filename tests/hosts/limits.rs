//! What many images and much memory cost the daemons.

use std::time::Duration;

use crate::bed::{BOTH, Bed, Host};

/// A number from one of the daemon's files in /proc.
fn daemon_figure(bed: &Bed, host: Host, pid: &str, file: &str, field: &str) -> u64 {
    let text = bed.ok(host, &["cat", &format!("/proc/{pid}/{file}")]);
    let line = text.lines().find_map(|line| line.strip_prefix(field)).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

/// Takes the figure again and again until the dump has ended; returns the largest.
fn watch(mut dump: std::process::Child, mut figure: impl FnMut() -> u64) -> u64 {
    let mut largest = 0;
    loop {
        largest = largest.max(figure());
        if let Some(status) = dump.try_wait().unwrap() {
            assert!(status.success());
            return largest;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn two_thousand_images_need_no_more_threads() {
    let bed = Bed::up();
    // Each task of a tree has seven images of its own.
    let tree = "for task in $(seq 300); do sleep 10000 & done; wait";
    let unit = ["--unit=tree", "-p", "StandardInput=null", "-p", "StandardOutput=null"];
    let more = ["-p", "StandardError=null", "-p", "Type=exec", "/bin/sh", "-c", tree];
    bed.ok(Host::A, &[&["systemd-run"], &unit[..], &more].concat());
    let tasks = || {
        let count = bed.run(Host::A, &["pgrep", "-c", "-x", "sleep"]);
        String::from_utf8_lossy(&count.stdout).trim().parse().unwrap_or(0)
    };
    crate::bed::wait_until("the tree has grown", || tasks() == 300);
    let pid = bed.ok(Host::A, &["systemctl", "show", "-P", "MainPID", "tree"]).trim().to_owned();

    let threads = |host, pid: &str| daemon_figure(&bed, host, pid, "status", "Threads:");
    let daemons = BOTH.map(|host| {
        bed.ctl(host, &["status"]);
        let pid = bed.daemon_pid(host);
        let idle = threads(host, &pid);
        assert!(idle < 10, "{idle} threads");
        (host, pid, idle)
    });
    let dump = bed.spawn(Host::A, &Bed::hooked_dump(&pid, Host::A.work_dir()));
    let most = watch(dump, || {
        let surplus =
            daemons.each_ref().map(|(host, pid, idle)| threads(*host, pid).saturating_sub(*idle));
        surplus.into_iter().max().unwrap()
    });
    assert_eq!(most, 0, "the number of threads does not move");
    let images = bed.list(Host::B)[0]["images"].as_u64().unwrap();
    assert!(images >= 2000, "{images} images");

    bed.ok(Host::B, &Bed::restore(Host::B.work_dir()));
    let tasks = bed.ok(Host::B, &["pgrep", "-c", "-x", "sleep"]);
    assert_eq!(tasks.trim(), "300");
    for (host, pid, idle) in &daemons {
        assert_eq!(threads(*host, pid), *idle);
    }
}

#[test]
fn the_proxy_stays_small_while_four_gib_pass() {
    let bed = Bed::up();
    let pid = bed.workload(Host::A, "big", 4096);
    let before = bed.ask(Host::A, "big", &pid);
    bed.ctl(Host::A, &["status"]);
    let proxy = bed.daemon_pid(Host::A);
    let dump = bed.spawn(Host::A, &Bed::hooked_dump(&pid, Host::A.work_dir()));
    let pss = watch(dump, || daemon_figure(&bed, Host::A, &proxy, "smaps_rollup", "Pss:"));
    println!("largest Pss of the proxy: {pss} KiB");
    assert!(pss < 20 << 10, "{pss} KiB");
    bed.ok(Host::B, &Bed::restore(Host::B.work_dir()));
    assert_eq!(bed.ask(Host::B, "big", &pid).checksum, before.checksum);
}
