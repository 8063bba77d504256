//! A client of the remote protocol (`docs/protocol.md`): images into a snapshot by name at the proxy,
//! and out of it by name at the cache. What `img-remote.c` was in CRIU's development branch.
//!
//! It blocks: its users are commands and container tools, which have one thing to do. Each image, list
//! and ending is a connection of its own, so one [`Client`] can serve many threads. Nothing here has a
//! time limit; the daemons have, and close the connection when one is over.
//!
//! ```no_run
//! use std::io::{Read, Write};
//! use criu_image_relay::client::{Client, Error};
//!
//! # fn main() -> Result<(), Error> {
//! // On the source host:
//! let proxy = Client::at("/run/criu-image/proxy");
//! proxy.push_id("", "web")?;
//! let mut image = proxy.open_write("web", "pages-1.img")?;
//! image.write_all(b"pages")?;
//! image.finish()?; // The cache has it.
//! proxy.finish_dump("web", Some(1))?;
//!
//! // On the destination host, where this may have begun before:
//! let cache = Client::at("/run/criu-image/cache");
//! let mut image = match cache.open_read("web", "pages-1.img") {
//!     Err(Error::NotFound(_)) => return Ok(()), // It never will be there.
//!     opened => opened?,
//! };
//! let mut pages = Vec::new();
//! image.read_to_end(&mut pages)?;
//! cache.finish_restore("web")
//! # }
//! ```

mod connection;
mod error;
mod read;
mod write;

pub use error::Error;
pub use read::Reader;
pub use write::Writer;

use std::io::Read;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use crate::criu::remote::{
    CACHE_SOCKET, ENTRY_MAX, LENGTH_LEN, PARENT, PROXY_SOCKET, Request, decode_id, encode_id,
    message_len,
};
use connection::Connection;

/// What image bytes pass through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Pipe,
    Socket,
}

/// Where a daemon is, and how it is spoken to. Nothing is connected until there is something to say.
#[derive(Debug, Clone)]
pub struct Client {
    path: PathBuf,
    way: Way,
    acknowledge: bool,
}

impl Client {
    /// A client of the daemon whose socket, or work-dir, is at `path`. In a work-dir, images are
    /// written and dumps end at `img-proxy.sock`, restores end at `img-cache.sock`, and images are read
    /// at the one that is there, at the cache's if both are.
    pub fn at(path: impl Into<PathBuf>) -> Client {
        Client { path: path.into(), way: Way::Pipe, acknowledge: true }
    }

    /// Image bytes go on the socket instead of through a pipe. That costs a copy, and there are places
    /// where no descriptor can be passed.
    #[must_use]
    pub fn on_socket(self) -> Client {
        Client { way: Way::Socket, ..self }
    }

    /// Whether writes, lists and the end of a dump wait for the cache, as they do at first. Without it
    /// the proxy says *no* by closing, if at all, and a writer that dies looks like one that has
    /// finished.
    #[must_use]
    pub fn acknowledged(self, acknowledge: bool) -> Client {
        Client { acknowledge, ..self }
    }

    /// Writes an image, which replaces one of that name. Acknowledged, it returns when the cache has
    /// accepted the image.
    ///
    /// # Errors
    ///
    /// [`Error::Damaged`] if the snapshot is, [`Error::Refused`] with `EBUSY` while somebody else writes
    /// the image, with `EINVAL` after the end of the dump or for a bad name.
    pub fn open_write(&self, snapshot: &str, name: &str) -> Result<Writer, Error> {
        self.open(snapshot, name, false)
    }

    /// Writes on at the end of an image, which need not be there. Errors as of
    /// [`open_write`](Client::open_write).
    pub fn open_append(&self, snapshot: &str, name: &str) -> Result<Writer, Error> {
        self.open(snapshot, name, true)
    }

    fn open(&self, snapshot: &str, name: &str, append: bool) -> Result<Writer, Error> {
        must_be_image(name)?;
        let acknowledge = self.acknowledge;
        let (snapshot, name) = (snapshot.to_owned(), name.to_owned());
        let request = Request::Write { snapshot, name, append, acknowledge };
        Writer::open(self.request(PROXY_SOCKET, &request)?, self.way, acknowledge)
    }

