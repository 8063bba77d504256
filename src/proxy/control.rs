//! The proxy behind its control socket.

use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

use tokio::net::{UnixListener, UnixStream};

use super::Proxy;
use super::dump::{self, Target};
use super::pages;
use super::records::{OpenSocket, Record};
use crate::config::full_address;
use crate::control::model::{
    Image, ImageFile, LinkStatus, Role, Snapshot, SnapshotState, Status, Withdrawn,
};
use crate::control::{Backend, Open, OpenPages, Refusal, Withdraw};
use crate::daemon::accept::accept_one;
use crate::daemon::handed_over::{PagesSocket, Socket};
use crate::daemon::journal;
use crate::daemon::places::Place;
use crate::daemon::sessions::Peer;
use crate::timeline::Phase;
use crate::wire::message::short;

/// What answers the control socket.
pub(super) struct Control(pub(super) Rc<Proxy>);

impl Backend for Control {
    fn status(&self) -> Status {
        self.0.status()
    }

    fn list(&self) -> Vec<Snapshot> {
        self.0.records.list()
    }

    fn show(&self, id: &str) -> Option<(Snapshot, Vec<Image>)> {
        self.0.records.find(id).map(|record| (record.info(), record.images()))
    }

    fn snapshot(&self, id: &str) -> Option<Snapshot> {
        self.0.records.find(id).map(|record| record.info())
    }

    fn timeline(&self, id: &str) -> Option<Vec<Phase>> {
        self.0.records.find(id).map(|record| record.timeline())
    }

    async fn drop_snapshot(&self, id: &str, peer: Peer) -> Result<(), Refusal> {
        let record = self.0.records.find(id).ok_or(Refusal::NoSuchSnapshot)?;
        record.stop("it was dropped by the operator");
        self.0.records.remove(&record);
        // Without a link nobody is told: the operator finds the pages at the cache.
        let link = self.0.links.connected(&record.info().peer);
        if let (Some(link), true) = (link, record.has_left_pages()) {
            let id = id.to_owned();
            tokio::task::spawn_local(async move {
                record.settled().await;
                link.forget_pages(&id).await;
            });
        }
        tracing::info!(
            message_id = journal::SNAPSHOT_DROPPED,
            criu_snapshot = id,
            "snapshot {id} dropped by the operator, {peer}"
        );
        Ok(())
    }

    async fn withdraw(&self, mut request: Withdraw) -> Result<Withdrawn, Refusal> {
        // It may be kept for a while, and no more of it goes over the link.
        request.reason = short(&request.reason);
        let cache = self.0.cache_for(request.to.as_deref())?;
        self.0.withdraw(&request, &cache).await.map_err(Refusal::Refused)
    }

    async fn connect(&self, to: Option<&str>, limit: Duration) -> Result<LinkStatus, Refusal> {
        let cache = self.0.cache_for(to)?;
        Ok(self.0.links.look_for(&cache, &self.0.settings(), limit).await)
    }

    fn open(&self, request: Open, socket: OwnedFd) -> Result<(), Refusal> {
        let proxy = self.0.clone();
        let cache = proxy.cache_for(request.to.as_deref())?;
        let socket = Socket::from(request.listening, socket).map_err(Refusal::unusable)?;
        let before = proxy.records.find(&request.id);
        let record = proxy.awaited(&request.id, &cache)?;
        let open = proxy.open_socket(&record)?;
        if let Some(before) = before {
            record.joins(&before);
        }
        record.belongs_to(request.attempt);
        let Open { id, parent, listening, .. } = request;
        // Who hands over a connection is no CRIU, which connects by itself: it sends files, and waits.
        let of_files = !listening;
        let target = Target { id, cache, parent, record: Some(record.clone()), of_files };
        match socket {
            Socket::Connected(socket) => {
                tokio::task::spawn_local(async move {
                    serve(proxy.clone(), socket, target).await;
                    drop(open);
                    proxy.records.await_no_more(&record);
                });
            }
            Socket::Listening(listener, file) => {
                self.0.listeners.start(async move {
                    listen(proxy, listener, target, record).await;
                    drop((open, file));
                });
            }
        }
        Ok(())
    }

