//! A session in which a client asks for pages, as `criu lazy-pages --page-server` does.
//!
//! ```text
//! GET*  CLOSE             one client, one connection
//! (GET* FORCE_CLOSE)*     on a socket that stays
//! ```
//!
//! Pages are given up to the first that is not there. CRIU has no way to be told why there are none: then the
//! connection ends, and the journal says it.

use std::fmt::Display;
use std::time::Duration;

use super::{BadClient, Client};
use crate::config::SessionSettings;
use crate::criu::page_server::answer::{self, GET_MAX};
use crate::criu::page_server::command::{BadCommand, Command};
use crate::criu::page_server::header::Dialect;
use crate::criu::page_server::kind::Kind;
use crate::criu::pages::{PageRange, Space};
use crate::daemon::journal;
use crate::sys::connected::Peer;

/// Whoever has the pages that a client asks for.
pub trait Pages {
    /// Why they cannot be given.
    type NotGiven: Display;

    /// Answers one command: [the header](Asked::header), and after it the pages that there are, at least one.
    /// Returns how many bytes they have.
    fn give(
        &mut self,
        client: &Client,
        asked: &Asked,
    ) -> impl Future<Output = Result<u64, Failure<Self::NotGiven>>>;

    /// The id of the snapshot that they are of, once it is known.
    fn snapshot(&self) -> Option<&str>;
}

/// What a client asks for.
#[derive(Debug, Clone, Copy)]
pub struct Asked {
    task: u32,
    range: PageRange,
    dialect: Dialect,
}

impl Asked {
    fn new(id: u64, address: u64, pages: u64, dialect: Dialect) -> Result<Asked, BadGet> {
        // CRIU's pids are positive ints.
        let task = u32::try_from(id).ok().filter(|pid| (1..=i32::MAX as u32).contains(pid));
        let task = task.ok_or(BadGet::NoTask(id))?;
        let range = PageRange::new(address, pages.min(GET_MAX))
            .map_err(|range| BadCommand::GetRange { id, range })?;
        Ok(Asked { task, range, dialect })
    }

    /// Whose pages.
    pub fn task(&self) -> u32 {
        self.task
    }

    /// Their page space.
    pub fn space(&self) -> Space {
        Space::Task(self.task)
    }

    /// Which; not more than one answer may have.
    pub fn range(&self) -> PageRange {
        self.range
    }

    /// The header of an answer that has these pages, the first of those that are asked for.
    pub fn header(&self, pages: PageRange) -> Result<Vec<u8>, BadClient> {
        Ok(answer::get(self.dialect, self.task.into(), pages.address(), pages.pages())?)
    }
}

/// A GET that is none.
#[derive(Debug, thiserror::Error)]
pub enum BadGet {
    /// See [`BadCommand`].
    #[error("{0}")]
    Command(#[from] BadCommand),
    /// It is not a task that it asks for.
    #[error("GET for {0}, which is no task's id")]
    NoTask(u64),
    /// A command that is none of this session.
    #[error("{0} is what a dump says to a proxy, and not where pages are asked for")]
    OfADump(Kind),
}

/// Why a session ends before its client ends it.
#[derive(Debug, thiserror::Error)]
pub enum Failure<E> {
    /// See [`BadClient`].
    #[error("{0}")]
    Client(#[from] BadClient),
    /// A GET that is none.
    #[error("{0}")]
    Get(#[from] BadGet),
    /// Pages cannot be given.
    #[error("{0}")]
    NotGiven(E),
}

/// How a session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// The connection is over.
    Over,
    /// The socket may be another's, who goes on with it.
    Force,
}

/// Does what a client commands, from `first` on if that has come already. Counts the bytes of pages that it
/// has been sent.
pub async fn serve<P: Pages>(
    client: &mut Client,
    first: Option<Command>,
    pages: &mut P,
    sent: &mut u64,
    limits: &SessionSettings,
) -> Result<Ended, Failure<P::NotGiven>> {
    let mut next = first;
    loop {
        let command = match next.take() {
            Some(first) => first,
            // A process that runs touches its memory when it likes.
            None => match client.command(Duration::MAX, limits.request_timeout).await? {
                Some(command) => command,
                None => return Ok(Ended::Over),
            },
        };
        match command {
            Command::Get { id, address, pages: count } => {
                // The first command has come, so the dialect is known.
                let dialect = client.dialect().ok_or(BadGet::Command(BadCommand::NoDialect))?;
                let asked = Asked::new(id, address, count, dialect)?;
                *sent += pages.give(client, &asked).await?;
            }
            Command::Close | Command::ForceClose => {
                client.write(&answer::status(true), limits.stall_timeout).await?;
                let force = command == Command::ForceClose;
                return Ok(if force { Ended::Force } else { Ended::Over });
            }
            Command::Open { .. } | Command::Parent { .. } | Command::Pages { .. } => {
                return Err(BadGet::OfADump(command.kind()).into());
            }
        }
    }
}

impl<E> Failure<E> {
    /// Whether the client broke the protocol.
    fn is_fault(&self) -> bool {
        match self {
            Failure::Get(_) => true,
            Failure::Client(bad) => bad.is_fault(),
            Failure::NotGiven(_) => false,
        }
    }
}

/// The line that the journal gets for a session.
pub fn tell<P: Pages>(
    pages: &P,
    peer: Peer,
    criu_bytes: u64,
    failure: Option<&Failure<P::NotGiven>>,
) where
    Failure<P::NotGiven>: Display,
{
    let criu_snapshot = pages.snapshot();
    let of = criu_snapshot.map(|id| format!(" of snapshot {id}")).unwrap_or_default();
    let failure = match failure {
        Some(Failure::Client(BadClient::MadeWay)) => {
            tracing::debug!("a client for pages, {peer}, makes way for others that came later");
            return;
        }
        None if criu_bytes == 0 => {
            tracing::debug!(criu_snapshot, "{peer} asked for no pages{of}");
            return;
        }
        None => {
            tracing::info!(
                message_id = journal::PAGES_SERVED,
                criu_snapshot,
                criu_bytes,
                "pages{of} were asked for by {peer}, and {criu_bytes} bytes sent"
            );
            return;
        }
        Some(failure) => failure,
    };
    let (message_id, what) = if failure.is_fault() {
        (journal::PROTOCOL_ERROR, format!("the session of a client for pages{of}, {peer}, ended"))
    } else {
        let what = format!("a client for pages{of}, {peer}, was left without");
        (journal::RESTORE_FAILED, what)
    };
    tracing::warn!(message_id, criu_snapshot, criu_reason = %failure, "{what}: {failure}");
}
