//! A round that is cut at any byte is as if it had not been: what came before stays, and the next one has
//! no parent, since CRIU takes what it has sent for held.

use std::cell::Cell;

use criu_image_relay::control::model::SnapshotState;
use criu_image_relay::criu::page_server::header::Dialect;
use criu_image_relay::criu::pages::PAGE_SIZE;
use proptest::prelude::*;
use proptest::sample::Index;

use crate::bench::{Bench, Door, ROOMY};
use crate::daemons::{Daemon, eventually};
use crate::forwarder::Forwarder;
use crate::model::{Act, Contained, Memory, Way, acts, dialect, way};
use crate::page_client::{HELD, PageClient};

type Round = (Vec<Act>, Way);

/// A process of which a round is lost.
#[derive(Debug, Clone)]
struct Migration {
    dialect: Dialect,
    listens: bool,
    /// Those before it.
    rounds: Vec<Round>,
    lost: Round,
    /// At which byte of what the client sends, or of as many on the link.
    cut: Index,
    /// Whether the client closes only its own direction, and waits for what the daemon does.
    hears: bool,
    /// What comes after it; without, the images come.
    next: Option<Round>,
}

fn migration() -> impl Strategy<Value = Migration> {
    let rounds = proptest::collection::vec((acts(), way()), 0..3);
    let next = proptest::option::of((acts(), way()));
    let how = (dialect(), any::<bool>(), any::<Index>(), any::<bool>());
    (how, rounds, (acts(), way()), next).prop_map(
        |((dialect, listens, cut, hears), rounds, lost, next)| Migration {
            dialect,
            listens,
            rounds,
            lost,
            cut,
            hears,
            next,
        },
    )
}

/// A process, and the last of its rounds that the cache holds.
struct Process<'a> {
    bench: &'a Bench,
    id: &'a str,
    migration: &'a Migration,
    door: Door,
    memory: Memory,
    /// What that round brought; `None` before the first.
    held: Option<Contained>,
    /// Whether the next one is based on it.
    is_parent: Parent,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Parent {
    Yes,
    No,
    /// A client that is gone may have been noticed or not.
    Perhaps,
}

impl<'a> Process<'a> {
    fn begin(bench: &'a Bench, id: &'a str, migration: &'a Migration) -> Process<'a> {
        let (door, memory) = (bench.door(id, migration.listens), Memory::new());
        let mut process =
            Process { bench, id, migration, door, memory, held: None, is_parent: Parent::No };
        migration.rounds.iter().for_each(|round| process.round(round));
        process
    }

    /// Goes on until the next round.
    fn act(&mut self, (acts, _): &Round) -> PageClient {
        for act in acts {
            self.memory.act(act);
        }
        self.bench.connect(self.id, self.door, self.migration.dialect)
    }

    /// A round that succeeds.
    fn round(&mut self, round: &Round) {
        let mut client = self.act(round);
        let parents = self.memory.send(&mut client, &round.1).unwrap();
        let now = self.memory.contained();
        let in_both =
            |had: &Contained| now.keys().copied().filter(|space| had.contains_key(space)).collect();
        let both: Vec<_> = self.held.as_ref().map(in_both).unwrap_or_default();
        let (none, all) = (parents.is_empty(), parents == both);
        let right = match self.is_parent {
            Parent::Yes => all,
            Parent::No => none,
            Parent::Perhaps => none || all,
        };
        assert!(right, "{parents:?} have a parent, of {both:?}");
        assert_eq!(client.close().unwrap(), HELD);
        self.memory.forget_dirt();
        (self.held, self.is_parent) = (Some(now), Parent::Yes);
    }

    /// How many bytes the client sends of the round that comes next.
    fn next_len(&self, (_, way): &Round) -> u64 {
        let parents: Vec<_> = match &self.held {
            Some(held) if self.is_parent == Parent::Yes => held.keys().copied().collect(),
            _ => Vec::new(),
        };
        self.memory.sent_len(&parents, way, self.migration.dialect)
    }

    /// The round did not succeed. A client that has heard something has had the kernel forget what was
    /// written to.
    fn lose(&mut self, client: &PageClient) {
        if client.has_heard() {
            self.memory.forget_dirt();
            self.is_parent = Parent::No;
        } else {
            self.is_parent = Parent::Perhaps;
        }
        let ended = || self.bench.proxy.sessions() == 0;
        assert!(eventually(ended), "the proxy does not take note of it");
    }

    /// What came before is there, and is what images join; or what comes next is.
    fn go_on(mut self) {
        let Migration { next, .. } = self.migration;
        let (cache, id) = (&self.bench.cache, self.id);
        if let Some(held) = &self.held {
            cache.assert_state(id, SnapshotState::Paged);
            let pages = held.values().map(|pages| pages.len() as u64).sum::<u64>();
            cache.assert_held(pages * PAGE_SIZE);
        } else {
            // The cache may hear of it last.
            let nothing = [None, Some(SnapshotState::Damaged), Some(SnapshotState::Paged)];
            let settled = || nothing.contains(&cache.show(id).map(|shown| shown.state));
            assert!(eventually(settled), "the cache does not take note of it");
            cache.assert_held(0);
        }
        if let Some(next) = next {
            self.round(next);
        }
        if let Some(held) = &self.held {
            self.bench.join(id);
            self.bench.assert_holds(id, held);
            self.bench.drop_all_of(id);
        }
    }
}

#[test]
fn a_client_that_is_gone_at_any_byte_leaves_what_was_held() {
    let bench = Bench::start();
    bench.check(200, migration(), |id, migration| {
        let mut process = Process::begin(&bench, id, &migration);
        let mut client = process.act(&migration.lost);
        let len = process.next_len(&migration.lost);
        client.gone_after(migration.cut.index(usize::try_from(len).unwrap()) as u64);
        let sent = process.memory.send(&mut client, &migration.lost.1);
        assert!(sent.is_err() || client.close().is_err(), "the round is not cut");
        assert!(client.is_gone(), "the round has another length");
        if migration.hears {
            // At most the answer to the last command that it could send whole.
            let said = client.rest();
            assert!([0, 1, 4].contains(&said.len()), "{said:?}");
        }
        process.lose(&client);
        drop(client);
        process.go_on();
    });
}

#[test]
fn a_link_that_breaks_at_any_byte_leaves_what_was_held() {
    let (cache, address) = Daemon::cache(ROOMY);
    let network = Forwarder::to(address);
    let bench = Bench::of(Daemon::proxy(network.address, &[]), cache);
    let lost = Cell::new(0);
    bench.check(120, migration(), |id, migration| {
        let mut process = Process::begin(&bench, id, &migration);
        let mut client = process.act(&migration.lost);
        let len = process.next_len(&migration.lost);
        network.cut_after(migration.cut.index(usize::try_from(len).unwrap()) as u64);
        let sent = process.memory.send(&mut client, &migration.lost.1);
        let status = sent.and_then(|_| client.close());
        let (status, was_cut) = (status.ok(), network.was_cut());
        if status == Some(HELD) {
            // It has not taken as many bytes on the link, or the link was not up yet.
            process.memory.forget_dirt();
            (process.held, process.is_parent) = (Some(process.memory.contained()), Parent::Yes);
        } else {
            assert!(was_cut, "the round is lost for nothing: {status:?}");
            lost.set(lost.get() + 1);
            process.lose(&client);
            let unlinked = || !bench.cache.status().links.iter().any(|link| link.up);
            assert!(eventually(unlinked), "the cache does not take note of it");
        }
        drop(client);
        process.go_on();
    });
    assert!(lost.get() > 60, "only {} rounds were lost", lost.get());
}
