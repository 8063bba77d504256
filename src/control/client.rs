//! The client of the control socket.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;
use tokio::time::timeout;
use zlink::{Call, Connection, Reply};

use super::Reading;
use super::calls::{
    ById, CallError, ConnectIn, ConnectOut, ExpectDumpIn, FinishDumpIn, FinishDumpOut, ListOut,
    Nothing, OpenIn, OpenPagesIn, ShowOut, StatusOut, TimelineOut, ViewOut, WatchIn, WatchOut,
    WithdrawIn, WithdrawOut, method,
};
use super::model::{Image, ImageFile, LinkStatus, Snapshot, Status, Withdrawn};
use crate::timeline::Phase;

/// Why a call has no result.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody answers on the socket, or we may not ask.
    #[error("{}: {source}", path.display())]
    Unreachable {
        /// The socket.
        path: PathBuf,
        /// What connect(2) said; or nobody answers.
        source: io::Error,
    },
    /// The daemon closed the connection in the middle, or said what is not Varlink.
    #[error("{}: the conversation broke off: {why}", path.display())]
    Broken {
        /// The socket.
        path: PathBuf,
        /// What happened.
        why: String,
        /// Whether the daemon had answered before: it lets us in.
        answered: bool,
    },
    /// The daemon knows no such snapshot.
    #[error("no snapshot is called {0:?}")]
    NoSuchSnapshot(String),
    /// The daemon refused, and says why.
    #[error("{0}")]
    Refused(String),
}

/// How long a daemon may take to answer what only looks. It takes some milliseconds. One that cannot start has a
/// socket all the same: systemd's.
const ANSWERS_WITHIN: Duration = Duration::from_secs(5);

/// A connection to a daemon's control socket.
#[derive(Debug)]
pub struct Client {
    path: PathBuf,
    connection: Connection<zlink::unix::Stream>,
    answered: bool,
    /// How long it waits for an answer of what only looks.
    limit: Duration,
}

/// A call on its way out.
#[derive(Debug, Serialize)]
struct Outgoing<'a, P> {
    method: &'a str,
    parameters: P,
}

/// An error reply: one of ours, or any other, which must not pass for a reply without parameters.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum AnyError {
    Known(CallError),
    Unknown { error: String },
}

impl Client {
    /// Connects to the socket at `path`.
    pub async fn connect(path: impl AsRef<Path>) -> Result<Client, ClientError> {
        let path = path.as_ref().to_owned();
        let unreachable = |source| ClientError::Unreachable { path: path.clone(), source };
        let stream = UnixStream::connect(&path).await.map_err(unreachable)?;
        let stream = zlink::unix::Stream::try_from(stream)
            .map_err(|error| unreachable(io::Error::other(error)))?;
        let (connection, limit) = (Connection::new(stream), ANSWERS_WITHIN);
        Ok(Client { path, connection, answered: false, limit })
    }

    /// Waits for every answer as long as the caller does, who has a limit of its own.
    #[must_use]
    pub fn patient(self) -> Client {
        Client { limit: Duration::MAX, ..self }
    }

    /// The socket it is connected to.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The daemon at a glance.
    pub async fn status(&mut self) -> Result<Status, ClientError> {
        let reply: StatusOut = self.ask(method::STATUS, Nothing {}).await?;
        Ok(reply.status)
    }

    /// Every snapshot it knows.
    pub async fn list(&mut self) -> Result<Vec<Snapshot>, ClientError> {
        let reply: ListOut = self.ask(method::LIST, Nothing {}).await?;
        Ok(reply.snapshots)
    }

    /// A snapshot and its images.
    pub async fn show(&mut self, id: &str) -> Result<(Snapshot, Vec<Image>), ClientError> {
        let reply: ShowOut = self.ask(method::SHOW, ById { id: id.to_owned() }).await?;
        Ok((reply.snapshot, reply.images))
    }

    /// When what happened to a snapshot.
    pub async fn timeline(&mut self, id: &str) -> Result<Vec<Phase>, ClientError> {
        let reply: TimelineOut = self.ask(method::TIMELINE, ById { id: id.to_owned() }).await?;
        Ok(reply.phases)
    }

    /// Has a snapshot forgotten.
    pub async fn drop_snapshot(&mut self, id: &str) -> Result<(), ClientError> {
        let _: Nothing = self.call(method::DROP, ById { id: id.to_owned() }, Vec::new()).await?;
        Ok(())
    }

    /// Hands over a listening or connected unix stream socket that speaks for the snapshot `id`.
    /// `to` and `reading` are as in [`Open`](super::Open).
    pub async fn open(
        &mut self,
        id: &str,
        to: Option<&str>,
        reading: Reading,
        socket: OwnedFd,
    ) -> Result<(), ClientError> {
        let (id, to) = (id.to_owned(), to.map(str::to_owned));
        let take = Some(reading != Reading::Look);
        let again = (reading == Reading::TakeAgain).then_some(true);
        self.call_open(OpenIn { id, to, take, again, ..OpenIn::default() }, socket).await
    }

