//! One client of a page server, as both daemons have them: its commands, and a session in which it asks for
//! pages.

mod gets;

use std::io;
use std::rc::Rc;
use std::time::Duration;

use rustix::io::Errno;
use tokio::time::timeout;

use crate::criu::page_server::command::{BadCommand, Command};
use crate::criu::page_server::header::{Dialect, Reader};
use crate::daemon::places::Place;
use crate::sys::connected::Stream;
use crate::sys::pipe::DEFAULT_CAPACITY;

pub use gets::{Asked, Ended, Failure, Pages, serve, tell};

/// A client that is connected.
#[derive(Debug)]
pub struct Client {
    stream: Rc<Stream>,
    reader: Reader,
    place: Place,
}

/// A client that leaves where it must not, stalls, or says what is no command.
#[derive(Debug, thiserror::Error)]
pub enum BadClient {
    /// See [`BadCommand`].
    #[error("{0}")]
    Command(#[from] BadCommand),
    /// It has gone within a command.
    #[error("the connection was closed within a command")]
    Torn,
    /// It has not said a first command, and others want its place.
    #[error("others want its place, and it has said nothing for longest")]
    MadeWay,
    /// It has not begun a command for that long.
    #[error("nothing came for {0:?}")]
    Silent(Duration),
    /// It has begun a command, and not ended it.
    #[error("the rest of a command did not come within {0:?}")]
    Late(Duration),
    /// It has read nothing for that long.
    #[error("an answer was not read for {0:?}")]
    Deaf(Duration),
    /// The connection failed.
    #[error("the connection failed: {0}")]
    Connection(io::Error),
}

impl BadClient {
    /// Whether it broke the protocol.
    fn is_fault(&self) -> bool {
        match self {
            BadClient::Command(_) | BadClient::Torn | BadClient::Late(_) => true,
            BadClient::MadeWay
            | BadClient::Silent(_)
            | BadClient::Deaf(_)
            | BadClient::Connection(_) => false,
        }
    }
}

impl Client {
    /// A client that has said nothing yet. It may have to give up its place until it has.
    pub fn new(stream: Stream, place: Place) -> Client {
        Client { stream: Rc::new(stream), reader: Reader::new(), place }
    }

    /// Its connection.
    pub fn stream(&self) -> &Rc<Stream> {
        &self.stream
    }

    /// How it speaks, once its first command has come.
    pub fn dialect(&self) -> Option<Dialect> {
        self.reader.dialect()
    }

    /// The next command; `None` when the client has closed the connection before it. The client may take
    /// `patience` until it begins one, and `limit` for each part of the rest.
    ///
    /// It can be cancelled without losing a part of a command.
    pub async fn command(
        &mut self,
        patience: Duration,
        limit: Duration,
    ) -> Result<Option<Command>, BadClient> {
        let Client { stream, reader, place } = self;
        let next = Client::next(stream, reader, patience, limit);
        place.unless_turned_out(next).await.unwrap_or(Err(BadClient::MadeWay))
    }

    async fn next(
        stream: &Stream,
        reader: &mut Reader,
        patience: Duration,
        limit: Duration,
    ) -> Result<Option<Command>, BadClient> {
        loop {
            let within = reader.is_within_header();
            let room = reader.room();
            if room.is_empty() {
                return Ok(None);
            }
            let wait = if within { limit } else { patience };
            match timeout(wait, stream.read(room)).await {
                Err(_) if within => return Err(BadClient::Late(wait)),
                Err(_) => return Err(BadClient::Silent(wait)),
                Ok(Ok(0)) if within => return Err(BadClient::Torn),
                Ok(Ok(0)) => return Ok(None),
                // CRIU kills a daemon that it needs no more.
                Ok(Err(error)) if is_gone(&error) && !within => return Ok(None),
                Ok(Err(error)) => return Err(BadClient::Connection(error)),
                Ok(Ok(len)) => {
                    if let Some(command) = reader.filled(len)? {
                        return Ok(Some(command));
                    }
                }
            }
        }
    }

    /// Sends bytes from memory. The client may take so long for each part of them.
    pub async fn write(&self, bytes: &[u8], limit: Duration) -> Result<(), BadClient> {
        for part in bytes.chunks(DEFAULT_CAPACITY) {
            let written = timeout(limit, self.stream.write_all(part)).await;
            written.map_err(|_| BadClient::Deaf(limit))?.map_err(BadClient::Connection)?;
        }
        Ok(())
    }
}

fn is_gone(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::CONNRESET | Errno::PIPE))
}
