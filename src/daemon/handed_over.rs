//! Sockets that a peer of the control socket hands over: a listening one, or one connection.

use std::cell::Cell;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::sockopt::socket_domain;
use rustix::net::{AddressFamily, RecvFlags, recv};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::time::sleep;

use super::sockets::Bound;
use crate::sys::connected::{Connected, Stream};
use crate::sys::unix::SocketFile;

/// A unix socket from a peer of the control socket.
#[derive(Debug)]
pub enum Socket {
    /// CRIU runs connect to it. Its file is removed when nobody listens any more.
    Listening(UnixListener, SocketFile),
    /// One CRIU run, or what speaks in its place, is connected.
    Connected(UnixStream),
}

impl Socket {
    /// Registers a unix stream socket with the event loop.
    pub fn from(listening: bool, socket: OwnedFd) -> io::Result<Socket> {
        if listening {
            let listener = socket.into();
            let file = SocketFile::of(&listener);
            into_tokio(listener).map(|listener| Socket::Listening(listener, file))
        } else {
            let socket = net::UnixStream::from(socket);
            socket.set_nonblocking(true)?;
            UnixStream::from_std(socket).map(Socket::Connected)
        }
    }
}

/// A socket on which CRIU's page server protocol is spoken.
#[derive(Debug)]
pub enum PagesSocket {
    /// Clients connect to it.
    Listening(Listener),
    /// One client is connected.
    Connected(Stream),
}

/// So much is done in a go: four connections are accepted that are to be served, or eight that have gone.
const IN_A_GO: u32 = 8;
/// What a connection costs that is to be served: its task, the question whose it is, its answer.
const SERVED: u32 = 2;
/// What one costs that has gone: it is closed, and nothing else.
const GONE: u32 = 1;
/// How long the rest of the daemon then has its turn, at least.
const REST: Duration = Duration::from_millis(1);

/// A socket from which connections are accepted, so many in a millisecond at most: who connects over and over is not to have
/// the event loop for itself. What a connection costs that ends at once is little, but there are as many as its maker likes.
#[derive(Debug)]
pub struct Listener {
    socket: Listening,
    /// What was done since the last rest.
    done: Cell<u32>,
}

#[derive(Debug)]
enum Listening {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl PagesSocket {
    /// Registers a stream socket with the event loop.
    pub fn from(listening: bool, socket: OwnedFd) -> io::Result<PagesSocket> {
        if !listening {
            let connected = Connected::adopt(socket).map_err(io::Error::other)?;
            return connected.register().map(PagesSocket::Connected);
        }
        let bound = if socket_domain(&socket)? == AddressFamily::UNIX {
            Bound::Unix(socket.into())
        } else {
            Bound::Tcp(socket.into())
        };
        Listener::from(bound).map(PagesSocket::Listening)
    }
}

impl Listener {
    /// Registers a listening socket with the event loop.
    pub fn from(bound: Bound) -> io::Result<Listener> {
        let socket = match bound {
            Bound::Tcp(listener) => {
                listener.set_nonblocking(true)?;
                Listening::Tcp(TcpListener::from_std(listener)?)
            }
            Bound::Unix(listener) => Listening::Unix(into_tokio(listener)?),
        };
        Ok(Listener { socket, done: Cell::new(0) })
    }

    /// Accepts one connection. What comes while it rests is in the socket's backlog.
    ///
    /// # Errors
    ///
    /// `ECONNABORTED`, as accept(2) has it, also when the peer has closed the connection and said nothing on it: most of
    /// those that come and go over and over have gone before they are accepted, and whoever comes after them waits.
    pub async fn accept(&self) -> io::Result<Stream> {
        if self.done.get() >= IN_A_GO {
            sleep(REST).await;
            self.done.set(0);
        }
        let accepted = match &self.socket {
            Listening::Tcp(listener) => {
                listener.accept().await.and_then(|(stream, peer)| Stream::from_tcp(stream, peer))
            }
            Listening::Unix(listener) => {
                listener.accept().await.map(|(stream, _)| Stream::from_unix(stream))
            }
        };
        let gone = accepted.as_ref().is_ok_and(has_gone);
        self.done.set(self.done.get() + if gone { GONE } else { SERVED });
        if gone { Err(Errno::CONNABORTED.into()) } else { accepted }
    }
}

/// Whether the peer has closed or broken a connection, and left nothing to read.
fn has_gone(stream: &Stream) -> bool {
    match recv(stream, &mut [0; 1], RecvFlags::PEEK | RecvFlags::DONTWAIT) {
        Ok((received, _)) => received == 0,
        Err(errno) => errno != Errno::AGAIN,
    }
}

/// Registers a listening unix socket with the event loop.
pub fn into_tokio(listener: net::UnixListener) -> io::Result<UnixListener> {
    listener.set_nonblocking(true)?;
    UnixListener::from_std(listener)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::accept::accept_one;
    use std::io::Write;
    use tokio::time::{Instant, timeout};

    #[tokio::test(flavor = "current_thread")]
    async fn who_has_gone_is_passed_over_and_who_has_spoken_is_not() {
        let bound = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = bound.local_addr().unwrap();
        let listener = Listener::from(Bound::Tcp(bound)).unwrap();
        let connect = || std::net::TcpStream::connect(address).unwrap();
        drop(connect());
        let mut spoke = connect();
        spoke.write_all(b"x").unwrap();
        let name = spoke.local_addr().unwrap();
        drop(spoke);
        let silent = connect();

        let accept = async || listener.accept().await;
        let error = accept().await.unwrap_err();
        assert_eq!(Errno::from_io_error(&error), Some(Errno::CONNABORTED));
        let accepted = accept_one("test", &accept).await;
        assert_eq!(accepted.peer().to_string(), name.to_string());
        let accepted = accept_one("test", &accept).await;
        assert_eq!(accepted.peer().to_string(), silent.local_addr().unwrap().to_string());
    }

    #[tokio::test(flavor = "current_thread")]
    async fn who_comes_and_goes_has_not_the_event_loop_for_itself() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        let bound = net::UnixListener::bind(&path).unwrap();
        let listener = Listener::from(Bound::Unix(bound)).unwrap();
        let begun = Instant::now();
        for _ in 0..100 {
            drop(net::UnixStream::connect(&path).unwrap());
        }
        for _ in 0..100 {
            listener.accept().await.unwrap_err();
        }
        assert!(begun.elapsed() >= 6 * REST, "{:?}", begun.elapsed());
        let _there = net::UnixStream::connect(&path).unwrap();
        timeout(Duration::from_secs(10), listener.accept()).await.unwrap().unwrap();
    }
}
