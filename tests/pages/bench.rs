//! What the properties share: daemons that serve case after case, and reading back what they hold.

use std::cell::Cell;
use std::fmt::Debug;
use std::io::Read;
use std::net::SocketAddr;

use criu_image_relay::client::{self, Error};
use criu_image_relay::control::model::{Snapshot, SnapshotState};
use criu_image_relay::criu::page_server::answer::GET_MAX;
use criu_image_relay::criu::page_server::command::Command;
use criu_image_relay::criu::page_server::header::Dialect;
use criu_image_relay::criu::pages::{PAGE_SIZE, Space};
use proptest::strategy::Strategy;
use proptest::test_runner::{Config, TestRunner};

use crate::criu::{Criu, RECORDS};
use crate::daemons::{Daemon, Settings, eventually};
use crate::model::{Contained, Shown, assert_shown, filled};
use crate::page_client::{HELD, PageClient};

/// Both daemons, linked.
pub(crate) struct Bench {
    pub(crate) proxy: Daemon,
    pub(crate) cache: Daemon,
    cases: Cell<u64>,
}

/// Where rounds of a snapshot are taken.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Door {
    /// Each connection is handed over.
    Connections,
    /// A listening socket is.
    Listener(SocketAddr),
}

impl Bench {
    pub(crate) fn start() -> Bench {
        let (cache, address) = Daemon::cache(ROOMY);
        Bench::of(Daemon::proxy(address, &[]), cache)
    }

    pub(crate) fn of(proxy: Daemon, cache: Daemon) -> Bench {
        Bench { proxy, cache, cases: Cell::new(0) }
    }

    /// Holds a property for many cases, each with a snapshot id of its own.
    pub(crate) fn check<T: Debug>(
        &self,
        cases: u32,
        of: impl Strategy<Value = T>,
        holds: impl Fn(&str, T),
    ) {
        // A case that fails may have waited for it.
        let max_shrink_time = 20_000;
        let config =
            Config { cases, max_shrink_time, failure_persistence: None, ..Config::default() };
        let ran = TestRunner::new(config).run(&of, |case| {
            self.cases.set(self.cases.get() + 1);
            holds(&format!("web-{}", self.cases.get()), case);
            Ok(())
        });
        if let Err(failed) = ran {
            panic!("{failed}");
        }
    }

    /// Has rounds of a snapshot listened for, or not.
    pub(crate) fn door(&self, id: &str, listens: bool) -> Door {
        if listens { Door::Listener(self.proxy.listen_for_pages(id)) } else { Door::Connections }
    }

    /// Connects for rounds of a snapshot.
    pub(crate) fn connect(&self, id: &str, door: Door, dialect: Dialect) -> PageClient {
        match door {
            Door::Connections => PageClient::on(self.proxy.open_pages_of(id, Some(id)), dialect),
            Door::Listener(address) => PageClient::at(address, dialect),
        }
    }

    /// Sends the images that make the pages a checkpoint.
    pub(crate) fn join(&self, id: &str) {
        let mut dump = Criu::in_dir_of(id, &self.proxy);
        dump.write("core-7.img", RECORDS);
        dump.complete();
    }

    /// A restore gets this memory, and so does a client that asks for images by their names.
    #[track_caller]
    pub(crate) fn assert_holds(&self, id: &str, wanted: &Contained) {
        // Who looks by name does not take the snapshot.
        let named = client::Client::at(self.cache.dir());
        assert_shown(wanted, |name| match named.open_read(id, name) {
            Ok(mut image) => {
                let mut bytes = Vec::new();
                image.read_to_end(&mut bytes).unwrap();
                Some(bytes)
            }
            Err(Error::NotFound(_)) => None,
            Err(error) => panic!("{error}"),
        });
        let mut restore = Criu::in_dir_of(id, &self.cache);
        assert_eq!(restore.read("core-7.img"), RECORDS);
        assert_shown(wanted, |name| {
            restore.ask(name).then(|| {
                let mut bytes = Vec::new();
                restore.take().read_to_end(&mut bytes).unwrap();
                bytes
            })
        });
    }

    /// Who asks for pages of tasks gets this memory: each run of pages, and nothing of what lies between them.
    #[track_caller]
    pub(crate) fn assert_given(&self, id: &str, mut client: PageClient, wanted: &Contained) {
        let mut asked = false;
        for (space, pages) in wanted {
            let Space::Task(pid) = *space else { continue };
            let mut next = pages.keys().next().copied();
            while let Some(page) = next {
                let follows = |(at, (number, _)): &(u64, (&u64, &Shown))| at == *number;
                let run = (page..).zip(pages.range(page..)).take_while(follows).count() as u64;
                let get =
                    Command::Get { id: pid.into(), address: page * PAGE_SIZE, pages: run + 9 };
                client.command(get).unwrap();
                let given = client.given(pid.into(), page * PAGE_SIZE).unwrap();
                let count = given.len() as u64 / PAGE_SIZE;
                assert_eq!(count, run.min(GET_MAX), "from {page:#x} of {space} on");
                for ((page, (number, _)), bytes) in pages.range(page..).zip(given.chunks(4096)) {
                    assert!(bytes == filled(*number), "page {page:#x} of {space} is another");
                }
                next = pages.range(page + count..).next().map(|(page, _)| *page);
                asked = true;
            }
        }
        if asked {
            assert_eq!(client.close().unwrap(), HELD);
        }
        drop(client);
        let awaited = |shown: Snapshot| shown.state == SnapshotState::Awaited;
        assert!(eventually(|| !self.proxy.show(id).is_some_and(awaited)));
    }

    /// Nothing is left of a snapshot that is dropped.
    #[track_caller]
    pub(crate) fn drop_all_of(&self, id: &str) {
        self.cache.drop_snapshot(id);
        if self.proxy.show(id).is_some() {
            self.proxy.drop_snapshot(id);
        }
        self.cache.assert_held(0);
    }
}

/// What a cache has room for, where its limit is not what is tested.
pub(crate) const ROOMY: Settings<'static> = &[("store.max-bytes", "\"1G\"")];
