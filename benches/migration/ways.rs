//! What is measured, and the ways of this project.

use std::time::{Duration, Instant};

use crate::bed::{self, BOTH, Bed, Host};

/// One migration.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Run {
    /// From the start of the dump until the process runs again.
    pub total: Duration,
    /// The dump's part of it.
    pub dump: Duration,
    /// CPU time of the proxy and of the cache, if they moved it.
    pub daemons: Option<[Duration; 2]>,
    /// CPU time of all that ran on both hosts, CRIU among it.
    pub hosts: Duration,
}

/// A way to move a process: its name, and a run of it with a new process of that name and size.
pub(crate) type Way = (&'static str, fn(&Bed, &str, u32) -> Run);

/// The floor, by which all are measured.
pub(crate) const FLOOR: Way = ("floor", floor);

/// The relay.
pub(crate) const RELAY: [Way; 3] = [("hook", hook), ("plain", plain), ("waiting", waiting)];

/// The relay of a release that need not know the hook.
pub(crate) const OTHER: [Way; 2] = [("plain", plain), ("waiting", waiting_plain)];

/// What makes CRIU wait until the cache has acknowledged everything.
const HOOK: [&str; 2] = ["--action-script", "criu-imagectl"];

/// Where images are, where there are files.
pub(crate) const IMAGES: &str = "/tmp/images";

fn floor(bed: &Bed, name: &str, mib: u32) -> Run {
    let run = measure(bed, name, mib, Host::A, |pid| {
        bed.ok(Host::A, &["mkdir", IMAGES]);
        let start = Instant::now();
        bed.ok(Host::A, &["criu", "dump", "-t", pid, "-D", IMAGES, "-o", "dump.log"]);
        let dump = start.elapsed();
        bed.ok(Host::A, &restore_files());
        (dump, start.elapsed())
    });
    bed.ok(Host::A, &["rm", "-rf", IMAGES]);
    run
}

/// `criu restore` from a directory.
pub(crate) fn restore_files() -> [&'static str; 7] {
    ["criu", "restore", "-d", "-D", IMAGES, "-o", "restore.log"]
}

fn hook(bed: &Bed, name: &str, mib: u32) -> Run {
    relay(bed, name, mib, &HOOK, false)
}

fn plain(bed: &Bed, name: &str, mib: u32) -> Run {
    relay(bed, name, mib, &[], false)
}

fn waiting(bed: &Bed, name: &str, mib: u32) -> Run {
    relay(bed, name, mib, &HOOK, true)
}

fn waiting_plain(bed: &Bed, name: &str, mib: u32) -> Run {
    relay(bed, name, mib, &[], true)
}

fn relay(bed: &Bed, name: &str, mib: u32, options: &[&str], restore_first: bool) -> Run {
    let before = BOTH.map(|host| daemon_cpu(bed, host));
    let mut run = measure(bed, name, mib, Host::B, |pid| {
        let spawn_restore = || bed.spawn(Host::B, &Bed::restore(Host::B.work_dir()));
        let waiting = restore_first.then(|| {
            let child = spawn_restore();
            let waits = || bed.ctl(Host::B, &["status"])[0]["sessions"] == 1;
            bed::wait_until("the restore waits", waits);
            child
        });
        let start = Instant::now();
        bed.ok(Host::A, &[&Bed::dump(pid, Host::A.work_dir())[..], options].concat());
        let dump = start.elapsed();
        bed::finish(waiting.unwrap_or_else(spawn_restore));
        (dump, start.elapsed())
    });
    let used = [0, 1].map(|index| daemon_cpu(bed, BOTH[index]).saturating_sub(before[index]));
    run.daemons = Some(used);
    // The cache gives the memory back before the next run, as files are removed.
    bed::wait_until("the snapshot is dropped", || bed.list(Host::B).is_empty());
    run
}

/// Moves a process in some way, which tells how long the dump took and how long all, and sees
/// that it is the same on the host where it has to be then.
pub(crate) fn measure(
    bed: &Bed,
    name: &str,
    mib: u32,
    destination: Host,
    way: impl FnOnce(&str) -> (Duration, Duration),
) -> Run {
    let pid = bed.workload(Host::A, name, mib);
    let before = bed.ask(Host::A, name, &pid);
    let hosts = hosts_cpu(bed);
    let (dump, total) = way(&pid);
    let hosts = hosts_cpu(bed).saturating_sub(hosts);
    assert_eq!(bed.ask(destination, name, &pid).checksum, before.checksum);
    bed.ok(destination, &["kill", "-KILL", &pid]);
    Run { total, dump, daemons: None, hosts }
}

/// CPU time that the host's daemon has used, as systemd accounts for it.
fn daemon_cpu(bed: &Bed, host: Host) -> Duration {
    let nanoseconds = bed.ok(host, &["systemctl", "show", "-P", "CPUUsageNSec", host.daemon()]);
    Duration::from_nanos(nanoseconds.trim().parse().unwrap_or(0))
}

/// CPU time of everything on both hosts, by their cgroups.
fn hosts_cpu(bed: &Bed) -> Duration {
    let used = |host| {
        let stat = bed.ok(host, &["cat", "/sys/fs/cgroup/cpu.stat"]);
        let microseconds = stat.lines().find_map(|line| line.strip_prefix("usage_usec "));
        Duration::from_micros(microseconds.unwrap().parse().unwrap())
    };
    BOTH.map(used).iter().sum()
}
