//! A connected stream socket, TCP or unix: what a link runs on.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::{Errno, ioctl_fionbio};
use rustix::net::sockopt::{socket_acceptconn, socket_domain, socket_type};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketType, getpeername, recv, send};
use tokio::io::{Interest, Ready};
use tokio::net::{TcpStream, UnixStream};

/// Who is at the other end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    /// A TCP peer.
    Tcp(SocketAddr),
    /// A process of this machine.
    Unix,
}

impl Peer {
    /// Its host, where that is not this one by a unix socket.
    pub fn host(&self) -> Option<IpAddr> {
        match self {
            Peer::Tcp(address) => Some(address.ip()),
            Peer::Unix => None,
        }
    }

    /// Its port, 0 for a unix socket.
    pub fn port(&self) -> u16 {
        match self {
            Peer::Tcp(address) => address.port(),
            Peer::Unix => 0,
        }
    }

    /// Whether what is sent to it stays on this machine.
    pub fn is_local(&self) -> bool {
        match self {
            Peer::Tcp(address) => address.ip().is_loopback(),
            Peer::Unix => true,
        }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Peer::Tcp(address) => address.fmt(f),
            Peer::Unix => f.write_str("unix socket"),
        }
    }
}

/// What a descriptor was expected to be, and was not.
#[derive(Debug, thiserror::Error)]
pub enum NotConnected {
    /// No socket at all.
    #[error("it is not a socket")]
    NotASocket,
    /// A datagram or packet socket, or one of another family.
    #[error("it is not a stream socket (TCP or unix)")]
    NotAStream,
    /// A socket that connections are accepted from.
    #[error("it is a listening socket; a connected one is expected")]
    Listening,
    /// Nobody is at the other end.
    #[error("it is not connected")]
    NoPeer,
    /// It could not be looked at.
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// A connected stream socket that is not in the event loop yet.
#[derive(Debug)]
pub struct Connected {
    socket: OwnedFd,
    peer: Peer,
}

impl Connected {
    /// Checks that a descriptor is such a socket.
    pub fn adopt(socket: OwnedFd) -> Result<Connected, NotConnected> {
        let kind = socket_type(&socket).map_err(|error| match error {
            Errno::NOTSOCK => NotConnected::NotASocket,
            other => NotConnected::Io(other.into()),
        })?;
        let family = socket_domain(&socket).map_err(io::Error::from)?;
        let known = [AddressFamily::UNIX, AddressFamily::INET, AddressFamily::INET6];
        if kind != SocketType::STREAM || !known.contains(&family) {
            return Err(NotConnected::NotAStream);
        }
        if socket_acceptconn(&socket).map_err(io::Error::from)? {
            return Err(NotConnected::Listening);
        }
        let name = getpeername(&socket).map_err(|error| match error {
            Errno::NOTCONN => NotConnected::NoPeer,
            other => NotConnected::Io(other.into()),
        })?;
        let peer = match name.map(SocketAddr::try_from) {
            Some(Ok(address)) => Peer::Tcp(canonical(address)),
            // The ends of a socket pair have no names.
            _ if family == AddressFamily::UNIX => Peer::Unix,
            _ => return Err(NotConnected::NoPeer),
        };
        Ok(Connected { socket, peer })
    }

    /// Who is at the other end.
    pub fn peer(&self) -> Peer {
        self.peer
    }

    /// Puts it into the event loop.
    pub fn register(self) -> io::Result<Stream> {
        ioctl_fionbio(&self.socket, true)?;
        match self.peer {
            Peer::Tcp(peer) => Stream::from_tcp(TcpStream::from_std(self.socket.into())?, peer),
            Peer::Unix => Ok(Stream(Kind::Unix(UnixStream::from_std(self.socket.into())?))),
        }
    }
}

/// A connected stream socket in the event loop.
#[derive(Debug)]
pub struct Stream(Kind);

#[derive(Debug)]
enum Kind {
    Tcp(TcpStream, Peer),
    Unix(UnixStream),
}

impl Stream {
    /// A connection that was made or accepted.
    pub fn from_tcp(stream: TcpStream, peer: SocketAddr) -> io::Result<Stream> {
        stream.set_nodelay(true)?;
        Ok(Stream(Kind::Tcp(stream, Peer::Tcp(canonical(peer)))))
    }

