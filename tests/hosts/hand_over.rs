//! A hand-over that breaks off: the process is not left frozen, and what is said of it and of the cache's copy is true.

use std::process::{Child, Command};
use std::time::{Duration, Instant};

use crate::bed::{Bed, Host, build, repository, wait_until};

/// How long a process may stay frozen after the fault.
const FROZEN_AT_MOST: Duration = Duration::from_secs(15);
/// The user's action script comes before the hand-over: nothing of that has been sent when it waits.
const SCRIPT: &str = "#!/bin/sh
case $CRTOOLS_SCRIPT_ACTION in
pre-dump) [ ! -e /tmp/stop ] || kill -STOP $(cat /tmp/stop);;
post-dump) touch /tmp/reached; until [ -e /tmp/go-on ]; do sleep 0.02; done;;
esac
";

fn bed() -> Bed {
    let bed = Bed::up();
    bed.configure(Host::A, "ack-timeout", "\"3s\"");
    let make = format!("cat >/tmp/script <<'EOF'\n{SCRIPT}EOF\nchmod 755 /tmp/script");
    bed.ok(Host::A, &["sh", "-c", &make]);
    bed.ok(Host::A, &["criu-imagectl", "--proxy", "status"]);
    bed
}

fn signal(bed: &Bed, host: Host, which: &str, pid: &str) {
    bed.ok(host, &["sh", "-c", &format!("kill -{which} {pid}")]);
}

/// Begins to move a process, with its pid in a file.
fn migrate(bed: &Bed, pid: &str, id: &str) -> Child {
    let migrate = format!(
        "echo $$ >/tmp/migrate.pid; exec criu-imagectl migrate -t {pid} --snapshot {id} \
         --max-rounds 0 --force -- --action-script /tmp/script"
    );
    bed.spawn(Host::A, &["sh", "-c", &migrate])
}

/// Whether CRIU holds a process of host A. It sleeps like any other while CRIU's own code in it sends pages.
fn is_frozen(bed: &Bed, pid: &str) -> bool {
    let tracer =
        bed.ok(Host::A, &["sed", "-n", "s/^TracerPid:\\s*//p", &format!("/proc/{pid}/status")]);
    tracer.trim() != "0"
}

/// Waits until a process of host A runs, and counts.
#[track_caller]
fn runs_on(bed: &Bed, name: &str, pid: &str) {
    let since = Instant::now();
    wait_until("it is not frozen", || !is_frozen(bed, pid));
    assert!(since.elapsed() < FROZEN_AT_MOST, "{:?}", since.elapsed());
    let before = bed.ask(Host::A, name, pid).counter;
    wait_until("it counts", || bed.ask(Host::A, name, pid).counter > before);
}

fn at_the_cache(bed: &Bed, id: &str) -> String {
    let list = bed.list(Host::B);
    let found = list.iter().find(|snapshot| snapshot["id"] == id);
    found.map_or_else(|| "gone".into(), |found| found["state"].as_str().unwrap().into())
}

/// Everything has been sent, and the cache, which is stopped, has acknowledged nothing of it. Returns what moves the
/// process, and the cache.
fn unacknowledged(bed: &Bed, pid: &str, id: &str) -> (Child, String) {
    bed.ok(Host::A, &["rm", "-f", "/tmp/reached", "/tmp/go-on", "/tmp/stop"]);
    let migration = migrate(bed, pid, id);
    wait_until("the process is frozen", || {
        bed.run(Host::A, &["test", "-e", "/tmp/reached"]).status.success()
    });
    let cache = bed.daemon_pid(Host::B);
    signal(bed, Host::B, "STOP", &cache);
    bed.ok(Host::A, &["touch", "/tmp/go-on"]);
    wait_until("all is sent", || {
        let told = bed.ctl(Host::A, &["show", id, "--timeline"]);
        let phases = told["phases"].as_array().unwrap();
        phases.iter().any(|phase| phase["phase"] == "acknowledgement")
    });
    assert!(is_frozen(bed, pid));
    (migration, cache)
}