    /// Hands over a connected socket for a restore, on which it says what becomes of it ([`HELD_BY_RESTORE`]). The snapshot
    /// is its own from then on; `copy` and `view` are as in [`Open`](super::Open).
    ///
    /// [`HELD_BY_RESTORE`]: crate::criu::stream::HELD_BY_RESTORE
    pub async fn hold(
        &mut self,
        id: &str,
        again: bool,
        copy: bool,
        view: bool,
        socket: OwnedFd,
    ) -> Result<(), ClientError> {
        let [again, copy, view] = [again, copy, view].map(|asked| asked.then_some(true));
        let call =
            OpenIn { id: id.to_owned(), take: Some(true), again, copy, view, ..OpenIn::default() };
        self.call_open(call, socket).await
    }

    /// Hands over a socket on which images of the snapshot `id` come that have pages in the snapshot `parent`.
    pub async fn open_child(
        &mut self,
        id: &str,
        parent: &str,
        to: Option<&str>,
        socket: OwnedFd,
    ) -> Result<(), ClientError> {
        let (id, to) = (id.to_owned(), to.map(str::to_owned));
        let parent = Some(parent.to_owned());
        self.call_open(OpenIn { id, to, parent, ..OpenIn::default() }, socket).await
    }

    /// Hands over a connected socket on which the images come of an attempt to move a process.
    pub async fn open_attempt(
        &mut self,
        id: &str,
        attempt: u64,
        to: Option<&str>,
        socket: OwnedFd,
    ) -> Result<(), ClientError> {
        let (id, to, attempt) = (id.to_owned(), to.map(str::to_owned), Some(attempt));
        self.call_open(OpenIn { id, to, attempt, ..OpenIn::default() }, socket).await
    }

    async fn call_open(&mut self, call: OpenIn, socket: OwnedFd) -> Result<(), ClientError> {
        let _: Nothing = self.call(method::OPEN, call, vec![socket]).await?;
        Ok(())
    }

    /// Hands over a listening or connected stream socket on which pages come for the snapshot `id`, or are
    /// asked for. The rest is as in [`OpenPages`](super::OpenPages).
    pub async fn open_pages(
        &mut self,
        id: &str,
        parent: Option<&str>,
        to: Option<&str>,
        socket: OwnedFd,
    ) -> Result<(), ClientError> {
        let (parent, to) = (parent.map(str::to_owned), to.map(str::to_owned));
        let call = OpenPagesIn { id: id.to_owned(), parent, to, attempt: None };
        let _: Nothing = self.call(method::OPEN_PAGES, call, vec![socket]).await?;
        Ok(())
    }

    /// The same for the pages of an attempt to move a process.
    pub async fn open_pages_of_attempt(
        &mut self,
        id: &str,
        attempt: u64,
        to: Option<&str>,
        socket: OwnedFd,
    ) -> Result<(), ClientError> {
        let (to, attempt) = (to.map(str::to_owned), Some(attempt));
        let call = OpenPagesIn { id: id.to_owned(), parent: None, to, attempt };
        let _: Nothing = self.call(method::OPEN_PAGES, call, vec![socket]).await?;
        Ok(())
    }

    /// Has the proxy make its link to a cache, unless it is there, and waits for that no longer than `limit`. `to` is as in
    /// [`Open`](super::Open).
    pub async fn connect_link(
        &mut self,
        to: Option<&str>,
        limit: Duration,
    ) -> Result<LinkStatus, ClientError> {
        let timeout_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        let call = ConnectIn { to: to.map(str::to_owned), timeout_ms };
        let reply: ConnectOut = self.call(method::CONNECT, call, Vec::new()).await?;
        Ok(reply.link)
    }

    /// Has the cache give up what came of an attempt to move a process, and waits for its answer.
    pub async fn withdraw(
        &mut self,
        id: &str,
        attempt: u64,
        reason: &str,
        to: Option<&str>,
    ) -> Result<Withdrawn, ClientError> {
        let (id, reason, to) = (id.to_owned(), reason.to_owned(), to.map(str::to_owned));
        let call = WithdrawIn { id, attempt, reason, to };
        let reply: WithdrawOut = self.call(method::WITHDRAW, call, Vec::new()).await?;
        Ok(reply.outcome)
    }

    /// The images of a whole snapshot as files.
    pub async fn view(&mut self, id: &str) -> Result<Vec<ImageFile>, ClientError> {
        let reply: ViewOut =
            self.call(method::VIEW, ById { id: id.to_owned() }, Vec::new()).await?;
        Ok(reply.images)
    }

    /// Has a snapshot given to restores though its memory may have changed.
    pub async fn accept_changed_memory(&mut self, id: &str) -> Result<(), ClientError> {
        let id = ById { id: id.to_owned() };
        let _: Nothing = self.call(method::ACCEPT_CHANGED_MEMORY, id, Vec::new()).await?;
        Ok(())
    }

    /// Says that the CRIU of this pid will wait until its dump [has ended](Client::finish_dump).
    pub async fn expect_dump(&mut self, pid: i32) -> Result<(), ClientError> {
        let _: Nothing = self.call(method::EXPECT_DUMP, ExpectDumpIn { pid }, Vec::new()).await?;
        Ok(())
    }

