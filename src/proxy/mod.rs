//! The source host: CRIU's dumps come in over unix sockets, the link to a cache goes out.
//!
//! - [`dump`]: one CRIU run, as a list of phases.
//! - [`link`]: the links to caches, made when there is something to send.
//! - [`connection`]: a link that is up, and the snapshots that share it.
//! - [`records`]: what was sent, for `criu-imagectl` and the status line.

pub mod connection;
pub mod dump;
pub mod link;
pub mod records;

mod control;

use std::cell::RefCell;
use std::io;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;

use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tracing::Level;

use crate::config::ProxySettings;
use crate::criu::stream::CAPTURE_SOCKET;
use crate::daemon::accept::accept_each;
use crate::daemon::handed_over::into_tokio;
use crate::daemon::rate::{Rate, human_bytes};
use crate::daemon::sessions::{Peer, Sessions, check_peer, may_connect};
use crate::daemon::{Daemon, Sockets, Wanted, journal};
use crate::sys::clock::{host_name, now_ms};

use dump::Target;
use link::Links;
use records::Records;

/// The proxy.
#[derive(Debug)]
pub struct Proxy {
    settings: RefCell<Rc<ProxySettings>>,
    name: String,
    links: Links,
    records: Rc<Records>,
    sessions: Sessions,
    permits: Arc<Semaphore>,
    listeners: RefCell<Vec<JoinHandle<()>>>,
    rate: Rate,
    started_ms: u64,
}

impl Proxy {
    fn new(settings: ProxySettings) -> Rc<Proxy> {
        let name = if settings.name.is_empty() { host_name() } else { settings.name.clone() };
        let permits = usize::try_from(settings.sessions.max).unwrap_or(Semaphore::MAX_PERMITS);
        Rc::new(Proxy {
            links: Links::new(name.clone()),
            name,
            records: Rc::default(),
            sessions: Sessions::default(),
            permits: Arc::new(Semaphore::new(permits.min(Semaphore::MAX_PERMITS))),
            listeners: RefCell::default(),
            rate: Rate::default(),
            started_ms: now_ms(),
            settings: RefCell::new(Rc::new(settings)),
        })
    }

    /// The settings in force; a session keeps those it began with.
    fn settings(&self) -> Rc<ProxySettings> {
        self.settings.borrow().clone()
    }

    /// Whether a peer may have a session; a refusal is logged.
    fn admit(&self, socket: &UnixStream) -> Option<Peer> {
        check_peer(socket, &self.settings().allow_uids)
            .inspect_err(|error| {
                tracing::warn!(message_id = journal::PEER_REFUSED, "a peer is refused: {error}");
            })
            .ok()
    }

    /// Serves the shared socket: each dump becomes a new snapshot.
    fn listen(self: &Rc<Self>, listener: UnixListener) {
        let proxy = self.clone();
        let task = tokio::task::spawn_local(async move {
            let accept = async || Ok(listener.accept().await?.0);
            let serve = |socket: UnixStream, permit| {
                if let Some(peer) = proxy.admit(&socket) {
                    let target = Target::fresh(&proxy.name, peer, proxy.settings().cache.clone());
                    let proxy = proxy.clone();
                    tokio::task::spawn_local(async move {
                        let _permit = permit;
                        dump::serve(&proxy, socket, peer, target).await;
                    });
                }
            };
            accept_each("stream", proxy.permits.clone(), accept, serve).await;
        });
        self.listeners.borrow_mut().push(task);
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
            link: None,
        }
    }

    fn level(settings: &ProxySettings) -> Level {
        settings.log.level
    }

    fn set_work_dir(settings: &mut ProxySettings, work_dir: PathBuf) {
        settings.work_dir = work_dir;
    }

    fn start(settings: ProxySettings, sockets: Sockets) -> io::Result<Rc<Proxy>> {
        let proxy = Proxy::new(settings);
        for listener in sockets.stream {
            proxy.listen(into_tokio(listener)?);
        }
        for listener in sockets.control {
            let backend = control::Control(proxy.clone());
            let allowed = {
                let proxy = proxy.clone();
                move |uid| may_connect(uid, &proxy.settings().allow_uids)
            };
            let serve = crate::control::serve(into_tokio(listener)?, allowed, backend);
            proxy.listeners.borrow_mut().push(tokio::task::spawn_local(serve));
        }
        Ok(proxy)
    }

    fn reload(&self, settings: ProxySettings) {
        *self.settings.borrow_mut() = Rc::new(settings);
    }

    fn tick(&self) {
        self.rate.sample(self.records.total());
        self.records.forget_old();
    }

    fn status_line(&self) -> String {
        let counts = self.records.counts();
        let links = self.links.describe(&self.settings().cache);
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
        self.records.total()
    }

    fn stop_accepting(&self) {
        self.listeners.borrow_mut().drain(..).for_each(|task| task.abort());
        self.records.stop_awaiting();
    }

    fn farewell(&self) {
        self.records.abandon("the proxy was stopped");
    }
}
