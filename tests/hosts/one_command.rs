//! A process moves by one command on each side, and systemd runs the one on host B.

use std::fs::{self, File};
use std::process::Command;

use serde_json::Value;

use crate::bed::{BOTH, Bed, Host, wait_until};

const UNIT: &str = "criu-image-restore@web.service";

fn unit(bed: &Bed, property: &str) -> String {
    let shown = bed.ok(Host::B, &["systemctl", "show", "-P", property, UNIT]);
    shown.trim().to_owned()
}

/// Moves a process away from host A.
#[track_caller]
fn migrate(bed: &Bed, pid: &str) -> Value {
    bed.ctl(Host::A, &["migrate", "-t", pid, "--snapshot", "web", "--max-downtime", "1min"])
}

#[track_caller]
fn nothing_is_left(bed: &Bed) {
    for host in BOTH {
        let left = bed.ok(
            host,
            &["find", "/run/criu-image", "-name", "migrate-*", "-o", "-name", "restore-*"],
        );
        assert_eq!(left, "");
    }
}

/// The kernel here may or may not track dirty pages: then there are rounds, else only the final dump.
#[test]
fn a_process_migrates_and_is_restored_by_a_unit_which_it_outlives() {
    let bed = Bed::up();
    let pid = bed.workload(Host::A, "job", 64);
    let before = bed.ask(Host::A, "job", &pid);
    bed.ok(Host::B, &["systemctl", "start", "--no-block", UNIT]);
    wait_until("the restore waits", || unit(&bed, "ActiveState") == "activating");

    assert_eq!(migrate(&bed, &pid)["outcome"], "migrated");
    wait_until("its parent has heard that it is gone", || !bed.lives(Host::A, &pid));
    wait_until("the restore ends", || unit(&bed, "ActiveState") != "activating");
    assert_eq!(
        (unit(&bed, "ActiveState"), unit(&bed, "Result")),
        ("inactive".into(), "success".into())
    );

    bed.ok(Host::B, &["systemctl", "stop", UNIT]);
    let after = bed.ask(Host::B, "job", &pid);
    assert_eq!((after.pid, &after.checksum), (before.pid, &before.checksum));
    wait_until("the counter goes on", || bed.ask(Host::B, "job", &pid).counter > after.counter);
    assert_timeline(&bed);
    nothing_is_left(&bed);
}

/// Both hosts together tell where the time of the migration went, in words and in a picture.
#[track_caller]
fn assert_timeline(bed: &Bed) {
    let told = bed.ctl(Host::A, &["show", "web", "--timeline"]);
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("a.json"), told.to_string()).unwrap();
    bed.copy(Host::B, dir.path(), "/tmp/timeline");
    let joined = ["--with", "/tmp/timeline/a.json", "--svg", "/tmp/timeline/web.svg"];
    let told = bed.ctl(Host::B, &[&["show", "web", "--timeline"][..], &joined].concat());
    let phases = told["phases"].as_array().unwrap();
    let names: Vec<_> = phases.iter().map(|phase| phase["phase"].as_str().unwrap()).collect();
    // Where the kernel does not track dirty pages there is no round; where it does both daemons tell of it.
    let count = |name| names.iter().filter(|told| **told == name).count();
    assert_eq!(count("round") % 2, 0, "{told}");
    for name in ["dump", "arrival", "acknowledgement", "restore"] {
        assert_eq!(count(name), 1, "{name}: {told}");
    }
    assert_eq!(names.last(), Some(&"restore"), "{told}");
    for phase in phases {
        let time = |of: &str| phase[of].as_u64().unwrap();
        assert!(time("ended_ms") >= time("begun_ms") && phase["failed"] == false, "{told}");
    }
    let bytes = |of: &[(&str, &str)]| {
        let is = |p: &&Value| {
            of.iter().any(|(daemon, name)| p["daemon"] == *daemon && p["phase"] == *name)
        };
        phases.iter().filter(is).map(|phase| phase["bytes"].as_u64().unwrap()).sum::<u64>()
    };
    assert!(bytes(&[("proxy", "round"), ("proxy", "dump")]) > 64 << 20, "{told}");
    assert!(bytes(&[("cache", "arrival")]) > 64 << 20, "{told}");

    // Each is a bar of what an XML parser takes for a picture.
    let svg = bed.ok(Host::B, &["cat", "/tmp/timeline/web.svg"]);
    let parse = "import sys, xml.dom.minidom as d\n\
                 for r in d.parse(sys.stdin).getElementsByTagName('rect'): print(r.getAttribute('class'))";
    let drawn = dir.path().join("web.svg");
    fs::write(&drawn, svg).unwrap();
    let mut parser = Command::new("python3");
    let parsed = parser.args(["-c", parse]).stdin(File::open(&drawn).unwrap()).output().unwrap();
    let bars = String::from_utf8(parsed.stdout).unwrap();
    let bars: Vec<_> = bars.lines().skip(1).collect();
    assert_eq!(bars, names);
}

