//! A restore that fails, or whose cache goes away, costs nothing.

use std::process::Output;

use criu_image_relay::daemon::journal::QUOTA_REACHED;

use crate::bed::{Bed, Host, finish, wait_until};

const UNIT: &str = "criu-image-restore@web.service";

fn unit(bed: &Bed, property: &str) -> String {
    bed.ok(Host::B, &["systemctl", "show", "-P", property, UNIT]).trim().to_owned()
}

/// Moves a process to the cache, under an id.
#[track_caller]
fn migrate(bed: &Bed, pid: &str, id: &str) {
    let migrate = ["migrate", "-t", pid, "--snapshot", id, "--max-downtime", "1min"];
    assert_eq!(bed.ctl(Host::A, &migrate)["outcome"], "migrated");
}

fn restore(bed: &Bed, options: &[&str]) -> Output {
    bed.run(Host::B, &[&["criu-imagectl", "restore"], options].concat())
}

#[track_caller]
fn complains(output: &Output, code: i32, of: &[&str]) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{said}");
    for part in of {
        assert!(said.contains(part), "{part:?} is not in {said}");
    }
}

#[track_caller]
fn state(bed: &Bed, id: &str) -> String {
    let list = bed.list(Host::B);
    let found = list.iter().find(|snapshot| snapshot["id"] == id);
    found.map_or_else(|| "gone".into(), |found| found["state"].as_str().unwrap().into())
}

/// Starts a process on host B that has a pid.
#[track_caller]
fn occupy(bed: &Bed, pid: &str) {
    let before = pid.parse::<u64>().unwrap() - 1;
    let start = format!(
        "echo {before} >/proc/sys/kernel/ns_last_pid; sleep 600 >/dev/null 2>&1 </dev/null & echo $!"
    );
    wait_until("a process has the pid", || {
        let got = bed.ok(Host::B, &["sh", "-c", &start]);
        got.trim() == pid || bed.run(Host::B, &["kill", got.trim()]).status.code().is_none()
    });
}

#[test]
fn a_restore_whose_pid_is_not_free_leaves_its_snapshot_whole_for_as_long_as_it_takes() {
    let bed = Bed::up();
    bed.configure(Host::B, "keep", "\"1s\"");
    let pid = bed.workload(Host::A, "job", 16);
    let other = bed.workload(Host::A, "other", 8);
    let before = bed.ask(Host::A, "job", &pid);
    migrate(&bed, &pid, "web");
    occupy(&bed, &pid);

    let named = format!("pid {pid} is not free: sleep 600 has it");
    complains(&restore(&bed, &["web"]), 1, &[&named, "criu-imagectl restore web"]);
    assert_eq!(state(&bed, "web"), "whole");
    let told = ["CRIU_SNAPSHOT=web", "-u", "criu-image-cache", "-p", "warning"];
    let told = bed.journal(Host::B, &told);
    let told = told.last().unwrap()["MESSAGE"].as_str().unwrap().to_owned();
    assert!(told.contains("snapshot web is whole and may be restored"), "{told}");

    // By systemd, which does not try it again by itself.
    assert!(!bed.run(Host::B, &["systemctl", "start", UNIT]).status.success());
    assert_eq!((unit(&bed, "Result"), unit(&bed, "NRestarts")), ("exit-code".into(), "0".into()));

    // What is taken after that is gone before it.
    migrate(&bed, &other, "other");
    bed.ok(Host::B, &["criu-imagectl", "restore", "other"]);
    wait_until("store.keep is over", || state(&bed, "other") == "gone");
    assert_eq!(state(&bed, "web"), "whole");
    bed.ok(Host::B, &["systemctl", "restart", "criu-image-cache"]);

    bed.ok(Host::B, &["kill", "-9", &pid]);
    wait_until("the pid is free", || !bed.lives(Host::B, &pid));
    bed.ok(Host::B, &["criu-imagectl", "restore", "web"]);
    let after = bed.ask(Host::B, "job", &pid);
    assert_eq!((after.pid, &after.checksum), (before.pid, &before.checksum));
    wait_until("store.keep is over", || state(&bed, "web") == "gone");
    complains(&restore(&bed, &["--again", "web"]), 4, &["snapshot web is not held any more"]);
}

