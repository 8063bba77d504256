//! A dump fails: towards the source, and nothing else suffers.

use crate::bed::{Bed, Host, wait_until};

/// Stops the proxy, starts a dump and waits until CRIU is in the middle of it.
fn dump_that_is_stuck(bed: &Bed, pid: &str) -> std::process::Child {
    bed.ok(Host::A, &["criu-imagectl", "status"]);
    let daemon = bed.daemon_pid(Host::A);
    bed.ok(Host::A, &["kill", "-STOP", &daemon]);
    let dump = [&Bed::dump(pid, Host::A.work_dir())[..], &["-v4"]].concat();
    let dump = bed.spawn(Host::A, &dump);
    wait_until("CRIU has begun to write pages", || {
        let log = bed.run(Host::A, &["grep", "-q", "Transferring pages", "/tmp/dump.log"]);
        log.status.success()
    });
    dump
}

/// A whole migration works now.
#[track_caller]
fn assert_the_next_dump_works(bed: &Bed, name: &str, pid: &str) {
    let before = bed.ask(Host::A, name, pid);
    bed.ok(Host::A, &Bed::hooked_dump(pid, Host::A.work_dir()));
    bed.ok(Host::B, &Bed::restore(Host::B.work_dir()));
    assert_eq!(bed.ask(Host::B, name, pid).checksum, before.checksum);
}

#[track_caller]
fn assert_goes_on(bed: &Bed, name: &str, pid: &str) {
    let before = bed.ask(Host::A, name, pid);
    wait_until("the process runs on", || bed.ask(Host::A, name, pid).counter > before.counter);
}

#[test]
fn criu_killed_in_the_middle_of_a_dump_damages_its_snapshot_only() {
    let bed = Bed::up();
    let pid = bed.workload(Host::A, "web", 256);
    let mut dump = dump_that_is_stuck(&bed, &pid);
    bed.ok(Host::A, &["pkill", "-KILL", "-x", "criu"]);
    bed.ok(Host::A, &["kill", "-CONT", &bed.daemon_pid(Host::A)]);
    assert!(!dump.wait().unwrap().success());

    wait_until("both sides know that the snapshot is damaged", || {
        [Host::A, Host::B].iter().all(|host| {
            let list = bed.list(*host);
            list.len() == 1 && list[0]["state"] == "damaged"
        })
    });
    for host in [Host::A, Host::B] {
        let reason = bed.list(host)[0]["reason"].as_str().unwrap().to_owned();
        assert!(
            reason.contains("CRIU closed the session without writing inventory.img"),
            "{reason}"
        );
    }
    assert_eq!(bed.ctl(Host::B, &["status"])[0]["held_bytes"], 0);
    assert_goes_on(&bed, "web", &pid);
    assert_the_next_dump_works(&bed, "web", &pid);
}

#[test]
fn a_link_cut_in_the_middle_fails_the_dump_towards_the_source() {
    let bed = Bed::up();
    bed.configure(Host::A, "keep-alive", "\"200ms\"");
    bed.configure(Host::B, "keep-alive", "\"200ms\"");
    let pid = bed.workload(Host::A, "web", 256);
    let cache = bed.stuck_cache();
    let dump = bed.spawn(Host::A, &Bed::hooked_dump(&pid, Host::A.work_dir()));
    wait_until("the dump is under way", || bed.list(Host::A).len() == 2);
    bed.cut();
    assert!(!dump.wait_with_output().unwrap().status.success());
    let list = bed.list(Host::A);
    assert_eq!(list[1]["state"], "damaged", "{list:?}");
    assert_goes_on(&bed, "web", &pid);

    bed.mend();
    bed.ok(Host::B, &["kill", "-CONT", &cache]);
    assert_the_next_dump_works(&bed, "web", &pid);
}

#[test]
fn a_dump_fails_in_time_when_there_is_no_cache_and_the_process_runs_on() {
    let bed = Bed::up();
    bed.configure(Host::A, "give-up-after", "\"1s\"");
    bed.ok(Host::B, &["systemctl", "stop", "criu-image-cache-link.socket", "criu-image-cache"]);
    let pid = bed.workload(Host::A, "web", 64);
    assert!(!bed.run(Host::A, &Bed::dump(&pid, Host::A.work_dir())).status.success());
    let list = bed.list(Host::A);
    let reason = list[0]["reason"].as_str().unwrap();
    assert!(reason.contains("no link to the cache 10.77.0.2:9996 within 1s"), "{reason}");
    let status = bed.ok(Host::A, &["systemctl", "is-active", "criu-image-proxy"]);
    assert_eq!(status.trim(), "active", "the proxy is ready without its cache");
    assert_goes_on(&bed, "web", &pid);

    bed.ok(Host::B, &["systemctl", "start", "criu-image-cache-link.socket"]);
    assert_the_next_dump_works(&bed, "web", &pid);
}

#[test]
fn a_cache_killed_in_the_middle_fails_the_dump_towards_the_source() {
    let bed = Bed::up();
    let pid = bed.workload(Host::A, "web", 256);
    let cache = bed.stuck_cache();
    let dump = bed.spawn(Host::A, &Bed::dump(&pid, Host::A.work_dir()));
    wait_until("the dump is under way", || bed.list(Host::A).len() == 2);
    bed.ok(Host::B, &["kill", "-KILL", &cache]);
    assert!(!dump.wait_with_output().unwrap().status.success());
    assert_goes_on(&bed, "web", &pid);
    wait_until("systemd has started the cache again", || {
        bed.run(Host::B, &["systemctl", "is-active", "criu-image-cache"]).status.success()
    });
    assert_the_next_dump_works(&bed, "web", &pid);
}
