//! Peers that were refused, by reason.

use std::cell::Cell;

use crate::daemon::local_peers::NotAdmitted;
use crate::daemon::page_server;
use crate::daemon::remote::BadClient;
use crate::daemon::sessions::BadSession;

/// Why a peer was refused, or its session ended before its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// Its user is not allowed.
    Uid,
    /// It is on another machine, and `insecure` is not set.
    Host,
    /// The kernel does not tell whose it is.
    Unknown,
    /// It broke a protocol.
    Protocol,
    /// It did not go on in time.
    Stalled,
}

impl Reason {
    /// Every reason there is, in the order of a page.
    pub const ALL: [Reason; 5] =
        [Reason::Uid, Reason::Host, Reason::Unknown, Reason::Protocol, Reason::Stalled];

    /// As a page has it.
    pub fn word(self) -> &'static str {
        match self {
            Reason::Uid => "uid",
            Reason::Host => "host",
            Reason::Unknown => "unknown",
            Reason::Protocol => "protocol",
            Reason::Stalled => "stalled",
        }
    }

    /// Why a session in which a client asked for pages ended, if the client is to blame.
    pub fn of_gets<E>(failure: &page_server::Failure<E>) -> Option<Reason> {
        use page_server::{BadClient::Connection, Failure};
        match failure {
            // One whose connection broke has only gone.
            Failure::Client(Connection(_)) | Failure::NotGiven(_) => None,
            Failure::Client(bad) => Some(bad.into()),
            Failure::Get(_) => Some(Reason::Protocol),
        }
    }
}

impl From<&NotAdmitted> for Reason {
    fn from(refused: &NotAdmitted) -> Reason {
        match refused {
            NotAdmitted::NotAllowed(_) => Reason::Uid,
            NotAdmitted::NotLocal => Reason::Host,
            NotAdmitted::Unknown | NotAdmitted::Io(_) => Reason::Unknown,
        }
    }
}

impl From<&BadSession> for Reason {
    fn from(bad: &BadSession) -> Reason {
        match bad {
            BadSession::Late(_) => Reason::Stalled,
            _ => Reason::Protocol,
        }
    }
}

impl From<&BadClient> for Reason {
    fn from(bad: &BadClient) -> Reason {
        match bad {
            BadClient::Session(bad) => bad.into(),
            BadClient::Header(_) => Reason::Protocol,
        }
    }
}

impl From<&page_server::BadClient> for Reason {
    fn from(bad: &page_server::BadClient) -> Reason {
        use page_server::BadClient::{Command, Connection, Deaf, Late, MadeWay, Silent, Torn};
        match bad {
            Silent(_) | Late(_) | Deaf(_) | MadeWay => Reason::Stalled,
            Command(_) | Torn | Connection(_) => Reason::Protocol,
        }
    }
}

/// How many were refused since the start.
#[derive(Debug, Default)]
pub struct Refusals([Cell<u64>; Reason::ALL.len()]);

impl Refusals {
    /// One more.
    pub fn count(&self, reason: Reason) {
        let count = &self.0[reason as usize];
        count.set(count.get() + 1);
    }

    /// How many there were for each reason.
    pub fn counts(&self) -> impl Iterator<Item = (&'static str, u64)> {
        Reason::ALL.iter().map(|reason| (reason.word(), self.0[*reason as usize].get()))
    }
}
