//! One link: a proxy that is connected, from its preface to its end. Its snapshots come in any
//! interleaving; what one of them does wrong damages that one, what the peer does wrong ends the
//! link, and damages those that were under way.

use std::rc::Rc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::timeout;
use tracing::Instrument;

use crate::config::CacheSettings;
use crate::daemon::journal;
use crate::daemon::local_peers::{NotAdmitted, Owner, admit_stream};
use crate::daemon::outages::Outages;
use crate::daemon::places::Place;
use crate::metrics::refusals::Reason;
use crate::store::Sender;
use crate::sys::clock::host_name;
use crate::sys::connected::Stream;
use crate::wire::frame::BadFrame;
use crate::wire::lane::{self, DEFAULT_CAPACITY, LaneError, Reader, Writer};
use crate::wire::message::{FEATURES, Message, Welcome};
use crate::wire::receiver::{Limits, Violation};

use super::Cache;
use super::answers::Answers;
use super::incoming::Incoming;
use super::link_places::{Activity, LinkPlace};

/// The pipe for what comes: more than an unprivileged user is granted is not asked for.
const INCOMING: usize = 1 << 20;
/// So many connections at once may be without a link: they have not introduced themselves, or wait for one of
/// `link.max` to end. When there are more, the one that came first is closed.
pub(super) const STRANGERS: u64 = 1024;
/// Snapshots under way at once on one link.
const SNAPSHOTS: usize = 1024;
/// Answers that a peer has not read yet.
const ANSWERS: usize = 4 * SNAPSHOTS;
/// How long a peer may take to hear why its link ends.
const FAREWELL: Duration = Duration::from_secs(1);

/// Who has made a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Whose {
    /// Whoever came to the socket: one of `link.max`.
    Anyone,
    /// Whoever started the cache: there is one.
    Given,
}

/// Why a link ends.
#[derive(Debug, thiserror::Error)]
pub(super) enum Over {
    /// The connection failed or ended, or what came on it was no frame.
    #[error("{0}")]
    Lane(#[from] LaneError),
    /// The peer broke the order of messages.
    #[error("the peer broke the protocol: {0}")]
    Violation(#[from] Violation),
    /// The peer said goodbye.
    #[error("the peer ended it: {0}")]
    Goodbye(String),
    /// The peer did not introduce itself, or asks too much.
    #[error("{1}")]
    Refused(Reason, String),
    /// The peer may not connect.
    #[error("{0}")]
    NotAllowed(#[from] NotAdmitted),
    /// Another host is to have its link.
    #[error(
        "all links of link.max were taken, another host wants one, none has more of them than {0}, and of those on this \
         one nothing was moved for longest"
    )]
    MadeWay(Owner),
}

impl Over {
    /// Whether the peer is to blame.
    fn is_fault(&self) -> bool {
        match self {
            Over::Violation(_) | Over::Refused(..) | Over::NotAllowed(_) => true,
            Over::Lane(error) => error.is_fault(),
            Over::Goodbye(_) | Over::MadeWay(_) => false,
        }
    }

    /// Whether the peer is told why, as it cannot know.
    fn is_told(&self) -> bool {
        self.is_fault() || matches!(self, Over::MadeWay(_))
    }

