//! The other side of CRIU's stream protocol: `push` is a dump to the proxy, `extract` a restore to
//! the cache.
//!
//! This is a command with one thing to do, so it blocks, as CRIU does.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use indicatif::ProgressBar;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::pipe::{PipeFlags, pipe_with};

use crate::criu::stream::{HEADER_LEN, decode_reply, encode_request, request_len};
use crate::sys::pipe::{grow, transfer_from_file, transfer_to_file};
use crate::sys::scm::send_descriptor;

/// Pipes are made as large as an unprivileged user may have them, in bytes.
const PIPE: usize = 1 << 20;

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
        let (out, into) = pipe()?;
        send_descriptor(&self.0, out.as_fd())?;
        // With it open here as well, a daemon that gave up would not be noticed.
        drop(out);
        let mut offset = 0;
        pump(&into, PollFlags::OUT, bar, || transfer_from_file(file, &mut offset, &into, PIPE))
    }

    /// Receives an image, as a restore does, and gives how many bytes it had; `None` if there is no
    /// such image.
    pub(super) fn receive(
        &mut self,
        name: &str,
        file: &File,
        bar: &ProgressBar,
    ) -> io::Result<Option<u64>> {
        self.0.write_all(&encode_request(name))?;
        if !self.reply()? {
            return Ok(None);
        }
        let (out, into) = pipe()?;
        send_descriptor(&self.0, into.as_fd())?;
        // With it open here as well, the end of the image would never come.
        drop(into);
        let mut offset = 0;
        pump(&out, PollFlags::IN, bar, || transfer_to_file(&out, file, &mut offset, PIPE)).map(Some)
    }

    fn reply(&mut self) -> io::Result<bool> {
        let mut header = [0; HEADER_LEN];
        self.0.read_exact(&mut header)?;
        let len = request_len(header).map_err(invalid)?;
        let mut message = vec![0; len];
        self.0.read_exact(&mut message)?;
        decode_reply(&message).map_err(invalid)
    }
}

/// The end where bytes come out, and the one where they go in.
fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let (out, into) = pipe_with(PipeFlags::CLOEXEC)?;
    grow(&into, PIPE);
    Ok((out, into))
}

/// Repeats a transfer until the end, waiting for the pipe when it is not ready.
fn pump(
    pipe: &OwnedFd,
    ready: PollFlags,
    bar: &ProgressBar,
    mut transfer: impl FnMut() -> io::Result<usize>,
) -> io::Result<u64> {
    let mut sum = 0;
    loop {
        match transfer() {
            Ok(0) => return Ok(sum),
            Ok(moved) => {
                sum += moved as u64;
                bar.inc(moved as u64);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                wait(&mut [PollFd::new(pipe, ready)])?;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

fn wait(pipe: &mut [PollFd<'_>]) -> io::Result<()> {
    match poll(pipe, None) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

fn invalid(error: impl std::error::Error + Send + Sync + 'static) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// Whether an error means that the daemon has ended the session.
pub(super) fn is_end(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset | io::ErrorKind::UnexpectedEof
    )
}
