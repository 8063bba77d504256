//! CRIU runs that are connected: who they are, how many there are, and their requests.

use std::cell::Cell;
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

use rustix::net::{RecvFlags, recv};
use tokio::io::{AsyncReadExt, Interest};
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::journal;
use crate::criu::stream::{BadRequest, HEADER_LEN, request_len};
use crate::sys::pipe::NotThatEnd;
use crate::sys::scm;

/// How often a peer that spoke out of turn, or says nothing more, is looked at.
pub(super) const LOOK: Duration = Duration::from_millis(100);

/// Counts the sessions under way.
#[derive(Debug, Clone, Default)]
pub struct Sessions(Rc<Cell<usize>>);

impl Sessions {
    /// How many there are.
    pub fn live(&self) -> usize {
        self.0.get()
    }

    /// One more, until the guard is dropped.
    pub fn enter(&self) -> Session {
        self.0.set(self.0.get() + 1);
        Session(self.0.clone())
    }
}

/// A session under way.
#[derive(Debug)]
pub struct Session(Rc<Cell<usize>>);

impl Drop for Session {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

/// The process at the other end of a unix socket, by `SO_PEERCRED`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// Its user, when it connected.
    pub uid: u32,
    /// Its pid; 0 when it lives in another pid namespace.
    pub pid: i32,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pid {} (uid {})", self.pid, self.uid)
    }
}

/// Whether a user is root or the daemon's own.
pub fn is_privileged(uid: u32) -> bool {
    uid == 0 || uid == rustix::process::geteuid().as_raw()
}

/// Whether a user may connect: root, the daemon's own user, and `allowed`.
pub fn is_admitted(uid: u32, allowed: &[u32]) -> bool {
    is_privileged(uid) || allowed.contains(&uid)
}

/// Who is connected, if they [may be](is_admitted). A refusal is logged.
pub fn admit(socket: &UnixStream, allowed: &[u32]) -> Option<Peer> {
    let message_id = journal::PEER_REFUSED;
    let credentials = match socket.peer_cred() {
        Ok(credentials) => credentials,
        Err(error) => {
            tracing::warn!(
                message_id,
                criu_peer = "unknown",
                criu_reason = %error,
                "a peer without credentials is refused: {error}"
            );
            return None;
        }
    };
    let peer = Peer { uid: credentials.uid(), pid: credentials.pid().unwrap_or(0) };
    let admitted = is_admitted(peer.uid, allowed);
    if !admitted {
        let criu_reason = "its uid is not in allow-uids";
        tracing::warn!(
            message_id,
            criu_peer = %peer,
            criu_reason,
            "{peer} is refused: {criu_reason}"
        );
    }
    admitted.then_some(peer)
}

/// What a CRIU run did wrong on its socket.
#[derive(Debug, thiserror::Error)]
pub enum BadSession {
    /// See [`BadRequest`].
    #[error("{0}")]
    Request(#[from] BadRequest),
    /// The socket ended within a request, or before the descriptor that belongs to it.
    #[error("the socket was closed in the middle of a request")]
    Torn,
    /// The rest of a request did not come in time.
    #[error("the rest of a request did not come within {0:?}")]
    Late(Duration),
    /// What came with a request is not the end of a pipe that it has to be.
    #[error("image {name}: {cause}")]
    Pipe {
        /// The image.
        name: String,
        /// What came instead.
        cause: String,
    },
    /// No usable descriptor came, or the socket failed.
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// Reads one request, without its length. `None` is the end of the session. CRIU may take its time
/// before a request, but not within one: that is `patience`.
pub async fn read_request(
    socket: &mut UnixStream,
    patience: Duration,
) -> Result<Option<Vec<u8>>, BadSession> {
    let mut header = [0; HEADER_LEN];
    let first = socket.read(&mut header).await?;
    if first == 0 {
        return Ok(None);
    }
    let rest = async {
        socket.read_exact(&mut header[first..]).await?;
        let mut request = vec![0; request_len(header)?];
        socket.read_exact(&mut request).await?;
        Ok(Some(request))
    };
    match timeout(patience, rest).await {
        Err(_) => Err(BadSession::Late(patience)),
        Ok(Err(BadSession::Io(error))) if error.kind() == io::ErrorKind::UnexpectedEof => {
            Err(BadSession::Torn)
        }
        Ok(request) => request,
    }
}

/// Receives the end of a pipe that belongs to the request for the image `name`; `adopt` checks that
/// it is the right one.
pub async fn receive_pipe<T>(
    socket: &UnixStream,
    name: &str,
    patience: Duration,
    adopt: impl FnOnce(OwnedFd) -> Result<T, NotThatEnd>,
) -> Result<T, BadSession> {
    let bad = |cause: String| BadSession::Pipe { name: name.to_owned(), cause };
    let descriptor = receive_descriptor(socket, patience).await;
    let descriptor = descriptor.map_err(|cause| bad(cause.to_string()))?;
    adopt(descriptor).map_err(|cause| bad(cause.to_string()))
}

async fn receive_descriptor(
    socket: &UnixStream,
    patience: Duration,
) -> Result<OwnedFd, BadSession> {
    let receive = socket.async_io(Interest::READABLE, || scm::receive_descriptor(socket));
    match timeout(patience, receive).await {
        Err(_) => Err(BadSession::Late(patience)),
        Ok(received) => received?.ok_or(BadSession::Torn),
    }
}

/// Resolves when the peer has closed the socket. For a peer whose turn it is not: CRIU says nothing
/// while it waits for a reply.
pub async fn closed(socket: &UnixStream) {
    let peek = || {
        let (received, _) = recv(socket, &mut [0; 1], RecvFlags::PEEK | RecvFlags::DONTWAIT)?;
        Ok(received)
    };
    match socket.async_io(Interest::READABLE, peek).await {
        Ok(0) | Err(_) => {}
        // Out of turn: its next request tells what comes of it. It hides the end from recv(2), but
        // not from epoll(7).
        Ok(_) => {
            while socket.ready(Interest::READABLE).await.is_ok_and(|ready| !ready.is_read_closed())
            {
                tokio::time::sleep(LOOK).await;
            }
        }
    }
}
