//! go-criu's phaul with the relay under it (`contrib/go-phaul`). Source and destination are the same machine here, so what
//! was migrated is restored once it is gone.

use crate::bed::{CRIUS, Ran, guest};
use crate::dirtier::Dirtier;
use crate::relay::Relay;

const DIR: &str = "/tmp/phaul";
const PROCESS: &str = "/tmp/phaul-process";
const MIB: u64 = 32;

/// Runs the program that migrates and restores. phaul takes the `criu` that it finds.
fn phaul(criu: &str, command: &str) -> Ran {
    let path = format!("{DIR}/{criu}-first");
    guest().ok(&format!("mkdir -p {path}; ln -sfn $(realpath $(command -v {criu})) {path}/criu"));
    // Whoever wants CRIU to have a configuration puts it there.
    guest().run(&format!("HOME={DIR} PATH={path}:$PATH phaul-relay {command}"))
}

fn migrate(criu: &str, id: &str, pid: u64, options: &str) -> Ran {
    let proxy = format!("{DIR}/proxy/control.sock");
    phaul(criu, &format!("migrate -id {id} -pid {pid} -proxy {proxy} {options}"))
}

fn restore(criu: &str, id: &str) {
    let ran = phaul(criu, &format!("restore -id {id} -cache {DIR}/cache/control.sock"));
    assert_eq!(ran.status, 0, "{ran:?}");
}

/// A command that tells what the cache knows of a snapshot.
fn show(relay: &Relay<'_>, id: &str) -> String {
    relay.imagectl("cache", &format!("show {id}"))
}

/// How many KiB each round brought, from what a migration printed.
fn rounds(ran: &Ran) -> Vec<u64> {
    let rounds = ran.stdout.lines().filter_map(|line| line.strip_prefix("round "));
    // N: K KiB in T s
    rounds.map(|round| round.split(' ').nth(1).unwrap().parse().unwrap()).collect()
}

#[test]
fn phaul_migrates_a_tree_that_goes_on_writing_through_the_relay() {
    let relay = Relay::start(guest(), DIR);
    for criu in CRIUS {
        let mut tree = Dirtier::start(guest(), PROCESS, MIB.try_into().unwrap(), 4);
        tree.tell("a", "dirty 1 3");
        tree.tell("a", "share 1 2");
        tree.tell("a", "fork b");
        tree.tell("b", "dirty 2 5");
        tree.tell("a", "churn 5");
        let pid = tree.pid("a");
        let ran = migrate(criu, criu, pid, "");
        assert_eq!(ran.status, 0, "{criu}: {ran:?}");
        assert!(!tree.lives("a") && !tree.lives("b"));
        let rounds = rounds(&ran);
        assert!(rounds.len() >= 3, "{criu}: {rounds:?}");
        assert!(rounds[0] >= (2 * MIB) << 10, "{criu}: {rounds:?}");
        assert!(
            rounds[1..].iter().all(|kib| (1..rounds[0] / 2).contains(kib)),
            "{criu}: {rounds:?}"
        );
        restore(criu, criu);
        tree.tell("a", "churn 0");
        tree.check("a");
        tree.check("b");
        let ran = guest().run(&show(&relay, criu));
        assert_eq!(ran.status, 4, "it is restored, and the cache still has it: {ran:?}");
    }
}

#[test]
fn the_process_is_frozen_until_the_cache_has_all_of_it_and_gone_when_that_is_taken_over() {
    let relay = Relay::start(guest(), DIR);
    for criu in CRIUS {
        let mut process = Dirtier::start(guest(), PROCESS, 8, 0);
        process.tell("a", "dirty 1 3");
        let pid = process.pid("a");
        let look = |id: &str| {
            let command = format!("{} && sed \"s/.*) //\" /proc/{pid}/stat", show(&relay, id));
            format!("-hand-over '{command} >{DIR}/state")
        };
        let state = || guest().ok(&format!("cut -c 1 {DIR}/state")).trim().to_owned();

        let id = format!("refused-{criu}");
        let ran = migrate(criu, &id, pid, &format!("{}; exit 3'", look(&id)));
        assert_eq!(ran.status, 1, "{ran:?}");
        assert!(ran.stderr.contains("the hand-over: exit status 3"), "{ran:?}");
        assert!(ran.stdout.contains("\"whole\""), "{ran:?}");
        assert_eq!(state(), "t", "traced and stopped");
        process.tell("a", "dirty 2 7");
        process.check("a");

        let id = format!("taken-{criu}");
        let ran = migrate(criu, &id, pid, &format!("{}'", look(&id)));
        assert_eq!(ran.status, 0, "{ran:?}");
        assert!(ran.stdout.contains("\"whole\""), "{ran:?}");
        assert_eq!(state(), "t");
        assert!(!process.lives("a"));
        restore(criu, &id);
        process.check("a");
    }
}

#[test]
fn a_process_whose_cache_dies_in_the_last_round_runs_on() {
    for criu in CRIUS {
        let _relay = Relay::start(guest(), DIR);
        let mut process = Dirtier::start(guest(), PROCESS, 8, 0);
        process.tell("a", "dirty 1 3");
        // CRIU runs it when the dump begins, not in pre-dumps: the cache answers no more, and then it is gone.
        let script = format!(
            "#!/bin/sh\n[ $CRTOOLS_SCRIPT_ACTION = pre-dump ] || exit 0\nkill -STOP $(cat {DIR}/cache.pid)\n\
             setsid sh -c 'sleep 1; kill -KILL $(cat {DIR}/cache.pid)' >/dev/null 2>&1 &\n"
        );
        guest().write(&format!("{DIR}/script"), &script);
        guest()
            .write(&format!("{DIR}/.criu/default.conf"), &format!("action-script {DIR}/script\n"));
        guest().ok(&format!("chmod 755 {DIR}/script"));
        let ran = migrate(criu, "lost", process.pid("a"), "");
        assert_eq!(ran.status, 1, "{ran:?}");
        assert!(rounds(&ran).len() >= 2, "{ran:?}");
        assert!(ran.stderr.contains("snapshot lost is damaged"), "{ran:?}");
        process.tell("a", "dirty 2 7");
        process.check("a");
    }
}