    /// Reads an image. At the cache it waits until the snapshot is whole, and need not be there yet; at
    /// the proxy it waits for an image that is being written.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`] if the snapshot is whole and has no such image, or at the proxy if none is
    /// there now; [`Error::Damaged`]; [`Error::Refused`] with `ESTALE` if a restore has taken the
    /// snapshot.
    pub fn open_read(&self, snapshot: &str, name: &str) -> Result<Reader, Error> {
        must_be_image(name)?;
        let pipe = Some(self.way == Way::Pipe);
        let (snapshot, name) = (snapshot.to_owned(), name.to_owned());
        let request = Request::Read { snapshot, name, pipe };
        Reader::open(self.request(self.reads_at(), &request)?, self.way)
    }

    /// Appends a snapshot's id to a list (whose name may be empty), which begins the snapshot. An id
    /// that is in the list moves to its end.
    pub fn push_id(&self, list: &str, id: &str) -> Result<(), Error> {
        let acknowledge = self.acknowledge;
        let request = Request::AppendToList { list: list.to_owned(), acknowledge };
        let connection = self.request(PROXY_SOCKET, &request)?;
        // The entries of a list have no pipe.
        let mut list = Writer::open(connection, Way::Socket, acknowledge)?;
        list.put(&encode_id(id))?;
        list.finish()
    }

    /// The ids of a list, oldest first. At the cache it waits until the list has one and none of its
    /// snapshots is still coming; at the proxy it is as it is, and may be empty.
    pub fn ids(&self, list: &str) -> Result<Vec<String>, Error> {
        let request = Request::ReadList { list: list.to_owned(), pipe: false };
        let opened = Reader::open(self.request(self.reads_at(), &request)?, Way::Socket);
        match opened {
            Ok(list) => entries(list),
            Err(Error::NotFound(_)) => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    /// Ends a dump: the snapshot is whole, once the images that are still being written have ended. If
    /// another number than `images` was opened, it is damaged; each write and each append of an image
    /// counts as one.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`] if no dump of that id is under way, [`Error::Damaged`]. None of them without
    /// acknowledgement.
    pub fn finish_dump(&self, snapshot: &str, images: Option<u64>) -> Result<(), Error> {
        let acknowledge = self.acknowledge;
        let request = Request::EndOfDump { snapshot: snapshot.to_owned(), images, acknowledge };
        let mut connection = self.request(PROXY_SOCKET, &request)?;
        if acknowledge { connection.reply().map(drop) } else { Ok(()) }
    }

    /// Ends a restore: the snapshot and those before it in its list are taken. It is always answered.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`] if there is no snapshot that could be taken.
    pub fn finish_restore(&self, snapshot: &str) -> Result<(), Error> {
        let request = Request::EndOfRestore { snapshot: snapshot.to_owned() };
        self.request(CACHE_SOCKET, &request)?.reply().map(drop)
    }

    fn reads_at(&self) -> &'static str {
        let is_there = |socket| self.path.join(socket).exists();
        if is_there(PROXY_SOCKET) && !is_there(CACHE_SOCKET) { PROXY_SOCKET } else { CACHE_SOCKET }
    }

    fn request(&self, socket: &str, request: &Request) -> Result<Connection, Error> {
        let at: &Path = &self.path;
        let path = if at.is_dir() { at.join(socket) } else { at.to_owned() };
        let mut connection = Connection::open(path)?;
        connection.say(&request.encode())?;
        Ok(connection)
    }
}

/// The name of the list of ids is no image's.
fn must_be_image(name: &str) -> Result<(), Error> {
    if name != PARENT {
        return Ok(());
    }
    let reason = format!("{PARENT:?} is the list of snapshot ids, not an image");
    Err(Error::Refused { errno: Errno::INVAL, reason })
}

fn entries(mut list: Reader) -> Result<Vec<String>, Error> {
    let mut bytes = Vec::new();
    list.read_to_end(&mut bytes)?;
    let (mut ids, mut left) = (Vec::new(), &bytes[..]);
    let cut = || list.broken("a list that ends within an id");
    let bad = |error: &dyn std::error::Error| list.broken(&error.to_string());
    while !left.is_empty() {
        let (length, rest) = left.split_first_chunk::<LENGTH_LEN>().ok_or_else(cut)?;
        let len = message_len(*length, ENTRY_MAX).map_err(|error| bad(&error))?;
        let (entry, rest) = rest.split_at_checked(len).ok_or_else(cut)?;
        ids.push(decode_id(entry).map_err(|error| bad(&error))?);
        left = rest;
    }
    Ok(ids)
}

#[cfg(test)]
mod tests;
