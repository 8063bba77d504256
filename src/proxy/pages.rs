//! CRIU's page server: a dump or pre-dump connects, sends the pages of a round, and hears when the cache
//! has them. Rounds follow each other on one connection or on several. Or somebody asks for pages: `gets`.

use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::time::timeout;
use tracing::Instrument;

use super::Proxy;
use super::dump::fresh_id;
use super::failure::Failure;
use super::gets::{NotGiven, Pages};
use super::records::Record;
use super::round::Round;
use super::upload::Chunk;
use crate::config::ProxySettings;
use crate::control::model::SnapshotState;
use crate::criu::page_server::answer;
use crate::criu::page_server::command::Command;
use crate::criu::page_server::session::{Action, Session};
use crate::criu::pages::Contents;
use crate::daemon::accept::accept_one;
use crate::daemon::handed_over::Listener;
use crate::daemon::journal;
use crate::daemon::local_peers::admit_stream;
use crate::daemon::page_server::{self, BadClient, Ended};
use crate::daemon::places::Place;
use crate::metrics::refusals::Reason;
use crate::sys::connected::Stream;
use crate::sys::ends::Source;

/// How many page spaces a round may have; a cache takes no more, either.
const SPACES_MAX: usize = 1 << 16;

/// What is said to a client that asks for pages where there are none.
const NOBODYS: &str = "GET on the shared page server, where each connection makes a snapshot: open a socket for \
                       the one whose pages are meant (criu-imagectl open --pages)";

/// Which snapshot the rounds belong to, and where they go.
#[derive(Debug, Clone)]
pub(super) struct Target {
    /// The snapshot's id.
    pub(super) id: String,
    /// The snapshot whose pages the first round is based on.
    pub(super) parent: Option<String>,
    /// The cache, `HOST:PORT`.
    pub(super) cache: String,
    /// Its record.
    pub(super) record: Rc<Record>,
    /// Whether a connection of its own has made it, so that there can be no pages yet to ask for.
    pub(super) is_new: bool,
}

impl Target {
    /// Whether there can be no pages of the snapshot that somebody could ask for.
    fn has_no_pages(&self) -> bool {
        self.is_new && !self.record.has_begun_rounds()
    }
}

/// Serves one connection of the shared socket: its rounds become a new snapshot.
pub(super) async fn serve_shared(proxy: Rc<Proxy>, stream: Stream, place: Place) {
    let id = fresh_id(&proxy.name, stream.peer().port());
    let cache = proxy.links.destination(&proxy.settings());
    // Nobody has that id.
    let Some(record) = proxy.records.add(&id, &cache, SnapshotState::Awaited) else { return };
    let target = Target { id, parent: None, cache, record: record.clone(), is_new: true };
    admit_and_serve(proxy.clone(), stream, target, place).await;
    proxy.records.await_no_more(&record);
}

/// Serves one connection of a socket that anybody may find, if its client may connect.
async fn admit_and_serve(proxy: Rc<Proxy>, stream: Stream, target: Target, place: Place) {
    let (settings, peer) = (proxy.settings(), stream.peer());
    match admit_stream(&stream, &settings.allow_uids, settings.insecure).await {
        Ok(_) => serve(proxy, stream, target, place).await,
        Err(why) => {
            proxy.figures.refusals.count(Reason::from(&why));
            tracing::warn!(
                message_id = journal::PEER_REFUSED,
                criu_peer = %peer,
                criu_snapshot = target.id,
                criu_reason = %why,
                "pages from {peer} are refused: {why}"
            );
        }
    }
}

/// Serves one connection, until the client closes it or breaks the protocol. Whatever fails ends this
/// session only, and towards the source: CRIU's dump fails, the process runs on.
pub(super) async fn serve(proxy: Rc<Proxy>, stream: Stream, target: Target, place: Place) {
    let _session = proxy.sessions.enter();
    let peer = stream.peer();
    let span = tracing::error_span!("pages", criu_peer = %peer);
    async {
        let settings = proxy.settings();
        let criu = page_server::Client::new(stream, place);
        let source = Rc::new(Source::Stream(criu.stream().clone()));
        let mut client = Client {
            proxy: &proxy,
            settings,
            target: &target,
            criu,
            source,
            session: Session::new(SPACES_MAX),
            pagemap: String::new(),
            has_closed: false,
        };
        let mut another = client.next(client.settings.sessions.stall_timeout).await;
        while another {
            // Between rounds the process runs, as long as its owner likes.
            another = client.next(Duration::MAX).await;
        }
    }
    .instrument(span)
    .await;
}