/// Each would hide from the other what was written to between two rounds.
#[test]
fn a_process_that_is_being_moved_is_not_moved_by_a_second_migration() {
    let bed = Bed::up();
    let pid = bed.workload(Host::A, "job", 8);
    let slow = "#!/bin/sh\ntouch /tmp/begun\nuntil [ -e /tmp/go ]; do sleep 0.02; done\nexec criu \"$@\"\n";
    bed.ok(Host::A, &["sh", "-c", &format!("printf '%s' '{slow}' >/tmp/criu; chmod +x /tmp/criu")]);
    let migrate = ["criu-imagectl", "migrate", "-t", &pid, "--max-downtime", "1min", "--snapshot"];
    let first = bed.spawn(Host::A, &[&migrate[..], &["web", "--criu", "/tmp/criu"]].concat());
    wait_until("the first is under way", || {
        bed.run(Host::A, &["test", "-e", "/tmp/begun"]).status.success()
    });
    let second = bed.run(Host::A, &[&migrate[..], &["other"]].concat());
    let stderr = String::from_utf8_lossy(&second.stderr);
    assert_eq!(second.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("is being moved by another criu-imagectl migrate"), "{stderr}");
    bed.ok(Host::A, &["touch", "/tmp/go"]);
    let first = first.wait_with_output().unwrap();
    assert!(first.status.success(), "{first:?}");
    bed.ok(Host::B, &["criu-imagectl", "restore", "web"]);
    nothing_is_left(&bed);
}

#[test]
fn a_restore_that_is_stopped_while_it_waits_may_be_started_again() {
    let bed = Bed::up();
    bed.ok(Host::B, &["systemctl", "start", "--no-block", UNIT]);
    wait_until("the restore waits", || unit(&bed, "ActiveState") == "activating");
    bed.ok(Host::B, &["systemctl", "stop", UNIT]);
    let left = bed.ok(Host::B, &["find", "/run/criu-image", "-name", "restore-*"]);
    assert_eq!(left, "");
    let journal = bed.ok(Host::B, &["journalctl", "-u", UNIT, "-o", "cat"]);
    assert!(journal.contains("interrupted before snapshot web was whole"), "{journal}");

    // It may be started again, also by another command.
    bed.ok(Host::B, &["systemctl", "start", "--no-block", UNIT]);
    wait_until("the restore waits", || unit(&bed, "ActiveState") == "activating");
    let pid = bed.workload(Host::A, "job", 8);
    migrate(&bed, &pid);
    wait_until("the restore ends", || unit(&bed, "ActiveState") != "activating");
    assert_eq!(unit(&bed, "Result"), "success");
    assert_eq!(bed.ask(Host::B, "job", &pid).pid.to_string(), pid);
}

#[test]
fn a_unit_restores_from_a_view_once() {
    let bed = Bed::up();
    let dir = format!("/run/systemd/system/{UNIT}.d");
    let settings = "[Service]\nEnvironment=RESTORE_OPTIONS=--view\n";
    bed.ok(Host::B, &["sh", "-c", &format!("mkdir -p {dir}; printf '{settings}' >{dir}/a.conf")]);
    bed.ok(Host::B, &["systemctl", "daemon-reload"]);
    bed.ok(Host::B, &["systemctl", "start", "--no-block", UNIT]);
    wait_until("the restore waits", || unit(&bed, "ActiveState") == "activating");

    let pid = bed.workload(Host::A, "job", 64);
    let before = bed.ask(Host::A, "job", &pid);
    migrate(&bed, &pid);
    wait_until("the restore ends", || unit(&bed, "ActiveState") != "activating");
    assert_eq!(unit(&bed, "Result"), "success");
    let after = bed.ask(Host::B, "job", &pid);
    assert_eq!((after.pid, &after.checksum), (before.pid, &before.checksum));
    assert_eq!(bed.list(Host::B)[0]["state"], "taken");
    nothing_is_left(&bed);

    let again = bed.run(Host::B, &["criu-imagectl", "restore", "--view", "web"]);
    assert_eq!(again.status.code(), Some(1), "{again:?}");
    let why = String::from_utf8_lossy(&again.stderr).into_owned();
    assert!(why.contains("a restore has taken snapshot web"), "{why}");
}