#[test]
fn what_a_killed_restore_left_is_named_and_the_snapshot_is_there() {
    let bed = Bed::up();
    let pid = bed.workload(Host::A, "job", 16);
    let before = bed.ask(Host::A, "job", &pid);
    migrate(&bed, &pid, "web");
    let die = "printf '#!/bin/sh\n[ $CRTOOLS_SCRIPT_ACTION != post-restore ] || kill -9 $PPID\n' >/tmp/die";
    bed.ok(Host::B, &["sh", "-c", &format!("{die}; chmod 755 /tmp/die")]);
    let killed = restore(&bed, &["web", "--", "--action-script", "/tmp/die"]);
    complains(&killed, 1, &["SIGKILL", "criu-imagectl restore web"]);
    assert_eq!(state(&bed, "web"), "whole");

    let named = format!("pid {pid} is not free");
    let kill = format!("kill -9 {pid}");
    let left = "is left of a restore that was killed";
    complains(&restore(&bed, &["web"]), 1, &[&named, "workload", left, &kill]);
    bed.ok(Host::B, &["kill", "-9", &pid]);
    wait_until("the pid is free", || !bed.lives(Host::B, &pid));
    bed.ok(Host::B, &["criu-imagectl", "restore", "web"]);
    assert_eq!(bed.ask(Host::B, "job", &pid).checksum, before.checksum);
}

#[test]
fn a_restore_outlives_a_restart_of_its_cache_in_mid_pages_and_is_told_that_the_migration_failed() {
    let bed = Bed::up();
    let pid = bed.workload(Host::A, "job", 48);
    let other = bed.workload(Host::A, "other", 32);
    let before = bed.ask(Host::A, "job", &pid);
    // In the middle of the pages they wait for room.
    bed.configure(Host::B, "max-bytes", "\"64M\"");
    migrate(&bed, &other, "other");
    bed.ok(Host::B, &["systemctl", "start", "--no-block", UNIT]);
    wait_until("the restore waits", || state(&bed, "web") == "awaited");

    let cache = bed.daemon_pid(Host::B);
    let migration = ["criu-imagectl", "migrate", "-t", &pid, "--snapshot", "web"];
    let migration = [&migration[..], &["--max-downtime", "1min"]].concat();
    let failing = bed.spawn(Host::A, &migration);
    let reached = format!("MESSAGE_ID={QUOTA_REACHED}");
    wait_until("pages wait for room", || !bed.journal(Host::B, &[&reached]).is_empty());
    bed.configure(Host::B, "max-bytes", "\"1G\"");
    // The migration hears of it when the restore has found the new cache: who comes later has heard nothing, and waits.
    let proxy = bed.daemon_pid(Host::A);
    bed.ok(Host::A, &["kill", "-STOP", &proxy]);
    bed.ok(Host::B, &["kill", "-KILL", &cache]);
    wait_until("the restore waits again", || state(&bed, "web") == "awaited");
    assert_eq!(unit(&bed, "ActiveState"), "activating");
    bed.ok(Host::A, &["kill", "-CONT", &proxy]);
    complains(&failing.wait_with_output().unwrap(), 1, &[&format!("process {pid} runs on here")]);
    let runs = bed.ask(Host::A, "job", &pid);
    wait_until("it runs at its source", || bed.ask(Host::A, "job", &pid).counter > runs.counter);

    // The process will not come, so who waits for it need not wait any longer, and is not started again.
    wait_until("the restore ends", || unit(&bed, "ActiveState") == "failed");
    let ended = ["ExecMainStatus", "NRestarts"].map(|property| unit(&bed, property));
    assert_eq!(ended, ["5", "0"]);
    let journal = bed.ok(Host::B, &["journalctl", "-u", UNIT, "-o", "cat"]);
    assert!(journal.contains("the cache has gone, and is waited for"), "{journal}");
    assert!(journal.contains("its migration failed, and it runs on at the source"), "{journal}");
    assert!(!journal.contains("allow-uids"), "{journal}");

    // What failed is in nobody's way.
    bed.ok(Host::B, &["systemctl", "start", "--no-block", UNIT]);
    finish(bed.spawn(Host::A, &migration));
    wait_until("the restore ends", || unit(&bed, "ActiveState") != "activating");
    assert_eq!((unit(&bed, "Result"), unit(&bed, "NRestarts")), ("success".into(), "0".into()));
    let after = bed.ask(Host::B, "job", &pid);
    assert_eq!((after.pid, &after.checksum), (before.pid, &before.checksum));
    assert_eq!(state(&bed, "web"), "taken");
}

/// A restore that waits, and is stopped so that what happens meanwhile comes between two of its steps. Returns its pid.
#[track_caller]
fn stopped_restore(bed: &Bed) -> String {
    bed.ok(Host::B, &["systemctl", "start", "--no-block", UNIT]);
    wait_until("the restore waits", || {
        bed.run(Host::B, &["criu-imagectl", "list"]).status.success()
            && state(bed, "web") == "awaited"
    });
    let pid = unit(bed, "MainPID");
    bed.ok(Host::B, &["kill", "-STOP", &pid]);
    pid
}

