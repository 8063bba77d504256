//! A long chain of rounds takes no more than one: of the kernel's memory, of the quota, and of the cache's
//! own memory.

use std::collections::{BTreeMap, BTreeSet};

use criu_image_relay::criu::page_server::header::Dialect;
use criu_image_relay::criu::pages::{PAGE_SIZE, Space};

use crate::bench::Bench;
use crate::model::{Contained, filled};
use crate::page_client::{HELD, PageClient};

const TASK: Space = Space::Task(1);
/// 256 MiB.
const PAGES: u64 = 1 << 16;
const ROUNDS: u64 = 50;
/// A twentieth.
const DIRTY: u64 = PAGES / 20;

/// What the cache's own memory may grow by from the fifth round to the last: the runs of the flat pagemap
/// are cut smaller and smaller, until each round cuts as many as it covers.
const GROWTH: u64 = 1 << 20;

#[test]
fn a_long_chain_takes_no_more_memory_than_one_round() {
    let bench = Bench::start();
    let mut client = PageClient::on(bench.proxy.open_pages("web"), Dialect::Long);
    let (mut random, mut memory) = (Random(0x2545_f491_4f6c_dd1d), BTreeMap::new());
    let (mut settled, flat) = (0, PAGES * PAGE_SIZE);
    for round in 1..=ROUNDS {
        let dirty = if round == 1 { (0..PAGES).collect() } else { random.dirty() };
        memory.extend(dirty.iter().map(|page| (*page, (round * PAGES + page, false))));
        assert_eq!(client.open(TASK).unwrap(), round > 1);
        send(&mut client, &dirty, &memory);
        assert_eq!(client.force_close().unwrap(), HELD);

        let last = dirty.len() as u64 * PAGE_SIZE;
        let (held, charged) = (bench.cache.memfd_bytes(), bench.cache.status().held_bytes);
        for bytes in [held, charged] {
            assert!(bytes >= flat && bytes <= flat / 10 * 11 + last, "{bytes} in round {round}");
        }
        let own = bench.cache.resident_bytes();
        if round == 5 {
            settled = own;
        }
        assert!(round < 5 || own <= settled + GROWTH, "{own} bytes in round {round}");
    }
    bench.join("web");
    bench.assert_holds("web", &Contained::from([(TASK, memory)]));
}

/// Sends the pages that are dirty, and says of those between them that they are as in the parent.
fn send(client: &mut PageClient, dirty: &BTreeSet<u64>, memory: &BTreeMap<u64, (u64, bool)>) {
    let mut at = 0;
    while at < PAGES {
        let is_dirty = dirty.contains(&at);
        let same = (at..PAGES).take_while(|page| dirty.contains(page) == is_dirty);
        let pages = same.take(4096).count() as u64;
        if is_dirty {
            let bytes: Vec<_> =
                memory.range(at..at + pages).map(|(_, page)| filled(page.0)).collect();
            client.pages(TASK, at * PAGE_SIZE, false, &bytes.concat()).unwrap();
        } else {
            client.hole(TASK, at * PAGE_SIZE, pages).unwrap();
        }
        at += pages;
    }
}

/// Marsaglia's xorshift: every run of the test takes the same pages.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }

    /// Pages that are dirty, in runs.
    fn dirty(&mut self) -> BTreeSet<u64> {
        let mut dirty = BTreeSet::new();
        while (dirty.len() as u64) < DIRTY {
            let (len, start) = (1 + self.below(64), self.below(PAGES - 64));
            dirty.extend(start..start + len);
        }
        dirty
    }
}
