//! The cache behind its control socket.

use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;

use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Notify;

use super::pages::{self, Whose};
use super::restore::{self, Source};
use super::{Cache, StateCounts};
use crate::control::model::{self, ImageFile, LinkStatus, Role, SnapshotState, Status};
use crate::control::{Backend, Open, OpenPages, Reading, Refusal};
use crate::daemon::accept::accept_one;
use crate::daemon::handed_over::{PagesSocket, Socket};
use crate::daemon::journal;
use crate::daemon::places::Place;
use crate::daemon::sessions::Peer;
use crate::store::{
    Claim, Image, Key, Memory, NoFiles, Permission, Refused, Snapshot, State, Unavailable,
};
use crate::timeline::Phase;

/// What answers the control socket.
pub(super) struct Control(pub(super) Rc<Cache>);

impl Backend for Control {
    fn status(&self) -> Status {
        self.0.status()
    }

    fn list(&self) -> Vec<model::Snapshot> {
        let mut list = Vec::new();
        self.0.store.for_each(|snapshot| list.push(describe(snapshot)));
        list
    }

    fn show(&self, id: &str) -> Option<(model::Snapshot, Vec<model::Image>)> {
        self.0.store.find(id, |snapshot| {
            let images = snapshot.images().into_iter().flat_map(|images| images.values());
            let describe_image = |image: &Rc<Image>| model::Image {
                name: image.name().to_owned(),
                bytes: image.len(),
                whole: image.is_whole(),
            };
            (describe(snapshot), images.map(describe_image).collect())
        })
    }

    fn snapshot(&self, id: &str) -> Option<model::Snapshot> {
        self.0.store.find(id, describe)
    }

    fn timeline(&self, id: &str) -> Option<Vec<Phase>> {
        self.0.store.find(id, |snapshot| snapshot.timeline.phases().to_vec())
    }

    async fn drop_snapshot(&self, id: &str, peer: Peer) -> Result<(), Refusal> {
        self.0.store.drop_snapshot(id).ok_or(Refusal::NoSuchSnapshot)?;
        tracing::info!(
            message_id = journal::SNAPSHOT_DROPPED,
            criu_snapshot = id,
            "snapshot {id} dropped by the operator, {peer}"
        );
        // What systemd keeps of it goes, before the operator relies on that.
        self.0.keeping.follow().await;
        Ok(())
    }

    fn open(&self, request: Open, socket: OwnedFd) -> Result<(), Refusal> {
        if request.to.is_some() || request.parent.is_some() {
            return Err(Refusal::Refused(
                "a cache sends nothing: `to` is for the proxy".to_owned(),
            ));
        }
        let cache = self.0.clone();
        let socket = Socket::from(request.listening, socket).map_err(Refusal::unusable)?;
        let (key, source) = if request.reading == Reading::Look {
            let key = cache.store.key_of(&request.id).ok_or(Refusal::NoSuchSnapshot)?;
            (key, Source::Look(key))
        } else {
            let again = request.reading == Reading::TakeAgain;
            let permission = Permission { again, copy: request.copy };
            let key = cache.store.expect(&request.id, permission).map_err(not_expected)?;
            cache.store.reserve(key);
            if request.view {
                cache.store.await_view(key);
                cache.prepare_view(key);
            }
            (key, Source::Named(key, permission))
        };
        match socket {
            Socket::Connected(socket) => {
                // It need not ask for an image to be the one that gets the snapshot.
                let claim = match source {
                    Source::Named(key, permission) => {
                        let claim = cache.store.claim(key, permission);
                        Some(claim.map_err(|refused| Refusal::Refused(refused.to_string()))?)
                    }
                    Source::Look(_) | Source::Oldest => None,
                };
                tokio::task::spawn_local(serve(cache, socket, source, claim));
            }
            Socket::Listening(listener, file) => {
                let directory = cache.store.open_directory(key);
                self.0.listeners.start(async move {
                    listen(cache, listener, key, source).await;
                    drop((directory, file));
                });
            }
        }
        Ok(())
    }

    fn open_pages(&self, request: OpenPages, socket: OwnedFd) -> Result<(), Refusal> {
        if request.parent.is_some() || request.to.is_some() {
            let why = "pages are asked for at a cache: `parent` and `to` are for the proxy";
            return Err(Refusal::Refused(why.to_owned()));
        }
        let cache = self.0.clone();
        let key = cache.store.key_of(&request.id).ok_or(Refusal::NoSuchSnapshot)?;
        let socket = PagesSocket::from(request.listening, socket).map_err(Refusal::unusable)?;
        match socket {
            PagesSocket::Connected(stream) => {
                let (whose, place) = (Whose::Named(key), Place::unlimited());
                tokio::task::spawn_local(pages::serve(cache, stream, whose, place));
            }
            PagesSocket::Listening(listener) => {
                self.0.listeners.start(pages::listen(cache, listener, key));
            }
        }
        Ok(())
    }