/// Serves an opened socket until the snapshot is whole, or its record is stopped or replaced.
pub(super) async fn listen(proxy: Rc<Proxy>, listener: Listener, target: Target) {
    let accept = async || listener.accept().await;
    loop {
        let stream = tokio::select! {
            stream = accept_one("an opened page server", &accept) => stream,
            () = target.record.over() => return,
        };
        // A task of its own: a round goes on when the daemon stops to listen.
        let place = Place::unlimited();
        tokio::task::spawn_local(admit_and_serve(proxy.clone(), stream, target.clone(), place));
    }
}

/// A connection.
struct Client<'a> {
    proxy: &'a Proxy,
    settings: Rc<ProxySettings>,
    target: &'a Target,
    /// What it says.
    criu: page_server::Client,
    /// The same connection, where pages come from.
    source: Rc<Source>,
    session: Session,
    /// The image that the pages would be described by.
    pagemap: String,
    /// Whether the client has ended the round, and waits for its status.
    has_closed: bool,
}

impl Client<'_> {
    /// Serves one round, or a session of GETs. Returns whether another may follow.
    async fn next(&mut self, patience: Duration) -> bool {
        let record = self.target.record.clone();
        let first = tokio::select! {
            first = self.command(patience) => first,
            () = record.over() => return false,
        };
        let refused = match first {
            Err(Failure::Client(BadClient::MadeWay)) => {
                self.proxy.figures.refusals.count(Reason::Stalled);
                tracing::debug!("a client makes way for others that came later");
                return false;
            }
            Ok(None) => return false,
            Ok(Some(Command::Get { .. })) if self.target.has_no_pages() => incomplete(NOBODYS),
            Ok(Some(get @ Command::Get { .. })) => return self.gets(get).await,
            Ok(Some(Command::Close | Command::ForceClose)) if self.criu.dialect().is_none() => {
                return self.nothing().await;
            }
            Ok(Some(first)) => return self.round(first).await,
            Err(failure) => failure,
        };
        self.proxy.figures.refusals.count(refused.reason());
        tracing::warn!(
            message_id = journal::PROTOCOL_ERROR,
            criu_snapshot = self.target.id,
            criu_reason = %refused,
            "the session ended: {refused}"
        );
        false
    }

    /// The connection has begun with its end: a client that needs no pages, or a dump that failed before it
    /// asked for anything. CRIU resets the kernel's notes of what changed when it has heard of parents, and
    /// this one has heard nothing: the next round goes on from the one before.
    async fn nothing(&self) -> bool {
        if let Err(failure) = self.answer(&answer::status(true)).await {
            tracing::debug!("a client that ended at once was not answered: {failure}");
        }
        false
    }

    /// Gives the client pages, until it ends that.
    async fn gets(&mut self, first: Command) -> bool {
        let (proxy, settings, target) = (self.proxy, self.settings.clone(), self.target);
        let limits = &self.settings.sessions;
        let (mut pages, mut sent) = (Pages { proxy, settings, target }, 0);
        let (client, first) = (&mut self.criu, Some(first));
        let ended = tokio::select! {
            ended = page_server::serve(client, first, &mut pages, &mut sent, limits) => ended,
            why = target.record.stopped() => Err(NotGiven::Stopped(why).into()),
        };
        if let Some(reason) = ended.as_ref().err().and_then(Reason::of_gets) {
            proxy.figures.refusals.count(reason);
        }
        page_server::tell(&pages, self.criu.stream().peer(), sent, ended.as_ref().err());
        matches!(ended, Ok(Ended::Force))
    }

    /// Serves one round.
    async fn round(&mut self, first: Command) -> bool {
        let record = self.target.record.clone();
        let started = Instant::now();
        let target = self.target;
        let own = record.has_begun_rounds().then_some(target.id.as_str());
        let parent = own.or(target.parent.as_deref());
        let before = record.begin_round();
        self.has_closed = false;
        let mut round = None;
        let ended = tokio::select! {
            ended = self.run(first, parent, &mut round) => ended,
            reason = record.stopped() => Err(Failure::Stopped(reason)),
        };
        let reason = ended.as_ref().err().map(ToString::to_string);
        if let (Some(reason), Some(round)) = (&reason, &round) {
            round.abort(reason).await;
        }
        let (_, bytes) = round.as_ref().map_or((0, 0), Round::counts);
        match &round {
            Some(round) if round.is_empty() && ended.is_ok() => record.leave_round(before),
            _ => record.end_round(bytes, reason),
        }
        self.tell(bytes, started, ended.as_ref().err());
        // CRIU fails without it. One that waits for another answer would take it for that one.
        let told = self.has_closed && self.answer(&answer::status(ended.is_ok())).await.is_ok();
        told && matches!(ended, Ok(true))
    }

    /// From the first command until the cache holds all of the round. Returns whether another may follow.
    async fn run(
        &mut self,
        first: Command,
        parent: Option<&str>,
        slot: &mut Option<Round>,
    ) -> Result<bool, Failure> {
        let connect = self.proxy.links.connect(&self.target.cache, &self.settings);
        let connection = connect.await.map_err(Failure::Lost)?;
        let id = &self.target.id;
        let limit = self.settings.link.ack_timeout;
        let attempt = self.target.record.attempt();
        let round = slot.insert(Round::begin(&connection, id, parent, attempt, limit).await?);
        let lost = round.lost();
        tokio::select! {
            // The link's end is the cause of whatever fails with it.
            biased;
            failure = lost => Err(failure),
            ended = self.exchange(first, round) => ended,
        }
    }

    /// Does what the client commands until the round has ended.
    async fn exchange(&mut self, first: Command, round: &Round) -> Result<bool, Failure> {
        let mut next = first;
        loop {
            let action = self.session.receive(next, |space| round.has_parent(space));
            let action = action.map_err(incomplete)?;
            self.has_closed = matches!(action, Action::RoundEnds { .. });
            match action {
                Action::Open { space, answer } => {
                    self.pagemap = space.pagemap();
                    self.target.record.begin_image(&self.pagemap, false);
                    round.space(space).await;
                    if let Some(answer) = answer {
                        self.answer(&answer).await?;
                    }
                }
                Action::Answer(answer) => self.answer(&answer).await?,
                Action::Pages { space, run, payload_len } => {
                    if run.contents() == Contents::Lazy {
                        return Err(incomplete(format!(
                            "pages of {space} are to stay at the source: a lazy dump (--lazy-pages) \
                             is not relayed"
                        )));
                    }
                    round.pages(run).await;
                    self.payload(round, payload_len).await?;
                }
                // There is nothing to hold; the next one cannot be based on it.
                Action::RoundEnds { force } if round.is_empty() => {
                    round.abort("it ended before any page space").await;
                    return Ok(force);
                }
                Action::RoundEnds { force } => {
                    round.finish(self.settings.link.ack_timeout).await?;
                    return Ok(force);
                }
            }
            let limit = self.settings.sessions.stall_timeout;
            let Some(command) = self.command(limit).await? else {
                return Err(incomplete("the client closed the connection after CLOSE"));
            };
            next = command;
        }
    }

    /// Forwards the bytes of pages.
    async fn payload(&mut self, round: &Round, mut left: u64) -> Result<(), Failure> {
        let limit = self.settings.sessions.stall_timeout;
        while left > 0 {
            let ready = timeout(limit, self.source.readable()).await;
            ready.map_err(|_| BadClient::Silent(limit))?.map_err(incomplete)?;
            let len = usize::try_from(left).unwrap_or(usize::MAX);
            match round.chunk(&self.source, len).await.map_err(incomplete)? {
                Chunk::NotYet => {}
                Chunk::End => return Err(incomplete("the connection was closed within pages")),
                Chunk::Moved(bytes) => {
                    left = left.saturating_sub(bytes);
                    self.target.record.sent(&self.pagemap, bytes);
                    self.proxy.records.sent(bytes);
                }
            }
        }
        Ok(())
    }

    /// The next command; `None` when the client has closed the connection between two rounds.
    async fn command(&mut self, patience: Duration) -> Result<Option<Command>, Failure> {
        let limit = self.settings.sessions.stall_timeout;
        match self.criu.command(patience, limit).await? {
            Some(command) => Ok(Some(command)),
            None => self.session.disconnected().map(|()| None).map_err(incomplete),
        }
    }

    /// Answers the client; it waits for it, so that there is room.
    async fn answer(&self, bytes: &[u8]) -> Result<(), Failure> {
        let limit = self.settings.sessions.request_timeout;
        Ok(self.criu.write(bytes, limit).await?)
    }

    /// The one line that the journal gets for a round.
    fn tell(&self, criu_bytes: u64, started: Instant, failure: Option<&Failure>) {
        let criu_seconds = started.elapsed().as_secs_f64();
        let Target { id, cache, .. } = self.target;
        match failure {
            None => tracing::info!(
                message_id = journal::ROUND_HELD,
                criu_snapshot = id,
                criu_bytes,
                criu_seconds,
                "a round of snapshot {id} sent to {cache}: {criu_bytes} bytes of pages, \
                 {criu_seconds:.2} s"
            ),
            Some(failure) => tracing::warn!(
                message_id = journal::ROUND_FAILED,
                criu_snapshot = id,
                criu_reason = %failure,
                criu_bytes,
                criu_seconds,
                "a round of snapshot {id} failed after {criu_bytes} bytes of pages: {failure}"
            ),
        }
    }
}

#[allow(clippy::needless_pass_by_value)] // for map_err
fn incomplete(why: impl ToString) -> Failure {
    Failure::Incomplete(why.to_string())
}
