//! Sockets that a peer of the control socket hands over: a listening one, or one connection.

use std::cell::Cell;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net;
use std::time::Duration;

use rustix::net::AddressFamily;
use rustix::net::sockopt::socket_domain;
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

/// So many connections are accepted in a go.
const IN_A_GO: u32 = 4;
/// How long the rest of the daemon then has its turn, at least.
const REST: Duration = Duration::from_millis(1);

/// A socket from which connections are accepted, four in a millisecond at most: who connects over and over is not to have
/// the event loop for itself. What a connection costs that ends at once is little, but there are as many as its maker likes.
#[derive(Debug)]
pub struct Listener {
    socket: Listening,
    /// How many were accepted since the last rest.
    accepted: Cell<u32>,
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
        Ok(Listener { socket, accepted: Cell::new(0) })
    }

    /// Accepts one connection. What comes while it rests is in the socket's backlog.
    pub async fn accept(&self) -> io::Result<Stream> {
        if self.accepted.get() >= IN_A_GO {
            sleep(REST).await;
            self.accepted.set(0);
        }
        let stream = match &self.socket {
            Listening::Tcp(listener) => {
                let (stream, peer) = listener.accept().await?;
                Stream::from_tcp(stream, peer)
            }
            Listening::Unix(listener) => Ok(Stream::from_unix(listener.accept().await?.0)),
        };
        self.accepted.set(self.accepted.get() + 1);
        stream
    }
}

/// Registers a listening unix socket with the event loop.
pub fn into_tokio(listener: net::UnixListener) -> io::Result<UnixListener> {
    listener.set_nonblocking(true)?;
    UnixListener::from_std(listener)
}
