//! The source host: CRIU's dumps come in over unix sockets, the link to a cache goes out.
//!
//! - [`dump`]: one CRIU run, as a list of phases; `requests` and `forward` are its ends, towards
//!   CRIU's socket and from CRIU's pipes.
//! - `copy` copies out of CRIU's pipes what CRIU only lends, `freeze` knows whether that was in time, `hooks` which
//!   CRIU waits until it is no matter.
//! - `pages`: CRIU's page server; `round` is what one round sends, `gets` gives pages back.
//! - `remote`: the clients that name their images, and the snapshots that they have begun.
//! - [`link`]: the links to caches, made when there is something to send; `greeting` is the handshake.
//! - [`connection`]: a link that is up, and the snapshots that share it, each an [`upload`]; `outgoing` is what goes
//!   out on it, `regions` what the cache is asked for.
//! - [`records`]: what was sent, for `criu-imagectl` and the status line; `figures` is what a scrape shows.

pub mod connection;
pub mod dump;
pub mod link;
pub mod records;
pub mod upload;
mod withdraw;

mod control;
mod copy;
mod failure;
mod figures;
mod forward;
mod freeze;
mod gets;
mod greeting;
mod hooks;
mod outgoing;
mod pages;
mod regions;
mod remote;
mod requests;
mod round;

use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;

use tokio::net::UnixStream;

use crate::config::ProxySettings;
use crate::criu::remote::PROXY_SOCKET;
use crate::criu::stream::CAPTURE_SOCKET;
use crate::daemon::accept::Listeners;
use crate::daemon::handed_over::into_tokio;
use crate::daemon::places::Places;
use crate::daemon::rate::{Rate, human_bytes};
use crate::daemon::sessions::{Peer, Sessions, admit};
use crate::daemon::{Daemon, Sockets, Wanted, journal};
use crate::metrics;
use crate::metrics::refusals::Reason;
use crate::sys::clock::{host_name, now_ms};
use crate::sys::held::Budget;

use dump::Target;
use figures::Figures;
use hooks::Hooks;
use link::Links;
use records::Records;
use remote::Remote;

/// The proxy.
#[derive(Debug)]
pub struct Proxy {
    settings: RefCell<Rc<ProxySettings>>,
    name: String,
    links: Rc<Links>,
    records: Rc<Records>,
    remote: Rc<Remote>,
    hooks: Hooks,
    /// The memory for what is copied.
    budget: Rc<Budget>,
    sessions: Sessions,
    listeners: Listeners,
    rate: Rate,
    /// Bytes of pages that clients have been given back.
    served: Cell<u64>,
    figures: Figures,
    started_ms: u64,
}

impl Proxy {
    fn new(settings: ProxySettings) -> Rc<Proxy> {
        let name = if settings.name.is_empty() { host_name() } else { settings.name.clone() };
        Rc::new(Proxy {
            links: Links::new(name.clone()),
            name,
            records: Rc::default(),
            remote: Rc::default(),
            hooks: Hooks::default(),
            budget: Rc::new(Budget::new(settings.memory.max_bytes)),
            sessions: Sessions::default(),
            listeners: Listeners::default(),
            rate: Rate::default(),
            served: Cell::new(0),
            figures: Figures::default(),
            started_ms: now_ms(),
            settings: RefCell::new(Rc::new(settings)),
        })
    }

    /// The settings in force; a session keeps those it began with.
    fn settings(&self) -> Rc<ProxySettings> {
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

    /// Serves one dump of the shared socket: it becomes a new snapshot.
    async fn serve(self: Rc<Self>, socket: UnixStream) {
        if let Some(peer) = self.admit(&socket) {
            let target = Target::fresh(&self.name, peer, self.links.destination(&self.settings()));
            dump::serve(&self, socket, peer, target).await;
        }
    }
}

impl Daemon for Proxy {
    const NAME: &'static str = "criu-image-proxy";
    type Settings = ProxySettings;

    fn wanted(settings: &ProxySettings) -> Wanted<'_> {
        Wanted {
            daemon: Self::NAME,
            work_dir: &settings.work_dir,
            stream: CAPTURE_SOCKET,
            remote: PROXY_SOCKET,
            pages: settings.pages.listen.as_deref(),
            metrics: settings.metrics.listen.as_ref(),
            link: None,
        }
    }

    fn start(settings: ProxySettings, sockets: Sockets) -> io::Result<Rc<Proxy>> {
        let max = Places::new(settings.sessions.max);
        let max_clients = Places::new(settings.remote.max);
        let max_scrapes = Places::new(metrics::CLIENTS_MAX);
        let proxy = Proxy::new(settings);
        if let Some(connected) = sockets.connected {
            proxy.links.join(connected.register()?, proxy.settings()).map_err(io::Error::other)?;
        }
        for listener in sockets.stream {
            let serving = proxy.clone();
            let serve = move |socket| serving.clone().serve(socket);
            proxy.listeners.serve_unix("stream", listener, &max, serve)?;
        }
        for listener in sockets.remote {
            let serving = proxy.clone();
            let serve = move |socket| remote::session::serve(&serving, socket);
            proxy.listeners.serve_unix("remote", listener, &max_clients, serve)?;
        }
        for listener in sockets.pages {
            let serving = proxy.clone();
            let serve = move |stream, place| pages::serve_shared(serving.clone(), stream, place);
            proxy.listeners.serve_bound("pages", listener, &max, serve)?;
        }
        for listener in sockets.metrics {
            let serving = proxy.clone();
            let serve = move |stream, place| metrics::serve(serving.clone(), stream, place);
            proxy.listeners.serve_bound("metrics", listener, &max_scrapes, serve)?;
        }
        for listener in sockets.control {
            let (backend, admitting) = (control::Control(proxy.clone()), proxy.clone());
            let admit = move |socket: &UnixStream| admitting.admit(socket);
            proxy.listeners.start(crate::control::serve(into_tokio(listener)?, admit, backend));
        }
        Ok(proxy)
    }

    fn reload(&self, settings: ProxySettings) {
        self.budget.set_limit(settings.memory.max_bytes);
        *self.settings.borrow_mut() = Rc::new(settings);
    }

    fn tick(&self) {
        self.rate.sample(self.records.total());
        self.records.forget_old();
        self.remote.expire(self.settings().remote.idle_timeout);
    }

    fn status_line(&self) -> String {
        let counts = self.records.counts();
        let links = self.links.describe(&self.links.destination(&self.settings()));
        format!(
            "{} sending, {} sent, {} damaged; {} at {}/s; {links}",
            counts.receiving,
            counts.whole,
            counts.damaged,
            human_bytes(self.records.total()),
            human_bytes(self.rate.per_second()),
        )
    }

    fn sessions(&self) -> usize {
        self.sessions.live()
    }

    fn progress(&self) -> u64 {
        self.records.total() + self.served.get()
    }

    fn stop_accepting(&self) {
        self.listeners.stop();
    }

    async fn over(&self) -> bool {
        self.links.over().await
    }

    async fn farewell(&self) {
        let criu_reason = "the proxy was stopped";
        self.records.abandon(criu_reason);
        // Who works on them does not come to say it.
        for record in self.records.under_way() {
            let (id, dump) = (record.info().id, record.is_dumping());
            let message_id = if dump { journal::SNAPSHOT_DAMAGED } else { journal::ROUND_FAILED };
            let what = if dump { "" } else { "a round of " };
            tracing::warn!(
                message_id,
                criu_snapshot = id,
                criu_reason,
                "{what}snapshot {id} is given up: {criu_reason}"
            );
        }
    }
}
