//! A client of the remote protocol, one step at a time, so that a test can stop between two.

use std::fs::File;
use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use criu_image_relay::criu::remote::{
    CACHE_SOCKET, LENGTH_LEN, PROXY_SOCKET, Reply, Request, decode_id, encode_id,
};
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use crate::criu::pipe;
use crate::daemons::Daemon;

/// No answer takes longer, also where thousands of others are served.
const PATIENCE: Duration = Duration::from_secs(30);

/// A connection to a daemon.
pub(crate) struct Connection(UnixStream);

impl Connection {
    pub(crate) fn to_proxy(proxy: &Daemon) -> Connection {
        Connection::to(&proxy.dir().join(PROXY_SOCKET))
    }

    pub(crate) fn to_cache(cache: &Daemon) -> Connection {
        Connection::to(&cache.dir().join(CACHE_SOCKET))
    }

    fn to(socket: &Path) -> Connection {
        let socket = UnixStream::connect(socket).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.set_write_timeout(Some(PATIENCE)).unwrap();
        Connection(socket)
    }

    /// Says any bytes.
    pub(crate) fn say(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).unwrap();
    }

    /// Sends a header.
    pub(crate) fn ask(&mut self, request: &Request) {
        self.say(&request.encode());
    }

    /// Sends the header of an acknowledged write, and hears that the image is accepted.
    pub(crate) fn create(&mut self, id: &str, name: &str) {
        self.ask(&write_of(id, name, true));
        assert_eq!(self.reply(), Reply::done());
    }

    /// Sends one byte and one descriptor.
    pub(crate) fn pass(&self, descriptor: BorrowedFd<'_>) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let descriptors = [descriptor];
        assert!(control.push(SendAncillaryMessage::ScmRights(&descriptors)));
        sendmsg(&self.0, &[IoSlice::new(&[0])], &mut control, SendFlags::NOSIGNAL).unwrap();
    }

    /// Passes a pipe's read end, and returns where the image is to be written to.
    pub(crate) fn pass_source(&self) -> File {
        let (theirs, ours) = pipe();
        self.pass(theirs.as_fd());
        ours.into()
    }

    /// Passes a pipe's write end, and returns where the image can be read.
    pub(crate) fn pass_sink(&self) -> File {
        let (ours, theirs) = pipe();
        self.pass(theirs.as_fd());
        ours.into()
    }

    /// The next reply.
    #[track_caller]
    pub(crate) fn reply(&mut self) -> Reply {
        self.try_reply().expect("a reply")
    }

    /// The next reply, or how the daemon says none.
    pub(crate) fn try_reply(&mut self) -> io::Result<Reply> {
        let mut length = [0; LENGTH_LEN];
        self.0.read_exact(&mut length)?;
        let mut message = vec![0; u32::from_le_bytes(length) as usize];
        self.0.read_exact(&mut message)?;
        Reply::decode(&message).map_err(io::Error::other)
    }

    /// No reply has come by now.
    #[track_caller]
    pub(crate) fn assert_unanswered(&self) {
        self.0.set_nonblocking(true).unwrap();
        let said = (&self.0).read(&mut [0; 64]);
        self.0.set_nonblocking(false).unwrap();
        assert_eq!(said.map_err(|error| error.kind()), Err(ErrorKind::WouldBlock));
    }

    /// Says that the image on the socket has come to its end.
    pub(crate) fn shut_down(&self) {
        self.0.shutdown(Shutdown::Write).unwrap();
    }

    /// What the daemon says until it closes.
    pub(crate) fn rest(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.0.read_to_end(&mut bytes).unwrap();
        bytes
    }

    /// The image that was asked for; the refusal if there is none.
    pub(crate) fn image(&mut self, through_pipe: bool) -> Result<Vec<u8>, Reply> {
        let reply = self.reply();
        let size = reply.size.ok_or(reply)?;
        let bytes = if through_pipe {
            let mut bytes = Vec::new();
            self.pass_sink().read_to_end(&mut bytes).unwrap();
            bytes
        } else {
            self.rest()
        };
        assert_eq!(bytes.len() as u64, size, "another size was told than came");
        Ok(bytes)
    }
}

/// The header of a write.
pub(crate) fn write_of(id: &str, name: &str, acknowledge: bool) -> Request {
    Request::Write { snapshot: id.to_owned(), name: name.to_owned(), append: false, acknowledge }
}

/// The header of a read.
pub(crate) fn read_of(id: &str, name: &str, pipe: bool) -> Request {
    Request::Read { snapshot: id.to_owned(), name: name.to_owned(), pipe: Some(pipe) }
}

/// Writes a whole image, and waits until the cache has it.
#[track_caller]
pub(crate) fn write(proxy: &Daemon, id: &str, name: &str, bytes: &[u8]) {
    let mut writer = Connection::to_proxy(proxy);
    writer.create(id, name);
    writer.say(bytes);
    writer.shut_down();
    assert_eq!(writer.reply(), Reply::done());
}

/// Reads an image; the refusal if there is none.
pub(crate) fn read(mut connection: Connection, id: &str, name: &str) -> Result<Vec<u8>, Reply> {
    connection.ask(&read_of(id, name, false));
    connection.image(false)
}

/// Appends an id to a list, and waits until the cache has it.
#[track_caller]
pub(crate) fn append_id(proxy: &Daemon, list: &str, id: &str) {
    let mut connection = Connection::to_proxy(proxy);
    connection.ask(&Request::AppendToList { list: list.to_owned(), acknowledge: true });
    assert_eq!(connection.reply(), Reply::done());
    connection.say(&encode_id(id));
    connection.shut_down();
    assert_eq!(connection.reply(), Reply::done());
}

/// The ids of a list.
#[track_caller]
pub(crate) fn ids(mut connection: Connection, list: &str) -> Vec<String> {
    connection.ask(&Request::ReadList { list: list.to_owned(), pipe: false });
    match connection.image(false) {
        Ok(bytes) => decode_ids(&bytes),
        Err(refusal) => {
            assert_eq!(refusal.error, Errno::NOENT.raw_os_error().unsigned_abs(), "{refusal:?}");
            Vec::new()
        }
    }
}

/// The content of a list.
pub(crate) fn decode_ids(mut bytes: &[u8]) -> Vec<String> {
    let mut ids = Vec::new();
    while let Some((length, rest)) = bytes.split_first_chunk() {
        let (entry, rest) = rest.split_at(u32::from_le_bytes(*length) as usize);
        ids.push(decode_id(entry).unwrap());
        bytes = rest;
    }
    assert!(bytes.is_empty(), "the list ends within an entry");
    ids
}

/// Says the end of a dump; the answer is whether the cache has all of it.
pub(crate) fn finish(proxy: &Daemon, id: &str, images: u64) -> Reply {
    let mut connection = Connection::to_proxy(proxy);
    let (snapshot, images) = (id.to_owned(), Some(images));
    connection.ask(&Request::EndOfDump { snapshot, images, acknowledge: true });
    connection.reply()
}

/// Says the end of a restore.
pub(crate) fn finish_restore(cache: &Daemon, id: &str) -> Reply {
    let mut connection = Connection::to_cache(cache);
    connection.ask(&Request::EndOfRestore { snapshot: id.to_owned() });
    connection.reply()
}

/// The daemon refuses with that error, and says why.
#[track_caller]
pub(crate) fn assert_refused(reply: &Reply, error: Errno, reason: &str) {
    assert_eq!(reply.error, error.raw_os_error().unsigned_abs(), "{reply:?}");
    assert!(reply.reason.contains(reason), "{reply:?}");
}
