//! Images between files and pipes for programs that have one thing to do, and so block.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::pipe::{PipeFlags, pipe_with};

use super::pipe::{grow, transfer_from_file, transfer_to_file};

/// Pipes are made as large as an unprivileged user may have them, in bytes.
const PIPE: usize = 1 << 20;
/// What is copied through memory at a time, in bytes.
const PIECE: usize = 256 << 10;

/// The end where bytes come out, and the one where they go in.
pub fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let (out, into) = pipe_with(PipeFlags::CLOEXEC)?;
    grow(&into, PIPE);
    Ok((out, into))
}

/// Splices a file into a pipe, from its start to its end, and tells `progress` what has moved. Gives
/// how many bytes that were.
pub fn from_file(file: &File, into: impl AsFd, progress: &mut dyn FnMut(u64)) -> io::Result<u64> {
    let (into, mut offset) = (into.as_fd(), 0);
    repeat(into, PollFlags::OUT, progress, || transfer_from_file(file, &mut offset, into, PIPE))
}

/// Splices what comes out of a pipe into a file, from its start, until the pipe's end.
pub fn to_file(out: impl AsFd, file: &File, progress: &mut dyn FnMut(u64)) -> io::Result<u64> {
    let (out, mut offset) = (out.as_fd(), 0);
    repeat(out, PollFlags::IN, progress, || transfer_to_file(out, file, &mut offset, PIPE))
}

/// Copies through memory what is neither a file nor a pipe, or may be anything.
pub fn copy(
    from: &mut impl Read,
    to: &mut impl Write,
    progress: &mut dyn FnMut(u64),
) -> io::Result<u64> {
    let mut piece = vec![0; PIECE];
    let mut sum = 0;
    loop {
        let len = match from.read(&mut piece) {
            Ok(0) => return Ok(sum),
            Ok(len) => len,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        to.write_all(&piece[..len])?;
        sum += len as u64;
        progress(len as u64);
    }
}

/// Repeats a transfer until the end, waiting for the pipe when it is not ready.
fn repeat(
    pipe: impl AsFd,
    ready: PollFlags,
    progress: &mut dyn FnMut(u64),
    mut transfer: impl FnMut() -> io::Result<usize>,
) -> io::Result<u64> {
    let mut sum = 0;
    loop {
        match transfer() {
            Ok(0) => return Ok(sum),
            Ok(moved) => {
                sum += moved as u64;
                progress(moved as u64);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                wait(&mut [PollFd::new(&pipe, ready)])?;
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
