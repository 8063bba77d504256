//! What speaks in CRIU's place, on a dump and on a restore: each step on its own, so that a test can
//! leave one out or do it wrong.

use std::fs::File;
use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use criu_image_relay::criu::images::INVENTORY;
use criu_image_relay::criu::stream::{
    CAPTURE_SOCKET, HEADER_LEN, SERVE_SOCKET, decode_reply, encode_request,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::pipe::{PipeFlags, pipe_with};

use crate::daemons::{Daemon, SOON};

/// An image with one empty record, as CRIU begins them all: `IMG_COMMON`, a magic, the record.
pub(crate) const RECORDS: &[u8] = b"\x19\x43\x56\x54\x16\x31\x31\x58\x00\x00\x00\x00";

/// How long to look whether nothing comes, where nothing must.
pub(crate) const A_WHILE: std::time::Duration = std::time::Duration::from_millis(150);

/// A CRIU run that is connected to a daemon.
pub(crate) struct Criu {
    socket: UnixStream,
}

impl Criu {
    /// A dump through the shared socket.
    pub(crate) fn dump(proxy: &Daemon) -> Criu {
        Criu::new(UnixStream::connect(proxy.dir().join(CAPTURE_SOCKET)).unwrap())
    }

    /// A dump, or a restore, through the socket `name` in a directory.
    pub(crate) fn in_directory(dir: &Path, name: &str) -> Criu {
        Criu::new(UnixStream::connect(dir.join(name)).unwrap())
    }

    /// A restore through the shared socket.
    pub(crate) fn restore(cache: &Daemon) -> Criu {
        Criu::new(UnixStream::connect(cache.dir().join(SERVE_SOCKET)).unwrap())
    }

    /// A dump or a restore in a directory that was opened for the snapshot `id`.
    pub(crate) fn in_dir_of(id: &str, daemon: &Daemon) -> Criu {
        Criu::new(daemon.open(id))
    }

    /// The same for a dump that goes to another cache than the configured one.
    pub(crate) fn dump_to(cache: SocketAddr, id: &str, proxy: &Daemon) -> Criu {
        Criu::new(proxy.open_to(id, Some(cache)))
    }

    pub(crate) fn new(socket: UnixStream) -> Criu {
        socket.set_read_timeout(Some(SOON)).unwrap();
        socket.set_write_timeout(Some(SOON)).unwrap();
        Criu { socket }
    }

    /// Who it is, as the daemons name it.
    pub(crate) fn peer() -> String {
        format!("pid {} (uid {})", std::process::id(), rustix::process::geteuid().as_raw())
    }

    /// Says any bytes.
    pub(crate) fn say(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).unwrap();
    }

    /// Asks for an image.
    pub(crate) fn request(&mut self, name: &str) {
        self.say(&encode_request(name));
    }

    /// Sends the byte that belongs to a request, and with it any number of descriptors.
    pub(crate) fn pass(&mut self, descriptors: &[BorrowedFd<'_>]) {
        self.try_pass(descriptors).unwrap();
    }

    fn try_pass(&self, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        pass(&self.socket, descriptors)
    }

    /// Opens an image for writing: a dump's request and its pipe.
    pub(crate) fn create(&mut self, name: &str) -> File {
        let (theirs, ours) = pipe();
        self.request(name);
        self.pass(&[theirs.as_fd()]);
        ours.into()
    }

    /// The same, if the daemon still listens.
    pub(crate) fn try_create(&mut self, name: &str) -> Option<File> {
        let (theirs, ours) = pipe();
        self.socket.write_all(&encode_request(name)).ok()?;
        self.try_pass(&[theirs.as_fd()]).ok()?;
        Some(ours.into())
    }

    /// Writes a whole image.
    pub(crate) fn write(&mut self, name: &str, bytes: &[u8]) {
        self.create(name).write_all(bytes).unwrap();
    }

    /// Ends a dump as CRIU does when it succeeded.
    pub(crate) fn complete(mut self) {
        self.write(INVENTORY, RECORDS);
    }

    /// The answer to a restore's request.
    pub(crate) fn reply(&mut self) -> io::Result<bool> {
        let mut header = [0; HEADER_LEN];
        self.socket.read_exact(&mut header)?;
        let mut reply = vec![0; u32::from_le_bytes(header) as usize];
        self.socket.read_exact(&mut reply)?;
        decode_reply(&reply).map_err(io::Error::other)
    }

    /// Whether the snapshot has that image.
    pub(crate) fn ask(&mut self, name: &str) -> bool {
        self.request(name);
        self.reply().unwrap()
    }

    /// Opens an image for reading.
    pub(crate) fn open(&mut self, name: &str) -> File {
        assert!(self.ask(name), "there is no {name}");
        self.take()
    }

    /// Passes the pipe for an image of which the daemon has said that it exists.
    pub(crate) fn take(&mut self) -> File {
        let (ours, theirs) = pipe();
        self.pass(&[theirs.as_fd()]);
        ours.into()
    }

    /// Reads a whole image.
    pub(crate) fn read(&mut self, name: &str) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.open(name).read_to_end(&mut bytes).unwrap();
        bytes
    }

    /// The daemon has closed the session, or does so now.
    #[track_caller]
    pub(crate) fn assert_closed(&mut self) {
        match self.socket.read(&mut [0; 64]) {
            Ok(0) => {}
            Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
            other => panic!("{other:?} instead of the session's end"),
        }
    }

    /// The daemon says nothing for now.
    #[track_caller]
    pub(crate) fn assert_waits(&mut self) {
        self.socket.set_read_timeout(Some(A_WHILE)).unwrap();
        let said = self.socket.read(&mut [0; 64]);
        assert_eq!(said.unwrap_err().kind(), ErrorKind::WouldBlock);
        self.socket.set_read_timeout(Some(SOON)).unwrap();
    }
}

/// Sends one byte, and with it any number of descriptors.
pub(crate) fn pass(socket: &UnixStream, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)));
    }
    sendmsg(socket, &[IoSlice::new(&[0])], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// A pipe that stays in this process: its read end, its write end.
pub(crate) fn pipe() -> (OwnedFd, OwnedFd) {
    pipe_with(PipeFlags::CLOEXEC).unwrap()
}

/// Nobody will read what is written to this pipe: the daemon has closed its end, or does so now.
#[track_caller]
pub(crate) fn assert_unread(pipe: &File) {
    let mut polled = [PollFd::new(pipe, PollFlags::empty())];
    let patience = Timespec { tv_sec: SOON.as_secs().try_into().unwrap(), tv_nsec: 0 };
    assert_eq!(poll(&mut polled, Some(&patience)).unwrap(), 1, "the pipe is still read");
    assert!(polled[0].revents().contains(PollFlags::ERR));
}