#[test]
fn a_view_that_was_not_restored_is_restored_even_if_its_snapshot_is_dropped_in_the_middle() {
    let bed = Bed::up();
    let pid = bed.workload(Host::A, "job", 64);
    let before = bed.ask(Host::A, "job", &pid);
    migrate(&bed, &pid);
    let restore = ["criu-imagectl", "restore", "--view", "web", "--", "--action-script"];
    let failed = bed.run(Host::B, &[&restore[..], &["/bin/false"]].concat());
    assert_eq!(failed.status.code(), Some(1), "{failed:?}");
    assert_eq!(bed.list(Host::B)[0]["state"], "whole");
    nothing_is_left(&bed);

    // CRIU has not opened the pages then.
    let drop =
        "[ $CRTOOLS_SCRIPT_ACTION != pre-restore ] || /usr/bin/criu-imagectl --cache drop web";
    let write = format!("printf '#!/bin/sh\n{drop}\n' >/tmp/drop; chmod 755 /tmp/drop");
    bed.ok(Host::B, &["sh", "-c", &write]);
    let restored = bed.run(Host::B, &[&restore[..], &["/tmp/drop"]].concat());
    let told = String::from_utf8_lossy(&restored.stderr).into_owned();
    assert!(restored.status.success(), "{told}");
    assert!(told.contains("the process runs, but the cache could not be told"), "{told}");
    assert_eq!(bed.ask(Host::B, "job", &pid).checksum, before.checksum);
    assert!(bed.list(Host::B).is_empty());
    assert_eq!(bed.ctl(Host::B, &["status"])[0]["held_bytes"], 0);
    nothing_is_left(&bed);
}

/// CRIU itself says only that its page server does not answer.
#[test]
fn a_migration_says_why_the_cache_refuses_it() {
    let bed = Bed::up();
    migrate(&bed, &bed.workload(Host::A, "before", 8));
    let pid = bed.workload(Host::A, "job", 8);
    let migrate = ["criu-imagectl", "migrate", "-t", &pid, "--max-downtime", "1min", "--snapshot"];
    let refused = bed.run(Host::A, &[&migrate[..], &["web"]].concat());
    let words = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success(), "{words}");
    assert!(words.contains("a snapshot web is held already"), "{words}");
    bed.ask(Host::A, "job", &pid);
    // What was held is as it was.
    let held = bed.list(Host::B);
    assert_eq!(
        (held.len(), &held[0]["id"], &held[0]["state"]),
        (1, &"web".into(), &"whole".into())
    );

    // Who waits is told what happened to the process, in one line.
    let slow = "#!/bin/sh\ncase \"$*\" in *' dump '*|dump*) kill -9 $PID; sleep 0.1;; esac\nexec criu \"$@\"\n";
    let slow = slow.replace("$PID", &pid);
    bed.ok(Host::A, &["sh", "-c", &format!("printf '%s' '{slow}' >/tmp/criu; chmod +x /tmp/criu")]);
    let waits = bed.spawn(Host::B, &["criu-imagectl", "restore", "other", "--timeout", "1min"]);
    wait_until("the restore waits", || bed.list(Host::B).iter().any(|one| one["id"] == "other"));
    let failed = bed.run(Host::A, &[&migrate[..], &["other", "--criu", "/tmp/criu"]].concat());
    assert!(!failed.status.success(), "{failed:?}");
    let waited = waits.wait_with_output().unwrap();
    let words = String::from_utf8_lossy(&waited.stderr);
    assert_eq!(waited.status.code(), Some(5), "{words}");
    assert!(words.contains("its process ended while it was moved: "), "{words}");
    nothing_is_left(&bed);
}
