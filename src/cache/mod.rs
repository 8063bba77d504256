//! The destination host: links from proxies come in, CRIU's restores are served.
//!
//! - [`link`]: one proxy, from its preface to its last snapshot; `link_places` says who may have a link, `incoming` is what comes on it, `rounds`
//!   the pages among it, `waits` those for the quota,
//!   `answers` what goes back, `regions` the parts of images that it asks for.
//! - [`remote`]: one client that names what it reads.
//! - `pages`: one client that asks for pages, as CRIU's lazy-pages daemon does.
//! - [`restore`]: one CRIU run, as a list of phases; `fill` is an image on its way out.
//! - `figures`: what a scrape shows. `keeping`: what systemd keeps while there is no cache.

pub mod link;
pub mod remote;
pub mod restore;

mod answers;
mod control;
mod figures;
mod fill;
mod incoming;
mod keeping;
mod link_places;
mod pages;
mod regions;
mod rounds;
mod waits;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::rc::Rc;
use std::time::Instant;

use tokio::net::UnixStream;

use crate::config::CacheSettings;
use crate::control::model::{LinkStatus, SnapshotState};
use crate::criu::remote::CACHE_SOCKET;
use crate::criu::stream::SERVE_SOCKET;
use crate::daemon::accept::Listeners;
use crate::daemon::given::GivenLink;
use crate::daemon::handed_over::into_tokio;
use crate::daemon::outages::Outages;
use crate::daemon::places::{Place, Places};
use crate::daemon::rate::{Rate, human_bytes};
use crate::daemon::sessions::{Peer, Sessions, admit};
use crate::daemon::{Daemon, Sockets, Wanted, journal};
use crate::metrics;
use crate::metrics::refusals::Reason;
use crate::store::pages::release_in_turns;
use crate::store::{Key, State, Store, close_in_background};
use crate::sys::clock::now_ms;
use crate::sys::connected::Stream;

use figures::Figures;
use keeping::Keeping;
use link_places::LinkPlaces;
use pages::Whose;
use restore::Source;

/// The cache.
#[derive(Debug)]
pub struct Cache {
    settings: RefCell<Rc<CacheSettings>>,
    store: Rc<Store>,
    links: Links,
    restores: Sessions,
    /// Those of them that do not wait for a snapshot any more.
    serving: Sessions,
    listeners: Listeners,
    given: GivenLink,
    rate: Rate,
    /// What old clients restore, by their process: their ending names nothing.
    restoring: RefCell<BTreeMap<i32, String>>,
    /// Bytes that restores have read.
    served: Cell<u64>,
    figures: Figures,
    keeping: Keeping,
    started_ms: u64,
}

impl Cache {
    fn new(settings: CacheSettings) -> Rc<Cache> {
        Rc::new(Cache {
            store: Store::new(settings.store.clone()),
            links: Links::new(settings.link.max),
            restores: Sessions::default(),
            serving: Sessions::default(),
            listeners: Listeners::default(),
            given: GivenLink::default(),
            rate: Rate::default(),
            restoring: RefCell::default(),
            served: Cell::new(0),
            figures: Figures::default(),
            keeping: Keeping::default(),
            started_ms: now_ms(),
            settings: RefCell::new(Rc::new(settings)),
        })
    }

    /// The settings in force; a session keeps those it began with.
    fn settings(&self) -> Rc<CacheSettings> {
        self.settings.borrow().clone()
    }

    /// Whether a peer may have a session.
    fn admit(&self, socket: &UnixStream) -> Option<Peer> {
        let peer = admit(socket, &self.settings().allow_uids);
        if peer.is_none() {
            self.figures.refusals.count(Reason::Uid);
        }
        peer
    }

    /// Serves one restore of the shared socket: it takes the oldest snapshot not yet taken.
    async fn serve(self: Rc<Self>, socket: UnixStream) {
        if let Some(peer) = self.admit(&socket) {
            restore::serve(&self, socket, peer, Source::Oldest, None).await;
        }
    }

    /// Serves one proxy.
    async fn serve_link(self: Rc<Self>, stream: Stream, place: Place) {
        let _ = link::serve(&self, stream, link::Whose::Anyone, place).await;
    }

    /// Brings the pages of a whole snapshot together, in steps and if a restore from a view is to come.
    fn prepare_view(&self, key: Key) {
        let store = self.store.clone();
        tokio::task::spawn_local(async move { store.prepare_view(key).await });
    }

    /// Has systemd keep what is whole, as long as the cache runs.
    async fn keep(self: Rc<Self>) {
        self.keeping.run(&self.store).await;
    }

