//! Whatever processes do with their memory between rounds, the images show it as it was at the last one, and who
//! asks for single pages gets those of then, from the cache and through the proxy.

use criu_image_relay::control::model::SnapshotState;
use criu_image_relay::criu::page_server::header::Dialect;
use proptest::prelude::*;
use proptest::sample::Index;

use crate::bench::Bench;
use crate::criu::{Criu, RECORDS};
use crate::model::{Act, Memory, Way, acts, dialect, way};
use crate::page_client::{HELD, PageClient};

/// A round, and what comes before it.
#[derive(Debug, Clone)]
struct Round {
    acts: Vec<Act>,
    way: Way,
    /// Whether it comes on a connection of its own.
    connects: bool,
}

/// A process that is moved.
#[derive(Debug, Clone)]
struct Migration {
    dialect: Dialect,
    listens: bool,
    rounds: Vec<Round>,
    /// Before which round its images begin to come; without, they come when all rounds have.
    images_begin: Option<Index>,
}

fn migration() -> impl Strategy<Value = Migration> {
    let round = (acts(), way(), any::<bool>()).prop_map(|(acts, way, connects)| Round {
        acts,
        way,
        connects,
    });
    let images_begin = proptest::option::weighted(0.3, any::<Index>());
    (dialect(), any::<bool>(), proptest::collection::vec(round, 1..8), images_begin).prop_map(
        |(dialect, listens, rounds, images_begin)| {
            // A socket that is handed over later is for another dump.
            let listens = listens || images_begin.is_some();
            Migration { dialect, listens, rounds, images_begin }
        },
    )
}

#[test]
fn images_show_the_memory_of_the_last_round() {
    let bench = Bench::start();
    bench.check(256, migration(), |id, migration| migrate(&bench, id, &migration));
}

fn migrate(bench: &Bench, id: &str, migration: &Migration) {
    let Migration { dialect, listens, rounds, images_begin } = migration;
    let begins = images_begin.map(|begins| begins.index(rounds.len()));
    let mut dump = begins.map(|_| Criu::in_dir_of(id, &bench.proxy));
    let door = bench.door(id, *listens);
    let (mut memory, mut client) = (Memory::new(), None);
    let mut before = Vec::new();
    for (number, round) in rounds.iter().enumerate() {
        round.acts.iter().for_each(|act| memory.act(act));
        if let (true, Some(dump)) = (begins == Some(number), &mut dump) {
            dump.write("core-7.img", RECORDS);
        }
        let now: Vec<_> = memory.contained().into_keys().collect();
        let connected = client.get_or_insert_with(|| bench.connect(id, door, *dialect));
        let parents = memory.send(connected, &round.way).unwrap();
        let both = now.iter().filter(|space| before.contains(*space));
        assert!(parents.iter().eq(both), "{parents:?} have a parent, of {before:?} and {now:?}");
        let connects = rounds.get(number + 1).is_none_or(|next| next.connects);
        let status = if connects { connected.close() } else { connected.force_close() };
        assert_eq!(status.unwrap(), HELD);
        client = client.filter(|_| !connects);
        memory.forget_dirt();
        before = now;
    }
    let held = memory.contained();
    bench.assert_given(id, bench.connect(id, door, *dialect), &held);
    match dump {
        Some(dump) => dump.complete(),
        None => bench.join(id),
    }
    for daemon in [&bench.proxy, &bench.cache] {
        daemon.assert_state(id, SnapshotState::Whole);
        bench.assert_given(id, PageClient::on(daemon.open_pages(id), *dialect), &held);
    }
    bench.assert_holds(id, &held);
    bench.drop_all_of(id);
}
