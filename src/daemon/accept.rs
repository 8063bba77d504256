//! Accepting connections: an error of accept(2) ends nothing.

use std::cell::RefCell;
use std::io;
use std::os::unix::net;
use std::time::Duration;

use rustix::io::Errno;
use tokio::net::UnixStream;
use tokio::task::JoinHandle;

use super::handed_over::{Listener, into_tokio};
use super::journal;
use super::places::{Place, Places};
use super::sockets::Bound;
use crate::sys::connected::Stream;

/// How long to wait when descriptors or memory have run out: a session's end frees some.
pub const BACK_OFF: Duration = Duration::from_millis(100);

/// What an error of accept(2) means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sorted {
    /// That connection has gone; the next may be there.
    NextOne,
    /// This machine or process is short of something; it may pass.
    BackOff,
}

/// Sorts an error by its errno (accept(2), ERRORS).
pub fn sort(error: &io::Error) -> Sorted {
    match Errno::from_io_error(error) {
        Some(
            Errno::CONNABORTED
            | Errno::INTR
            | Errno::PROTO
            | Errno::NETDOWN
            | Errno::NETUNREACH
            | Errno::HOSTDOWN
            | Errno::HOSTUNREACH
            | Errno::NONET
            | Errno::NOPROTOOPT
            | Errno::OPNOTSUPP,
        ) => Sorted::NextOne,
        _ => Sorted::BackOff,
    }
}

/// The tasks that a daemon listens with.
#[derive(Debug, Default)]
pub struct Listeners(RefCell<Vec<JoinHandle<()>>>);

impl Listeners {
    /// Starts one more.
    pub fn start(&self, listener: impl Future<Output = ()> + 'static) {
        let mut listeners = self.0.borrow_mut();
        listeners.retain(|listener| !listener.is_finished());
        listeners.push(tokio::task::spawn_local(listener));
    }

    /// Serves each connection of a unix socket, at most as many at once as there are places. The part of
    /// `serve` before its future is done in the order in which they are accepted.
    pub fn serve_unix<F: Future<Output = ()> + 'static>(
        &self,
        socket: &'static str,
        listener: net::UnixListener,
        places: &Places,
        serve: impl Fn(UnixStream) -> F + 'static,
    ) -> io::Result<()> {
        let (listener, places) = (into_tokio(listener)?, places.clone());
        self.start(async move {
            let accept = async || Ok(listener.accept().await?.0);
            accept_each(socket, &places, accept, |stream, place| {
                let session = serve(stream);
                async move {
                    let _place = place;
                    session.await;
                }
            })
            .await;
        });
        Ok(())
    }

    /// The same for a socket of either family, where a peer that has said nothing yet may have to make way.
    pub fn serve_bound<F: Future<Output = ()> + 'static>(
        &self,
        socket: &'static str,
        listener: Bound,
        places: &Places,
        serve: impl Fn(Stream, Place) -> F + 'static,
    ) -> io::Result<()> {
        let (listener, places) = (Listener::from(listener)?, places.clone());
        self.start(async move {
            let accept = async || listener.accept().await;
            accept_each(socket, &places, accept, |stream, mut place| {
                places.await_first_word(&mut place);
                serve(stream, place)
            })
            .await;
        });
        Ok(())
    }

    /// Ends them all; what they have accepted goes on.
    pub fn stop(&self) {
        for listener in self.0.borrow_mut().drain(..) {
            listener.abort();
        }
    }
}

/// Accepts for ever, and serves each connection in a task of its own. While no place is free, one connection waits for it,
/// and further ones in the socket's backlog: no place is held for those that may come, as others may share them.
async fn accept_each<S, F: Future<Output = ()> + 'static>(
    socket: &str,
    places: &Places,
    accept: impl AsyncFn() -> io::Result<S>,
    serve: impl Fn(S, Place) -> F,
) {
    loop {
        let stream = accept_one(socket, &accept).await;
        let place = places.take().await;
        tokio::task::spawn_local(serve(stream, place));
    }
}

/// Accepts one connection, however long it takes.
pub async fn accept_one<S>(socket: &str, accept: &impl AsyncFn() -> io::Result<S>) -> S {
    let mut told = false;
    loop {
        match accept().await {
            Ok(connection) => return connection,
            Err(error) if sort(&error) == Sorted::NextOne => {
                tracing::debug!(
                    criu_socket = socket,
                    "a connection went before it was accepted: {error}"
                );
            }
            Err(error) => {
                // Once for each shortage, not ten times a second.
                if !std::mem::replace(&mut told, true) {
                    tracing::warn!(
                        message_id = journal::CANNOT_SERVE,
                        criu_socket = socket,
                        criu_reason = %error,
                        "cannot accept connections now, trying on: {error}"
                    );
                }
                tokio::time::sleep(BACK_OFF).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn no_error_ends_accepting() {
        let results = RefCell::new(vec![
            Ok(7),
            Err(Errno::NFILE.into()),
            Err(Errno::MFILE.into()),
            Err(Errno::CONNABORTED.into()),
            Err(Errno::BADF.into()),
        ]);
        let accept = async || results.borrow_mut().pop().unwrap();
        assert_eq!(accept_one("test", &accept).await, 7);
    }

    #[test]
    fn errors_are_sorted_by_errno() {
        assert_eq!(sort(&Errno::CONNABORTED.into()), Sorted::NextOne);
        assert_eq!(sort(&Errno::MFILE.into()), Sorted::BackOff);
        assert_eq!(sort(&io::Error::other("?")), Sorted::BackOff);
    }
}
