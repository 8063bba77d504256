//! A process moves by one command on each side, and systemd runs the one on host B.

use crate::bed::{Bed, Host, wait_until};

const UNIT: &str = "criu-image-restore@web.service";

fn unit(bed: &Bed, property: &str) -> String {
    let shown = bed.ok(Host::B, &["systemctl", "show", "-P", property, UNIT]);
    shown.trim().to_owned()
}

/// The kernel here may or may not track dirty pages: then there are rounds, else only the final dump.
#[test]
fn a_process_migrates_and_is_restored_by_a_unit_which_it_outlives() {
    let bed = Bed::up();
    let pid = bed.workload(Host::A, "job", 64);
    let before = bed.ask(Host::A, "job", &pid);
    bed.ok(Host::B, &["systemctl", "start", "--no-block", UNIT]);
    wait_until("the restore waits", || unit(&bed, "ActiveState") == "activating");

    let migrate = ["migrate", "-t", &pid, "--snapshot", "web", "--max-downtime", "1min"];
    let summary = bed.ctl(Host::A, &migrate);
    assert_eq!(summary["outcome"], "migrated");
    assert!(!bed.lives(Host::A, &pid));
    wait_until("the restore ends", || unit(&bed, "ActiveState") != "activating");
    assert_eq!(
        (unit(&bed, "ActiveState"), unit(&bed, "Result")),
        ("inactive".into(), "success".into())
    );

    bed.ok(Host::B, &["systemctl", "stop", UNIT]);
    let after = bed.ask(Host::B, "job", &pid);
    assert_eq!((after.pid, &after.checksum), (before.pid, &before.checksum));
    wait_until("the counter goes on", || bed.ask(Host::B, "job", &pid).counter > after.counter);
    for host in [Host::A, Host::B] {
        let left = bed.ok(
            host,
            &["find", "/run/criu-image", "-name", "migrate-*", "-o", "-name", "restore-*"],
        );
        assert_eq!(left, "");
    }
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
    bed.ctl(Host::A, &["migrate", "-t", &pid, "--snapshot", "web", "--max-downtime", "1min"]);
    wait_until("the restore ends", || unit(&bed, "ActiveState") != "activating");
    assert_eq!(unit(&bed, "Result"), "success");
    assert_eq!(bed.ask(Host::B, "job", &pid).pid.to_string(), pid);
}