    fn open_pages(&self, request: OpenPages, socket: OwnedFd) -> Result<(), Refusal> {
        let proxy = self.0.clone();
        let OpenPages { id, parent, to, attempt, listening } = request;
        let cache = proxy.cache_for(to.as_deref())?;
        let socket = PagesSocket::from(listening, socket).map_err(Refusal::unusable)?;
        // A directory may be open for the images of the same dump.
        let beside = proxy.records.find(&id).filter(|record| {
            record.state() == SnapshotState::Awaited && record.info().peer == cache
        });
        let record = beside.map_or_else(|| proxy.awaited(&id, &cache), Ok)?;
        let open = proxy.open_socket(&record)?;
        record.belongs_to(attempt);
        let target = pages::Target { id, parent, cache, record: record.clone(), is_new: false };
        match socket {
            PagesSocket::Connected(stream) => {
                tokio::task::spawn_local(async move {
                    pages::serve(proxy.clone(), stream, target, Place::unlimited()).await;
                    drop(open);
                    proxy.records.await_no_more(&record);
                });
            }
            PagesSocket::Listening(listener) => {
                self.0.listeners.start(async move {
                    pages::listen(proxy, listener, target).await;
                    drop(open);
                });
            }
        }
        Ok(())
    }

    fn expect_dump(&self, pid: i32) -> Result<(), Refusal> {
        self.0.hooks.expect(pid)
    }

    async fn finish_dump(&self, pid: i32, limit: Duration) -> Result<Snapshot, Refusal> {
        self.0.hooks.finish(pid, limit).await
    }

    fn view(&self, _id: &str) -> Result<Vec<ImageFile>, Refusal> {
        Err(Refusal::Refused("a proxy holds no images: ask the cache".to_owned()))
    }
}

impl Proxy {
    /// The proxy at a glance.
    pub(super) fn status(&self) -> Status {
        let counts = self.records.counts();
        Status {
            role: Role::Proxy,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            started_ms: self.started_ms,
            sessions: self.sessions.live() as u64,
            receiving: counts.receiving,
            whole: counts.whole,
            taken: 0,
            damaged: counts.damaged,
            held_bytes: self.budget.used(),
            max_bytes: self.settings().memory.max_bytes,
            total_bytes: self.records.total(),
            rate: self.rate.per_second(),
            links: self.links.status(&self.links.destination(&self.settings())),
        }
    }

    /// The cache that a snapshot goes to.
    fn cache_for(&self, to: Option<&str>) -> Result<String, Refusal> {
        let cache = match to {
            Some(to) => full_address(to).map_err(Refusal::Refused)?,
            None => self.links.destination(&self.settings()),
        };
        self.links.check(&cache).map_err(Refusal::Refused)?;
        Ok(cache)
    }

    /// Counts a socket that is opened for a snapshot, which is no longer awaited if there can be none.
    fn open_socket(&self, record: &Rc<Record>) -> Result<OpenSocket, Refusal> {
        self.records.open_socket(record).map_err(|why| {
            self.records.await_no_more(record);
            Refusal::Refused(why)
        })
    }

    /// Lists a snapshot for which a socket is opened.
    fn awaited(&self, id: &str, cache: &str) -> Result<Rc<Record>, Refusal> {
        self.records.add(id, cache, SnapshotState::Awaited).ok_or_else(|| {
            Refusal::Refused(format!(
                "snapshot {id} is awaited or being sent already; drop it first"
            ))
        })
    }
}

async fn serve(proxy: Rc<Proxy>, socket: UnixStream, target: Target) -> bool {
    match proxy.admit(&socket) {
        Some(peer) => dump::serve(&proxy, socket, peer, target).await,
        None => false,
    }
}

/// Serves an opened directory until one dump of it is at the cache: a dump that failed may be tried
/// again.
async fn listen(proxy: Rc<Proxy>, listener: UnixListener, target: Target, record: Rc<Record>) {
    let accept = async || Ok(listener.accept().await?.0);
    loop {
        let socket = tokio::select! {
            socket = accept_one("an opened directory", &accept) => socket,
            _ = record.stopped() => return,
        };
        // A task of its own: a dump goes on when the daemon stops to listen.
        let dump = tokio::task::spawn_local(serve(proxy.clone(), socket, target.clone()));
        if dump.await.unwrap_or(false) {
            return;
        }
    }
}
