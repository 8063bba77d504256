//! Sockets that `criu-imagectl open` hands over: a listening one, or one connection.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net;

use tokio::net::{UnixListener, UnixStream};

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

/// Registers a listening socket with the event loop.
pub fn into_tokio(listener: net::UnixListener) -> io::Result<UnixListener> {
    listener.set_nonblocking(true)?;
    UnixListener::from_std(listener)
}
