//! A client of the remote protocol, each step on its own, so that a test can leave one out or do it
//! wrong; and what goes on beside it.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use criu_image_relay::control::model::SnapshotState;
use criu_image_relay::criu::remote::{CACHE_SOCKET, LENGTH_LEN, PROXY_SOCKET, Reply, Request};
use rustix::io::Errno;

use crate::criu::{A_WHILE, pass, pipe};
use crate::daemons::{Daemon, SOON, Settings, is_end};
use crate::hosts::Hosts;

/// A connected client.
pub(crate) struct Remote {
    socket: UnixStream,
}

/// How a client comes to one daemon or the other.
pub(crate) type Connect = fn(&Daemon) -> Remote;

/// A write, which is acknowledged.
pub(crate) fn write_of(id: &str, name: &str) -> Request {
    Request::Write {
        snapshot: id.to_owned(),
        name: name.to_owned(),
        append: false,
        acknowledge: true,
    }
}

/// A write of a client that listens to nothing.
pub(crate) fn unheard_write_of(id: &str, name: &str) -> Request {
    Request::Write {
        snapshot: id.to_owned(),
        name: name.to_owned(),
        append: false,
        acknowledge: false,
    }
}

/// A read on the socket, or through a pipe.
pub(crate) fn read_of(id: &str, name: &str, pipe: bool) -> Request {
    Request::Read { snapshot: id.to_owned(), name: name.to_owned(), pipe: Some(pipe) }
}

/// The end of a dump, which is acknowledged.
pub(crate) fn end_of(id: &str) -> Request {
    Request::EndOfDump { snapshot: id.to_owned(), images: None, acknowledge: true }
}

/// Ids for a list, which are acknowledged.
pub(crate) fn append_to(list: &str) -> Request {
    Request::AppendToList { list: list.to_owned(), acknowledge: true }
}

impl Remote {
    pub(crate) fn at_proxy(proxy: &Daemon) -> Remote {
        Remote::new(UnixStream::connect(proxy.dir().join(PROXY_SOCKET)).unwrap())
    }

    pub(crate) fn at_cache(cache: &Daemon) -> Remote {
        Remote::new(UnixStream::connect(cache.dir().join(CACHE_SOCKET)).unwrap())
    }

    fn new(socket: UnixStream) -> Remote {
        socket.set_read_timeout(Some(SOON)).unwrap();
        socket.set_write_timeout(Some(SOON)).unwrap();
        Remote { socket }
    }

    /// Says any bytes.
    pub(crate) fn say(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).unwrap();
    }

    /// Says any bytes, if the daemon takes them.
    pub(crate) fn try_say(&mut self, bytes: &[u8]) -> bool {
        self.socket.write_all(bytes).is_ok()
    }

    pub(crate) fn ask(&mut self, request: &Request) {
        self.say(&request.encode());
    }

    /// Sends one byte, and with it any number of descriptors.
    pub(crate) fn pass(&mut self, descriptors: &[BorrowedFd<'_>]) {
        pass(&self.socket, descriptors).unwrap();
    }

    /// Passes the pipe that an image is written into.
    pub(crate) fn create(&mut self) -> File {
        let (theirs, ours) = pipe();
        self.pass(&[theirs.as_fd()]);
        ours.into()
    }

    /// Passes the pipe that an image is read from.
    pub(crate) fn take(&mut self) -> File {
        let (ours, theirs) = pipe();
        self.pass(&[theirs.as_fd()]);
        ours.into()
    }

    /// Says nothing more, and listens.
    pub(crate) fn shut(&mut self) {
        self.socket.shutdown(Shutdown::Write).unwrap();
    }

    /// The next reply; `None` when the daemon has closed.
    pub(crate) fn try_reply(&mut self) -> Option<Reply> {
        let mut length = [0; LENGTH_LEN];
        match self.socket.read_exact(&mut length) {
            Ok(()) => {}
            Err(error) if is_end(error.kind()) => return None,
            Err(error) => panic!("{error}"),
        }
        let mut reply = vec![0; u32::from_le_bytes(length) as usize];
        self.socket.read_exact(&mut reply).unwrap();
        Some(Reply::decode(&reply).unwrap())
    }

    #[track_caller]
    pub(crate) fn reply(&mut self) -> Reply {
        self.try_reply().expect("a reply")
    }

    /// All is well so far.
    #[track_caller]
    pub(crate) fn assert_done(&mut self) {
        assert_eq!(self.reply(), Reply::done());
    }

    /// It is refused, with all of these in the reason.
    #[track_caller]
    pub(crate) fn assert_refused(&mut self, errno: Errno, parts: &[&str]) {
        let reply = self.reply();
        assert_eq!(reply.error, errno.raw_os_error().unsigned_abs(), "{reply:?}");
        for part in parts {
            assert!(reply.reason.contains(part), "{reply:?} has no {part:?}");
        }
    }

    pub(crate) fn read_exactly(&mut self, bytes: &mut [u8]) {
        self.socket.read_exact(bytes).unwrap();
    }

    /// What comes until the daemon closes.
    pub(crate) fn rest(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.socket.read_to_end(&mut bytes).unwrap();
        bytes
    }

    /// The daemon has closed the connection, or does so now.
    #[track_caller]
    pub(crate) fn assert_closed(&mut self) {
        match self.socket.read(&mut [0; 64]) {
            Ok(0) => {}
            Err(error) if is_end(error.kind()) => {}
            other => panic!("{other:?} instead of the connection's end"),
        }
    }

    /// The daemon says nothing for now, and does not close.
    #[track_caller]
    pub(crate) fn assert_waits(&mut self) {
        self.socket.set_read_timeout(Some(A_WHILE)).unwrap();
        let said = self.socket.read(&mut [0; 64]);
        assert_eq!(said.unwrap_err().kind(), ErrorKind::WouldBlock);
        self.socket.set_read_timeout(Some(SOON)).unwrap();
    }

    /// Reads an image on the socket.
    #[track_caller]
    pub(crate) fn read(mut self, id: &str, name: &str) -> Result<Vec<u8>, Reply> {
        self.ask(&read_of(id, name, false));
        let reply = self.reply();
        if reply.error != 0 {
            return Err(reply);
        }
        let bytes = self.rest();
        assert_eq!(reply.size, Some(bytes.len() as u64));
        Ok(bytes)
    }
}

