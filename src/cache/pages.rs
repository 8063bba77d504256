//! A page server for restores: one client that asks for pages, as `criu lazy-pages --page-server` does.
//!
//! It gets the pages of one snapshot, from the layers or images that they came in, and says at the end
//! that it has them all. Reading pages does not count as taking the snapshot; those of a snapshot that is
//! dropped meanwhile stay as long as the session.

use std::io;
use std::rc::Rc;
use std::time::Duration;

use rustix::io::Errno;
use tokio::io::Interest;
use tokio::time::timeout;
use tracing::Instrument;

use crate::config::CacheSettings;
use crate::criu::page_server::answer;
use crate::criu::page_server::command::{BadCommand, Command};
use crate::criu::page_server::header::Reader;
use crate::criu::page_server::kind::Kind;
use crate::criu::pages::{BadRange, Space};
use crate::daemon::accept::accept_one;
use crate::daemon::handed_over::Listener;
use crate::daemon::journal;
use crate::daemon::local_peers::admit_stream;
use crate::daemon::sessions::Session;
use crate::store::pages::{Flat, Index, PageRange, Part};
use crate::store::{Key, State, Unavailable};
use crate::sys::connected::Stream;
use crate::sys::pipe::{Pipe, transfer, transfer_from_file};

use super::Cache;

/// No answer has more pages: CRIU asks for no more (`MAX_XFER_LEN` in `criu/uffd.c`), and takes fewer than it
/// asked for.
const PAGES_MAX: u64 = 1024;
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

/// Why a session ends before its client ends it.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{0}")]
    Command(#[from] BadCommand),
    #[error("{0} is said by a dump, whose pages go to the proxy; here they are asked for")]
    OfADump(Kind),
    #[error("GET for {id}: {range}")]
    Range { id: u64, range: BadRange },
    #[error("GET for {0}, which is no task's id")]
    NoTask(u64),
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
    #[error("the connection was closed within a command")]
    Torn,
    #[error("the rest of a command did not come within {0:?}")]
    Late(Duration),
    #[error("pages were not read for {0:?}")]
    Stalled(Duration),
    #[error("the client left while it waited")]
    Left,
    #[error("the connection failed: {0}")]
    Connection(io::Error),
    #[error("pages cannot be served: {0}")]
    Ours(io::Error),
}

/// Serves one client of a socket that anybody may find, if it may connect.
pub(super) async fn admit_and_serve(cache: Rc<Cache>, stream: Stream, whose: Whose) {
    let (settings, peer) = (cache.settings(), stream.peer());
    match admit_stream(&stream, &settings.allow_uids, settings.insecure) {
        Ok(()) => serve(cache, stream, whose).await,
        Err(why) => {
            let message_id = journal::PEER_REFUSED;
            tracing::warn!(message_id, "a client for pages, {peer}, is refused: {why}");
        }
    }
}

/// Serves one client, until it closes the connection or breaks the protocol.
pub(super) async fn serve(cache: Rc<Cache>, stream: Stream, whose: Whose) {
    let _session = cache.restores.enter();
    let peer = stream.peer();
    let span =
        tracing::info_span!("pages", criu_peer = %peer, criu_snapshot = tracing::field::Empty);
    async {
        let settings = cache.settings();
        let pipe_size = usize::try_from(settings.sessions.pipe_size).unwrap_or(usize::MAX);
        let staging = match Pipe::new(pipe_size) {
            Ok(staging) => staging,
            Err(error) => {
                tracing::warn!("pages cannot be served to {peer}: {error}");
                return;
            }
        };
        let reader = Reader::new();
        let (cache, sent) = (&*cache, 0);
        let mut client =
            Client { cache, settings, stream, reader, staging, whose, bound: None, sent };
        let ended = client.run().await;
        client.tell(ended);
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
        tokio::task::spawn_local(admit_and_serve(cache.clone(), stream, Whose::Named(key)));
    }
}

