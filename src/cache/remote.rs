//! One client of `img-cache.sock`, which names the images that it reads, from its first request to its
//! last.

use std::rc::Rc;
use std::time::Instant;

use rustix::io::Errno;
use tokio::net::UnixStream;
use tokio::time::timeout;
use tracing::Instrument;

use super::Cache;
use super::fill::{Fill, Reading};
use super::regions::{Refusal, missing};
use super::restore::Failure;
use crate::config::{CacheSettings, Reads};
use crate::criu::images::INVENTORY;
use crate::criu::pages::Space;
use crate::criu::remote::{Reply, Request};
use crate::daemon::journal;
use crate::daemon::remote::{BadClient, Client};
use crate::daemon::sessions::Peer;
use crate::metrics::refusals::Reason;
use crate::store::{Image, Key, State};

/// Restores of old clients whose end may still come.
const RESTORES_MAX: usize = 4096;

/// Why a session ends before the client ends it.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error("{0}")]
    Client(#[from] BadClient),
    #[error("{0}")]
    Failed(#[from] Failure),
    #[error("{1}")]
    Refused(Errno, String),
}

impl Ended {
    /// Why, if the client is to blame.
    fn reason(&self) -> Option<Reason> {
        match self {
            Ended::Client(bad) => Some(bad.into()),
            Ended::Failed(failure) => failure.reason(),
            Ended::Refused(errno, _) => (*errno == Errno::INVAL).then_some(Reason::Protocol),
        }
    }
}

/// Serves one client.
pub(super) async fn serve(cache: Rc<Cache>, socket: UnixStream) {
    let Some(peer) = cache.admit(&socket) else { return };
    let settings = cache.settings();
    let patience = settings.sessions.request_timeout;
    let client = Client::new(socket, patience, settings.remote.historical_endings);
    let span = tracing::error_span!("remote", criu_peer = %peer);
    let mut session = Session { cache, settings, client, peer };
    let serve = async {
        if let Err(ended) = session.run().await {
            if let Some(reason) = ended.reason() {
                session.cache.figures.refusals.count(reason);
            }
            tell(peer, &ended);
        }
    };
    serve.instrument(span).await;
}

struct Session {
    cache: Rc<Cache>,
    settings: Rc<CacheSettings>,
    client: Client,
    peer: Peer,
}

impl Session {
    async fn run(&mut self) -> Result<(), Ended> {
        loop {
            let request = match self.client.next().await {
                Ok(Some(request)) => request,
                Ok(None) => return Ok(()),
                Err(bad) => {
                    // It may have gone.
                    let _ = self.client.reply(&Reply::refused(bad.errno(), &bad.to_string())).await;
                    return Err(bad.into());
                }
            };
            let _session = self.cache.restores.enter();
            if !self.perform(request).await? {
                return Ok(());
            }
        }
    }

    /// Does what is asked for. Returns whether the connection can carry another request.
    async fn perform(&self, request: Request) -> Result<bool, Ended> {
        match request {
            Request::Read { snapshot, name, pipe } => {
                let through_pipe = pipe.unwrap_or(self.settings.remote.reads == Reads::Pipe);
                let is_old = self.settings.remote.historical_endings && pipe.is_none();
                match self.while_there(self.image(&snapshot, &name)).await? {
                    Ok(image) => {
                        if is_old && name == INVENTORY {
                            self.restores(snapshot);
                        }
                        self.send(image, through_pipe).await
                    }
                    // What comes to a pagemap has read an inventory, and looks for the parent of that
                    // snapshot. It needs none if CRIU found none in the dump.
                    Err((Errno::IO | Errno::STALE, why))
                        if is_old && Space::of_pagemap(&name).is_some() =>
                    {
                        self.refuse((Errno::NOENT, why)).await
                    }
                    Err(refusal) => self.refuse(refusal).await,
                }
            }
            Request::ReadList { list, pipe } => match self.while_there(self.list(&list)).await? {
                Ok(image) => self.send(image, pipe).await,
                Err(refusal) => self.refuse(refusal).await,
            },
            Request::EndOfRestore { snapshot } => {
                let Some(taken) = self.cache.store.restored(&snapshot) else {
                    let reason = format!("there is no snapshot {snapshot} that could be taken");
                    return self.refuse((Errno::NOENT, reason)).await;
                };
                tell_taken(&taken);
                self.reply(&Reply::done()).await
            }
            Request::HistoricalEndOfRestore => {
                let restored = self.cache.restoring.borrow_mut().remove(&self.peer.pid);
                if let Some(taken) = restored.and_then(|id| self.cache.store.restored(&id)) {
                    tell_taken(&taken);
                }
                self.reply(&Reply::done()).await
            }
            Request::Write { .. }
            | Request::AppendToList { .. }
            | Request::EndOfDump { .. }
            | Request::HistoricalEndOfDump => {
                let reason = "images are written and dumps end at the proxy, not at the cache";
                self.refuse((Errno::INVAL, reason.to_owned())).await
            }
        }
    }

    /// Waits as long as the client does.
    async fn while_there<T>(&self, wait: impl Future<Output = T>) -> Result<T, Ended> {
        tokio::select! {
            found = wait => Ok(found),
            () = self.client.gone() => Err(Failure::Left.into()),
        }
    }

    /// An image of a snapshot, once that is whole: what a snapshot lacks that turns out to be damaged
    /// would else look like a part of it.
    async fn image(&self, id: &str, name: &str) -> Result<Rc<Image>, Refusal> {
        let store = &self.cache.store;
        let claim = store.peek(self.listed(id).await);
        let images = claim.images().await;
        let images = images.map_err(|unavailable| (Errno::IO, unavailable.to_string()))?;
        if store.find(id, |found| matches!(found.state, State::Taken(_))) == Some(true) {
            return Err((Errno::STALE, format!("a restore has taken snapshot {id}")));
        }
        images.get(name).cloned().ok_or_else(|| missing(id, name))
    }

    /// Waits until there is a snapshot of that id.
    async fn listed(&self, id: &str) -> Key {
        let mut changed = self.cache.store.watch();
        loop {
            if let Some(key) = self.cache.store.key_of(id) {
                return key;
            }
            // The store is there as long as the cache is.
            let _ = changed.changed().await;
        }
    }

    /// A list, once it has an id and none of its snapshots is still coming.
    async fn list(&self, list: &str) -> Result<Rc<Image>, Refusal> {
        let mut changed = self.cache.store.watch();
        while !self.cache.store.list_is_settled(list) {
            let _ = changed.changed().await;
        }
        let image = self.cache.store.list_image(list, None);
        let image = image.map_err(|errno| (errno, errno.to_string()))?;
        image.ok_or_else(|| (Errno::NOENT, "the list is empty".to_owned()))
    }

    async fn send(&self, image: Rc<Image>, through_pipe: bool) -> Result<bool, Ended> {
        let _serving = self.cache.serving.enter();
        self.reply(&Reply::found(image.len())).await?;
        let sink = self.client.sink(image.name(), through_pipe).await?;
        let pipe_size = usize::try_from(self.settings.sessions.pipe_size).unwrap_or(usize::MAX);
        let reading = Rc::<Reading>::default();
        let (name, begun) = (image.name().to_owned(), Instant::now());
        let fill = Fill::begin(sink, image, pipe_size, &reading)
            .map_err(|cause| Failure::Image { name: name.clone(), cause })?;
        let taken = self.read_out(fill, &reading, &name).await?;
        self.cache.served.set(self.cache.served.get() + taken);
        tracing::trace!("image {name} was read: {taken} bytes in {:?}", begun.elapsed());
        Ok(through_pipe)
    }

    /// A client that stops reading is given up after a while.
    async fn read_out(&self, fill: Fill, reading: &Reading, name: &str) -> Result<u64, Failure> {
        let limit = self.settings.sessions.stall_timeout;
        let mut seen = 0;
        let mut filled = std::pin::pin!(fill.run());
        loop {
            match timeout(limit, &mut filled).await {
                Ok(taken) => return taken,
                Err(_) if reading.bytes.get() > seen => seen = reading.bytes.get(),
                Err(_) => {
                    return Err(Failure::Stalled { names: name.to_owned(), waited: limit });
                }
            }
        }
    }

    /// An old client has read the inventory of a snapshot, which a restore reads of what it restores and not of
    /// that one's parents. The same process will say the restore's end.
    fn restores(&self, snapshot: String) {
        let mut restoring = self.cache.restoring.borrow_mut();
        // Those that failed have said no end.
        if restoring.len() >= RESTORES_MAX {
            restoring.pop_first();
        }
        restoring.insert(self.peer.pid, snapshot);
    }

    async fn reply(&self, reply: &Reply) -> Result<bool, Ended> {
        self.client.reply(reply).await?;
        Ok(true)
    }

    /// What is not there ends nothing; other refusals do.
    async fn refuse(&self, (errno, reason): Refusal) -> Result<bool, Ended> {
        self.reply(&Reply::refused(errno, &reason)).await?;
        if errno == Errno::NOENT { Ok(true) } else { Err(Ended::Refused(errno, reason)) }
    }
}

fn tell_taken(ids: &[String]) {
    for id in ids {
        tracing::info!(
            message_id = journal::SNAPSHOT_TAKEN,
            criu_snapshot = id,
            "snapshot {id} taken: its restore has ended"
        );
    }
}

fn tell(peer: Peer, ended: &Ended) {
    match ended {
        // Not the peer's fault.
        Ended::Failed(Failure::Left) => tracing::info!("a client, {peer}, left: {ended}"),
        Ended::Refused(errno, _) if *errno != Errno::INVAL => {
            tracing::info!("a client, {peer}, was refused: {ended}");
        }
        _ => {
            let message_id = match ended {
                Ended::Failed(Failure::Stalled { .. } | Failure::Image { .. }) => {
                    journal::RESTORE_FAILED
                }
                _ => journal::PROTOCOL_ERROR,
            };
            tracing::warn!(
                message_id,
                criu_reason = %ended,
                "the session of a client, {peer}, ended: {ended}"
            );
        }
    }
}