/// Begins an acknowledged image; the cache has accepted it.
#[track_caller]
pub(crate) fn begin(proxy: &Daemon, id: &str, name: &str) -> Remote {
    let mut writer = Remote::at_proxy(proxy);
    writer.ask(&write_of(id, name));
    writer.assert_done();
    writer
}

/// Writes a whole image; the cache has it.
#[track_caller]
pub(crate) fn write(proxy: &Daemon, id: &str, name: &str, bytes: &[u8]) {
    let mut writer = begin(proxy, id, name);
    writer.say(bytes);
    writer.shut();
    writer.assert_done();
}

/// Says that a dump has ended.
#[track_caller]
pub(crate) fn end(proxy: &Daemon, id: &str) -> Reply {
    let mut client = Remote::at_proxy(proxy);
    client.ask(&end_of(id));
    client.reply()
}

/// A whole snapshot of one image.
#[track_caller]
pub(crate) fn whole(proxy: &Daemon, id: &str, name: &str, bytes: &[u8]) {
    write(proxy, id, name, bytes);
    assert_eq!(end(proxy, id), Reply::done());
}

/// Both daemons, and beside what goes wrong a snapshot that is being written over the same link and
/// that a restore waits for.
pub(crate) struct Stage {
    pub(crate) hosts: Hosts,
    writer: Remote,
    reader: Remote,
}

impl Stage {
    pub(crate) fn set() -> Stage {
        Stage::with(&[], &[])
    }

    /// With other settings than the defaults.
    #[track_caller]
    pub(crate) fn with(proxy: Settings<'_>, cache: Settings<'_>) -> Stage {
        let hosts = Hosts::with(proxy, cache);
        let mut reader = Remote::at_cache(&hosts.cache);
        reader.ask(&read_of("bystander", "pages-1.img", false));
        let mut writer = begin(&hosts.proxy, "bystander", "pages-1.img");
        writer.say(b"half");
        Stage { hosts, writer, reader }
    }

    /// The snapshot is damaged at both daemons, with the cause, and served to nobody.
    #[track_caller]
    pub(crate) fn assert_damaged(&self, id: &str, cause: &str) {
        let Hosts { proxy, cache, .. } = &self.hosts;
        proxy.assert_log(&["WARN", &format!("snapshot {id} damaged"), cause]);
        cache.assert_log(&["WARN", &format!("snapshot {id} from source"), "damaged", cause]);
        for daemon in [proxy, cache] {
            let reason = daemon.assert_state(id, SnapshotState::Damaged);
            assert!(reason.contains(cause), "{reason}");
        }
        for client in [Remote::at_proxy(proxy), Remote::at_cache(cache)] {
            let refused = client.read(id, "core-7.img").unwrap_err();
            assert_eq!(refused.error, Errno::IO.raw_os_error().unsigned_abs(), "{refused:?}");
            assert!(refused.reason.contains(cause), "{refused:?}");
        }
    }

    /// What was under way ends well, and a new snapshot does too.
    #[track_caller]
    pub(crate) fn assert_undisturbed(mut self) {
        let Hosts { proxy, cache, .. } = &mut self.hosts;
        proxy.assert_alive();
        cache.assert_alive();
        self.writer.say(b" and half");
        self.writer.shut();
        self.writer.assert_done();
        self.reader.assert_waits();
        assert_eq!(end(proxy, "bystander"), Reply::done());
        assert_eq!(self.reader.reply(), Reply::found(13));
        assert_eq!(self.reader.rest(), b"half and half");
        whole(proxy, "fresh", "pages-1.img", b"fresh");
        assert_eq!(Remote::at_cache(cache).read("fresh", "pages-1.img").unwrap(), b"fresh");
    }
}
