//! Pre-dumps through the proxy and the cache: only what changed goes over the link, and what is restored is all of it.

use crate::bed::{CRIUS, Guest, guest, wait_until};
use crate::dirtier::{ChangingTree, Dirtier};
use crate::relay::Relay;

const PAGE: u64 = 4096;

/// What may go over the link besides the pages of a round: `3 %` of them, and so much.
const OVERHEAD: u64 = 64 << 10;

/// What the processes dirty by themselves between two rounds is less than so many pages.
const NOISE: u64 = 100;

/// The rounds of one snapshot, each sent to the page server that the proxy is for it.
struct Rounds<'a> {
    relay: &'a Relay<'a>,
    criu: &'static str,
    id: String,
    dir: String,
    port: u64,
    done: u32,
}

/// What a round cost.
struct Sent {
    /// Pages that CRIU says it sent.
    pages: u64,
    /// Bytes that the link carried towards the cache.
    link: u64,
}

impl<'a> Rounds<'a> {
    /// A page server for a snapshot. Its directory is called as it is.
    #[track_caller]
    fn open(relay: &'a Relay<'a>, criu: &'static str, id: &str) -> Rounds<'a> {
        let dir = format!("{}/{id}", relay.dir);
        relay.guest.ok(&format!("rm -rf {dir}; mkdir -p {dir}"));
        let opened = relay.ctl("proxy", &format!("open {dir} --pages"));
        let port = opened["port"].as_u64().unwrap();
        Rounds { relay, criu, id: id.to_owned(), dir, port, done: 0 }
    }

    /// The migration is given up at the source, and begun again.
    #[track_caller]
    fn begin_anew(&mut self) {
        self.relay.ctl("proxy", &format!("drop {}", self.id));
        self.guest().ok(&format!("rm -r {0} && mkdir {0}", self.dir));
        let opened = self.relay.ctl("proxy", &format!("open {} --pages", self.dir));
        self.port = opened["port"].as_u64().unwrap();
        self.done = 0;
    }

    fn guest(&self) -> &'a Guest {
        self.relay.guest
    }

    /// A pre-dump or the dump.
    #[track_caller]
    fn round(&mut self, action: &str, pid: u64) -> Sent {
        let (now, before) = (self.done + 1, self.link_bytes());
        let parent = match self.done {
            0 => String::new(),
            round => format!("--prev-images-dir ../{round}"),
        };
        let options = format!("{parent} {} -t {pid} --track-mem", self.page_server());
        self.guest().criu(self.criu, action, &self.images(now), &options);
        self.done = now;
        Sent { pages: self.pages_written(), link: self.link_bytes() - before }
    }

    fn images(&self, round: u32) -> String {
        format!("{}/{round}", self.dir)
    }

    fn page_server(&self) -> String {
        format!("--page-server --address 127.0.0.1 --port {}", self.port)
    }

    /// Sends the images of the last round, which join the pages.
    #[track_caller]
    fn push(&self) {
        let push = format!("push --snapshot {} {}", self.id, self.images(self.done));
        self.relay.ctl("proxy", &push);
    }

    /// Restores through the stream.
    #[track_caller]
    fn restore(&self) {
        let dir = format!("{}/stream", self.dir);
        self.guest().ok(&format!("mkdir -p {dir}"));
        self.relay.ctl("cache", &format!("open --snapshot {} {dir}", self.id));
        self.guest().criu(self.criu, "restore", &dir, "--stream --restore-detached");
    }

    /// Restores from a directory of files and links.
    #[track_caller]
    fn restore_view(&self) {
        let dir = format!("{}/view", self.dir);
        self.relay.ctl("cache", &format!("view --snapshot {} {dir}", self.id));
        self.guest().criu(self.criu, "restore", &dir, "--restore-detached");
    }

