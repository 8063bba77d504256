//! `criu-imagectl migrate` and `restore`: a process moves in rounds, or is left alone.

use serde_json::Value;

use crate::bed::{Guest, Ran, guest, wait_until};
use crate::dirtier::Dirtier;
use crate::relay::Relay;

/// A pair of daemons and the command. Both ends are in one guest: what leaves it comes back.
struct Bed<'a> {
    guest: &'a Guest,
    relay: Relay<'a>,
}

impl<'a> Bed<'a> {
    fn start(dir: &'static str) -> Bed<'a> {
        Bed { guest: guest(), relay: Relay::start(guest(), dir) }
    }

    fn migrate(&self, pid: u64, snapshot: &str, options: &str) -> Ran {
        let dir = self.relay.dir;
        let command =
            format!("migrate --tree {pid} --snapshot {snapshot} --work-dir {dir} {options}");
        self.guest.run(&self.relay.imagectl("proxy", &command))
    }

    /// Restores the snapshot, which is there.
    #[track_caller]
    fn restore(&self, snapshot: &str, options: &str) -> Value {
        let dir = self.relay.dir;
        let restore = format!("restore {snapshot} --timeout 10 --work-dir {dir} {options}");
        self.relay.ctl("cache", &restore)
    }

    /// Nothing of a migration or a restore is left: no directory, no snapshot at the proxy, no CRIU.
    #[track_caller]
    fn is_clean(&self) {
        let left = self
            .guest
            .run(&format!("cd {}; ls -d migrate-* restore-*; pgrep -l criu$", self.relay.dir));
        assert_eq!(left.stdout, "");
    }

    /// The pages that came are held for nobody.
    #[track_caller]
    fn cache_holds_nothing(&self) {
        wait_until("the cache gives the pages back", || {
            self.relay.ctl("cache", "status")[0]["held_bytes"] == 0
        });
    }

    fn state(&self, snapshot: &str) -> Value {
        let shown = self.guest.run(&self.relay.imagectl("proxy", &format!("show {snapshot}")));
        match shown.status {
            0 => serde_json::from_str::<Value>(&shown.stdout).unwrap()["snapshot"]["state"].clone(),
            _ => Value::Null,
        }
    }
}

/// The summary that it prints, whatever its exit status.
#[track_caller]
fn summary(ran: &Ran) -> Value {
    serde_json::from_str(&ran.stdout).unwrap_or_else(|error| panic!("{error}: {ran:?}"))
}

#[test]
fn a_process_that_dirties_a_twentieth_of_its_memory_a_second_reaches_the_goal() {
    let bed = Bed::start("/tmp/migrate-goal");
    let mut process = Dirtier::start(guest(), "/tmp/migrate-goal-process", 512, 0);
    process.tell("a", "churn 5");
    let pid = process.pid("a");
    // All of it at once takes longer than that by far, where everything is emulated.
    let ran = bed.migrate(pid, "web", "--max-downtime 2s");
    assert_eq!(ran.status, 0, "{ran:?}");
    let summary = summary(&ran);
    assert_eq!((&summary["outcome"], &summary["snapshot"]), (&"migrated".into(), &"web".into()));
    assert!(!summary["rounds"].as_array().unwrap().is_empty(), "{summary}");
    let frozen = summary["dump"]["frozen_ms"].as_u64().unwrap();
    assert!(frozen <= 2000, "{summary}");
    let last = summary["dump"]["bytes"].as_u64().unwrap();
    assert!(last < 128 << 20, "{summary}");
    assert!(!process.lives("a"));
    bed.is_clean();
    assert_eq!(bed.state("web"), "whole");
    assert_eq!(bed.restore("web", "")["pid"], pid);
    process.tell("a", "churn 0");
    process.check("a");
}

#[test]
fn one_that_dirties_faster_than_the_link_carries_is_given_up_and_runs_on() {
    let bed = Bed::start("/tmp/migrate-hopeless");
    let mut process = Dirtier::start(guest(), "/tmp/migrate-hopeless-process", 128, 0);
    process.tell("a", "churn 2000");
    let pid = process.pid("a");
    let ran = bed.migrate(pid, "web", "--max-downtime 100ms");
    assert_eq!(ran.status, 7, "{ran:?}");
    let told = summary(&ran);
    assert_eq!(told["outcome"], "given-up");
    let rounds = told["rounds"].as_array().unwrap().len();
    assert!((2..=4).contains(&rounds), "{told}");
    assert!(ran.stderr.contains("runs on here"), "{ran:?}");
    assert!(process.lives("a"));
    bed.is_clean();
    assert_eq!(bed.state("web"), Value::Null);
    bed.cache_holds_nothing();
    // Where that is said, it is moved all the same.
    let ran = bed.migrate(pid, "forced", "--max-downtime 100ms --max-rounds 2 --force");
    assert_eq!(ran.status, 0, "{ran:?}");
    assert_eq!(summary(&ran)["rounds"].as_array().unwrap().len(), 2);
    assert!(!process.lives("a"));
    bed.restore("forced", "");
    process.tell("a", "churn 0");
    process.check("a");
}

#[test]
fn an_idle_tree_with_shared_memory_moves_after_one_round() {
    let bed = Bed::start("/tmp/migrate-idle");
    let mut tree = Dirtier::start(guest(), "/tmp/migrate-idle-processes", 32, 8);
    tree.tell("a", "fork b");
    tree.tell("b", "dirty 1 3");
    tree.tell("b", "share 1 2");
    let ran = bed.migrate(tree.pid("a"), "web", "--max-downtime 5s -- -v4");
    assert_eq!(ran.status, 0, "{ran:?}");
    assert_eq!(summary(&ran)["rounds"].as_array().unwrap().len(), 1);
    // Of the pages some came in the round and some in the dump: for a view they are brought together.
    bed.restore("web", "--view");
    assert_eq!(bed.relay.state("cache", "web"), "taken");
    bed.is_clean();
    tree.check("a");
    tree.check("b");
}

#[test]
fn without_rounds_memory_decides() {
    let bed = Bed::start("/tmp/migrate-once");
    let mut process = Dirtier::start(guest(), "/tmp/migrate-once-process", 64, 0);
    process.tell("a", "dirty 1 1");
    let pid = process.pid("a");
    let ran = bed.migrate(pid, "web", "--max-rounds 0");
    assert_eq!(ran.status, 7, "{ran:?}");
    assert!(process.lives("a"));
    let ran = bed.migrate(pid, "web", "--max-rounds 0 --force --leave-running");
    assert_eq!(ran.status, 0, "{ran:?}");
    assert_eq!(summary(&ran)["outcome"], "copied");
    assert!(process.lives("a"));
    process.check("a");
    bed.is_clean();
}

#[test]
fn an_interrupt_leaves_the_process_running_and_nothing_behind() {
    let bed = Bed::start("/tmp/migrate-interrupt");
    let mut process = Dirtier::start(guest(), "/tmp/migrate-interrupt-process", 512, 0);
    process.tell("a", "dirty 1 1");
    let pid = process.pid("a");
    for (number, seconds) in ["0", "1", "3"].into_iter().enumerate() {
        // It is never frozen for good: there is always one more round.
        process.tell("a", "churn 50");
        let snapshot = format!("web{number}");
        let migrate = format!("migrate -t {pid} --snapshot {snapshot} --max-downtime 0");
        let migrate = format!("{migrate} --work-dir {}", bed.relay.dir);
        let command = bed.relay.imagectl("proxy", &migrate);
        // It catches signals before it makes its directory.
        let begun = format!("until ls -d {}/migrate-*; do sleep 0.1; done >&2", bed.relay.dir);
        let ran = bed
            .guest
            .run(&format!("{command} & {begun}; sleep {seconds}; kill -INT $!; wait $!; echo $?"));
        assert!(ran.stdout.ends_with("8\n"), "{seconds} s: {ran:?}");
        assert!(ran.stderr.contains("interrupted"), "{seconds} s: {ran:?}");
        assert!(process.lives("a"), "{seconds} s");
        bed.is_clean();
        assert_eq!(bed.state(&snapshot), Value::Null, "{seconds} s");
        bed.cache_holds_nothing();
        process.tell("a", "churn 0");
        process.check("a");
    }
}

/// Both happen at the last moment, in a script that runs before the one that hands the snapshot over.
/// With its cache gone nobody can say whether that had all of it.
#[test]
fn what_happens_at_the_last_moment_leaves_the_process_running() {
    let bed = Bed::start("/tmp/migrate-lost");
    let mut process = Dirtier::start(guest(), "/tmp/migrate-lost-process", 64, 0);
    process.tell("a", "dirty 1 1");
    let pid = process.pid("a");
    let dir = bed.relay.dir;
    let interrupt = "pkill -INT -f 'imagectl.* migrate'; sleep 0.5".to_owned();
    let kill = format!("kill -KILL $(cat {dir}/cache.pid)");
    let cases = [("exit 3", 1), (interrupt.as_str(), 8), (kill.as_str(), 9)];
    for (number, (what, status)) in cases.into_iter().enumerate() {
        process.tell("a", "churn 5");
        let when = "[ \"$CRTOOLS_SCRIPT_ACTION\" = post-dump ] || exit 0";
        bed.guest.write(&format!("{dir}/script"), &format!("#!/bin/sh\n{when}\n{what}\n"));
        bed.guest.ok(&format!("chmod 755 {dir}/script"));
        let options = format!("--max-downtime 1min -- --action-script {dir}/script");
        let ran = bed.migrate(pid, &format!("web{number}"), &options);
        assert_eq!(ran.status, status, "{what}: {ran:?}");
        assert!(process.lives("a"), "{what}");
        process.tell("a", "churn 0");
        process.check("a");
        bed.is_clean();
    }
}
