//! Pipes and splice: how image bytes travel without entering user space.
//!
//! Every splice here is non-blocking. "Not yet" is [`io::ErrorKind::WouldBlock`], and each caller
//! arranges its two ends so that only one of them can be the cause.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, OFlags, fcntl_getfl, fstat};
use rustix::pipe::{
    PipeFlags, SpliceFlags, fcntl_getpipe_size, fcntl_setpipe_size, pipe_with, splice,
};
use tokio::net::unix::pipe;

/// A new pipe holds this many bytes (pipe(7)).
pub const DEFAULT_CAPACITY: usize = 64 << 10;

/// A private pipe through which one lane passes its payload. It is empty between frames.
#[derive(Debug)]
pub struct Pipe {
    /// Where bytes come out.
    pub out: OwnedFd,
    /// Where bytes go in.
    pub into: OwnedFd,
    capacity: usize,
}

impl Pipe {
    /// Makes a pipe of `capacity` bytes, or of what the kernel grants: an unprivileged user gets
    /// 64 pipes of 1 MiB and small ones after that (`pipe-user-pages-soft`, pipe(7)).
    pub fn new(capacity: usize) -> io::Result<Pipe> {
        let (out, into) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        grow(&into, capacity);
        let capacity = fcntl_getpipe_size(&into)?;
        Ok(Pipe { out, into, capacity })
    }

    /// How many bytes fit, when every page of them is full.
    pub fn capacity(&self) -> usize {
        self.capacity
    }
}

/// Grows a pipe to `capacity` bytes, or to the half or less of it that the kernel grants: there is a
/// limit for a pipe (`pipe-max-size`) and one for a user. A refusal costs speed and nothing else, so
/// it is not an error.
pub fn grow(pipe: impl AsFd, mut capacity: usize) {
    while fcntl_getpipe_size(&pipe).is_ok_and(|now| now < capacity)
        && fcntl_setpipe_size(&pipe, capacity).is_err()
    {
        capacity /= 2;
    }
}

/// Moves at most `len` bytes from one descriptor to another, one of which is a pipe. 0 is the end
/// of the source.
pub fn transfer(from: impl AsFd, to: impl AsFd, len: usize) -> io::Result<usize> {
    Ok(splice(from, None, to, None, len, SpliceFlags::MOVE | SpliceFlags::NONBLOCK)?)
}

/// Moves at most `len` bytes from a pipe to `offset` of a file, and moves `offset` on.
pub fn transfer_to_file(
    pipe: impl AsFd,
    file: impl AsFd,
    offset: &mut u64,
    len: usize,
) -> io::Result<usize> {
    Ok(splice(pipe, None, file, Some(offset), len, SpliceFlags::MOVE | SpliceFlags::NONBLOCK)?)
}

/// Moves at most `len` bytes from `offset` of a file into a pipe, and moves `offset` on. 0 is the
/// end of the file.
pub fn transfer_from_file(
    file: impl AsFd,
    offset: &mut u64,
    pipe: impl AsFd,
    len: usize,
) -> io::Result<usize> {
    Ok(splice(file, Some(offset), pipe, None, len, SpliceFlags::MOVE | SpliceFlags::NONBLOCK)?)
}

