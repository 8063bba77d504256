//! CRIU's page server: a dump or pre-dump connects, sends the pages of a round, and hears when the cache
//! has them. Rounds follow each other on one connection or on several.

use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::time::timeout;
use tracing::Instrument;

use super::Proxy;
use super::dump::fresh_id;
use super::failure::Failure;
use super::records::Record;
use super::round::Round;
use super::upload::Chunk;
use crate::config::ProxySettings;
use crate::control::model::SnapshotState;
use crate::criu::page_server::answer;
use crate::criu::page_server::command::Command;
use crate::criu::page_server::header::Reader;
use crate::criu::page_server::session::{Action, Session, Violation};
use crate::criu::pages::Contents;
use crate::daemon::accept::accept_one;
use crate::daemon::handed_over::Listener;
use crate::daemon::journal;
use crate::daemon::local_peers::admit_stream;
use crate::sys::connected::Stream;
use crate::sys::ends::Source;

/// How many page spaces a round may have; a cache takes no more, either.
const SPACES_MAX: usize = 1 << 16;

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
}

/// Serves one connection of the shared socket: its rounds become a new snapshot.
pub(super) async fn serve_shared(proxy: Rc<Proxy>, stream: Stream) {
    let id = fresh_id(&proxy.name, stream.peer().port());
    let cache = proxy.links.destination(&proxy.settings());
    // Nobody has that id.
    let Some(record) = proxy.records.add(&id, &cache, SnapshotState::Awaited) else { return };
    let target = Target { id, parent: None, cache, record: record.clone() };
    admit_and_serve(proxy.clone(), stream, target).await;
    proxy.records.await_no_more(&record);
}

/// Serves one connection of a socket that anybody may find, if its client may connect.
async fn admit_and_serve(proxy: Rc<Proxy>, stream: Stream, target: Target) {
    let (settings, peer) = (proxy.settings(), stream.peer());
    match admit_stream(&stream, &settings.allow_uids, settings.insecure) {
        Ok(()) => serve(proxy, stream, target).await,
        Err(why) => {
            let message_id = journal::PEER_REFUSED;
            tracing::warn!(message_id, "pages from {peer} are refused: {why}");
        }
    }
}

/// Serves one connection, until the client closes it or breaks the protocol. Whatever fails ends this
/// session only, and towards the source: CRIU's dump fails, the process runs on.
pub(super) async fn serve(proxy: Rc<Proxy>, stream: Stream, target: Target) {
    let _session = proxy.sessions.enter();
    let peer = stream.peer();
    let span = tracing::info_span!("pages", criu_snapshot = target.id, criu_peer = %peer);
    async {
        let settings = proxy.settings();
        let stream = Rc::new(stream);
        let source = Rc::new(Source::Stream(stream.clone()));
        let (reader, session) = (Reader::new(), Session::new(SPACES_MAX));
        let mut client = Client {
            proxy: &proxy,
            settings,
            target: &target,
            stream,
            source,
            reader,
            session,
            pagemap: String::new(),
            has_closed: false,
        };
        let mut another = client.round(client.settings.sessions.stall_timeout).await;
        while another {
            // Between rounds the process runs, as long as its owner likes.
            another = client.round(Duration::MAX).await;
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
        tokio::task::spawn_local(admit_and_serve(proxy.clone(), stream, target.clone()));
    }
}

/// A connection.
struct Client<'a> {
    proxy: &'a Proxy,
    settings: Rc<ProxySettings>,
    target: &'a Target,
    stream: Rc<Stream>,
    /// The same, where pages come from.
    source: Rc<Source>,
    reader: Reader,
    session: Session,
    /// The image that the pages would be described by.
    pagemap: String,
    /// Whether the client has ended the round, and waits for its status.
    has_closed: bool,
}

impl Client<'_> {
    /// Serves one round. Returns whether another may follow.
    async fn round(&mut self, patience: Duration) -> bool {
        let record = self.target.record.clone();
        let first = tokio::select! {
            first = self.command_within(patience) => first,
            () = record.over() => return false,
        };
        let first = match first {
            // Of which no round is begun.
            Ok(Some(Command::Get { .. })) => Err(incomplete(Violation::Get)),
            first => first,
        };
        let first = match first {
            Ok(Some(first)) => first,
            Ok(None) => return false,
            Err(failure) => {
                tracing::warn!(message_id = journal::PEER_REFUSED, "the session ended: {failure}");
                return false;
            }
        };
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
        let round = slot.insert(Round::begin(&connection, id, parent, limit).await?);
        let lost = round.lost();
        tokio::select! {
            // The link's end is the cause of whatever fails with it.
            biased;
            failure = lost => Err(failure),
            ended = self.exchange(first, round) => ended,
        }
    }

    /// Does what the client commands until the round has ended.
    async fn exchange(&mut self, first: Command, round: &mut Round) -> Result<bool, Failure> {
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
            let Some(command) = self.command_within(limit).await? else {
                return Err(incomplete("the client closed the connection after CLOSE"));
            };
            next = command;
        }
    }

    /// Forwards the bytes of pages.
    async fn payload(&mut self, round: &mut Round, mut left: u64) -> Result<(), Failure> {
        let limit = self.settings.sessions.stall_timeout;
        while left > 0 {
            let ready = timeout(limit, self.source.readable()).await;
            ready.map_err(|_| stalled(limit))?.map_err(incomplete)?;
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

    async fn command_within(&mut self, limit: Duration) -> Result<Option<Command>, Failure> {
        timeout(limit, self.command()).await.unwrap_or_else(|_| Err(stalled(limit)))
    }

    /// The next command; `None` when the client has closed the connection between two rounds. It can be
    /// cancelled without losing a part of it.
    async fn command(&mut self) -> Result<Option<Command>, Failure> {
        loop {
            let room = self.reader.room();
            if room.is_empty() {
                return Ok(None);
            }
            match self.stream.read(room).await.map_err(incomplete)? {
                0 if self.reader.is_within_header() => {
                    return Err(incomplete("the connection was closed within a command"));
                }
                0 => return self.session.disconnected().map(|()| None).map_err(incomplete),
                len => {
                    if let Some(command) = self.reader.filled(len).map_err(incomplete)? {
                        return Ok(Some(command));
                    }
                }
            }
        }
    }

    /// Answers the client; it waits for it, so that there is room.
    async fn answer(&self, bytes: &[u8]) -> Result<(), Failure> {
        let limit = self.settings.sessions.request_timeout;
        let written = timeout(limit, self.stream.write_all(bytes)).await;
        written.map_err(|_| stalled(limit))?.map_err(incomplete)
    }

    /// The one line that the journal gets for a round.
    fn tell(&self, criu_bytes: u64, started: Instant, failure: Option<&Failure>) {
        let criu_seconds = started.elapsed().as_secs_f64();
        let Target { id, cache, .. } = self.target;
        match failure {
            None => tracing::info!(
                message_id = journal::ROUND_HELD,
                criu_bytes,
                criu_seconds,
                "a round of snapshot {id} sent to {cache}: {criu_bytes} bytes of pages, \
                 {criu_seconds:.2} s"
            ),
            Some(failure) => tracing::warn!(
                message_id = journal::SNAPSHOT_DAMAGED,
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

fn stalled(limit: Duration) -> Failure {
    Failure::Incomplete(format!("nothing came for {limit:?}"))
}