    /// Restores the small images of a view; the pages come as they are touched, from a daemon's page server.
    #[track_caller]
    fn restore_lazily(&self, daemon: &str) {
        let (dir, view) = (format!("{}/lazy", self.dir), format!("{}/lazy-view", self.dir));
        self.guest().ok(&format!("mkdir -p {dir}"));
        self.relay.ctl("cache", &format!("view --snapshot {} {view}", self.id));
        let opened = self.relay.ctl(daemon, &format!("open --snapshot {} {dir} --pages", self.id));
        let port = opened["port"].as_u64().unwrap();
        let lazy_pages = format!(
            "{} lazy-pages -D {view} -v3 -o lazy.log --page-server --address 127.0.0.1 --port {port}",
            self.criu
        );
        self.guest().start(&lazy_pages, &format!("{dir}/log"));
        wait_until("the lazy-pages daemon listens", || {
            self.guest().run(&format!("test -S {view}/lazy-pages.socket")).status == 0
        });
        self.guest().criu(self.criu, "restore", &view, "--lazy-pages --restore-detached");
        wait_until("the lazy-pages daemon has all it needs", || {
            self.guest().run("pgrep -f lazy-pages").status != 0
        });
        eprintln!("{}", self.guest().ok(&format!("cat {view}/lazy.log; for f in {view}/pagemap-*; do crit decode -i $f | tail -c 1500; done; ls -l {view}; uname -r")));
        self.guest().ok(&format!("! grep -E '^\\([^)]*\\) *Error' {view}/lazy.log"));
    }

    /// What CRIU says that it wrote in the last round.
    #[track_caller]
    fn pages_written(&self) -> u64 {
        let stats = format!("{}/stats-dump", self.images(self.done));
        let told = self.guest().ok(&format!("crit decode -i {stats}"));
        let told: serde_json::Value = serde_json::from_str(&told).unwrap();
        let dump = &told["entries"][0]["dump"];
        let count = |name: &str| dump[name].as_u64().unwrap_or(0);
        count("pages_written") + count("shpages_written")
    }

    /// What the proxy has sent on the link that is up, as the kernel counts it.
    #[track_caller]
    fn link_bytes(&self) -> u64 {
        let told = self.guest().ok("ss -tniHO state established dport = :9996");
        let sent = told.split_whitespace().find_map(|word| word.strip_prefix("bytes_sent:"));
        sent.map_or(0, |sent| sent.parse().unwrap())
    }
}

impl Drop for Rounds<'_> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.guest().run(&format!("rm -rf {}", self.dir));
            self.relay.ctl("cache", &format!("drop {}", self.id));
        }
    }
}

impl Sent {
    #[track_caller]
    fn assert_is(&self, expected: u64, noise: u64) {
        let Sent { pages, link } = *self;
        assert!((expected..expected + noise).contains(&pages), "{pages}, not {expected}");
        let limit = pages * PAGE * 103 / 100 + OVERHEAD;
        assert!((pages * PAGE..=limit).contains(&link), "{pages} pages, {link} bytes on the link");
        println!("{pages} pages, {link} bytes on the link");
    }
}

#[test]
fn only_what_changed_goes_over_the_link() {
    const MIB: u32 = 256;
    let all = u64::from(MIB) * (1 << 20) / PAGE;
    let relay = Relay::start(guest(), "/tmp/precopy");
    for pre_dumps in 1..=5 {
        let criu = CRIUS[pre_dumps % 2];
        let mut process = Dirtier::start(guest(), "/tmp/precopy-process", MIB, 0);
        process.tell("a", "dirty 1 1");
        let pid = process.pid("a");
        let mut rounds = Rounds::open(&relay, criu, &format!("web-{pre_dumps}"));
        rounds.round("pre-dump", pid).assert_is(all, 1000);
        for round in 2..=pre_dumps as u64 {
            let step = 5 * round;
            process.tell("a", &format!("dirty {round} {step}"));
            rounds.round("pre-dump", pid).assert_is(all.div_ceil(step), NOISE);
        }
        process.tell("a", "dirty 9 50");
        rounds.round("dump", pid).assert_is(all.div_ceil(50), NOISE);
        assert!(!process.lives("a"));
        assert_eq!(relay.state("cache", &rounds.id), "paged");
        rounds.push();
        // What is restored twice has to find what it was told in its place twice.
        guest().ok("cp -a /tmp/precopy-process /tmp/precopy-told");
        rounds.restore();
        process.check("a");
        guest().ok(&format!("kill -KILL {pid}"));
        wait_until("it is gone", || !process.lives("a"));
        guest().ok("cp -a /tmp/precopy-told/. /tmp/precopy-process && rm -r /tmp/precopy-told");
        rounds.restore_view();
        process.check("a");
    }
}

#[test]
fn a_tree_that_forks_remaps_and_loses_a_process_comes_through() {
    let relay = Relay::start(guest(), "/tmp/precopy-tree");
    for criu in CRIUS {
        let mut tree = ChangingTree::start(guest(), "/tmp/precopy-processes");
        let mut rounds = Rounds::open(&relay, criu, "tree");
        for round in 0..3 {
            tree.change(round);
            rounds.round(["pre-dump", "pre-dump", "dump"][round], tree.pid());
        }
        rounds.push();
        rounds.restore();
        tree.check();
    }
}

