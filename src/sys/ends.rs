//! Where bytes of images and pages come from and go to: a pipe that a peer passed, or the socket itself.

use std::cell::Cell;
use std::io;
use std::rc::Rc;

use rustix::net::{SendFlags, send};
use tokio::io::Interest;
use tokio::net::UnixStream;

use super::connected::Stream;
use super::held::Held;
use super::pipe::{Pipe, PipeReader, PipeWriter, transfer};

/// Where an image comes from.
#[derive(Debug)]
pub enum Source {
    /// The peer writes it into a pipe.
    Pipe(PipeReader),
    /// The peer writes it into the socket.
    Socket(SocketReader),
    /// What the peer wrote is copied first.
    Held(Rc<Held>),
    /// The peer writes pages into the connection, among other things.
    Stream(Rc<Stream>),
}

impl Source {
    /// Waits until there is something to read, or the end.
    pub async fn readable(&self) -> io::Result<()> {
        match self {
            Source::Pipe(pipe) => pipe.readable().await,
            Source::Socket(socket) => socket.readable().await,
            Source::Held(held) => {
                held.readable().await;
                Ok(())
            }
            Source::Stream(stream) => stream.ready(Interest::READABLE).await.map(drop),
        }
    }

    /// Moves what is there, at most `len` bytes, into an empty pipe; 0 is the end of the image.
    /// `WouldBlock` means that nothing is there yet.
    pub fn transfer_to(&self, pipe: &Pipe, len: usize) -> io::Result<usize> {
        match self {
            Source::Pipe(source) => source.transfer_to(pipe, len),
            Source::Socket(source) => source.transfer_to(pipe, len),
            Source::Held(held) => held.transfer_to(pipe, len),
            Source::Stream(stream) => {
                stream.try_io(Interest::READABLE, || transfer(&**stream, &pipe.into, len))
            }
        }
    }

    /// Grows a pipe; a socket stays as it is.
    pub fn grow(&self, capacity: usize) {
        if let Source::Pipe(pipe) = self {
            pipe.grow(capacity);
        }
    }

    /// Whether everybody who writes into a pipe has closed it.
    pub fn is_closed(&self) -> bool {
        matches!(self, Source::Pipe(pipe) if pipe.is_closed())
    }
}

/// A socket that a peer writes one image into.
#[derive(Debug)]
pub struct SocketReader {
    socket: Rc<UnixStream>,
    /// What was read to see whether a descriptor comes with it.
    first: Cell<Option<u8>>,
}

impl SocketReader {
    /// What is read from now on is the image; `first` precedes it.
    pub fn new(socket: Rc<UnixStream>, first: Option<u8>) -> SocketReader {
        SocketReader { socket, first: Cell::new(first) }
    }

    async fn readable(&self) -> io::Result<()> {
        if self.first.get().is_some() { Ok(()) } else { self.socket.readable().await }
    }

    fn transfer_to(&self, pipe: &Pipe, len: usize) -> io::Result<usize> {
        let first = match self.first.take() {
            Some(byte) => rustix::io::write(&pipe.into, &[byte])?,
            None => 0,
        };
        let rest = self
            .socket
            .try_io(Interest::READABLE, || transfer(&self.socket, &pipe.into, len - first));
        match rest {
            Err(error) if first > 0 && error.kind() == io::ErrorKind::WouldBlock => Ok(first),
            rest => Ok(first + rest?),
        }
    }
}

/// Where an image goes to.
#[derive(Debug)]
pub enum Sink {
    /// The peer reads it from a pipe.
    Pipe(PipeWriter),
    /// The peer reads it from the socket.
    Socket(Rc<UnixStream>),
}

impl Sink {
    /// Moves at most `len` bytes that are in a pipe to the peer, waiting for room. `EPIPE` means that
    /// the reader has closed its end.
    pub async fn transfer_from(&self, staged: &Pipe, len: usize) -> io::Result<usize> {
        match self {
            Sink::Pipe(pipe) => pipe.transfer_from(staged, len).await,
            Sink::Socket(socket) => {
                let send = || transfer(&staged.out, socket, len);
                socket.async_io(Interest::WRITABLE, send).await
            }
        }
    }

    /// Writes bytes from memory, for what is small.
    pub async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let written = match self {
                Sink::Pipe(pipe) => pipe.write(bytes).await?,
                Sink::Socket(socket) => {
                    let write =
                        || Ok(send(socket, bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)?);
                    socket.async_io(Interest::WRITABLE, write).await?
                }
            };
            bytes = &bytes[written..];
        }
        Ok(())
    }

    /// Grows a pipe; a socket stays as it is.
    pub fn grow(&self, capacity: usize) {
        if let Sink::Pipe(pipe) = self {
            pipe.grow(capacity);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::pipe::DEFAULT_CAPACITY;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[tokio::test]
    async fn the_first_byte_of_a_socket_precedes_the_rest_and_the_end_is_zero() {
        let (mut theirs, ours) = UnixStream::pair().unwrap();
        theirs.write_all(b"pages").await.unwrap();
        drop(theirs);
        let source = Source::Socket(SocketReader::new(Rc::new(ours), Some(b'>')));
        let pipe = Pipe::new(DEFAULT_CAPACITY).unwrap();
        let mut moved = 0;
        loop {
            source.readable().await.unwrap();
            match source.transfer_to(&pipe, 100) {
                Ok(0) => break,
                Ok(len) => moved += len,
                Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
            }
        }
        let mut bytes = [0; 6];
        assert_eq!((moved, rustix::io::read(&pipe.out, &mut bytes).unwrap()), (6, 6));
        assert_eq!(&bytes, b">pages");
    }

    #[tokio::test]
    async fn a_socket_takes_what_was_staged() {
        let (mut theirs, ours) = UnixStream::pair().unwrap();
        let pipe = Pipe::new(DEFAULT_CAPACITY).unwrap();
        rustix::io::write(&pipe.into, b"pages").unwrap();
        let sink = Sink::Socket(Rc::new(ours));
        assert_eq!(sink.transfer_from(&pipe, 5).await.unwrap(), 5);
        drop(sink);
        let mut bytes = Vec::new();
        theirs.read_to_end(&mut bytes).await.unwrap();
        assert_eq!(bytes, b"pages");
    }
}