    fn accept_changed_memory(&self, id: &str, peer: Peer) -> Result<(), Refusal> {
        let key = self.0.store.key_of(id).ok_or(Refusal::NoSuchSnapshot)?;
        if self.0.store.accept_changed_memory(key) {
            tracing::warn!(
                message_id = journal::MEMORY_ACCEPTED,
                criu_snapshot = id,
                "snapshot {id} is given to restores though its memory may have changed: {peer} accepts that"
            );
        }
        Ok(())
    }

    async fn prepare_view(&self, id: &str) -> Result<(), Refusal> {
        let key = self.0.store.key_of(id).ok_or(Refusal::NoSuchSnapshot)?;
        let prepared = self.0.store.files(key).await;
        prepared.map(drop).map_err(|why| no_view(id, &why))
    }

    fn view(&self, id: &str) -> Result<Vec<ImageFile>, Refusal> {
        let files = |snapshot: &Snapshot| match &snapshot.state {
            State::Whole(_) | State::Taken(_) if snapshot.memory == Memory::MayHaveChanged => {
                Err(Refusal::Refused(Unavailable::ChangedMemory(id.to_owned()).to_string()))
            }
            State::Whole(images) | State::Taken(images) => {
                images.values().map(|image| image_file(image)).collect()
            }
            _ => Err(no_view(id, &NoFiles::NotWhole)),
        };
        self.0.store.find(id, files).ok_or(Refusal::NoSuchSnapshot)?
    }
}

impl Cache {
    /// The cache at a glance.
    pub(super) fn status(&self) -> Status {
        let counts = StateCounts::of(&self.store);
        Status {
            role: Role::Cache,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            started_ms: self.started_ms,
            sessions: self.restores.live() as u64,
            receiving: counts.coming(),
            whole: counts.whole,
            taken: counts.taken,
            damaged: counts.damaged,
            held_bytes: self.store.quota().used(),
            max_bytes: self.store.quota().limit(),
            total_bytes: self.store.total(),
            rate: self.rate.per_second(),
            links: self.links.peers.borrow().iter().map(|peer| LinkStatus::clone(peer)).collect(),
        }
    }
}

fn no_view(id: &str, why: &NoFiles) -> Refusal {
    Refusal::Refused(format!("there is no view of snapshot {id}: {why}"))
}

/// An image as others can open it, through this process.
fn image_file(image: &Image) -> Result<ImageFile, Refusal> {
    let (name, pid) = (image.name().to_owned(), std::process::id());
    let apart = || Refusal::Refused(format!("the pages of image {name} are not in one file"));
    let descriptor = image.as_file().ok_or_else(apart)?.as_raw_fd();
    Ok(ImageFile { bytes: image.len(), path: format!("/proc/{pid}/fd/{descriptor}"), name })
}

fn not_expected(refused: Refused) -> Refusal {
    match refused {
        Refused::Gone(_) => Refusal::NoSuchSnapshot,
        refused => Refusal::Refused(refused.to_string()),
    }
}

async fn serve(cache: Rc<Cache>, socket: UnixStream, source: Source, claim: Option<Claim>) -> bool {
    match cache.admit(&socket) {
        Some(peer) => restore::serve(&cache, socket, peer, source, claim).await,
        None => false,
    }
}

/// Serves an opened directory until a restore has taken its snapshot, or it is gone: one that failed
/// before may be tried again, and one that comes later is not given what another has taken.
async fn listen(cache: Rc<Cache>, listener: UnixListener, key: Key, source: Source) {
    let accept = async || Ok(listener.accept().await?.0);
    let taken = Rc::new(Notify::new());
    loop {
        let socket = tokio::select! {
            socket = accept_one("an opened directory", &accept) => socket,
            () = taken.notified() => return,
            () = cache.store.gone(key) => return,
        };
        let (cache, taken) = (cache.clone(), taken.clone());
        // A task of its own: a restore goes on when the daemon stops to listen.
        tokio::task::spawn_local(async move {
            if serve(cache, socket, source, None).await {
                taken.notify_one();
            }
        });
    }
}

/// The state as others are told it.
pub(super) fn state_of(snapshot: &Snapshot) -> SnapshotState {
    match &snapshot.state {
        State::Awaited => SnapshotState::Awaited,
        State::Paged if snapshot.flat().is_some() => SnapshotState::Paged,
        State::Paged | State::Receiving(_) => SnapshotState::Receiving,
        State::Whole(_) => SnapshotState::Whole,
        State::Taken(_) => SnapshotState::Taken,
        State::Damaged { .. } => SnapshotState::Damaged,
    }
}

fn describe(snapshot: &Snapshot) -> model::Snapshot {
    let counts = snapshot.counts();
    let reason = match &snapshot.state {
        State::Damaged { reason, .. } => reason.as_str(),
        _ => "",
    };
    model::Snapshot {
        id: snapshot.id.clone(),
        state: state_of(snapshot),
        reason: reason.to_owned(),
        peer: snapshot.sender.name.clone(),
        images: counts.images,
        bytes: counts.bytes,
        begun_ms: snapshot.begun_ms,
        ended_ms: snapshot.ended_ms,
        needs_view: snapshot.needs_view.clone().unwrap_or_default(),
        memory_may_have_changed: (snapshot.memory != Memory::AsFrozen).then_some(true),
    }
}
