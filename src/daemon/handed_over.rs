//! Sockets that a peer of the control socket hands over: a listening one, or one connection.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net;

use rustix::net::AddressFamily;
use rustix::net::sockopt::socket_domain;
use tokio::net::{TcpListener, UnixListener, UnixStream};

use crate::sys::connected::{Connected, Stream};

/// A unix socket from a peer of the control socket.
#[derive(Debug)]
pub enum Socket {
    /// CRIU runs connect to it.
    Listening(UnixListener),
    /// One CRIU run, or what speaks in its place, is connected.
    Connected(UnixStream),
}

impl Socket {
    /// Registers a unix stream socket with the event loop.
    pub fn from(listening: bool, socket: OwnedFd) -> io::Result<Socket> {
        if listening {
            into_tokio(socket.into()).map(Socket::Listening)
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

/// A socket from which connections are accepted.
#[derive(Debug)]
pub enum Listener {
    /// TCP.
    Tcp(TcpListener),
    /// A unix socket.
    Unix(UnixListener),
}

impl PagesSocket {
    /// Registers a stream socket with the event loop.
    pub fn from(listening: bool, socket: OwnedFd) -> io::Result<PagesSocket> {
        if !listening {
            let connected = Connected::adopt(socket).map_err(io::Error::other)?;
            return connected.register().map(PagesSocket::Connected);
        }
        let listener = if socket_domain(&socket)? == AddressFamily::UNIX {
            Listener::Unix(into_tokio(socket.into())?)
        } else {
            Listener::Tcp(tcp_into_tokio(socket.into())?)
        };
        Ok(PagesSocket::Listening(listener))
    }
}

impl Listener {
    /// Accepts one connection.
    pub async fn accept(&self) -> io::Result<Stream> {
        match self {
            Listener::Tcp(listener) => {
                let (stream, peer) = listener.accept().await?;
                Stream::from_tcp(stream, peer)
            }
            Listener::Unix(listener) => Ok(Stream::from_unix(listener.accept().await?.0)),
        }
    }
}

/// Registers a listening TCP socket with the event loop.
pub fn tcp_into_tokio(listener: std::net::TcpListener) -> io::Result<TcpListener> {
    listener.set_nonblocking(true)?;
    TcpListener::from_std(listener)
}

/// Registers a listening socket with the event loop.
pub fn into_tokio(listener: net::UnixListener) -> io::Result<UnixListener> {
    listener.set_nonblocking(true)?;
    UnixListener::from_std(listener)
}
