//! One client of `img-proxy.sock`, from its first request to its last.

use std::rc::Rc;

use rustix::io::Errno;
use tokio::net::UnixStream;
use tracing::Instrument;

use super::read::Found;
use super::snapshot::{Snapshot, Writing};
use super::task::{Next, Task, take};
use super::{Refusal, read};
use crate::config::{ProxySettings, Reads};
use crate::criu::historical::is_their_list;
use crate::criu::pages::Space;
use crate::criu::remote::{PARENT, Reply};
use crate::daemon::journal;
use crate::daemon::remote::{BadClient, Client};
use crate::daemon::sessions::Peer;
use crate::metrics::refusals::Reason;
use crate::proxy::Proxy;
use crate::proxy::failure::Failure;

/// Why a session ends before the client ends it.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error("{0}")]
    Client(#[from] BadClient),
    #[error("{0}")]
    Refused(#[from] Refusal),
    #[error("it left while it waited")]
    Left,
}

impl Ended {
    /// Why, if the client is to blame.
    fn reason(&self) -> Option<Reason> {
        match self {
            Ended::Client(bad) => Some(bad.into()),
            Ended::Refused(refusal) => (refusal.errno == Errno::INVAL).then_some(Reason::Protocol),
            Ended::Left => None,
        }
    }
}

/// Serves one client. The part before the future is done when the client is accepted: what has come of
/// it by then takes effect before what comes of those that are accepted later.
pub(in crate::proxy) fn serve(
    proxy: &Rc<Proxy>,
    socket: UnixStream,
) -> impl Future<Output = ()> + use<> {
    let admitted = proxy.admit(&socket).map(|peer| Session::begin(proxy.clone(), socket, peer));
    async move {
        if let Some((session, first)) = admitted {
            let span = tracing::error_span!("remote", criu_peer = %session.peer);
            session.run(first).instrument(span).await;
        }
    }
}

/// A client and what serves it.
pub(super) struct Session {
    pub(super) proxy: Rc<Proxy>,
    pub(super) settings: Rc<ProxySettings>,
    pub(super) client: Client,
    peer: Peer,
}

impl Session {
    fn begin(proxy: Rc<Proxy>, socket: UnixStream, peer: Peer) -> (Session, Option<Next>) {
        let settings = proxy.settings();
        let patience = settings.sessions.request_timeout;
        let mut client = Client::new(socket, patience, settings.remote.historical_endings);
        let first = client.come_already().map(|come| take(&proxy, peer, come));
        (Session { proxy, settings, client, peer }, first)
    }

    async fn run(mut self, mut come: Option<Next>) {
        loop {
            let next = match come.take() {
                Some(next) => next,
                None => take(&self.proxy, self.peer, self.client.next().await),
            };
            let done = match next {
                Ok(None) => return,
                Ok(Some(task)) => self.perform(task).await,
                Err(bad) => {
                    let _ = self.reply_refused(&refusal_of(&bad)).await;
                    Err(bad.into())
                }
            };
            match done {
                Ok(true) => {}
                Ok(false) => return,
                Err(ended) => {
                    if let Some(reason) = ended.reason() {
                        self.proxy.figures.refusals.count(reason);
                    }
                    return tell(self.peer, &ended);
                }
            }
        }
    }

    /// Does what is asked for. Returns whether the connection can carry another request.
    async fn perform(&self, task: Task) -> Result<bool, Ended> {
        let _busy = self.proxy.sessions.enter();
        match task {
            Task::Write { writing, append, acknowledge } => {
                self.write(&writing, append, acknowledge).await
            }
            Task::Append { appending, acknowledge } => {
                let list = &appending.list;
                let old = (!acknowledge && is_their_list(list)).then_some(self.peer);
                let appended = self.append(list, acknowledge, old).await;
                let refusals = &self.proxy.remote.refusals;
                match &appended {
                    Err(refusal) if !acknowledge => refusals.remember(self.peer, list, refusal),
                    _ => refusals.forget(self.peer, list),
                }
                self.concluded(appended, acknowledge).await?;
                Ok(false)
            }
            Task::Read { snapshot, name, pipe } => {
                let through_pipe = pipe.unwrap_or(self.settings.remote.reads == Reads::Pipe);
                let find = async {
                    if let Some(writing) = self.proxy.remote.find(&snapshot) {
                        writing.image_ended(&name).await;
                        writing.must_not_have_failed()?;
                    }
                    read::find(&self.proxy, &snapshot, &name).await
                };
                // To an old client what cannot be read is no parent, and CRIU sends all pages.
                let is_old = self.settings.remote.historical_endings && pipe.is_none();
                let is_parents = is_old && Space::of_pagemap(&name).is_some();
                let find = async {
                    find.await.map_err(|refusal| match refusal.errno {
                        Errno::IO | Errno::STALE if is_parents => {
                            Refusal::new(Errno::NOENT, refusal.reason)
                        }
                        _ => refusal,
                    })
                };
                self.read(find, through_pipe).await
            }
            Task::ReadList { list, pipe } => {
                let find = async {
                    let remote = &self.proxy.remote;
                    remote.appended(&list).await;
                    let understood = self.settings.remote.historical_endings || pipe;
                    remote.may_read_list(self.peer, &list, understood)?;
                    read::find(&self.proxy, &list, PARENT).await
                };
                self.read(find, pipe).await
            }
            Task::End { snapshot, images, acknowledge } => {
                let finished = snapshot.finish(&self.proxy, images, true).await;
                self.proxy.remote.forget(&snapshot);
                self.concluded(finished, acknowledge).await?;
                if acknowledge {
                    self.client.reply(&Reply::done()).await?;
                }
                Ok(true)
            }
            Task::EndAll(snapshots) => {
                self.end_all(&snapshots).await;
                Ok(true)
            }
            Task::Refused { refusal, listens } => {
                if listens {
                    self.reply_refused(&refusal).await?;
                }
                if refusal.errno == Errno::NOENT { Ok(true) } else { Err(refusal.into()) }
            }
        }
    }

    /// Tells the client of what failed, if it listens.
    async fn concluded(&self, result: Result<(), Refusal>, listens: bool) -> Result<(), Ended> {
        if let (Err(refusal), true) = (&result, listens) {
            // The connection ends in any case.
            let _ = self.reply_refused(refusal).await;
        }
        Ok(result?)
    }

    async fn reply_refused(&self, refusal: &Refusal) -> Result<(), BadClient> {
        self.client.reply(&Reply::refused(refusal.errno, &refusal.reason)).await
    }

    async fn write(
        &self,
        writing: &Writing,
        append: bool,
        acknowledge: bool,
    ) -> Result<bool, Ended> {
        let snapshot = &writing.snapshot;
        let written = tokio::select! {
            biased;
            why = snapshot.failed() => Err(Refusal::failed(why)),
            written = self.write_image(writing, append, acknowledge) => {
                written.map_err(|failure| {
                    snapshot.fail(&failure);
                    Refusal::failed(failure.to_string())
                })
            }
        };
        let go_on = match written {
            Ok(go_on) => go_on,
            Err(refusal) => {
                self.concluded(Err(refusal), acknowledge).await?;
                false
            }
        };
        if acknowledge {
            self.client.reply(&Reply::done()).await?;
        }
        Ok(go_on)
    }

    /// Each id begins its snapshot, and goes to the end of the list at the cache.
    async fn append(
        &self,
        list: &str,
        acknowledge: bool,
        old: Option<Peer>,
    ) -> Result<(), Refusal> {
        let patience = self.settings.sessions.stall_timeout;
        let limit = self.settings.link.ack_timeout;
        if acknowledge {
            self.client.reply(&Reply::done()).await.map_err(|bad| refusal_of(&bad))?;
        }
        while let Some(id) = self.client.entry(patience).await.map_err(|bad| refusal_of(&bad))? {
            if let (Some(peer), true) = (old, self.settings.remote.historical_endings) {
                self.proxy.remote.make_way(peer, list)?;
            }
            let snapshot = self.proxy.remote.listed(&self.proxy, &id, list, old)?;
            let listed = async {
                let upload = snapshot.upload(&self.proxy).await?;
                upload.list(list).await;
                if acknowledge {
                    upload.ready(limit).await?;
                }
                Ok::<_, Failure>(())
            };
            tokio::select! {
                biased;
                why = snapshot.failed() => return Err(Refusal::failed(why)),
                listed = listed => listed.map_err(|failure| {
                    snapshot.fail(&failure);
                    Refusal::failed(failure.to_string())
                })?,
            }
        }
        if acknowledge {
            self.client.reply(&Reply::done()).await.map_err(|bad| refusal_of(&bad))?;
        }
        Ok(())
    }

    /// Waits as long as the client does, and sends what was found.
    async fn read(
        &self,
        find: impl Future<Output = Result<Found, Refusal>>,
        through_pipe: bool,
    ) -> Result<bool, Ended> {
        let found = tokio::select! {
            found = find => found,
            () = self.client.gone() => return Err(Ended::Left),
        };
        match found {
            Ok(found) => {
                let patience = self.settings.sessions.stall_timeout;
                found.send(&self.client, through_pipe, patience).await?;
                Ok(through_pipe)
            }
            Err(refusal) => {
                self.reply_refused(&refusal).await?;
                if refusal.errno == Errno::NOENT { Ok(true) } else { Err(refusal.into()) }
            }
        }
    }

    /// The dump of an old client has ended, whether it succeeded or not: the last of its snapshots has
    /// to be a checkpoint.
    async fn end_all(&self, snapshots: &[Rc<Snapshot>]) {
        for (index, snapshot) in snapshots.iter().enumerate() {
            let partial = index + 1 < snapshots.len();
            if !snapshot.is_listed() {
                let why = "its id was not appended to a list: is this the rest of a dump?";
                snapshot.fail(&Failure::Incomplete(why.to_owned()));
            }
            // What fails is told in the journal.
            let _ = snapshot.finish(&self.proxy, None, partial).await;
            self.proxy.remote.forget(snapshot);
        }
    }
}

fn refusal_of(bad: &BadClient) -> Refusal {
    Refusal::new(bad.errno(), bad.to_string())
}

/// A session that the client has not ended itself.
fn tell(peer: Peer, ended: &Ended) {
    match ended {
        // The snapshot has a line of its own, and many clients.
        Ended::Refused(Refusal { errno: Errno::IO, .. }) => {
            tracing::debug!("the session of a client, {peer}, ended: {ended}");
        }
        // Not its fault.
        Ended::Left => tracing::info!("a client, {peer}, left while it waited"),
        Ended::Refused(refusal) if refusal.errno != Errno::INVAL => {
            tracing::info!("a client, {peer}, was refused: {ended}");
        }
        _ => {
            tracing::warn!(
                message_id = journal::PROTOCOL_ERROR,
                criu_reason = %ended,
                "the session of a client, {peer}, ended: {ended}"
            );
        }
    }
}
