//! A page server for restores: one client that asks for pages, as `criu lazy-pages --page-server` does.
//!
//! It gets the pages of one snapshot, from the layers or images that they came in, and says at the end
//! that it has them all. Reading pages does not count as taking the snapshot; those of a snapshot that is
//! dropped meanwhile stay as long as the session.

use std::io;
use std::rc::Rc;
use std::time::Duration;

use tokio::io::Interest;
use tokio::time::timeout;
use tracing::Instrument;

use crate::config::CacheSettings;
use crate::criu::pages::{PageRange, Space};
use crate::daemon::accept::accept_one;
use crate::daemon::handed_over::Listener;
use crate::daemon::journal;
use crate::daemon::local_peers::admit_stream;
use crate::daemon::page_server::{self, Asked, BadClient, Client, Ended};
use crate::daemon::places::Place;
use crate::daemon::sessions::Session;
use crate::metrics::refusals::Reason;
use crate::store::pages::{Flat, Index, Part};
use crate::store::{Key, State, Unavailable};
use crate::sys::connected::Stream;
use crate::sys::pipe::{Pipe, transfer, transfer_from_file};

use super::Cache;

/// How often a client that waits for its snapshot is looked at.
const LOOK: Duration = Duration::from_millis(100);

/// Whose pages a client gets.
#[derive(Debug, Clone, Copy)]
pub(super) enum Whose {
    /// Those of the snapshot that the socket was opened for.
    Named(Key),
    /// Those of the one snapshot that has the task it asks for: the shared socket.
    WhoHasTheTask,
}

/// Why a client does not get pages.
#[derive(Debug, thiserror::Error)]
enum NotGiven {
    #[error("no whole snapshot has a task {0}")]
    NobodyHas(u32),
    #[error("snapshots {ids} all have a task {task}: open a socket for the one that is meant")]
    SeveralHave { task: u32, ids: String },
    #[error("the snapshot has no {0}")]
    NotInSnapshot(Space),
    #[error("{space} has no page at {address:#x}")]
    NoPage { space: Space, address: u64 },
    #[error("{0}")]
    Unavailable(#[from] Unavailable),
    #[error("its pages cannot be told apart: {0}")]
    NotFlat(String),
    #[error("the client left while it waited")]
    Left,
    #[error("pages cannot be served: {0}")]
    Ours(io::Error),
}

/// Why a session ends before its client ends it.
type Failure = page_server::Failure<NotGiven>;

impl From<NotGiven> for Failure {
    fn from(why: NotGiven) -> Failure {
        Failure::NotGiven(why)
    }
}

/// Serves one client of a socket that anybody may find, if it may connect.
pub(super) async fn admit_and_serve(cache: Rc<Cache>, stream: Stream, whose: Whose, place: Place) {
    let (settings, peer) = (cache.settings(), stream.peer());
    match admit_stream(&stream, &settings.allow_uids, settings.insecure).await {
        Ok(_) => serve(cache, stream, whose, place).await,
        Err(why) => {
            cache.figures.refusals.count(Reason::from(&why));
            tracing::warn!(
                message_id = journal::PEER_REFUSED,
                criu_peer = %peer,
                criu_reason = %why,
                "a client for pages, {peer}, is refused: {why}"
            );
        }
    }
}

/// Serves one client, until it closes the connection or breaks the protocol.
pub(super) async fn serve(cache: Rc<Cache>, stream: Stream, whose: Whose, place: Place) {
    let _session = cache.restores.enter();
    let peer = stream.peer();
    let span = tracing::error_span!("pages", criu_peer = %peer);
    async {
        let settings = cache.settings();
        let mut pages =
            Pages { cache: &cache, settings: settings.clone(), staging: None, whose, bound: None };
        let (mut client, mut sent) = (Client::new(stream, place), 0);
        let ended = loop {
            match page_server::serve(&mut client, None, &mut pages, &mut sent, &settings.sessions)
                .await
            {
                Ok(Ended::Force) => {}
                Ok(Ended::Over) => break Ok(()),
                Err(failure) => break Err(failure),
            }
        };
        if let Some(reason) = ended.as_ref().err().and_then(Reason::of_gets) {
            cache.figures.refusals.count(reason);
        }
        page_server::tell(&pages, peer, sent, ended.as_ref().err());
    }
    .instrument(span)
    .await;
}

/// Serves an opened socket until its snapshot is gone.
pub(super) async fn listen(cache: Rc<Cache>, listener: Listener, key: Key) {
    let accept = async || listener.accept().await;
    loop {
        let stream = tokio::select! {
            stream = accept_one("an opened page server", &accept) => stream,
            () = cache.store.gone(key) => return,
        };
        // A task of its own: a restore goes on when the daemon stops to listen.
        let (whose, place) = (Whose::Named(key), Place::unlimited());
        tokio::task::spawn_local(admit_and_serve(cache.clone(), stream, whose, place));
    }
}

/// The pages that a client asks for.
struct Pages<'a> {
    cache: &'a Cache,
    settings: Rc<CacheSettings>,
    /// Empty between answers. Who asks for nothing needs none.
    staging: Option<Pipe>,
    whose: Whose,
    bound: Option<Bound>,
}

