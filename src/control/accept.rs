//! Accepting peers on the control socket, whatever goes wrong with one of them.

use std::rc::Rc;
use std::time::Duration;

use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::Backend;
use super::serve::converse;
use crate::daemon::accept::accept_one;
use crate::daemon::idlers::Idlers;
use crate::daemon::sessions::Peer;

/// So many peers are served at once. For a further one, the one that has called nothing for longest makes way;
/// while all have calls under way, it waits.
const PEERS_MAX: usize = 256;
/// How often it is looked whether one of them has no call under way any more.
const LOOK: Duration = Duration::from_millis(50);

/// Serves the interface to every peer that is admitted. It never returns: neither a peer's fault nor
/// an accept error ends it. Dropping the future ends the conversations too.
///
/// It spawns local tasks, so it must run inside a [`tokio::task::LocalSet`].
pub async fn serve<B: Backend + 'static>(
    listener: UnixListener,
    admit: impl Fn(&UnixStream) -> Option<Peer>,
    backend: B,
) {
    let backend = Rc::new(backend);
    let (mut peers, idlers) = (JoinSet::new(), Idlers::default());
    let accept = async || Ok(listener.accept().await?.0);
    loop {
        tokio::select! {
            socket = accept_one("control", &accept) => {
                if let Some(peer) = admit(&socket) {
                    while peers.len() >= PEERS_MAX {
                        idlers.turn_out_oldest();
                        let _ = timeout(LOOK, peers.join_next()).await;
                    }
                    peers.spawn_local(converse(socket, peer, Rc::clone(&backend), idlers.clone()));
                }
            }
            // Only so that finished ones are not kept.
            Some(_) = peers.join_next() => {}
        }
    }
}
