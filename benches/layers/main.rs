//! What a round of pages costs the store, and whether that grows with the chain:
//!
//! ```text
//! cargo bench --bench layers [-- --mib 256 --rounds 50]
//! cargo bench --bench layers -- --cut 1024
//! ```
//!
//! With `--cut` every second page of a parent is dirtied, for parents of 64 MiB, 128 MiB and so on up to so many:
//! the worst that a round can do to its parent's runs. What a run costs may not grow with the parent.
//! Otherwise:
//!
//! The first round brings all memory. Each later one dirties 5 % of it in random runs of 1 to 64 pages and
//! inherits the rest, as CRIU does; its parent is dropped when it is committed. The whole is done once
//! so, and once with every snapshot kept.
//!
//! - index: giving the round's runs their places, and inheriting what is between them;
//! - commit: making the round a snapshot; release: dropping its parent and giving back its pages;
//! - runs: how many there are in the round, and in the new flat pagemap;
//! - heap: what is allocated for all of it, the indexes and the layers' own notes; the pages are not in it.
//!
//! To write the pages is not measured. The last lines say what the last rounds cost, of what the first
//! did: it may grow with the logarithm of the flat pagemap's runs, and not with the rounds.

// A benchmark fails by panicking.
#![allow(clippy::unwrap_used)]

mod allocated;

use std::collections::BTreeMap;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::pin::pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use criu_image_relay::store::pages::{Flat, PAGE, PageRange, Place, Round};
use criu_image_relay::store::{Charge, Quota};

/// The one page space.
const SPACE: u64 = 7;

fn main() {
    let pages = option("--mib", 256) * 256;
    let rounds = option("--rounds", 50);
    let cut = option("--cut", 0);
    if cut > 0 {
        return cut_in_two(cut);
    }
    for keep in [false, true] {
        let parents = if keep { "kept" } else { "dropped" };
        println!("{pages} pages, 5 % dirtied in each round; parents are {parents}");
        println!(
            "{:>5} {:>11} {:>11} {:>11} {:>9} {:>9} {:>9} {:>7} {:>12} {:>12}",
            "round",
            "index us",
            "commit us",
            "release us",
            "runs",
            "flat",
            "heap KiB",
            "layers",
            "charged KiB",
            "held KiB"
        );
        chain(pages, rounds, keep);
    }
}

fn chain(pages: u64, rounds: u64, keep: bool) {
    let quota = Quota::new(u64::MAX);
    let (mut random, mut kept) = (Random(0x2545_f491_4f6c_dd1d), Vec::new());
    let all = PageRange::new(0, pages).unwrap();
    let mut newest: Option<Flat<u64>> = None;
    let (before, mut costs) = (allocated::bytes(), Vec::new());
    for number in 1..=rounds {
        let dirty = if number == 1 { vec![all] } else { random.dirty(pages) };
        let clean = between(&dirty, pages);
        let charges: Vec<Charge> =
            dirty.iter().map(|range| charge(&quota, range.bytes())).collect();

        let begun = Instant::now();
        let mut round = Round::new(newest.clone());
        let mut places = Vec::new();
        for (range, charge) in dirty.iter().zip(charges) {
            places.push(round.accept(&SPACE, *range, 0, charge).unwrap());
        }
        for range in &clean {
            round.inherit(&SPACE, *range).unwrap();
        }
        let index = begun.elapsed();
        for place in places {
            write(&place);
            round.filled(place);
        }

        let begun = Instant::now();
        let flat = round.commit().unwrap();
        let commit = begun.elapsed();
        kept.extend(newest.replace(flat).filter(|_| keep));
        let release = begun.elapsed().saturating_sub(commit);
        let runs = u32::try_from(dirty.len() + clean.len()).unwrap();
        drop((dirty, clean));
        let heap = allocated::bytes() - before;
        costs.push(Cost { time: index + commit + release, runs, heap });

        if [1, 2, 10, 25, 50].contains(&number) || number % 100 == 0 {
            let flat = newest.as_ref().unwrap().space(&SPACE).unwrap();
            let (layers, held) = memory(newest.iter().chain(&kept));
            println!(
                "{number:>5} {:>11.1} {:>11.1} {:>11.1} {runs:>9} {:>9} {:>9} {layers:>7} {:>12} {:>12}",
                micros(index),
                micros(commit),
                micros(release),
                flat.len(),
                heap / 1024,
                quota.used() / 1024,
                held / 1024
            );
        }
    }
    let begun = Instant::now();
    drop((newest, kept));
    println!("everything dropped in {:.1} us", micros(begun.elapsed()));
    tell_growth(&costs);
    assert_eq!(quota.used(), 0);
}

/// Every second page of one big run is dirtied, for runs of up to so many MiB.
fn cut_in_two(most: u64) {
    println!("every second page is dirtied; the parent is dropped");
    println!(
        "{:>5} {:>9} {:>11} {:>11} {:>9}",
        "MiB", "runs", "index ms", "release ms", "us a run"
    );
    let sizes = std::iter::successors(Some(64), |mib| Some(mib * 2));
    for mib in sizes.take_while(|mib| *mib <= most) {
        // The least of three: what else the machine does costs more, never less.
        let costs = (0..3).map(|_| cut_one_in_two(mib * 256));
        let (index, release) = costs.min_by_key(|(index, release)| *index + *release).unwrap();
        let runs = mib * 256;
        println!(
            "{mib:>5} {runs:>9} {:>11.1} {:>11.1} {:>9.2}",
            micros(index) / 1e3,
            micros(release) / 1e3,
            micros(index + release) / f64::from(u32::try_from(runs).unwrap())
        );
    }
}