/// The snapshot that a client reads.
struct Bound {
    id: String,
    flat: Flat<Space>,
    /// From now on the daemon's end waits for the client's.
    _serving: Session,
}

impl page_server::Pages for Pages<'_> {
    type NotGiven = NotGiven;

    async fn give(&mut self, client: &Client, asked: &Asked) -> Result<u64, Failure> {
        let (space, range) = (asked.space(), asked.range());
        let flat = self.flat(client, asked.task()).await?;
        let index = flat.space(&space).ok_or(NotGiven::NotInSnapshot(space))?;
        let address = range.address();
        let there = index.leading(range).ok_or(NotGiven::NoPage { space, address })?;
        let header = asked.header(there)?;
        let size = usize::try_from(self.settings.sessions.pipe_size).unwrap_or(usize::MAX);
        let staging = match self.staging.take() {
            Some(staging) => staging,
            None => Pipe::new(size).map_err(NotGiven::Ours)?,
        };
        self.send(client, &header, (index, there), &staging).await?;
        self.staging = Some(staging);
        self.cache.served.set(self.cache.served.get() + there.bytes());
        Ok(there.bytes())
    }

    fn snapshot(&self) -> Option<&str> {
        self.bound.as_ref().map(|bound| &*bound.id)
    }
}

impl Pages<'_> {
    /// The pages of the client's snapshot, which the first task that it asks for may tell.
    async fn flat(&mut self, client: &Client, task: u32) -> Result<Flat<Space>, NotGiven> {
        if let Some(bound) = &self.bound {
            return Ok(bound.flat.clone());
        }
        let store = &self.cache.store;
        let key = match self.whose {
            Whose::Named(key) => key,
            Whose::WhoHasTheTask => self.who_has(task)?,
        };
        let claim = store.peek(key);
        tokio::select! {
            // A client may close its direction with its last command.
            biased;
            whole = claim.images() => drop(whole?),
            () = left(client.stream()) => return Err(NotGiven::Left),
        }
        let id = claim.id().unwrap_or_default();
        let flat = store.flat_of(key).await.map_err(NotGiven::NotFlat)?;
        let serving = self.cache.serving.enter();
        self.bound = Some(Bound { id, flat: flat.clone(), _serving: serving });
        Ok(flat)
    }

    fn who_has(&self, task: u32) -> Result<Key, NotGiven> {
        let pagemap = Space::Task(task).pagemap();
        let mut ids = Vec::new();
        self.cache.store.for_each(|snapshot| {
            if let State::Whole(images) | State::Taken(images) = &snapshot.state {
                ids.extend(images.contains_key(&pagemap).then(|| snapshot.id.clone()));
            }
        });
        match &ids[..] {
            [id] => self.cache.store.key_of(id).ok_or(NotGiven::NobodyHas(task)),
            [] => Err(NotGiven::NobodyHas(task)),
            _ => Err(NotGiven::SeveralHave { task, ids: ids.join(", ") }),
        }
    }

    /// Sends bytes, and after them all pages of a range.
    async fn send(
        &self,
        client: &Client,
        header: &[u8],
        (index, range): (&Index, PageRange),
        staging: &Pipe,
    ) -> Result<(), Failure> {
        let ours = |error| Failure::from(NotGiven::Ours(error));
        let (into, room) = (&staging.into, staging.capacity());
        let mut staged = rustix::io::write(into, header).map_err(|errno| ours(errno.into()))?;
        for part in index.parts(range) {
            let Part::Pages { range, mut offset, run } = part else { break };
            let end = offset + range.bytes();
            while offset < end {
                let left = usize::try_from(end - offset).unwrap_or(room).min(room);
                match transfer_from_file(run.layer(), &mut offset, into, left) {
                    Ok(0) => return Err(ours(io::ErrorKind::UnexpectedEof.into())),
                    Ok(moved) => staged += moved,
                    Err(error) if staged > 0 && error.kind() == io::ErrorKind::WouldBlock => {
                        self.flush(client, staging, std::mem::take(&mut staged)).await?;
                    }
                    Err(error) => return Err(ours(error)),
                }
            }
        }
        Ok(self.flush(client, staging, staged).await?)
    }

    /// Sends what is staged.
    async fn flush(
        &self,
        client: &Client,
        staging: &Pipe,
        mut staged: usize,
    ) -> Result<(), BadClient> {
        let limit = self.settings.sessions.stall_timeout;
        let stream = client.stream();
        while staged > 0 {
            let send = || transfer(&staging.out, &**stream, staged);
            let moved = timeout(limit, stream.async_io(Interest::WRITABLE, send)).await;
            staged -= moved.map_err(|_| BadClient::Deaf(limit))?.map_err(BadClient::Connection)?;
        }
        Ok(())
    }
}

/// Resolves when the client has closed the connection.
async fn left(stream: &Stream) {
    let open = async || {
        let ready = stream.ready(Interest::READABLE).await;
        ready.is_ok_and(|ready| !ready.is_read_closed())
    };
    while open().await {
        tokio::time::sleep(LOOK).await;
    }
}
