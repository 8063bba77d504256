//! What a migration costs, on two real hosts with real CRIU:
//!
//! ```text
//! cargo build --release --examples && cargo bench --bench migration [-- --mib 1024 --runs 5]
//! ```
//!
//! Each run takes the floor and the relay in turn, on processes of the same size:
//!
//! - floor: `criu dump` to tmpfs and `criu restore` from tmpfs, on one host, no network at all;
//! - relay: `criu dump --stream` on one host, `criu restore --stream` on the other.
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
    dump: Duration,
    restore: Duration,
    /// CPU time of the proxy and of the cache.
    cpu: [Duration; 2],
}

impl Run {
    fn total(self) -> Duration {
        self.dump + self.restore
    }
}

fn main() {
    let mib = option("--mib", 1024);
    let runs = option("--runs", 5);
    let bed = Bed::up();
    bed.configure(Host::B, "keep", "\"taken\"");
    let clean_up = |host, pid: &str| {
        bed.ok(host, &["kill", "-KILL", pid]);
        bed.ok(host, &["rm", "-rf", "/tmp/images"]);
    };

    println!("{mib} MiB, {runs} runs, each the floor and then the relay; seconds");
    println!("{:>4}  {:>22}  {:>22}  {:>6}  cpu proxy, cache", "run", "floor", "relay", "ratio");
    let mut pairs = Vec::new();
    // The first pair warms up the page cache and the services; it is not counted.
    for number in 0..=runs {
        let floor = floor(&bed, &format!("f{number}"), mib, clean_up);
        let relay = relay(&bed, &format!("r{number}"), mib, clean_up);
        let label = if number == 0 { "warm".to_owned() } else { number.to_string() };
        show(&label, floor, relay, mib);
        if number > 0 {
            pairs.push((floor, relay));
        }
    }
    let floors = median(pairs.iter().map(|(floor, _)| floor.total()));
    let relays = median(pairs.iter().map(|(_, relay)| relay.total()));
    println!(
        "median: floor {:.3}, relay {:.3}, ratio of medians {:.3}, median of ratios {:.3}",
        floors.as_secs_f64(),
        relays.as_secs_f64(),
        relays.as_secs_f64() / floors.as_secs_f64(),
        median_f64(pairs.iter().map(|(f, r)| r.total().as_secs_f64() / f.total().as_secs_f64())),
    );
    for (index, host) in BOTH.iter().enumerate() {
        let cpu = median(pairs.iter().map(|(_, relay)| relay.cpu[index]));
        let per_gb = cpu.as_secs_f64() / (f64::from(mib) * 1.048_576e-3);
        println!("{}: {per_gb:.3} CPU seconds per GB", host.daemon());
    }
}

fn floor(bed: &Bed, name: &str, mib: u32, clean_up: impl Fn(Host, &str)) -> Run {
    let pid = bed.workload(Host::A, name, mib);
    let before = bed.ask(Host::A, name, &pid);
    bed.ok(Host::A, &["mkdir", "/tmp/images"]);
    let start = Instant::now();
    bed.ok(Host::A, &["criu", "dump", "-t", &pid, "-D", "/tmp/images", "-o", "dump.log"]);
    let dump = start.elapsed();
    bed.ok(Host::A, &["criu", "restore", "-d", "-D", "/tmp/images", "-o", "restore.log"]);
    let restore = start.elapsed().saturating_sub(dump);
    assert_eq!(bed.ask(Host::A, name, &pid).checksum, before.checksum);
    clean_up(Host::A, &pid);
    Run { dump, restore, cpu: [Duration::ZERO; 2] }
}

fn relay(bed: &Bed, name: &str, mib: u32, clean_up: impl Fn(Host, &str)) -> Run {
    let pid = bed.workload(Host::A, name, mib);
    let before = bed.ask(Host::A, name, &pid);
    let cpu_before = BOTH.map(|host| cpu(bed, host));
    let start = Instant::now();
    bed.ok(Host::A, &Bed::dump(&pid, Host::A.work_dir()));
    let dump = start.elapsed();
    bed.ok(Host::B, &Bed::restore(Host::B.work_dir()));
    let restore = start.elapsed().saturating_sub(dump);
    let cpu_after = BOTH.map(|host| cpu(bed, host));
    assert_eq!(bed.ask(Host::B, name, &pid).checksum, before.checksum);
    clean_up(Host::B, &pid);
    // The cache gives the memory back before the next run, as the floor's images were removed.
    bed::wait_until("the snapshot is dropped", || bed.list(Host::B).is_empty());
    let cpu = [0, 1].map(|index| cpu_after[index].saturating_sub(cpu_before[index]));
    Run { dump, restore, cpu }
}

/// CPU time that the host's daemon has used, as systemd accounts for it.
fn cpu(bed: &Bed, host: Host) -> Duration {
    let nanoseconds = bed.ok(host, &["systemctl", "show", "-P", "CPUUsageNSec", host.daemon()]);
    Duration::from_nanos(nanoseconds.trim().parse().unwrap_or(0))
}

fn show(label: &str, floor: Run, relay: Run, mib: u32) {
    let times = |run: Run| {
        let [dump, restore, total] =
            [run.dump, run.restore, run.total()].map(|time| time.as_secs_f64());
        format!("{dump:.3} + {restore:.3} = {total:.3}")
    };
    let ratio = relay.total().as_secs_f64() / floor.total().as_secs_f64();
    let [proxy, cache] = relay.cpu.map(|cpu| cpu.as_secs_f64() * 1024.0 / f64::from(mib));
    println!(
        "{label:>4}  {:>22}  {:>22}  {ratio:>6.3}  {proxy:.3}, {cache:.3} per GiB",
        times(floor),
        times(relay)
    );
}

fn median(values: impl Iterator<Item = Duration>) -> Duration {
    Duration::from_secs_f64(median_f64(values.map(|value| value.as_secs_f64())))
}

fn median_f64(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 {
        values[middle]
    } else {
        f64::midpoint(values[middle - 1], values[middle])
    }
}

fn option(name: &str, default: u32) -> u32 {
    let mut arguments = std::env::args();
    arguments.find(|argument| argument == name);
    arguments.next().map_or(default, |value| value.parse().expect("a number"))
}
