//! A client of the remote protocol: its headers, and what goes back to it. The proxy and the cache
//! serve the same protocol with different requests.

use std::io;
use std::rc::Rc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::sessions::{BadSession, LOOK, closed, receive_pipe};
use crate::criu::remote::{
    BadHeader, ENTRY_MAX, HEADER_MAX, LENGTH_LEN, Reply, Request, decode_id, message_len,
};
use crate::sys::ends::{Sink, SocketReader, Source};
use crate::sys::pipe::{PipeReader, PipeWriter};
use crate::sys::scm;

/// What a client did wrong, or what befell its connection.
#[derive(Debug, thiserror::Error)]
pub enum BadClient {
    /// See [`BadHeader`].
    #[error("{0}")]
    Header(#[from] BadHeader),
    /// See [`BadSession`].
    #[error("{0}")]
    Session(#[from] BadSession),
}

impl BadClient {
    /// What it is told, if it listens.
    pub fn errno(&self) -> Errno {
        match self {
            BadClient::Session(BadSession::Late(_)) => Errno::TIMEDOUT,
            BadClient::Session(BadSession::Io(_)) => Errno::IO,
            BadClient::Session(_) | BadClient::Header(_) => Errno::INVAL,
        }
    }
}

impl From<io::Error> for BadClient {
    fn from(error: io::Error) -> BadClient {
        BadClient::Session(error.into())
    }
}

/// A connected client.
#[derive(Debug)]
pub struct Client {
    socket: Rc<UnixStream>,
    /// What has come of the next header.
    partial: Partial,
    patience: Duration,
    historical: bool,
    /// Whether it has made a request.
    known: bool,
}

impl Client {
    /// A client that has said nothing yet. It has `patience` for its first header, and for the rest of
    /// each. `historical` endings are understood or not.
    pub fn new(socket: UnixStream, patience: Duration, historical: bool) -> Client {
        let partial = Partial::new(HEADER_MAX);
        Client { socket: Rc::new(socket), partial, patience, historical, known: false }
    }

    /// The request that has come already, if it has: what is looked at in the order in which clients
    /// were accepted takes effect in that order.
    pub fn come_already(&mut self) -> Option<Result<Option<Request>, BadClient>> {
        let historical = self.historical;
        match self.partial.advance(&self.socket) {
            Err(error) if error.is_not_yet() => None,
            advanced => {
                self.known = true;
                Some(advanced.and_then(|header| decode(header, historical)))
            }
        }
    }

    /// The next request; `None` when the client has closed. It may take its time before a header that
    /// is not its first, but not within one.
    pub async fn next(&mut self) -> Result<Option<Request>, BadClient> {
        if self.known {
            let socket = &self.socket;
            socket.async_io(Interest::READABLE, || peek(socket)).await?;
        }
        self.known = true;
        match timeout(self.patience, self.partial.rest(&self.socket)).await {
            Err(_) => Err(BadSession::Late(self.patience).into()),
            Ok(header) => decode(header?, self.historical),
        }
    }

    /// The next entry of what is appended to a list, `None` at its end. It may take `patience`.
    pub async fn entry(&self, patience: Duration) -> Result<Option<String>, BadClient> {
        let mut entry = Partial::new(ENTRY_MAX);
        match timeout(patience, entry.rest(&self.socket)).await {
            Err(_) => Err(BadSession::Late(patience).into()),
            Ok(entry) => Ok(entry?.map(|entry| decode_id(&entry)).transpose()?),
        }
    }

    /// Answers. A client that reads nothing is given up.
    pub async fn reply(&self, reply: &Reply) -> Result<(), BadClient> {
        let bytes = reply.encode();
        let mut left = &bytes[..];
        let write = async {
            while !left.is_empty() {
                self.socket.writable().await?;
                match self.socket.try_write(left) {
                    Ok(sent) => left = &left[sent..],
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => return Err(error),
                }
            }
            Ok(())
        };
        match timeout(self.patience, write).await {
            Err(_) => Err(BadSession::Late(self.patience).into()),
            Ok(sent) => Ok(sent?),
        }
    }

    /// Where the image that is written comes from: through a pipe if its read end is the next thing
    /// that comes, else on the socket. Resolves when something has come, or the end.
    pub async fn source(&self, name: &str) -> Result<Source, BadClient> {
        let receive = || scm::receive_byte(&*self.socket);
        let first = self.socket.async_io(Interest::READABLE, receive).await;
        let bad = |cause: String| BadSession::Pipe { name: name.to_owned(), cause };
        match first.map_err(|cause| bad(cause.to_string()))? {
            Some((_, Some(descriptor))) => {
                let pipe = PipeReader::adopt(descriptor).map_err(|cause| bad(cause.to_string()))?;
                Ok(Source::Pipe(pipe))
            }
            Some((byte, None)) => {
                Ok(Source::Socket(SocketReader::new(self.socket.clone(), Some(byte))))
            }
            None => Ok(Source::Socket(SocketReader::new(self.socket.clone(), None))),
        }
    }

    /// Where the image that is read goes to.
    pub async fn sink(&self, name: &str, through_pipe: bool) -> Result<Sink, BadClient> {
        if !through_pipe {
            return Ok(Sink::Socket(self.socket.clone()));
        }
        let pipe = receive_pipe(&self.socket, name, self.patience, PipeWriter::adopt).await?;
        Ok(Sink::Pipe(pipe))
    }

    /// Waits for the word that an acknowledged image has come to its end: after a pipe one more byte,
    /// on the socket that the client has shut down only its sending direction. A process that is killed
    /// closes everything.
    pub async fn said_its_end(&self, source: &Source) -> Result<bool, BadClient> {
        match source {
            Source::Pipe(_) => {
                let receive = || scm::receive_byte(&*self.socket);
                let byte = self.socket.async_io(Interest::READABLE, receive);
                match timeout(self.patience, byte).await {
                    Err(_) => Err(BadSession::Late(self.patience).into()),
                    Ok(byte) => Ok(byte?.is_some()),
                }
            }
            Source::Held(held) => Box::pin(self.said_its_end(held.from())).await,
            Source::Socket(_) | Source::Stream(_) => Ok(!self.has_hung_up()),
        }
    }

    /// Resolves when the client has gone. One that has only shut down its sending direction still
    /// listens.
    pub async fn gone(&self) {
        closed(&self.socket).await;
        while !self.has_hung_up() {
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Whether the client has closed both directions.
    pub fn has_hung_up(&self) -> bool {
        let mut socket = [PollFd::new(&*self.socket, PollFlags::empty())];
        let looked = poll(&mut socket, Some(&Timespec::default()));
        looked.is_err() || socket[0].revents().contains(PollFlags::HUP)
    }
}

fn decode(header: Option<Vec<u8>>, historical: bool) -> Result<Option<Request>, BadClient> {
    header.map(|header| Ok(Request::decode(&header, historical)?)).transpose()
}

/// A message of which a part has come.
#[derive(Debug)]
struct Partial {
    length: [u8; LENGTH_LEN],
    message: Vec<u8>,
    /// How many bytes of both have come.
    come: usize,
    limit: usize,
}

impl Partial {
    /// Nothing has come. The message has at most `limit` bytes.
    fn new(limit: usize) -> Partial {
        Partial { length: [0; LENGTH_LEN], message: Vec::new(), come: 0, limit }
    }

    /// Waits for the rest of the message. `None` is the end of the stream.
    async fn rest(&mut self, socket: &UnixStream) -> Result<Option<Vec<u8>>, BadClient> {
        let advance = || match self.advance(socket) {
            Err(error) if error.is_not_yet() => Err(io::ErrorKind::WouldBlock.into()),
            advanced => Ok(advanced),
        };
        socket.async_io(Interest::READABLE, advance).await?
    }

    /// Reads what has come, never beyond the message: what follows may carry a descriptor.
    fn advance(&mut self, socket: &UnixStream) -> Result<Option<Vec<u8>>, BadClient> {
        loop {
            if self.come == LENGTH_LEN && self.message.is_empty() {
                self.message = vec![0; message_len(self.length, self.limit)?];
            }
            let wanted = if self.come < LENGTH_LEN {
                &mut self.length[self.come..]
            } else {
                &mut self.message[self.come - LENGTH_LEN..]
            };
            if wanted.is_empty() {
                self.come = 0;
                return Ok(Some(std::mem::take(&mut self.message)));
            }
            match recv(socket, wanted, RecvFlags::DONTWAIT).map_err(io::Error::from)?.0 {
                0 if self.come == 0 => return Ok(None),
                0 => return Err(BadSession::Torn.into()),
                received => self.come += received,
            }
        }
    }
}

/// Looks whether something has come, or the end.
fn peek(socket: &UnixStream) -> io::Result<()> {
    recv(socket, &mut [0; 1], RecvFlags::PEEK | RecvFlags::DONTWAIT)?;
    Ok(())
}

impl BadClient {
    fn is_not_yet(&self) -> bool {
        matches!(self, BadClient::Session(BadSession::Io(error))
            if error.kind() == io::ErrorKind::WouldBlock)
    }
}