    /// Ends the dump of the CRIU of this pid, and waits until the cache has acknowledged it.
    pub async fn finish_dump(
        &mut self,
        pid: i32,
        limit: Duration,
    ) -> Result<Snapshot, ClientError> {
        let timeout_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        let call = FinishDumpIn { pid, timeout_ms };
        let reply: FinishDumpOut = self.call(method::FINISH_DUMP, call, Vec::new()).await?;
        Ok(reply.snapshot)
    }

    /// Follows a snapshot until it is whole, damaged or taken; with `taken`, whole is not the end.
    /// It need not be there yet.
    pub async fn watch(&mut self, id: &str, taken: bool) -> Result<Watch<'_>, ClientError> {
        self.watch_with(WatchIn { id: id.to_owned(), taken: taken.then_some(true), known: None })
            .await
    }

    /// The same, for one that is there. When it is not, that is told at once.
    pub async fn watch_known(&mut self, id: &str) -> Result<Watch<'_>, ClientError> {
        self.watch_with(WatchIn { id: id.to_owned(), taken: None, known: Some(true) }).await
    }

    async fn watch_with(&mut self, parameters: WatchIn) -> Result<Watch<'_>, ClientError> {
        let call = Call::new(Outgoing { method: method::WATCH, parameters }).set_more(true);
        if let Err(error) = self.connection.send_call(&call, Vec::new()).await {
            return Err(self.broken(&error));
        }
        Ok(Watch { client: self, more: true })
    }

    /// A call that only looks.
    async fn ask<P, R>(&mut self, method: &str, parameters: P) -> Result<R, ClientError>
    where
        P: Serialize + std::fmt::Debug,
        R: DeserializeOwned + std::fmt::Debug,
    {
        let limit = self.limit;
        let answer = self.call(method, parameters, Vec::new());
        if let Ok(answer) = timeout(limit, answer).await {
            return answer;
        }
        let why = format!("the daemon has not answered for {limit:?}");
        let source = io::Error::new(io::ErrorKind::TimedOut, why);
        Err(ClientError::Unreachable { path: self.path.clone(), source })
    }

    async fn call<P, R>(
        &mut self,
        method: &str,
        parameters: P,
        descriptors: Vec<OwnedFd>,
    ) -> Result<R, ClientError>
    where
        P: Serialize + std::fmt::Debug,
        R: DeserializeOwned + std::fmt::Debug,
    {
        let call = Call::new(Outgoing { method, parameters });
        if let Err(error) = self.connection.send_call(&call, descriptors).await {
            return Err(self.broken(&error));
        }
        Ok(self.receive().await?.0)
    }

    /// A reply, and whether more follow.
    async fn receive<R>(&mut self) -> Result<(R, bool), ClientError>
    where
        R: DeserializeOwned + std::fmt::Debug,
    {
        let received = self.connection.receive_reply::<R, AnyError>().await;
        self.answered |= received.is_ok();
        let reply: Reply<R> = match received {
            Ok((Ok(reply), _)) => reply,
            Ok((Err(error), _)) => return Err(from_reply(error)),
            Err(zlink::Error::VarlinkService(error)) => {
                return Err(ClientError::Refused(error.to_string()));
            }
            Err(error) => return Err(self.broken(&error)),
        };
        let more = reply.continues() == Some(true);
        match reply.into_parameters() {
            Some(parameters) => Ok((parameters, more)),
            None => Err(self.broken(&zlink::Error::MissingParameters)),
        }
    }

    fn broken(&self, error: &zlink::Error) -> ClientError {
        let why = match error {
            zlink::Error::UnexpectedEof => "the daemon closed the connection".to_owned(),
            error => error.to_string(),
        };
        ClientError::Broken { path: self.path.clone(), why, answered: self.answered }
    }
}

fn from_reply(error: AnyError) -> ClientError {
    match error {
        AnyError::Known(CallError::NoSuchSnapshot { id }) => ClientError::NoSuchSnapshot(id),
        AnyError::Known(CallError::Refused { reason }) => ClientError::Refused(reason),
        AnyError::Known(CallError::NoDescriptor) => {
            ClientError::Refused("no descriptor was passed with the call".to_owned())
        }
        AnyError::Known(CallError::NotASocket) => ClientError::Refused(
            "what was passed is not a stream socket of the right kind".to_owned(),
        ),
        AnyError::Unknown { error } => ClientError::Refused(error),
    }
}

/// The states of one snapshot, as they come.
#[derive(Debug)]
pub struct Watch<'c> {
    client: &'c mut Client,
    more: bool,
}

impl Watch<'_> {
    /// The snapshot at once, then whenever it has changed; `None` after its last state. It can be
    /// cancelled without losing a state.
    pub async fn next(&mut self) -> Result<Option<Snapshot>, ClientError> {
        if !self.more {
            return Ok(None);
        }
        let received = self.client.receive::<WatchOut>().await;
        // Whatever fails is the end of the watch.
        self.more = matches!(received, Ok((_, true)));
        let (reply, _) = received?;
        Ok(Some(reply.snapshot))
    }
}
