//! The other side of CRIU's stream protocol: `push` is a dump to the proxy, `extract` and `restore`
//! are restores to the cache.
//!
//! This is a command with one thing to do, so it blocks, as CRIU does.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use indicatif::ProgressBar;

use crate::criu::stream::{HEADER_LEN, decode_reply, encode_request, request_len};
use crate::sys::pump;
use crate::sys::scm::send_descriptor;

/// A session of the stream protocol.
#[derive(Debug)]
pub(super) struct Session(UnixStream);

impl Session {
    /// Makes a session, and the end of it that the daemon gets.
    pub(super) fn new() -> io::Result<(Session, OwnedFd)> {
        let (ours, theirs) = UnixStream::pair()?;
        Ok((Session(ours), theirs.into()))
    }

    /// Sends an image, as a dump does, and gives how many bytes it had.
    pub(super) fn send(&mut self, name: &str, file: &File, bar: &ProgressBar) -> io::Result<u64> {
        self.0.write_all(&encode_request(name))?;
        let (out, into) = pump::pipe()?;
        send_descriptor(&self.0, out.as_fd())?;
        // With it open here as well, a daemon that gave up would not be noticed.
        drop(out);
        pump::from_file(file, &into, &mut |moved| bar.inc(moved))
    }

    /// Receives an image, as a restore does, and gives how many bytes it had; `None` if there is no
    /// such image.
    pub(super) fn receive(
        &mut self,
        name: &str,
        file: &File,
        bar: &ProgressBar,
    ) -> io::Result<Option<u64>> {
        if !self.ask(name)? {
            return Ok(None);
        }
        let (out, into) = pump::pipe()?;
        send_descriptor(&self.0, into.as_fd())?;
        // With it open here as well, the end of the image would never come.
        drop(into);
        pump::to_file(&out, file, &mut |moved| bar.inc(moved)).map(Some)
    }

    /// Asks for an image, as a restore does, and gives whether there is one; then a pipe has to follow.
    pub(super) fn ask(&mut self, name: &str) -> io::Result<bool> {
        self.0.write_all(&encode_request(name))?;
        let mut header = [0; HEADER_LEN];
        self.0.read_exact(&mut header)?;
        let len = request_len(header).map_err(invalid)?;
        let mut message = vec![0; len];
        self.0.read_exact(&mut message)?;
        decode_reply(&message).map_err(invalid)
    }

    /// Ends the session, and waits until the daemon has heard it.
    pub(super) fn end(mut self) -> io::Result<()> {
        self.finish()
    }

    /// Says that nothing more comes, and waits until the daemon has heard it.
    pub(super) fn finish(&mut self) -> io::Result<()> {
        self.0.shutdown(Shutdown::Write)?;
        match self.0.read(&mut [0])? {
            0 => Ok(()),
            _ => Err(invalid("the daemon spoke out of turn")),
        }
    }
}

fn invalid(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}
