//! One client for the figures.

use std::io;
use std::rc::Rc;
use std::time::Duration;

use rustix::net::{Shutdown, shutdown};
use tokio::time::timeout;

use super::page::Page;
use super::refusals::{Reason, Refusals};
use super::request::{Answer, HEAD_MAX};
use crate::daemon::journal;
use crate::daemon::local_peers::{NotAdmitted, Owner};
use crate::daemon::places::Place;
use crate::sys::connected::{Peer, Stream};

/// So many clients are served at once; further ones wait to be accepted.
pub const CLIENTS_MAX: u64 = 16;
/// How long a client may take to ask, and then to read the answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long the rest of what it says is looked at.
const REST: Duration = Duration::from_secs(1);

/// Whose figures they are.
pub trait Figures {
    /// Everything that a scrape shows.
    fn page(&self) -> Page;

    /// Whether a client may have them.
    fn admit(&self, client: &Stream) -> impl Future<Output = Result<Owner, NotAdmitted>>;

    /// Where refused clients are counted.
    fn refusals(&self) -> &Refusals;
}

/// Serves one client: one request, one answer. What it does wrong ends its connection and nothing else.
/// Until its request has come it may have to give up its place.
pub async fn serve(figures: Rc<impl Figures>, stream: Stream, mut place: Place) {
    let peer = stream.peer();
    if let Err(why) = figures.admit(&stream).await {
        let why_not = match why {
            NotAdmitted::NotAllowed(_) => format!("{why}, nor in metrics.allow-uids"),
            _ => why.to_string(),
        };
        return refuse(&*figures, peer, Reason::from(&why), &why_not);
    }
    let Some(asked) = place.unless_turned_out(timeout(PATIENCE, ask(&stream))).await else {
        figures.refusals().count(Reason::Stalled);
        tracing::debug!("a client for figures, {peer}, makes way for others that came later");
        return;
    };
    let answer = match asked {
        Ok(Ok(Some(answer))) => answer,
        // It has only looked whether somebody listens.
        Ok(Ok(None)) => return,
        Ok(Err(error)) => return refuse(&*figures, peer, Reason::Protocol, &error.to_string()),
        Err(_) => {
            let why = format!("its request did not come within {PATIENCE:?}");
            return refuse(&*figures, peer, Reason::Stalled, &why);
        }
    };
    let (answer, text) = match answer {
        Answer::Figures => match figures.page().text() {
            Ok(text) => (answer, text),
            Err(_) => (Answer::Ours, String::new()),
        },
        other => (other, String::new()),
    };
    if answer.is_fault() {
        refuse(&*figures, peer, Reason::Protocol, "it sent no request for figures");
    }
    tell(&stream, answer.encode(&text).as_bytes()).await;
}

fn refuse(figures: &impl Figures, peer: Peer, reason: Reason, why: &str) {
    figures.refusals().count(reason);
    let message_id = match reason {
        Reason::Uid | Reason::Host | Reason::Unknown => journal::PEER_REFUSED,
        Reason::Protocol | Reason::Stalled => journal::PROTOCOL_ERROR,
    };
    let (criu_peer, criu_reason) = (tracing::field::display(peer), why);
    tracing::warn!(
        message_id,
        criu_peer,
        criu_reason,
        "a client for figures, {peer}, is refused: {criu_reason}"
    );
}

/// Waits for the head of a request; `None` when the client leaves without a word.
async fn ask(stream: &Stream) -> io::Result<Option<Answer>> {
    let mut head = vec![0; HEAD_MAX];
    let mut come = 0;
    loop {
        come += match stream.read(&mut head[come..]).await? {
            0 if come == 0 => return Ok(None),
            0 => return Err(io::Error::other("it left in the middle of its request")),
            len => len,
        };
        if let Some(answer) = Answer::to(&head[..come]) {
            return Ok(Some(answer));
        }
    }
}

/// Answers. Bytes that are left unread when the connection is closed would take the answer with them, so
/// that what the client still says is read for a while.
async fn tell(stream: &Stream, answer: &[u8]) {
    let written = timeout(PATIENCE, stream.write_all(answer)).await;
    if !matches!(written, Ok(Ok(()))) || shutdown(stream, Shutdown::Write).is_err() {
        return;
    }
    let rest = async {
        let mut rest = [0; 1024];
        while stream.read(&mut rest).await.is_ok_and(|len| len > 0) {}
    };
    let _ = timeout(REST, rest).await;
}
