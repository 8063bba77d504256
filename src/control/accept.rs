//! Accepting peers on the control socket, whatever goes wrong with one of them.

use std::io;
use std::rc::Rc;
use std::time::Duration;

use rustix::io::Errno;
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinSet;
use tracing::{debug, warn};

use super::Backend;
use super::serve::{Peer, converse};

/// So many peers are served at once; further ones wait in the socket's backlog.
const PEERS_MAX: usize = 256;
/// How long to wait when the kernel has no descriptor or memory for another peer.
const BACK_OFF: Duration = Duration::from_millis(100);

/// Serves the interface to every peer whose uid is allowed. It never returns: neither a peer's fault
/// nor an accept error ends it. Dropping the future ends the conversations too.
///
/// It spawns local tasks, so it must run inside a [`tokio::task::LocalSet`].
pub async fn serve<B: Backend + 'static>(
    listener: UnixListener,
    allowed: impl Fn(u32) -> bool,
    backend: B,
) {
    let backend = Rc::new(backend);
    let mut peers = JoinSet::new();
    let mut accept = Accept { listener, short: false };
    loop {
        while peers.len() >= PEERS_MAX {
            peers.join_next().await;
        }
        tokio::select! {
            stream = accept.next() => {
                if let Some((stream, peer)) = admit(stream, &allowed) {
                    peers.spawn_local(converse(stream, peer, Rc::clone(&backend)));
                }
            }
            // Only so that finished ones are not kept.
            Some(_) = peers.join_next() => {}
        }
    }
}

/// Who connected, if they may.
fn admit(stream: UnixStream, allowed: impl Fn(u32) -> bool) -> Option<(UnixStream, Peer)> {
    let credentials = match stream.peer_cred() {
        Ok(credentials) => credentials,
        Err(error) => {
            warn!("control: a peer without credentials is not served: {error}");
            return None;
        }
    };
    let peer = Peer { uid: credentials.uid(), pid: credentials.pid().unwrap_or(0) };
    if !allowed(peer.uid) {
        warn!("control: {peer} may not use this socket: its uid is not among allow-uids");
        return None;
    }
    debug!("control: {peer} connected");
    Some((stream, peer))
}

/// The listening socket, and whether descriptors or memory ran out.
struct Accept {
    listener: UnixListener,
    /// Set from the first such failure to the next success, so that it is logged once.
    short: bool,
}

impl Accept {
    async fn next(&mut self) -> UnixStream {
        loop {
            let error = match self.listener.accept().await {
                Ok((stream, _)) => {
                    self.short = false;
                    return stream;
                }
                Err(error) => error,
            };
            if is_the_peers(&error) {
                continue;
            }
            if !self.short {
                self.short = true;
                warn!("control: no peer can be accepted, trying again each {BACK_OFF:?}: {error}");
            }
            tokio::time::sleep(BACK_OFF).await;
        }
    }
}

/// Whether an accept error tells of one connection only, and the next can be accepted at once.
fn is_the_peers(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::CONNABORTED | Errno::INTR | Errno::PROTO))
}
