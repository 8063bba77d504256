//! Accepting peers on the control socket, whatever goes wrong with one of them.

use std::rc::Rc;

use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinSet;

use super::Backend;
use super::serve::converse;
use super::users::Users;
use crate::daemon::accept::accept_one;
use crate::daemon::sessions::Peer;

/// Serves the interface to every peer that is admitted. It never returns: neither a peer's fault nor
/// an accept error ends it, and nobody waits for what others hold. Dropping the future ends the
/// conversations too.
///
/// It spawns local tasks, so it must run inside a [`tokio::task::LocalSet`].
pub async fn serve<B: Backend + 'static>(
    listener: UnixListener,
    admit: impl Fn(&UnixStream) -> Option<Peer>,
    backend: B,
) {
    let backend = Rc::new(backend);
    let (mut peers, users) = (JoinSet::new(), Users::default());
    let accept = async || Ok(listener.accept().await?.0);
    loop {
        tokio::select! {
            socket = accept_one("control", &accept) => {
                if let Some(peer) = admit(&socket) {
                    let user = users.of(peer.uid);
                    // It counts from now on, not from when its task begins.
                    let idler = user.idle();
                    peers.spawn_local(converse(socket, peer, Rc::clone(&backend), user, idler));
                }
            }
            // Only so that finished ones are not kept.
            Some(_) = peers.join_next() => {}
        }
    }
}
