//! Pre-dumps with nothing of ours: that the bed is right, and what CRIU's own page server makes of them.

use crate::bed::{CRIUS, Guest, guest, wait_until};
use crate::dirtier::{ChangingTree, Dirtier};

const PAGE: u64 = 4096;

/// What the processes dirty by themselves between two rounds is less than so many pages.
const NOISE: u64 = 100;

/// CRIU's rounds, each sent to a page server of its own that writes files.
struct Rounds<'a> {
    guest: &'a Guest,
    criu: &'static str,
    dir: &'static str,
    /// Of the page servers.
    port: u16,
    done: u32,
}

impl Rounds<'_> {
    /// A pre-dump or the dump; returns how many pages were sent.
    #[track_caller]
    fn round(&mut self, action: &str, pid: u64) -> u64 {
        let Rounds { guest, criu, dir, port, done } = *self;
        let (now, parent) = (done + 1, format!("--prev-images-dir ../{done}"));
        let parent = if done == 0 { "" } else { &parent };
        let server = format!("{dir}/server/{now}");
        let at = format!("--address 127.0.0.1 --port {port}");
        guest.criu(criu, "page-server", &server, &format!("{parent} {at} --daemon --pidfile pid"));
        let options = format!("{parent} {at} -t {pid} --track-mem --page-server");
        guest.criu(criu, action, &format!("{dir}/client/{now}"), &options);
        wait_until("the page server ends", || {
            guest.run(&format!("test -d /proc/$(cat {server}/pid)")).status != 0
        });
        self.done = now;
        let sizes = guest.ok(&format!("stat -c %s {server}/pages-*.img"));
        sizes.lines().map(|size| size.parse::<u64>().unwrap()).sum::<u64>() / PAGE
    }

    #[track_caller]
    fn restore(&self) {
        let Rounds { guest, criu, dir, done, .. } = *self;
        guest.ok(&format!("cp {dir}/client/{done}/*.img {dir}/server/{done}"));
        guest.criu(criu, "restore", &format!("{dir}/server/{done}"), "--restore-detached");
    }
}

impl Drop for Rounds<'_> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.guest.run(&format!("rm -rf {}", self.dir));
        }
    }
}

#[test]
fn the_guest_tracks_dirty_pages_for_both_crius() {
    for criu in CRIUS {
        guest().ok(&format!("{criu} check --feature mem_dirty_track"));
    }
    let version = |criu: &str| guest().ok(&format!("{criu} --version"));
    assert!(version("criu").contains("Version: 4.1"), "{}", version("criu"));
    assert!(!version("criu-4.2").contains("Version: 4.1"), "{}", version("criu-4.2"));
}

#[test]
fn a_round_sends_what_has_changed_since_the_one_before() {
    for criu in CRIUS {
        let mut process = Dirtier::start(guest(), "/tmp/rounds-process", 32, 0);
        process.tell("a", "dirty 1 3");
        let pid = process.pid("a");
        let pages = 32 << 20 >> 12;
        let mut rounds = Rounds { guest: guest(), criu, dir: "/tmp/rounds", port: 9997, done: 0 };
        let sent = rounds.round("pre-dump", pid);
        assert!((pages..pages + 1000).contains(&sent), "{criu}: {sent}");
        process.tell("a", "dirty 2 7");
        let sent = rounds.round("pre-dump", pid);
        assert!((pages / 7..pages / 7 + NOISE).contains(&sent), "{criu}: {sent}");
        process.tell("a", "dirty 3 100");
        let sent = rounds.round("dump", pid);
        assert!((pages / 100..pages / 100 + NOISE).contains(&sent), "{criu}: {sent}");
        assert!(!process.lives("a"));
        rounds.restore();
        process.check("a");
        process.tell("a", "churn 500");
        process.tell("a", "churn 0");
        process.check("a");
    }
}

#[test]
fn a_tree_that_forks_remaps_and_loses_a_process_comes_through_the_rounds() {
    let mut tree = ChangingTree::start(guest(), "/tmp/tree-processes");
    let mut rounds = Rounds { guest: guest(), criu: "criu", dir: "/tmp/tree", port: 9998, done: 0 };
    for round in 0..3 {
        tree.change(round);
        rounds.round(["pre-dump", "pre-dump", "dump"][round], tree.pid());
    }
    rounds.restore();
    tree.check();
}