    /// A connection of a unix socket.
    pub fn from_unix(stream: UnixStream) -> Stream {
        Stream(Kind::Unix(stream))
    }

    /// Who is at the other end.
    pub fn peer(&self) -> Peer {
        match self.0 {
            Kind::Tcp(_, peer) => peer,
            Kind::Unix(_) => Peer::Unix,
        }
    }

    /// Waits until the socket is ready, see tokio's `ready`.
    pub async fn ready(&self, interest: Interest) -> io::Result<Ready> {
        match &self.0 {
            Kind::Tcp(stream, _) => stream.ready(interest).await,
            Kind::Unix(stream) => stream.ready(interest).await,
        }
    }

    /// Calls `io` whenever the socket is ready, until that is no longer "not yet".
    pub async fn async_io<R>(
        &self,
        interest: Interest,
        io: impl FnMut() -> io::Result<R>,
    ) -> io::Result<R> {
        match &self.0 {
            Kind::Tcp(stream, _) => stream.async_io(interest, io).await,
            Kind::Unix(stream) => stream.async_io(interest, io).await,
        }
    }
}

impl Stream {
    /// Calls `io` once if the socket is ready; "not yet" otherwise.
    pub fn try_io<R>(
        &self,
        interest: Interest,
        io: impl FnOnce() -> io::Result<R>,
    ) -> io::Result<R> {
        match &self.0 {
            Kind::Tcp(stream, _) => stream.try_io(interest, io),
            Kind::Unix(stream) => stream.try_io(interest, io),
        }
    }

    /// Reads what is there, at most as much as there is room for; 0 is the end.
    pub async fn read(&self, room: &mut [u8]) -> io::Result<usize> {
        let receive = || Ok(recv(self, &mut *room, RecvFlags::DONTWAIT)?.0);
        self.async_io(Interest::READABLE, receive).await
    }

    /// Writes bytes from memory, for what is small.
    pub async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        while !bytes.is_empty() {
            let write = || Ok(send(self, bytes, flags)?);
            bytes = &bytes[self.async_io(Interest::WRITABLE, write).await?..];
        }
        Ok(())
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.0 {
            Kind::Tcp(stream, _) => stream.as_fd(),
            Kind::Unix(stream) => stream.as_fd(),
        }
    }
}

/// An IPv4 peer of an IPv6 socket is shown and judged as what it is.
pub fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream, UdpSocket};
    use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};

    #[test]
    fn only_a_connected_stream_socket_is_adopted() {
        let refused = |fd: OwnedFd| Connected::adopt(fd).unwrap_err().to_string();
        let dir = tempfile::tempdir().unwrap();
        let listening = UnixListener::bind(dir.path().join("x")).unwrap();
        assert_eq!(refused(tempfile::tempfile().unwrap().into()), "it is not a socket");
        assert!(refused(UdpSocket::bind("127.0.0.1:0").unwrap().into()).contains("not a stream"));
        assert!(refused(UnixDatagram::unbound().unwrap().into()).contains("not a stream"));
        assert!(refused(listening.into()).contains("a listening socket"));

        let unconnected = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None);
        assert_eq!(refused(unconnected.unwrap()), "it is not connected");
    }

    #[test]
    fn the_peer_is_named_and_judged() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let unix = Connected::adopt(ours.into()).unwrap();
        assert!(unix.peer().is_local());
        assert_eq!(unix.peer().to_string(), "unix socket");

        let listener = TcpListener::bind("[::]:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let client = TcpStream::connect(("127.0.0.1", port)).unwrap();
        let address = client.local_addr().unwrap();
        let (accepted, _) = listener.accept().unwrap();
        let tcp = Connected::adopt(accepted.into()).unwrap();
        assert_eq!(tcp.peer(), Peer::Tcp(address));
        assert!(tcp.peer().is_local());
        assert!(!Peer::Tcp(([192, 0, 2, 7], 1).into()).is_local());
    }
}
