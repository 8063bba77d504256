//! The daemons in the guest.

use serde_json::Value;

use crate::bed::{CRIUS, Guest, guest};
use crate::dirtier::Dirtier;

/// A proxy and a cache that serve, until this is dropped. Their work-dirs are `proxy` and `cache` in `dir`.
pub(crate) struct Relay<'a> {
    pub(crate) guest: &'a Guest,
    pub(crate) dir: &'static str,
}

impl<'a> Relay<'a> {
    #[track_caller]
    pub(crate) fn start(guest: &'a Guest, dir: &'static str) -> Relay<'a> {
        guest.ok(&format!("rm -rf {dir}; mkdir -p {dir}"));
        guest.write(&format!("{dir}/cache.toml"), "listen = \"127.0.0.1:9996\"\n");
        guest.write(
            &format!("{dir}/proxy.toml"),
            "cache = \"127.0.0.1:9996\"\n[link]\ngive-up-after = \"3s\"\n",
        );
        let relay = Relay { guest, dir };
        for name in ["cache", "proxy"] {
            // It returns when the daemon serves.
            guest.ok(&format!(
                "mkdir {dir}/{name}; criu-image-{name} --config {dir}/{name}.toml --work-dir {dir}/{name} \
                 --daemon --pidfile {dir}/{name}.pid --log-file {dir}/{name}.log"
            ));
        }
        relay
    }

    /// Asks the proxy or the cache for something; it has to succeed. Returns what it said, as JSON.
    #[track_caller]
    pub(crate) fn ctl(&self, daemon: &str, command: &str) -> Value {
        serde_json::from_str(&self.guest.ok(&self.imagectl(daemon, command))).unwrap()
    }

    /// The command that asks the proxy or the cache for something.
    pub(crate) fn imagectl(&self, daemon: &str, command: &str) -> String {
        let dir = self.dir;
        format!("criu-imagectl --json --socket {dir}/{daemon}/control.sock {command}")
    }

    /// The state of a snapshot, as the proxy or the cache says it.
    #[track_caller]
    pub(crate) fn state(&self, daemon: &str, id: &str) -> String {
        let shown = self.ctl(daemon, &format!("show {id}"));
        shown["snapshot"]["state"].as_str().unwrap().to_owned()
    }
}

impl Drop for Relay<'_> {
    fn drop(&mut self) {
        let dir = self.dir;
        if std::thread::panicking() {
            eprintln!("{}", self.guest.run(&format!("tail -n 20 {dir}/*.log")).stdout);
        }
        self.guest.run(&format!("kill $(cat {dir}/proxy.pid {dir}/cache.pid); rm -rf {dir}"));
    }
}

#[test]
fn a_dump_streams_through_the_daemons_and_is_restored() {
    let relay = Relay::start(guest(), "/tmp/relay");
    for criu in CRIUS {
        let mut tree = Dirtier::start(guest(), "/tmp/relay-processes", 16, 4);
        tree.tell("a", "dirty 1 9");
        tree.tell("a", "fork b");
        tree.tell("b", "share 1 2");
        let pid = tree.pid("a");
        let (proxy, cache) = (format!("{}/proxy", relay.dir), format!("{}/cache", relay.dir));
        // Emulated as it is, the guest may be too slow to copy the memory in time for one without the hook.
        let options = format!("--stream -W /tmp -t {pid} --action-script criu-imagectl");
        relay.guest.criu(criu, "dump", &proxy, &options);
        assert!(!tree.lives("a"));
        relay.guest.criu(criu, "restore", &cache, "--stream -W /tmp --restore-detached");
        tree.check("a");
        tree.check("b");
    }
}
