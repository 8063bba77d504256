//! A proxy and a cache, and the sessions that go on beside the one that does something wrong.

use std::fs::File;
use std::io::{Read, Write};
use std::net::SocketAddr;

use crate::criu::{Criu, RECORDS};
use crate::daemons::{Daemon, Settings};

/// What a whole image of pages holds in these tests. Half of it fits a pipe, so that no write waits.
pub(crate) fn pages() -> Vec<u8> {
    (0..60_000u32).map(|i| (i % 251).to_le_bytes()[0]).collect()
}

/// Both daemons, linked.
pub(crate) struct Hosts {
    pub(crate) proxy: Daemon,
    pub(crate) cache: Daemon,
    pub(crate) address: SocketAddr,
}

impl Hosts {
    pub(crate) fn start() -> Hosts {
        Hosts::with(&[], &[])
    }

    /// With other settings than the defaults.
    pub(crate) fn with(proxy: Settings<'_>, cache: Settings<'_>) -> Hosts {
        let (cache, address) = Daemon::cache(cache);
        Hosts { proxy: Daemon::proxy(address, proxy), cache, address }
    }

    /// A dump, and the restore that waits for it, while something else goes wrong.
    pub(crate) fn bystander(&self) -> Bystander {
        Bystander::begin(&self.proxy, &self.cache, self.address)
    }

    /// What was under way ends well, and a new dump and restore do too.
    #[track_caller]
    pub(crate) fn assert_undisturbed(&mut self, bystander: Bystander) {
        self.proxy.assert_alive();
        self.cache.assert_alive();
        bystander.finish();
        Bystander::begin_named("fresh", &self.proxy, &self.cache, self.address).finish();
    }
}

/// A dump under way, and the restore that waits for it.
pub(crate) struct Bystander {
    dump: Criu,
    open: File,
    restore: Criu,
}

impl Bystander {
    pub(crate) fn begin(proxy: &Daemon, cache: &Daemon, address: SocketAddr) -> Bystander {
        Bystander::begin_named("bystander", proxy, cache, address)
    }

    fn begin_named(id: &str, proxy: &Daemon, cache: &Daemon, address: SocketAddr) -> Bystander {
        let mut restore = Criu::in_dir_of(id, cache);
        restore.request("pages-1.img");
        let mut dump = Criu::dump_to(address, id, proxy);
        dump.write("core-7.img", RECORDS);
        let mut open = dump.create("pages-1.img");
        open.write_all(&pages()[..30_000]).unwrap();
        cache.assert_receiving(id, 30_000);
        Bystander { dump, open, restore }
    }

    /// Writes the rest, and restores all of it.
    #[track_caller]
    pub(crate) fn finish(mut self) {
        self.restore.assert_waits();
        self.open.write_all(&pages()[30_000..]).unwrap();
        drop(self.open);
        self.dump.complete();
        assert!(self.restore.reply().unwrap());
        let mut bytes = Vec::new();
        self.restore.take().read_to_end(&mut bytes).unwrap();
        assert!(bytes == pages(), "the restore got other bytes than the dump gave");
        assert_eq!(self.restore.read("core-7.img"), RECORDS);
        assert!(!self.restore.ask("cgroup.img"));
    }
}
