//! One connection: what is said on it, and what is answered.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use super::Error;
use crate::criu::remote::{HEADER_MAX, LENGTH_LEN, Reply, message_len};
use crate::sys::scm;
use crate::sys::unix::{self, is_close};

/// A connection to a daemon.
#[derive(Debug)]
pub(super) struct Connection {
    path: PathBuf,
    pub(super) socket: UnixStream,
}

impl Connection {
    pub(super) fn open(path: PathBuf) -> Result<Connection, Error> {
        match unix::connect(&path) {
            Ok(socket) => Ok(Connection { path, socket }),
            Err(source) => Err(Error::Unreachable { path, source }),
        }
    }

    /// Says something. That the daemon has closed is no error here: it may have said why before.
    pub(super) fn say(&mut self, bytes: &[u8]) -> Result<(), Error> {
        unless_closed(self.socket.write_all(bytes))
    }

    /// Passes an end of a pipe. As with [`say`](Connection::say), the daemon may have closed.
    pub(super) fn pass(&self, end: BorrowedFd<'_>) -> Result<(), Error> {
        loop {
            match scm::send_descriptor(&self.socket, end) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                passed => return unless_closed(passed),
            }
        }
    }

    /// Says the end of what goes on the socket.
    pub(super) fn shut_down(&self) -> Result<(), Error> {
        match self.socket.shutdown(Shutdown::Write) {
            Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
            shut => shut.map_err(Error::Io),
        }
    }

    /// Waits for a reply that is no error.
    pub(super) fn reply(&mut self) -> Result<Reply, Error> {
        let mut length = [0; LENGTH_LEN];
        self.exactly(&mut length)?;
        let len = message_len(length, HEADER_MAX).map_err(|bad| self.broken(&bad.to_string()))?;
        let mut message = vec![0; len];
        self.exactly(&mut message)?;
        let reply = Reply::decode(&message).map_err(|bad| self.broken(&bad.to_string()))?;
        if reply.error == 0 { Ok(reply) } else { Err(Error::told(reply)) }
    }

    fn exactly(&mut self, bytes: &mut [u8]) -> Result<(), Error> {
        match self.socket.read_exact(bytes) {
            Err(error) if is_close(&error) => Err(self.closed()),
            read => read.map_err(Error::Io),
        }
    }

    pub(super) fn closed(&self) -> Error {
        self.broken("the daemon has closed the connection")
    }

    pub(super) fn broken(&self, why: &str) -> Error {
        Error::Broken { path: self.path.clone(), why: why.to_owned() }
    }
}

fn unless_closed(said: io::Result<()>) -> Result<(), Error> {
    match said {
        Err(error) if is_close(&error) => Ok(()),
        said => said.map_err(Error::Io),
    }
}