/// A connection.
struct Client<'a> {
    cache: &'a Cache,
    settings: Rc<CacheSettings>,
    stream: Stream,
    reader: Reader,
    /// Empty between answers.
    staging: Pipe,
    whose: Whose,
    bound: Option<Bound>,
    /// Bytes of pages that the client has been sent.
    sent: u64,
}

/// The snapshot that a client reads.
struct Bound {
    id: String,
    flat: Flat<Space>,
    /// From now on the daemon's end waits for the client's.
    _serving: Session,
}

impl Client<'_> {
    async fn run(&mut self) -> Result<(), Failure> {
        while let Some(command) = self.command().await? {
            match command {
                Command::Get { id, address, pages } => self.get(id, address, pages).await?,
                Command::Close => return self.write(&answer::status(true)).await,
                // The socket may be another's, who goes on with it.
                Command::ForceClose => self.write(&answer::status(true)).await?,
                Command::Open { .. } | Command::Parent { .. } | Command::Pages { .. } => {
                    return Err(Failure::OfADump(command.kind()));
                }
            }
        }
        Ok(())
    }

    /// The next command; `None` when the client has closed the connection. It may take its time before a
    /// command, but not within one.
    async fn command(&mut self) -> Result<Option<Command>, Failure> {
        let limit = self.settings.sessions.request_timeout;
        loop {
            let within = self.reader.is_within_header();
            let room = self.reader.room();
            if room.is_empty() {
                return Ok(None);
            }
            let read = self.stream.read(room);
            let read = if within {
                timeout(limit, read).await.map_err(|_| Failure::Late(limit))?
            } else {
                read.await
            };
            match read {
                Ok(0) if within => return Err(Failure::Torn),
                Ok(0) => return Ok(None),
                // CRIU kills a daemon that it needs no more.
                Err(error) if is_gone(&error) && !within => return Ok(None),
                Err(error) => return Err(Failure::Connection(error)),
                Ok(len) => {
                    if let Some(command) = self.reader.filled(len)? {
                        return Ok(Some(command));
                    }
                }
            }
        }
    }

    /// Answers GET: with the pages that there are from the address on, as many as were asked for or
    /// fewer.
    async fn get(&mut self, id: u64, address: u64, pages: u64) -> Result<(), Failure> {
        let range = PageRange::new(address, pages.min(PAGES_MAX));
        let range = range.map_err(|range| Failure::Range { id, range })?;
        // CRIU's pids are positive ints.
        let task = u32::try_from(id).ok().filter(|pid| (1..=i32::MAX as u32).contains(pid));
        let task = task.ok_or(Failure::NoTask(id))?;
        let space = Space::Task(task);
        let flat = self.flat(task).await?;
        let index = flat.space(&space).ok_or(Failure::NotInSnapshot(space))?;
        let there = index.parts(range).map_while(|part| match part {
            Part::Pages { range, .. } => Some(range.pages()),
            Part::Gap(_) => None,
        });
        let there = PageRange::new(address, there.sum());
        let there = there.map_err(|_| Failure::NoPage { space, address })?;
        // The first command has come, so the dialect is known.
        let dialect = self.reader.dialect().ok_or(BadCommand::NoDialect)?;
        let header = answer::get(dialect, id, address, there.pages())?;
        self.send(&header, index, there).await
    }

    /// The pages of the client's snapshot, which the first task that it asks for may tell.
    async fn flat(&mut self, task: u32) -> Result<Flat<Space>, Failure> {
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
            () = self.left() => return Err(Failure::Left),
        }
        let id = claim.id().unwrap_or_default();
        tracing::Span::current().record("criu_snapshot", &id);
        let flat = store.flat_of(key).map_err(Failure::NotFlat)?;
        let serving = self.cache.serving.enter();
        self.bound = Some(Bound { id, flat: flat.clone(), _serving: serving });
        Ok(flat)
    }

    fn who_has(&self, task: u32) -> Result<Key, Failure> {
        let pagemap = Space::Task(task).pagemap();
        let mut ids = Vec::new();
        self.cache.store.for_each(|snapshot| {
            if let State::Whole(images) | State::Taken(images) = &snapshot.state {
                ids.extend(images.contains_key(&pagemap).then(|| snapshot.id.clone()));
            }
        });
        match &ids[..] {
            [id] => self.cache.store.key_of(id).ok_or(Failure::NobodyHas(task)),
            [] => Err(Failure::NobodyHas(task)),
            _ => Err(Failure::SeveralHave { task, ids: ids.join(", ") }),
        }
    }

    /// Resolves when the client has closed the connection.
    async fn left(&self) {
        let open = async || {
            let ready = self.stream.ready(Interest::READABLE).await;
            ready.is_ok_and(|ready| !ready.is_read_closed())
        };
        while open().await {
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Sends bytes, and after them all pages of a range.
    async fn send(
        &mut self,
        header: &[u8],
        index: &Index,
        range: PageRange,
    ) -> Result<(), Failure> {
        let (into, room) = (&self.staging.into, self.staging.capacity());
        let mut staged =
            rustix::io::write(into, header).map_err(|errno| Failure::Ours(errno.into()))?;
        for part in index.parts(range) {
            let Part::Pages { range, mut offset, run } = part else { break };
            let end = offset + range.bytes();
            while offset < end {
                let left = usize::try_from(end - offset).unwrap_or(room).min(room);
                match transfer_from_file(run.layer(), &mut offset, into, left) {
                    Ok(0) => return Err(Failure::Ours(io::ErrorKind::UnexpectedEof.into())),
                    Ok(moved) => staged += moved,
                    Err(error) if staged > 0 && error.kind() == io::ErrorKind::WouldBlock => {
                        self.flush(std::mem::take(&mut staged)).await?;
                    }
                    Err(error) => return Err(Failure::Ours(error)),
                }
            }
        }
        self.flush(staged).await?;
        self.sent += range.bytes();
        self.cache.served.set(self.cache.served.get() + range.bytes());
        Ok(())
    }

    /// Sends what is staged.
    async fn flush(&self, mut staged: usize) -> Result<(), Failure> {
        let limit = self.settings.sessions.stall_timeout;
        while staged > 0 {
            let send = || transfer(&self.staging.out, &self.stream, staged);
            let moved = timeout(limit, self.stream.async_io(Interest::WRITABLE, send)).await;
            staged -= moved.map_err(|_| Failure::Stalled(limit))?.map_err(Failure::Connection)?;
        }
        Ok(())
    }

    async fn write(&self, bytes: &[u8]) -> Result<(), Failure> {
        let limit = self.settings.sessions.stall_timeout;
        let written = timeout(limit, self.stream.write_all(bytes)).await;
        written.map_err(|_| Failure::Stalled(limit))?.map_err(Failure::Connection)
    }

    fn tell(&self, ended: Result<(), Failure>) {
        let (peer, criu_bytes) = (self.stream.peer(), self.sent);
        let of = match &self.bound {
            Some(bound) => format!(" of snapshot {}", bound.id),
            None => String::new(),
        };
        match ended {
            Ok(()) if criu_bytes == 0 => tracing::debug!("{peer} asked for no pages{of}"),
            Ok(()) => tracing::info!(
                criu_bytes,
                "pages{of} were asked for by {peer}, and {criu_bytes} bytes sent"
            ),
            // Not the peer's fault.
            Err(failure @ (Failure::Left | Failure::Unavailable(_) | Failure::Ours(_))) => {
                tracing::warn!("a client for pages{of}, {peer}, was left without: {failure}");
            }
            Err(failure) => {
                let message_id = journal::PEER_REFUSED;
                tracing::warn!(
                    message_id,
                    "the session of a client for pages{of}, {peer}, ended: {failure}"
                );
            }
        }
    }
}

fn is_gone(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::CONNRESET | Errno::PIPE))
}
