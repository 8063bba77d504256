//! What is restored is the memory as it was when the process was frozen, whatever the link does meanwhile.
//!
//! While CRIU ends a process that it has dumped, the kernel writes into its memory (tests/bed/threads.rs); what is lent to
//! a cache that does not read would be read after that.

use serde_json::Value;

use crate::bed::{BOTH, Bed, Host, finish, wait_until};

/// Two hosts with a link that is up, and on host A a process whose threads would be dead in changed memory.
fn with_threads() -> (Bed, String) {
    let bed = Bed::up();
    let warm = bed.workload(Host::A, "warm", 1);
    bed.ok(Host::A, &Bed::hooked_dump(&warm, Host::A.work_dir()));
    for snapshot in bed.list(Host::B) {
        bed.ok(Host::B, &["criu-imagectl", "--cache", "drop", snapshot["id"].as_str().unwrap()]);
    }
    let pid = bed.start("threads", Host::A, "web", 1);
    (bed, pid)
}

/// The one snapshot that the cache holds and nobody has taken, when it is whole.
fn whole(bed: &Bed) -> Value {
    let not_taken = || {
        let list = bed.list(Host::B).into_iter();
        list.filter(|snapshot| snapshot["state"] != "taken").collect::<Vec<_>>()
    };
    wait_until("the cache holds it", || {
        let list = not_taken();
        list.len() == 1 && list[0]["state"] == "whole"
    });
    not_taken().remove(0)
}

#[track_caller]
fn assert_unchanged_on_host_b(bed: &Bed, id: &str, pid: &str) {
    bed.ok(Host::B, &["criu-imagectl", "restore", id]);
    let report = bed.report(Host::B, "web", pid);
    assert_eq!(report["changed"], 0, "{report}");
}

#[test]
fn a_dump_by_hand_while_the_cache_reads_nothing_carries_no_changed_memory() {
    let (bed, pid) = with_threads();
    let cache = bed.daemon_pid(Host::B);
    bed.ok(Host::B, &["kill", "-STOP", &cache]);
    bed.ok(Host::A, &Bed::dump(&pid, Host::A.work_dir()));
    assert!(!bed.lives(Host::A, &pid), "CRIU did not wait");
    bed.ok(Host::B, &["kill", "-CONT", &cache]);
    let snapshot = whole(&bed);
    let id = snapshot["id"].as_str().unwrap();
    if snapshot["memory_may_have_changed"] == true {
        // The machine was too busy to copy in time, and both daemons say so.
        let refused = bed.run(Host::B, &["criu-imagectl", "restore", id]);
        let why = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(!refused.status.success() && why.contains("--accept-changed-memory"), "{why}");
        for host in BOTH {
            let told = bed.journal(host, &["MESSAGE_ID=28c8701b10e040f18933be523bf1f2d3"]);
            assert_eq!(told.len(), 1, "{host:?}");
        }
        return;
    }
    assert_unchanged_on_host_b(&bed, id, &pid);
}

/// Whether CRIU has written its images, and the action script asks whether the cache has them.
fn action_script_waits(bed: &Bed) -> bool {
    let asks = bed.run(Host::A, &["pgrep", "-x", "criu-imagectl"]);
    let images =
        bed.list(Host::A).last().map_or(0, |snapshot| snapshot["images"].as_u64().unwrap());
    asks.status.success() && images > 10
}

#[test]
fn with_the_hook_criu_waits_for_the_cache_and_the_memory_is_as_it_was() {
    let (bed, pid) = with_threads();
    let cache = bed.daemon_pid(Host::B);
    bed.ok(Host::B, &["kill", "-STOP", &cache]);
    let dump = bed.spawn(Host::A, &Bed::hooked_dump(&pid, Host::A.work_dir()));
    wait_until("the action script waits", || action_script_waits(&bed));
    assert!(bed.lives(Host::A, &pid));
    bed.ok(Host::B, &["kill", "-CONT", &cache]);
    finish(dump);
    assert!(!bed.lives(Host::A, &pid));
    let snapshot = whole(&bed);
    assert_eq!(snapshot.get("memory_may_have_changed"), None, "{snapshot}");
    assert_unchanged_on_host_b(&bed, snapshot["id"].as_str().unwrap(), &pid);
}

#[test]
fn a_proxy_that_dies_while_the_hook_waits_fails_the_dump_and_the_process_goes_on() {
    let (bed, pid) = with_threads();
    let cache = bed.daemon_pid(Host::B);
    bed.ok(Host::B, &["kill", "-STOP", &cache]);
    let dump = bed.spawn(Host::A, &Bed::hooked_dump(&pid, Host::A.work_dir()));
    wait_until("the action script waits", || action_script_waits(&bed));
    bed.ok(Host::A, &["kill", "-KILL", &bed.daemon_pid(Host::A)]);
    assert!(!dump.wait_with_output().unwrap().status.success());
    bed.ok(Host::B, &["kill", "-CONT", &cache]);
    let before = bed.report(Host::A, "web", &pid)["counter"].as_u64();
    wait_until("it goes on", || bed.report(Host::A, "web", &pid)["counter"].as_u64() > before);
}

#[test]
fn at_the_limit_of_the_proxys_memory_criu_waits_and_loses_nothing() {
    let bed = Bed::up();
    bed.configure(Host::A, "max-bytes", "\"1M\"");
    let pid = bed.workload(Host::A, "web", 64);
    let before = bed.ask(Host::A, "web", &pid);
    let cache = bed.stuck_cache();
    let mut dump = bed.spawn(Host::A, &Bed::dump(&pid, Host::A.work_dir()));
    let held = || bed.ctl(Host::A, &["status"])[0]["held_bytes"].as_u64().unwrap();
    wait_until("the proxy is at its limit", || held() >= 1 << 20);
    assert!(dump.try_wait().unwrap().is_none(), "CRIU waits");
    assert!(held() <= 3 << 20, "{} bytes are held", held());
    bed.ok(Host::B, &["kill", "-CONT", &cache]);
    finish(dump);
    let snapshot = whole(&bed);
    let id = snapshot["id"].as_str().unwrap();
    let mut restore = vec!["criu-imagectl", "restore", id];
    if snapshot["memory_may_have_changed"] == true {
        restore.push("--accept-changed-memory");
    }
    bed.ok(Host::B, &restore);
    assert_eq!(bed.ask(Host::B, "web", &pid).checksum, before.checksum);
    assert_eq!(held(), 0);
}
