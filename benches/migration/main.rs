//! What a migration costs, on two real hosts with real CRIU:
//!
//! ```text
//! cargo build --release --examples && cargo bench --bench migration [-- --mib 1024 --runs 5 --peers]
//! ```
//!
//! Each run takes these in turn, on processes of the same size, each time beginning with another one:
//! whoever comes after a run finds its memory, which the machine may have given back to its host.
//!
//! - floor: `criu dump` to tmpfs and `criu restore` from tmpfs, on one host, no network at all;
//! - hook: `criu dump --stream` with the action script `criu-imagectl` on one host, then `criu restore --stream` on the
//!   other;
//! - plain: the same without the script. A machine that is too busy to copy the pages in time makes the snapshot one whose
//!   memory may have changed, whose restore is refused, and the benchmark ends: measure on a quiet one;
//! - waiting: the same as hook, but the restore is started first and waits at the cache for its snapshot.
//!
//! With `--peers` also what others do between the same two CRIUs ([`peers`]). With `--against DIR` also plain and waiting without the
//! script, on two more hosts, with the binaries of another build: `target/release` of a checkout of the release before.
//!
//! The measure is from the start of the dump until the process runs again. Machines are noisy: read
//! the medians and their ratio, not the single figures.

// A benchmark fails by panicking.
#![allow(clippy::unwrap_used)]

#[path = "../../tests/hosts/bed.rs"]
#[allow(dead_code)]
mod bed;
mod peers;
mod ways;

use std::path::PathBuf;
use std::time::Duration;

use bed::{BOTH, Bed, Host};
use ways::{FLOOR, OTHER, RELAY, Run, Way};

/// A way, and the hosts on which it is taken.
struct Column<'a> {
    name: String,
    bed: &'a Bed,
    way: Way,
}

fn main() {
    let number = |name, default| option(name).map_or(default, |value| value.parse().unwrap());
    let (mib, runs) = (number("--mib", 1024), number("--runs", 5));
    let with_peers = std::env::args().any(|argument| argument == "--peers");
    let bed = up(bed::build());
    let other = option("--against").map(|build| up(std::path::absolute(build).unwrap()));
    let mut ways: Vec<Column> = Vec::new();
    let mut add = |bed, suffix: &str, given: &[Way]| {
        let column = |way: &Way| Column { name: format!("{}{suffix}", way.0), bed, way: *way };
        ways.extend(given.iter().map(column));
    };
    add(&bed, "", &[FLOOR]);
    add(&bed, "", &RELAY);
    if let Some(other) = &other {
        add(other, ", other", &OTHER);
    }
    if with_peers {
        peers::prepare(&bed);
        add(&bed, "", &peers::PEERS);
    }

    println!(
        "{mib} MiB, {runs} runs of each in turn; seconds for the dump + until it runs = times the \
         floor's"
    );
    print!("{:>4}", "run");
    for Column { name, .. } in &ways {
        print!("  {name:>22}");
    }
    println!();
    let mut taken: Vec<Vec<Run>> = vec![Vec::new(); ways.len()];
    // The first run warms up the page cache and the services; it is not counted.
    for number in 0..=runs {
        let one = in_turn(&ways, number, mib);
        print!("{:>4}", if number == 0 { "warm".to_owned() } else { number.to_string() });
        for run in &one {
            print!("  {:>22}", show(run, &one[0]));
        }
        println!();
        if number > 0 {
            taken.iter_mut().zip(one).for_each(|(runs, run)| runs.push(run));
        }
    }
    for (Column { name, .. }, runs) in ways.iter().zip(&taken) {
        tell(name, runs, &taken[0], mib);
    }
}

/// One run of each way, in the order of `ways`, each time beginning with another.
fn in_turn(ways: &[Column], number: u32, mib: u32) -> Vec<Run> {
    let mut runs = vec![None; ways.len()];
    for place in 0..ways.len() {
        let which = (number as usize + place) % ways.len();
        let Column { bed, way: (_, migrate), .. } = ways[which];
        runs[which] = Some(migrate(bed, &format!("m{number}-{which}"), mib));
    }
    runs.into_iter().flatten().collect()
}

fn show(run: &Run, floor: &Run) -> String {
    let (dump, rest) = (run.dump.as_secs_f64(), run.total.saturating_sub(run.dump).as_secs_f64());
    let ratio = run.total.as_secs_f64() / floor.total.as_secs_f64();
    format!("{dump:.2} + {rest:.2} = {ratio:.2} x")
}

/// The medians of a way, and their ratio to those of the floor.
fn tell(name: &str, runs: &[Run], floors: &[Run], mib: u32) {
    let (total, floor) = (median(runs, |run| run.total), median(floors, |run| run.total));
    let gb = f64::from(mib) * 1.048_576e-3;
    let hosts = median(runs, |run| run.hosts) / gb;
    println!(
        "{name:<14} median {total:.3} s = {:.3} x floor; both hosts {hosts:.2} CPU seconds per GB",
        total / floor
    );
    for (index, host) in BOTH.iter().enumerate() {
        let used: Option<Vec<_>> = runs.iter().map(|run| Some(run.daemons?[index])).collect();
        let Some(used) = used else { return };
        let cpu = middle(used) / gb;
        println!("               {} {cpu:.3} CPU seconds per GB", host.daemon());
    }
}

/// The median of a figure, in seconds.
fn median(runs: &[Run], figure: impl Fn(&Run) -> Duration) -> f64 {
    middle(runs.iter().map(figure).collect())
}

fn middle(mut values: Vec<Duration>) -> f64 {
    values.sort();
    let upper = values.len() / 2;
    let lower = (values.len() - 1) / 2;
    values[lower].as_secs_f64().midpoint(values[upper].as_secs_f64())
}

/// Two hosts with a build, whose cache forgets what was restored.
fn up(build: PathBuf) -> Bed {
    let bed = Bed::up_with(build);
    bed.configure(Host::B, "keep", "\"taken\"");
    // The files are this checkout's, whose tables another build may not know: what was set is all that is left of them.
    for (host, file) in [(Host::A, "proxy"), (Host::B, "cache")] {
        let file = format!("/etc/criu-image-relay/{file}.toml");
        bed.ok(host, &["sed", "-n", "-i", "-e", "/^[a-z]/p", "-e", "/^\\[store\\]/p", &file]);
    }
    bed
}

/// What follows an option on the command line.
fn option(name: &str) -> Option<String> {
    let mut arguments = std::env::args();
    arguments.find(|argument| argument == name)?;
    Some(arguments.next().unwrap_or_else(|| panic!("{name} wants a value")))
}