#[test]
fn a_dump_streams_its_images_and_sends_its_pages() {
    let relay = Relay::start(guest(), "/tmp/precopy-stream");
    for criu in CRIUS {
        let mut process = Dirtier::start(guest(), "/tmp/precopy-streamed", 16, 4);
        process.tell("a", "dirty 1 3");
        let pid = process.pid("a");
        let rounds = Rounds::open(&relay, criu, "streamed");
        let options = format!("--stream -W /tmp {} -t {pid}", rounds.page_server());
        rounds.guest().criu(criu, "dump", &rounds.dir, &options);
        assert!(!process.lives("a"));
        rounds.restore();
        process.check("a");
    }
}

#[test]
fn a_migration_that_was_given_up_may_be_begun_again() {
    let relay = Relay::start(guest(), "/tmp/precopy-again");
    let mut process = Dirtier::start(guest(), "/tmp/precopy-given-up", 8, 0);
    process.tell("a", "dirty 1 1");
    let pid = process.pid("a");
    for criu in CRIUS {
        let mut rounds = Rounds::open(&relay, criu, "again");
        rounds.round("pre-dump", pid);
        // The cache still holds what came; the new round does not go on from it.
        rounds.begin_anew();
        rounds.round("pre-dump", pid);
        process.tell("a", "dirty 2 3");
        rounds.round("dump", pid);
        rounds.push();
        rounds.restore();
        process.check("a");
    }
}

#[test]
fn a_lazy_restore_asks_the_cache_for_pages_of_all_rounds() {
    restore_lazily("cache", "/tmp/precopy-lazy");
}

#[test]
fn a_lazy_restore_at_the_source_asks_the_proxy_for_pages_of_all_rounds() {
    restore_lazily("proxy", "/tmp/precopy-back");
}

#[track_caller]
fn restore_lazily(daemon: &str, dir: &'static str) {
    let relay = Relay::start(guest(), dir);
    for criu in CRIUS {
        let mut process = Dirtier::start(guest(), "/tmp/precopy-asked", 16, 0);
        process.tell("a", "dirty 1 1");
        let pid = process.pid("a");
        let mut rounds = Rounds::open(&relay, criu, "lazy");
        rounds.round("pre-dump", pid);
        process.tell("a", "dirty 2 7");
        rounds.round("dump", pid);
        rounds.push();
        rounds.restore_lazily(daemon);
        process.check("a");
        let log = guest().ok(&format!("cat {}/{daemon}.log", relay.dir));
        assert!(log.contains("pages of snapshot lazy were asked for"), "{log}");
        if daemon == "proxy" {
            // It would await rounds on the socket for ever.
            relay.ctl("proxy", "drop lazy");
        }
    }
}

#[test]
fn incremental_dumps_into_directories_are_pushed_one_by_one() {
    let relay = Relay::start(guest(), "/tmp/precopy-pushed");
    for criu in CRIUS {
        let mut process = Dirtier::start(guest(), "/tmp/precopy-directory", 16, 4);
        process.tell("a", "dirty 1 1");
        let pid = process.pid("a");
        let dir = format!("{}/dir", relay.dir);
        guest().ok(&format!("rm -rf {dir}; mkdir {dir}"));
        let images = |round: &str| format!("{dir}/{round}");
        guest().criu(criu, "pre-dump", &images("1"), &format!("-t {pid} --track-mem"));
        relay.ctl("proxy", &format!("push {}", images("1")));
        process.tell("a", "dirty 2 9");
        let options = format!("-t {pid} --track-mem --prev-images-dir ../1");
        guest().criu(criu, "dump", &images("2"), &options);
        let alone = relay.imagectl("proxy", &format!("push {}", images("2")));
        let refused = guest().run(&alone);
        assert!(refused.status != 0 && refused.stderr.contains("--parent"), "{refused:?}");
        relay.ctl("proxy", &format!("push --parent 1 {}", images("2")));
        let stream = images("stream");
        guest().ok(&format!("mkdir {stream}"));
        relay.ctl("cache", &format!("open --snapshot 2 {stream}"));
        guest().criu(criu, "restore", &stream, "--stream --restore-detached");
        process.check("a");
        relay.ctl("cache", "drop 1 2");
    }
}