    /// Serves the one proxy that is connected already.
    async fn serve_given(self: Rc<Self>, stream: Stream) {
        let well = link::serve(&self, stream, link::Whose::Given, Place::unlimited()).await;
        self.given.ended(well);
    }
}

/// The links that are up.
#[derive(Debug)]
struct Links {
    places: LinkPlaces,
    peers: RefCell<Vec<Rc<LinkStatus>>>,
    busy: Sessions,
    /// What was told of each proxy's links.
    outages: RefCell<BTreeMap<Proxy, Rc<Outages>>>,
}

/// What a proxy calls itself, and its host.
type Proxy = (String, Option<IpAddr>);

/// Of so many proxies it is known whether they were lost.
const OUTAGES: usize = 256;

impl Links {
    fn new(max: u64) -> Links {
        Links {
            places: LinkPlaces::new(max),
            peers: RefCell::default(),
            busy: Sessions::default(),
            outages: RefCell::default(),
        }
    }

    fn add(&self, peer: &str) -> UpLink<'_> {
        let status =
            Rc::new(LinkStatus { peer: peer.to_owned(), up: true, why: "connected".to_owned() });
        self.peers.borrow_mut().push(status.clone());
        UpLink { links: self, status }
    }

    /// What was told of a proxy's links so far.
    fn outages_of(&self, name: &str, host: Option<IpAddr>) -> Rc<Outages> {
        let mut known = self.outages.borrow_mut();
        if known.len() >= OUTAGES {
            known.retain(|_, outages| Rc::strong_count(outages) > 1 || outages.is_down());
        }
        let proxy = (name.to_owned(), host);
        if known.len() >= OUTAGES && !known.contains_key(&proxy) {
            return Rc::default();
        }
        known.entry(proxy).or_default().clone()
    }
}

/// A link that is up, until it is dropped.
struct UpLink<'a> {
    links: &'a Links,
    status: Rc<LinkStatus>,
}

impl Drop for UpLink<'_> {
    fn drop(&mut self) {
        self.links.peers.borrow_mut().retain(|peer| !Rc::ptr_eq(peer, &self.status));
    }
}

/// How many snapshots there are in each state.
#[derive(Debug, Default, Clone, Copy)]
struct StateCounts {
    awaited: u64,
    receiving: u64,
    /// Those of which rounds of pages are held.
    paged: u64,
    whole: u64,
    taken: u64,
    damaged: u64,
}

impl StateCounts {
    fn of(store: &Store) -> StateCounts {
        let mut counts = StateCounts::default();
        store.for_each(|snapshot| match control::state_of(snapshot) {
            SnapshotState::Awaited => counts.awaited += 1,
            SnapshotState::Receiving => counts.receiving += 1,
            SnapshotState::Paged => counts.paged += 1,
            SnapshotState::Whole => counts.whole += 1,
            SnapshotState::Taken => counts.taken += 1,
            SnapshotState::Damaged => counts.damaged += 1,
        });
        counts
    }

    /// Those that are still to be whole, as a glance shows them.
    fn coming(self) -> u64 {
        self.receiving + self.paged
    }

    /// By the states' names.
    fn by_state(self) -> [(&'static str, u64); 6] {
        let StateCounts { awaited, receiving, paged, whole, taken, damaged } = self;
        let names = ["awaited", "receiving", "paged", "whole", "taken", "damaged"];
        let counts = [awaited, receiving, paged, whole, taken, damaged];
        std::array::from_fn(|state| (names[state], counts[state]))
    }
}

impl Daemon for Cache {
    const NAME: &'static str = "criu-image-cache";
    type Settings = CacheSettings;

    fn wanted(settings: &CacheSettings) -> Wanted<'_> {
        Wanted {
            daemon: Self::NAME,
            work_dir: &settings.work_dir,
            stream: SERVE_SOCKET,
            remote: CACHE_SOCKET,
            pages: settings.pages.listen.as_deref(),
            metrics: settings.metrics.listen.as_ref(),
            link: Some(&settings.listen),
        }
    }