    fn reason(&self) -> Reason {
        match self {
            Over::Refused(reason, _) => *reason,
            Over::NotAllowed(why) => Reason::from(why),
            Over::Lane(_) | Over::Violation(_) | Over::Goodbye(_) | Over::MadeWay(_) => {
                Reason::Protocol
            }
        }
    }
}

/// Serves one link until it ends. Returns whether nothing was lost with it, and the peer was not to
/// blame for its end.
///
/// A peer that has not introduced itself, or waits for a link, may have to give up its `place`.
pub(super) async fn serve(cache: &Cache, stream: Stream, whose: Whose, mut place: Place) -> bool {
    let address = stream.peer();
    let span = tracing::error_span!("link", criu_peer = %address);
    async {
        let settings = cache.settings();
        let greet = async {
            // Whoever is refused hears so after its HELLO: what lies unread when a connection is closed takes
            // the last word with it.
            let admitted = admit_stream(&stream, &settings.allow_uids, settings.insecure).await;
            let (mut reader, mut writer) = lane::split(stream, settings.link.keep_alive);
            let hello = match admitted {
                Ok(owner) => {
                    hello(&settings, &mut reader, &mut writer).await.map(|name| (name, owner))
                }
                Err(why) => Err(turn_away(&mut reader, &mut writer, why).await),
            };
            match hello {
                Ok((name, _)) if whose == Whose::Given => Ok((name, None, reader, writer)),
                Ok((name, owner)) => tokio::select! {
                    biased;
                    place = cache.links.places.take(owner) => {
                        Ok((name, Some((owner, place)), reader, writer))
                    }
                    () = reader.hung_up() => Err((LaneError::Closed.into(), writer)),
                },
                Err(over) => Err((over, writer)),
            }
        };
        let Some(greeted) = place.unless_turned_out(greet).await else {
            cache.figures.refusals.count(Reason::Stalled);
            tracing::debug!("a link from {address} makes way for others that came later");
            return false;
        };
        let (name, link, reader, writer) = match greeted {
            Ok(greeted) => greeted,
            Err((over, mut writer)) => {
                farewell(&mut writer, &over).await;
                cache.figures.refusals.count(over.reason());
                let message_id = match &over {
                    Over::NotAllowed(_) => journal::PEER_REFUSED,
                    _ => journal::PROTOCOL_ERROR,
                };
                tracing::warn!(
                    message_id,
                    criu_reason = %over,
                    "a link from {address} is refused: {over}"
                );
                return !over.is_fault();
            }
        };
        drop(place);
        let pipes = reader
            .with_pipe(INCOMING)
            .and_then(|reader| Ok((reader, writer.with_pipe(DEFAULT_CAPACITY)?)));
        let (reader, mut writer) = match pipes {
            Ok(halves) => halves,
            Err(error) => {
                tracing::warn!(
                    message_id = journal::CANNOT_SERVE,
                    criu_reason = %error,
                    "a link from {address} cannot be served: {error}"
                );
                return false;
            }
        };
        let features = FEATURES.map(str::to_owned).to_vec();
        let welcome = Message::Welcome(Welcome { name: host_name(), features });
        // It fits into the buffers of a new connection. One that is gone is noticed below.
        let _ = timeout(FAREWELL, writer.send(&welcome)).await;
        let outages = cache.links.outages_of(&name, address.host());
        let peer = format!("{name} ({address})");
        let _up = cache.links.add(&peer);
        outages.tell_up(&format!("link from {peer}"));
        let sender = Sender { name: peer, host: address.host(), attempt: 0 };
        run(cache, &settings, (reader, writer), &sender, &outages, link).await
    }
    .instrument(span)
    .await
}

/// The peer introduces itself. Returns its name for itself.
async fn hello(
    settings: &CacheSettings,
    reader: &mut Reader<()>,
    writer: &mut Writer<()>,
) -> Result<String, Over> {
    let limit = settings.link.hello_timeout;
    let greeting = async {
        // Ours goes first whatever comes, so that a peer of another version can say so.
        writer.send_preface().await.map_err(LaneError::from)?;
        reader.receive_preface().await?;
        let (message, _) = reader.receive().await?;
        let Message::Hello(hello) = message else {
            let kind = message.kind().as_str_name();
            return Err(Over::Refused(Reason::Protocol, format!("a {kind} instead of a HELLO")));
        };
        Ok(printable(&hello.name))
    };
    timeout(limit, greeting).await.unwrap_or_else(|_| {
        Err(Over::Refused(Reason::Stalled, format!("no HELLO within {limit:?}")))
    })
}

/// Waits a moment for the HELLO of a peer that may not connect, so that it hears why.
async fn turn_away(reader: &mut Reader<()>, writer: &mut Writer<()>, why: NotAdmitted) -> Over {
    let greeting = async {
        writer.send_preface().await.map_err(LaneError::from)?;
        reader.receive_preface().await?;
        reader.receive().await.map(drop)
    };
    match timeout(FAREWELL, greeting).await {
        Ok(Err(error)) if error.is_fault() => error.into(),
        _ => why.into(),
    }
}

/// A name from the network, as it may stand in a log line.
fn printable(name: &str) -> String {
    let safe = |c: &char| c.is_ascii_alphanumeric() || "._-".contains(*c);
    name.chars().filter(safe).take(64).collect()
}

/// Tells the peer why, unless it knows; it may be gone.
async fn farewell<P>(writer: &mut Writer<P>, over: &Over) {
    if over.is_told() {
        // A peer that does not speak the protocol is not spoken to.
        if matches!(over, Over::Lane(LaneError::Frame(BadFrame::Preface(_)))) {
            return;
        }
        let goodbye = Message::goodbye(&over.to_string());
        let _ = timeout(FAREWELL, writer.send(&goodbye)).await;
    }
}

/// Everything after the handshake. `link` is the place that another host may want.
async fn run(
    cache: &Cache,
    settings: &CacheSettings,
    (reader, writer): (Reader, Writer),
    sender: &Sender,
    outages: &Outages,
    mut link: Option<(Owner, LinkPlace)>,
) -> bool {
    let peer = &sender.name;
    let (replies, queue) = mpsc::channel(ANSWERS);
    let limits = Limits { images: settings.store.max_images, snapshots: SNAPSHOTS };
    let activity = link.as_ref().map_or_else(|| Rc::new(Activity::new()), |(_, l)| l.activity());
    let mut incoming = Incoming::new(cache, sender, limits, replies, activity);
    let mut answers = Answers::new(writer, queue, settings.link.keep_alive);
    let over = tokio::select! {
        over = incoming.receive(reader) => over,
        error = answers.send() => error.into(),
        over = made_way(&mut link) => over,
    };
    let lost = incoming.abandon(&format!("the link from {peer} ended: {over}"));
    outages.tell_over(&format!("link from {peer}"), &over.to_string(), over.is_fault(), lost);
    if over.is_fault() {
        cache.figures.refusals.count(over.reason());
    }
    if over.is_told() && timeout(FAREWELL, answers.flush()).await.is_ok() {
        farewell(answers.writer(), &over).await;
    }
    lost == 0 && !over.is_fault()
}

/// Resolves when another host is to have the link.
async fn made_way(link: &mut Option<(Owner, LinkPlace)>) -> Over {
    match link {
        Some((owner, place)) => {
            place.ended().await;
            Over::MadeWay(*owner)
        }
        None => std::future::pending().await,
    }
}