/// What a descriptor was expected to be, and was not.
#[derive(Debug, thiserror::Error)]
pub enum NotThatEnd {
    /// Something else than a pipe.
    #[error("the descriptor passed is {0}, not a pipe")]
    NotAPipe(&'static str),
    /// The other end of a pipe.
    #[error("the descriptor passed is the {0} end of a pipe, not the {1} end")]
    WrongEnd(&'static str, &'static str),
    /// It could not be looked at or registered.
    #[error("the descriptor passed cannot be used: {0}")]
    Io(#[from] io::Error),
}

/// The read end of a pipe that CRIU writes an image into.
#[derive(Debug)]
pub struct PipeReader(pipe::Receiver);

impl PipeReader {
    /// Takes a descriptor from a peer, after checking that it is what it has to be.
    ///
    /// `O_NONBLOCK` is set on our own file description; CRIU's end is another one.
    pub fn adopt(fd: OwnedFd) -> Result<PipeReader, NotThatEnd> {
        check_end(&fd, OFlags::RDONLY)?;
        Ok(PipeReader(pipe::Receiver::from_owned_fd(fd)?))
    }

    /// Waits until there is something to read, or the end.
    pub async fn readable(&self) -> io::Result<()> {
        self.0.readable().await
    }

    /// Moves what is there, at most `len` bytes, into an empty pipe; 0 is the end of the image.
    /// `WouldBlock` means that nothing is there yet.
    pub fn transfer_to(&self, pipe: &Pipe, len: usize) -> io::Result<usize> {
        self.0.try_io(|| transfer(&self.0, &pipe.into, len))
    }

    /// Copies what is there, at most `len` bytes, to `offset` of a file, and moves `offset` on; 0 is the end of the image.
    /// After `WouldBlock` [`readable`](PipeReader::readable) waits.
    pub fn transfer_to_file(
        &self,
        file: impl AsFd,
        offset: &mut u64,
        len: usize,
    ) -> io::Result<usize> {
        self.0.try_io(|| transfer_to_file(&self.0, file, offset, len))
    }

    /// The same for what is there in this very moment, even if nobody has waited for it.
    pub fn transfer_now_to_file(
        &self,
        file: impl AsFd,
        offset: &mut u64,
        len: usize,
    ) -> io::Result<usize> {
        transfer_to_file(&self.0, file, offset, len)
    }

    /// Whether everybody who wrote into it has closed it. What they wrote may still be there.
    pub fn is_closed(&self) -> bool {
        let mut pipe = [PollFd::new(&self.0, PollFlags::empty())];
        poll(&mut pipe, Some(&Timespec::default())).is_ok_and(|events| events > 0)
    }

    /// Grows the pipe, see [`grow`].
    pub fn grow(&self, capacity: usize) {
        grow(&self.0, capacity);
    }
}

/// The write end of a pipe that CRIU reads an image from.
#[derive(Debug)]
pub struct PipeWriter(pipe::Sender);

impl PipeWriter {
    /// Takes a descriptor from a peer, after checking that it is what it has to be.
    pub fn adopt(fd: OwnedFd) -> Result<PipeWriter, NotThatEnd> {
        check_end(&fd, OFlags::WRONLY)?;
        Ok(PipeWriter(pipe::Sender::from_owned_fd(fd)?))
    }

    /// Moves at most `len` bytes that are in another pipe into this one, waiting for room. `EPIPE`
    /// means that the reader has closed its end.
    pub async fn transfer_from(&self, staged: &Pipe, len: usize) -> io::Result<usize> {
        loop {
            self.0.writable().await?;
            match self.0.try_io(|| transfer(&staged.out, &self.0, len)) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                moved => return moved,
            }
        }
    }

    /// Writes bytes from memory, waiting for room; returns how many.
    pub async fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            self.0.writable().await?;
            match self.0.try_write(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                written => return written,
            }
        }
    }

    /// Grows the pipe, see [`grow`].
    pub fn grow(&self, capacity: usize) {
        grow(&self.0, capacity);
    }
}

fn check_end(fd: &OwnedFd, wanted: OFlags) -> Result<(), NotThatEnd> {
    let kind = FileType::from_raw_mode(fstat(fd).map_err(io::Error::from)?.st_mode);
    if kind != FileType::Fifo {
        return Err(NotThatEnd::NotAPipe(describe(kind)));
    }
    let mode = fcntl_getfl(fd).map_err(io::Error::from)? & OFlags::ACCMODE;
    if mode != wanted {
        let name = |mode| if mode == OFlags::RDONLY { "read" } else { "write" };
        return Err(NotThatEnd::WrongEnd(name(mode), name(wanted)));
    }
    Ok(())
}

fn describe(kind: FileType) -> &'static str {
    match kind {
        FileType::RegularFile => "a regular file",
        FileType::Directory => "a directory",
        FileType::Socket => "a socket",
        FileType::CharacterDevice => "a character device",
        FileType::BlockDevice => "a block device",
        _ => "of an unknown kind",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::pipe::pipe;

    #[tokio::test]
    async fn only_the_right_end_of_a_pipe_is_adopted() {
        let (out, into) = pipe().unwrap();
        let wrong = PipeReader::adopt(into).unwrap_err().to_string();
        assert_eq!(wrong, "the descriptor passed is the write end of a pipe, not the read end");
        assert!(PipeReader::adopt(out).is_ok());

        let file = tempfile::tempfile().unwrap().into();
        let wrong = PipeWriter::adopt(file).unwrap_err().to_string();
        assert_eq!(wrong, "the descriptor passed is a regular file, not a pipe");
    }

    #[tokio::test]
    async fn a_pipe_gives_its_bytes_then_its_end() {
        let (out, into) = pipe().unwrap();
        let reader = PipeReader::adopt(out).unwrap();
        let lane = Pipe::new(DEFAULT_CAPACITY).unwrap();
        let nothing = reader.transfer_to(&lane, 100).unwrap_err();
        assert_eq!(nothing.kind(), io::ErrorKind::WouldBlock);

        rustix::io::write(&into, b"pages").unwrap();
        reader.readable().await.unwrap();
        assert_eq!(reader.transfer_to(&lane, 100).unwrap(), 5);
        drop(into);
        reader.readable().await.unwrap();
        assert_eq!(reader.transfer_to(&lane, 100).unwrap(), 0);
    }
}