/// Lets it go on, and returns its exit status and what it says.
#[track_caller]
fn goes_on(bed: &Bed, pid: &str) -> (String, String) {
    bed.ok(Host::B, &["kill", "-CONT", pid]);
    wait_until("the restore ends", || unit(bed, "ActiveState") != "activating");
    let said = bed.ok(Host::B, &["journalctl", "-u", UNIT, "-o", "cat"]);
    assert!(said.contains("the cache has gone, and is waited for"), "{said}");
    (unit(bed, "ExecMainStatus"), said)
}

#[test]
fn a_restore_whose_cache_is_restarted_when_the_snapshot_is_whole_goes_on_with_it() {
    let bed = Bed::up();
    let restore = stopped_restore(&bed);
    let pid = bed.workload(Host::A, "job", 8);
    let before = bed.ask(Host::A, "job", &pid);
    migrate(&bed, &pid, "web");
    bed.ok(Host::B, &["systemctl", "restart", "criu-image-cache"]);
    let (status, said) = goes_on(&bed, &restore);
    assert_eq!((status.as_str(), unit(&bed, "NRestarts").as_str()), ("0", "0"), "{said}");
    assert_eq!(bed.ask(Host::B, "job", &pid).checksum, before.checksum);
    assert_eq!(state(&bed, "web"), "taken");
}

#[test]
fn a_restore_that_finds_its_cache_again_hears_of_a_migration_that_failed_meanwhile() {
    let bed = Bed::up();
    let restore = stopped_restore(&bed);
    bed.ok(Host::B, &["systemctl", "restart", "criu-image-cache"]);
    let pid = bed.workload(Host::A, "job", 8);
    let failing = ["criu-imagectl", "migrate", "-t", &pid, "--snapshot", "web", "--force"];
    let failing = [&failing[..], &["--max-rounds", "0", "--criu", "/bin/false"]].concat();
    complains(&bed.run(Host::A, &failing), 1, &["runs on here"]);
    assert_eq!(state(&bed, "web"), "damaged");
    let (status, said) = goes_on(&bed, &restore);
    assert_eq!(status, "5", "{said}");
    assert!(said.contains("its migration failed, and it runs on at the source"), "{said}");
}

#[test]
fn of_two_restores_of_one_id_the_second_is_refused_by_name() {
    let bed = Bed::up();
    bed.ok(Host::B, &["systemctl", "start", "--no-block", UNIT]);
    wait_until("the restore waits", || {
        bed.run(Host::B, &["criu-imagectl", "list"]).status.success()
            && state(&bed, "web") == "awaited"
    });
    complains(&restore(&bed, &["web"]), 1, &["another restore has snapshot web", "--copy"]);
    bed.ok(Host::B, &["mkdir", "/tmp/web"]);
    bed.ok(Host::B, &["criu-imagectl", "--cache", "open", "/tmp/web"]);
    assert!(!bed.run(Host::B, &Bed::restore("/tmp/web")).status.success());

    let pid = bed.workload(Host::A, "job", 8);
    migrate(&bed, &pid, "web");
    wait_until("the restore ends", || unit(&bed, "ActiveState") != "activating");
    assert_eq!(unit(&bed, "Result"), "success");
    assert_eq!(bed.ask(Host::B, "job", &pid).pid.to_string(), pid);
    let refused = "a restore has taken snapshot web";
    complains(&restore(&bed, &["web"]), 1, &[refused]);
}

#[test]
fn a_unit_waits_for_a_cache_that_is_not_there_yet() {
    let bed = Bed::up();
    let dir = format!("/run/systemd/system/{UNIT}.d");
    let settings = "[Service]\nEnvironment=\"RESTORE_OPTIONS=--socket /run/late.sock\"\n";
    bed.ok(Host::B, &["sh", "-c", &format!("mkdir -p {dir}; printf '{settings}' >{dir}/a.conf")]);
    bed.ok(Host::B, &["systemctl", "daemon-reload"]);
    bed.ok(Host::B, &["systemctl", "start", "--no-block", UNIT]);
    wait_until("systemd starts it again", || unit(&bed, "NRestarts") != "0");
    bed.ok(Host::B, &["ln", "-s", "/run/criu-image/cache/control.sock", "/run/late.sock"]);
    wait_until("the restore waits", || state(&bed, "web") == "awaited");
    let pid = bed.workload(Host::A, "job", 8);
    migrate(&bed, &pid, "web");
    wait_until("the restore ends", || unit(&bed, "ActiveState") != "activating");
    assert_eq!(unit(&bed, "Result"), "success");
}
