//! What a migration costs, on two real hosts with real CRIU:
//!
//! ```text
//! cargo build --release --examples && cargo bench --bench migration [-- --mib 1024 --runs 5]
//! ```
//!
//! Each run takes these in turn, on processes of the same size, each time beginning with another one:
//! whoever comes after a run finds its memory, which the machine may have given back to its host.
//!
//! - floor: `criu dump` to tmpfs and `criu restore` from tmpfs, on one host, no network at all;
//! - after: `criu dump --stream` on one host, then `criu restore --stream` on the other;
//! - waiting: the same, but the restore is started first and waits at the cache for its snapshot.
//!
//! The measure is from the start of the dump until the process runs again. Machines are noisy: read
//! the medians and their ratio, not the single figures.

// A benchmark fails by panicking.
#![allow(clippy::unwrap_used)]

#[path = "../tests/hosts/bed.rs"]
#[allow(dead_code)]
mod bed;

use std::time::{Duration, Instant};

use bed::{BOTH, Bed, Host};

/// One migration.
#[derive(Debug, Clone, Copy)]
struct Run {
    total: Duration,
    /// The dump's part of it.
    dump: Duration,
    /// CPU time of the proxy and of the cache.
    cpu: [Duration; 2],
}

/// When the restore is started.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Restore {
    After,
    Waiting,
}

fn main() {
    let mib = option("--mib", 1024);
    let runs = option("--runs", 5);
    let bed = Bed::up();
    bed.configure(Host::B, "keep", "\"taken\"");

    println!(
        "{mib} MiB, {runs} runs of each in turn; seconds from the start of the dump until it runs"
    );
    println!("{:>4}  {:>16}  {:>24}  {:>24}", "run", "floor", "after", "waiting");
    let (mut floors, mut after, mut waiting) = (Vec::new(), Vec::new(), Vec::new());
    // The first run warms up the page cache and the services; it is not counted.
    for number in 0..=runs {
        let mut taken = [None; 3];
        for place in 0..3 {
            let which = (number + place) % 3;
            let name = format!("m{number}-{which}");
            taken[which as usize] = Some(match which {
                0 => floor(&bed, &name, mib),
                1 => relay(&bed, &name, mib, Restore::After),
                _ => relay(&bed, &name, mib, Restore::Waiting),
            });
        }
        let [Some(base), Some(one), Some(other)] = taken else { unreachable!() };
        let ratio = |run: Run| run.total.as_secs_f64() / base.total.as_secs_f64();
        let label = if number == 0 { "warm".to_owned() } else { number.to_string() };
        println!(
            "{label:>4}  {:>16}  {:>16} = {:.2} x  {:>16} = {:.2} x",
            show(base),
            show(one),
            ratio(one),
            show(other),
            ratio(other),
        );
        if number > 0 {
            floors.push(base);
            after.push(one);
            waiting.push(other);
        }
    }
    let floor = median(&floors, |run| run.total);
    println!("floor:   median {floor:.3} s");
    for (name, relays) in [("after", &after), ("waiting", &waiting)] {
        let relay = median(relays, |run| run.total);
        println!("{:<8} median {relay:.3} s = {:.3} x floor", format!("{name}:"), relay / floor);
        for (index, host) in BOTH.iter().enumerate() {
            let gb = f64::from(mib) * 1.048_576e-3;
            let cpu = median(relays, |run| run.cpu[index]) / gb;
            println!("         {} {cpu:.3} CPU seconds per GB", host.daemon());
        }
    }
}

fn floor(bed: &Bed, name: &str, mib: u32) -> Run {
    let pid = bed.workload(Host::A, name, mib);
    let before = bed.ask(Host::A, name, &pid);
    bed.ok(Host::A, &["mkdir", "/tmp/images"]);
    let start = Instant::now();
    bed.ok(Host::A, &["criu", "dump", "-t", &pid, "-D", "/tmp/images", "-o", "dump.log"]);
    let dump = start.elapsed();
    bed.ok(Host::A, &["criu", "restore", "-d", "-D", "/tmp/images", "-o", "restore.log"]);
    let total = start.elapsed();
    assert_eq!(bed.ask(Host::A, name, &pid).checksum, before.checksum);
    bed.ok(Host::A, &["kill", "-KILL", &pid]);
    bed.ok(Host::A, &["rm", "-rf", "/tmp/images"]);
    Run { total, dump, cpu: [Duration::ZERO; 2] }
}

fn relay(bed: &Bed, name: &str, mib: u32, restore: Restore) -> Run {
    let pid = bed.workload(Host::A, name, mib);
    let before = bed.ask(Host::A, name, &pid);
    let spawn_restore = || bed.spawn(Host::B, &Bed::restore(Host::B.work_dir()));
    let waiting = (restore == Restore::Waiting).then(|| {
        let child = spawn_restore();
        let waits = || bed.ctl(Host::B, &["status"])[0]["sessions"] == 1;
        bed::wait_until("the restore waits", waits);
        child
    });
    let cpu_before = BOTH.map(|host| cpu(bed, host));
    let start = Instant::now();
    bed.ok(Host::A, &Bed::dump(&pid, Host::A.work_dir()));
    let dump = start.elapsed();
    bed::finish(waiting.unwrap_or_else(spawn_restore));
    let total = start.elapsed();
    let cpu_after = BOTH.map(|host| cpu(bed, host));
    assert_eq!(bed.ask(Host::B, name, &pid).checksum, before.checksum);
    bed.ok(Host::B, &["kill", "-KILL", &pid]);
    // The cache gives the memory back before the next run, as the floor's images were removed.
    bed::wait_until("the snapshot is dropped", || bed.list(Host::B).is_empty());
    let cpu = [0, 1].map(|index| cpu_after[index].saturating_sub(cpu_before[index]));
    Run { total, dump, cpu }
}

/// CPU time that the host's daemon has used, as systemd accounts for it.
fn cpu(bed: &Bed, host: Host) -> Duration {
    let nanoseconds = bed.ok(host, &["systemctl", "show", "-P", "CPUUsageNSec", host.daemon()]);
    Duration::from_nanos(nanoseconds.trim().parse().unwrap_or(0))
}

fn show(run: Run) -> String {
    let rest = run.total.saturating_sub(run.dump);
    format!("{:.2} + {:.2}", run.dump.as_secs_f64(), rest.as_secs_f64())
}

/// The median of a figure, in seconds.
fn median(runs: &[Run], figure: impl Fn(&Run) -> Duration) -> f64 {
    let mut values: Vec<f64> = runs.iter().map(|run| figure(run).as_secs_f64()).collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 { values[middle] } else { values[middle - 1].midpoint(values[middle]) }
}

fn option(name: &str, default: u32) -> u32 {
    let mut arguments = std::env::args();
    arguments.find(|argument| argument == name);
    arguments.next().map_or(default, |value| value.parse().expect("a number"))
}