/// How long it takes to make the round, and to drop its parent.
fn cut_one_in_two(pages: u64) -> (Duration, Duration) {
    let quota = Quota::new(u64::MAX);
    let all = PageRange::new(0, pages).unwrap();
    let mut round = Round::new(None);
    let place = round.accept(&SPACE, all, 0, charge(&quota, all.bytes())).unwrap();
    write(&place);
    round.filled(place);
    let parent = round.commit().unwrap();

    let mut index = Duration::ZERO;
    let mut round = Round::new(Some(parent.clone()));
    for page in (0..pages).step_by(2) {
        let dirty = PageRange::new(page * PAGE, 1).unwrap();
        let clean = PageRange::new((page + 1) * PAGE, 1).unwrap();
        let charge = charge(&quota, dirty.bytes());
        let begun = Instant::now();
        let place = round.accept(&SPACE, dirty, 0, charge).unwrap();
        round.inherit(&SPACE, clean).unwrap();
        index += begun.elapsed();
        write(&place);
        round.filled(place);
    }
    let begun = Instant::now();
    let flat = round.commit().unwrap();
    index += begun.elapsed();
    let begun = Instant::now();
    drop(parent);
    let release = begun.elapsed();
    assert_eq!(flat.pages(), pages);
    (index, release)
}

fn write(place: &Place) {
    let bytes = vec![1; 1 << 20];
    let (mut offset, end) = (place.offset(), place.offset() + place.bytes());
    while offset < end {
        let piece = bytes.len().min(usize::try_from(end - offset).unwrap());
        place.layer().file().write_all_at(&bytes[..piece], offset).unwrap();
        offset += piece as u64;
    }
}

/// What a round cost.
struct Cost {
    time: Duration,
    runs: u32,
    /// Bytes that were allocated after it.
    heap: usize,
}

/// How many rounds are taken together, since a single one is measured in less than a millisecond.
const TOGETHER: usize = 3;

/// What a run cost at the end, of what it cost at the beginning. The first round has no parent and is left out.
fn tell_growth(costs: &[Cost]) {
    let later = costs.get(1..).unwrap_or_default();
    let Some((first, last)) = later.first_chunk().zip(later.last_chunk()) else { return };
    let halves = costs.split_at(costs.len() / 2);
    let (early, late) = (time_of_a_run(first), time_of_a_run(last));
    println!(
        "the heap grew by {} bytes a round in the first half, {} in the second",
        growth(halves.0),
        growth(halves.1)
    );
    println!(
        "a run took {early:.2} us in rounds 2 to {}, {late:.2} us in the last {TOGETHER}: {:.2} times \
         as much\n",
        TOGETHER + 1,
        late / early
    );
}

fn time_of_a_run(rounds: &[Cost; TOGETHER]) -> f64 {
    let runs: u32 = rounds.iter().map(|round| round.runs).sum();
    micros(rounds.iter().map(|round| round.time).sum()) / f64::from(runs)
}

/// By how many bytes each of some rounds let the heap grow; what is given back with a parent counts, too.
fn growth(rounds: &[Cost]) -> isize {
    let heap = |round: &Cost| isize::try_from(round.heap).unwrap();
    let (first, last) = (heap(&rounds[0]), heap(&rounds[rounds.len() - 1]));
    (last - first) / isize::try_from(rounds.len()).unwrap()
}

/// How many layers the snapshots see, and how many bytes the kernel holds for them.
fn memory<'a>(flats: impl Iterator<Item = &'a Flat<u64>>) -> (usize, u64) {
    let mut layers = BTreeMap::new();
    for flat in flats {
        for run in flat.space(&SPACE).unwrap().runs() {
            layers.insert(Rc::as_ptr(run.layer()), run.layer().clone());
        }
    }
    let blocks = layers.values().map(|layer| layer.file().metadata().unwrap().blocks());
    (layers.len(), blocks.sum::<u64>() * 512)
}

fn charge(quota: &Quota, bytes: u64) -> Charge {
    let mut charging = pin!(quota.charge(bytes, || 0, Duration::ZERO));
    match charging.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(charge) => charge.unwrap(),
        Poll::Pending => panic!("the quota is without end"),
    }
}

/// What lies between the dirty ranges.
fn between(dirty: &[PageRange], pages: u64) -> Vec<PageRange> {
    let starts = [0].into_iter().chain(dirty.iter().map(|range| range.end_address()));
    let ends = dirty.iter().map(|range| range.address()).chain([pages * PAGE]);
    starts
        .zip(ends)
        .filter(|(start, end)| start < end)
        .map(|(start, end)| PageRange::new(start, (end - start) / PAGE).unwrap())
        .collect()
}

/// Marsaglia's xorshift: every run of the benchmark takes the same pages.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }

    /// A twentieth of the pages, in runs that do not overlap, in order.
    fn dirty(&mut self, pages: u64) -> Vec<PageRange> {
        let mut taken = BTreeMap::new();
        let mut left = pages / 20;
        while left > 0 {
            let len = (1 + self.below(64)).min(left);
            let start = self.below(pages - len);
            let before = taken.range(..start + len).next_back();
            if before.is_none_or(|(begin, count)| begin + count <= start) {
                taken.insert(start, len);
                left -= len;
            }
        }
        let range = |(start, count): (u64, u64)| PageRange::new(start * PAGE, count).unwrap();
        taken.into_iter().map(range).collect()
    }
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

fn option(name: &str, default: u64) -> u64 {
    let mut arguments = std::env::args().skip_while(|argument| argument != name).skip(1);
    arguments.next().map_or(default, |value| value.parse().unwrap())
}