    fn start(settings: CacheSettings, sockets: Sockets) -> io::Result<Rc<Cache>> {
        let max = Places::new(settings.sessions.max);
        let max_readers = Places::new(settings.sessions.max);
        let max_clients = Places::new(settings.remote.max);
        let max_scrapes = Places::new(metrics::CLIENTS_MAX);
        let max_strangers = Places::new(link::STRANGERS);
        let cache = Cache::new(settings);
        cache.keeping.begin(&cache.store, sockets.kept);
        for (key, ..) in cache.store.restorable() {
            cache.prepare_view(key);
        }
        if cache.keeping.is_on() {
            tokio::task::spawn_local(cache.clone().keep());
        }
        for listener in sockets.stream {
            let serving = cache.clone();
            let serve = move |socket| serving.clone().serve(socket);
            cache.listeners.serve_unix("stream", listener, &max, serve)?;
        }
        for listener in sockets.remote {
            let serving = cache.clone();
            let serve = move |socket| remote::serve(serving.clone(), socket);
            cache.listeners.serve_unix("remote", listener, &max_clients, serve)?;
        }
        for listener in sockets.pages {
            let serving = cache.clone();
            let serve = move |stream, place| {
                pages::admit_and_serve(serving.clone(), stream, Whose::WhoHasTheTask, place)
            };
            cache.listeners.serve_bound("pages", listener, &max_readers, serve)?;
        }
        for listener in sockets.metrics {
            let serving = cache.clone();
            let serve = move |stream, place| metrics::serve(serving.clone(), stream, place);
            cache.listeners.serve_bound("metrics", listener, &max_scrapes, serve)?;
        }
        for listener in sockets.link {
            let serving = cache.clone();
            let serve = move |stream, place| serving.clone().serve_link(stream, place);
            cache.listeners.serve_bound("link", listener, &max_strangers, serve)?;
        }
        tokio::task::spawn_local(release_in_turns());
        tokio::task::spawn_local(close_in_background());
        if let Some(connected) = sockets.connected {
            tokio::task::spawn_local(cache.clone().serve_given(connected.register()?));
        }
        for listener in sockets.control {
            let (backend, admitting) = (control::Control(cache.clone()), cache.clone());
            let admit = move |socket: &UnixStream| admitting.admit(socket);
            cache.listeners.start(crate::control::serve(into_tokio(listener)?, admit, backend));
        }
        Ok(cache)
    }

    fn reload(&self, settings: CacheSettings) {
        self.store.configure(settings.store.clone());
        *self.settings.borrow_mut() = Rc::new(settings);
    }

    fn tick(&self) {
        self.rate.sample(self.store.total());
        for (id, sender, why) in self.store.expire(Instant::now()) {
            tracing::info!(
                message_id = journal::SNAPSHOT_EXPIRED,
                criu_snapshot = id,
                criu_peer = sender.address(),
                criu_reason = why,
                "snapshot {id} is no longer kept: {why}"
            );
        }
    }

    fn status_line(&self) -> String {
        let counts = StateCounts::of(&self.store);
        let links = self.links.peers.borrow().len();
        let quota = self.store.quota();
        let reached = if quota.is_reached() { ", QUOTA REACHED, senders wait" } else { "" };
        format!(
            "{} receiving, {} whole, {} taken, {} damaged; {} of {} held{reached}; {}/s; {} restores, {links} links",
            counts.coming(),
            counts.whole,
            counts.taken,
            counts.damaged,
            human_bytes(quota.used()),
            human_bytes(quota.limit()),
            human_bytes(self.rate.per_second()),
            self.restores.live(),
        )
    }

    fn sessions(&self) -> usize {
        self.serving.live() + self.links.busy.live()
    }

    fn progress(&self) -> u64 {
        self.store.total() + self.served.get()
    }

    fn stop_accepting(&self) {
        self.listeners.stop();
    }

    /// What it holds whole stays until a restore has taken it: only then the link's end is the end.
    async fn over(&self) -> bool {
        let well = self.given.over().await;
        let mut changed = self.store.watch();
        let whole = || StateCounts::of(&self.store).whole;
        if whole() > 0 {
            tracing::info!("{} whole snapshots are still served", whole());
        }
        while whole() > 0 {
            // The store lives as long as this.
            let _ = changed.changed().await;
        }
        well
    }

    async fn farewell(&self) {
        self.keeping.follow().await;
        self.store.for_each(|snapshot| {
            if self.store.key_of(&snapshot.id).is_some_and(|key| self.keeping.has(key)) {
                let (message_id, id) = (journal::SNAPSHOT_LEFT, snapshot.id.as_str());
                tracing::info!(
                    message_id,
                    criu_snapshot = id,
                    "snapshot {id} is left to systemd's file descriptor store: it is held again after a restart, and lost at a stop"
                );
                return;
            }
            let criu_reason = match snapshot.state {
                State::Whole(_) => "the cache was stopped before a restore took it",
                State::Paged => "the cache was stopped while it held pages of it",
                State::Receiving(_) => "the cache was stopped while it was coming",
                State::Awaited | State::Taken(_) | State::Damaged { .. } => return,
            };
            let (message_id, id) = (journal::SNAPSHOT_LOST, snapshot.id.as_str());
            tracing::warn!(
                message_id,
                criu_snapshot = id,
                criu_reason,
                "snapshot {id} is lost: {criu_reason}"
            );
        });
    }
}