/// How a migration ended, and what it said.
fn ended(migration: Child) -> (Option<i32>, String) {
    let output = migration.wait_with_output().unwrap();
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn a_process_whose_images_are_sent_and_not_acknowledged_runs_on_when_the_proxy_is_killed() {
    let bed = bed();
    let pid = bed.workload(Host::A, "job", 8);
    let (migration, cache) = unacknowledged(&bed, &pid, "web");
    let proxy = bed.daemon_pid(Host::A);
    signal(&bed, Host::A, "KILL", &proxy);
    runs_on(&bed, "job", &pid);

    // The next proxy has the cache give up what its predecessor sent.
    signal(&bed, Host::B, "CONT", &cache);
    let (status, words) = ended(migration);
    let dropped = format!("process {pid} runs on here, and the cache has dropped its copy of web");
    assert!(status == Some(1) && words.contains(&dropped), "{status:?}: {words}");
    assert_eq!(at_the_cache(&bed, "web"), "damaged");
    runs_on(&bed, "job", &pid);
}

#[test]
fn a_process_whose_images_are_sent_and_not_acknowledged_runs_on_when_its_migration_is_interrupted()
{
    let bed = bed();
    let interrupt = "kill -INT $(cat /tmp/migrate.pid)";
    let pid = bed.workload(Host::A, "job", 8);
    let (migration, cache) = unacknowledged(&bed, &pid, "web");
    bed.ok(Host::A, &["sh", "-c", interrupt]);
    runs_on(&bed, "job", &pid);
    // The cache does not answer: nobody can know.
    let (status, words) = ended(migration);
    let unknown =
        format!("process {pid} runs on here. Whether the cache has snapshot web is not known");
    assert!(status == Some(9) && words.contains(&unknown), "{status:?}: {words}");
    assert!(words.contains("criu-imagectl --cache drop web"), "{words}");
    signal(&bed, Host::B, "CONT", &cache);
    wait_until("the withdrawal has come", || at_the_cache(&bed, "web") == "damaged");

    let (migration, cache) = unacknowledged(&bed, &pid, "again");
    bed.ok(Host::A, &["sh", "-c", interrupt]);
    // Else the cache might be faster.
    wait_until("it is called off", || {
        let decided = "test -h /run/criu-image/migrate-*/decision";
        bed.run(Host::A, &["sh", "-c", decided]).status.success()
    });
    signal(&bed, Host::B, "CONT", &cache);
    runs_on(&bed, "job", &pid);
    let (status, words) = ended(migration);
    let dropped =
        format!("process {pid} runs on here, and the cache has dropped its copy of again");
    assert!(status == Some(8) && words.contains(&dropped), "{status:?}: {words}");
    assert_eq!(at_the_cache(&bed, "again"), "damaged");
}

#[test]
fn a_process_whose_pages_go_to_a_proxy_that_stands_still_runs_on() {
    let bed = bed();
    let pid = bed.workload(Host::A, "job", 64);
    let proxy = bed.daemon_pid(Host::A);
    bed.ok(Host::A, &["sh", "-c", &format!("echo {proxy} >/tmp/stop")]);
    let migration = migrate(&bed, &pid, "web");
    wait_until("the process is frozen", || is_frozen(&bed, &pid));
    runs_on(&bed, "job", &pid);
    signal(&bed, Host::A, "CONT", &proxy);
    let (status, words) = ended(migration);
    let silent = "the proxy has not answered for 10s";
    let there = format!("process {pid} runs on here");
    assert!(status == Some(1) && words.contains(silent), "{status:?}: {words}");
    assert!(words.contains(&there), "{words}");
    assert_ne!(at_the_cache(&bed, "web"), "whole");
    runs_on(&bed, "job", &pid);
}

/// CRIU's place, which leaves a trace when it is run.
const CRIU: &str =
    "printf '#!/bin/sh\\ntouch /tmp/criu-ran; exec criu \"$@\"\\n' >/tmp/criu; chmod 755 /tmp/criu";

#[test]
fn a_process_is_not_touched_while_there_is_no_link_to_its_cache() {
    let bed = bed();
    let pid = bed.workload(Host::A, "job", 8);
    bed.ok(Host::A, &["sh", "-c", CRIU]);
    let move_to = |options: &[&str]| {
        let migrate = ["criu-imagectl", "migrate", "-t", &pid, "--criu", "/tmp/criu", "--force"];
        let begun = Instant::now();
        let ran = bed.run(Host::A, &[&migrate[..], options].concat());
        let words = String::from_utf8_lossy(&ran.stderr).into_owned();
        assert_eq!(ran.status.code(), Some(3), "{words}");
        assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
        assert!(words.contains(&format!("process {pid} was not touched")), "{words}");
        assert!(bed.list(Host::A).is_empty());
        words
    };
    let words = move_to(&["--to", "10.77.0.2:1"]);
    let refused = "there is no link to the cache 10.77.0.2:1: Connection refused";
    assert!(words.contains(refused), "{words}");
    bed.cut();
    let words = move_to(&[]);
    assert!(words.contains("there is no link to the cache 10.77.0.2:9996: "), "{words}");
    assert!(!bed.run(Host::A, &["test", "-e", "/tmp/criu-ran"]).status.success());
    runs_on(&bed, "job", &pid);

    bed.mend();
    let move_now = ["migrate", "-t", &pid, "--criu", "/tmp/criu", "--force"];
    assert_eq!(bed.ctl(Host::A, &move_now)["outcome"], "migrated");
    bed.ok(Host::A, &["test", "-e", "/tmp/criu-ran"]);
}

#[test]
fn a_migration_whose_cache_is_gone_ends_soon_after_its_process_runs_on() {
    let bed = bed();
    let pid = bed.workload(Host::A, "job", 8);
    let migration = migrate(&bed, &pid, "web");
    wait_until("the process is frozen", || {
        bed.run(Host::A, &["test", "-e", "/tmp/reached"]).status.success()
    });
    bed.ok(Host::B, &["systemctl", "stop", "criu-image-cache-*.socket", "criu-image-cache"]);
    bed.ok(Host::A, &["sh", "-c", "kill -INT $(cat /tmp/migrate.pid)"]);
    wait_until("it is called off", || {
        let decided = "test -h /run/criu-image/migrate-*/decision";
        bed.run(Host::A, &["sh", "-c", decided]).status.success()
    });
    bed.ok(Host::A, &["touch", "/tmp/go-on"]);
    runs_on(&bed, "job", &pid);
    let since = Instant::now();
    let (status, words) = ended(migration);
    assert!(since.elapsed() < Duration::from_secs(12), "{:?}: {words}", since.elapsed());
    assert_eq!(status, Some(8), "{words}");
    assert!(words.contains(&format!("process {pid} runs on here")), "{words}");
}

/// A small fixed part of `tests/long/hand_over`, with a restore that waits.
#[test]
fn whatever_breaks_a_hand_over_off_at_some_moments_nothing_is_frozen_and_what_is_said_is_true() {
    let mut trial = Command::new(repository().join("tests/long/hand_over"));
    trial.args(["--runs", "2", "--seed", "10"]).env("CRIU_IMAGE_RELAY_BUILD", build());
    let output = trial.output().unwrap();
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{told}\n{}", String::from_utf8_lossy(&output.stderr));
}
