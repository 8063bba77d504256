//! The control socket: a Varlink interface, `org.criu.ImageRelay`, and its client.
//!
//! `proto/org.criu.ImageRelay.varlink` is the interface, with comments; it is what introspection
//! answers too, and a test holds it against the types. Both daemons serve it ([`serve`]) from what
//! their [`Backend`] knows; `criu-imagectl` calls it ([`Client`]).
//!
//! zlink gives the framing, the descriptors and the JSON. Its `Server` is not used: it writes
//! replies one connection after the other, so that one peer that does not read would stop all.
//! Here every connection is a task of its own, with limits on what it may send (`guard.rs`).

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

mod accept;
mod calls;
mod client;
mod guard;
pub mod model;
mod serve;
mod users;

#[cfg(test)]
mod description;
#[cfg(test)]
mod tests;

pub use accept::serve;
pub use client::{Client, ClientError, Watch};

use crate::daemon::sessions::Peer;
use crate::timeline::Phase;
use model::{Image, ImageFile, LinkStatus, Snapshot, Status, Withdrawn};

/// The interface's name.
pub const INTERFACE: &str = "org.criu.ImageRelay";
/// The interface in Varlink's own language, as introspection answers it.
pub const DESCRIPTION: &str = include_str!("../../proto/org.criu.ImageRelay.varlink");

/// Where the proxy's control socket is under systemd.
pub const PROXY_SOCKET: &str = "/run/criu-image/proxy/control.sock";
/// Where the cache's control socket is under systemd.
pub const CACHE_SOCKET: &str = "/run/criu-image/cache/control.sock";

/// What a daemon answers from. Calls come from one task after another and must not block.
pub trait Backend {
    /// The daemon at a glance.
    fn status(&self) -> Status;

    /// Every snapshot it knows, the oldest first.
    fn list(&self) -> Vec<Snapshot>;

    /// A snapshot and its images.
    fn show(&self, id: &str) -> Option<(Snapshot, Vec<Image>)>;

    /// A snapshot without its images. It is asked for 20 times a second while somebody waits for
    /// it, so override this where [`show`](Backend::show) has many images to copy.
    fn snapshot(&self, id: &str) -> Option<Snapshot> {
        self.show(id).map(|(snapshot, _)| snapshot)
    }

    /// When what happened to a snapshot.
    fn timeline(&self, id: &str) -> Option<Vec<Phase>>;

    /// Forgets a snapshot and gives its memory back, because `peer` said so. When this is done it does not come back, even if the
    /// daemon is killed.
    fn drop_snapshot(&self, id: &str, peer: Peer) -> impl Future<Output = Result<(), Refusal>>;

    /// Has the cache give up what came of an attempt to move a process, which has failed.
    fn withdraw(&self, _request: Withdraw) -> impl Future<Output = Result<Withdrawn, Refusal>> {
        async { Err(Refusal::Refused("it is the proxy that sends: ask that one".to_owned())) }
    }

    /// Makes the link to a cache, unless it is there; `to` is as in [`Open`]. Returns how the link is then, or when `limit` is over.
    fn connect(
        &self,
        _to: Option<&str>,
        _limit: Duration,
    ) -> impl Future<Output = Result<LinkStatus, Refusal>> {
        async { Err(Refusal::Refused("a cache connects to nobody: ask the proxy".to_owned())) }
    }

    /// Serves CRIU's stream protocol on a socket. It returns at once: what happens on the socket
    /// later is told by the snapshot's state.
    ///
    /// The socket is a unix stream socket, non-blocking and close-on-exec, and the id is a good
    /// one ([`check_id`](crate::criu::names::check_id)).
    fn open(&self, request: Open, socket: OwnedFd) -> Result<(), Refusal>;

    /// Serves CRIU's page server protocol on a socket, in the same way. It is a stream socket, TCP or unix,
    /// non-blocking and close-on-exec, and the ids are good ones.
    fn open_pages(&self, request: OpenPages, socket: OwnedFd) -> Result<(), Refusal>;

    /// Gives a snapshot to whoever asks for it from now on, though its memory may have changed, because `peer` said so.
    fn accept_changed_memory(&self, _id: &str, _peer: Peer) -> Result<(), Refusal> {
        Err(Refusal::Refused("a proxy holds no images: ask the cache".to_owned()))
    }

    /// The CRIU of this pid will wait for [`finish_dump`](Backend::finish_dump).
    fn expect_dump(&self, _pid: i32) -> Result<(), Refusal> {
        Err(Refusal::Refused("a cache takes no dumps: tell the proxy".to_owned()))
    }

    /// Ends the dump of the CRIU of this pid, and waits until the cache has acknowledged it. Unless this is waited
    /// for to its end, the dump is given up.
    fn finish_dump(
        &self,
        _pid: i32,
        _limit: Duration,
    ) -> impl Future<Output = Result<Snapshot, Refusal>> {
        async { Err(Refusal::Refused("a cache takes no dumps: ask the proxy".to_owned())) }
    }

    /// Does before [`view`](Backend::view) what may take its time, and does not hold up others.
    fn prepare_view(&self, _id: &str) -> impl Future<Output = Result<(), Refusal>> {
        async { Ok(()) }
    }

    /// The images of a whole snapshot as files.
    fn view(&self, id: &str) -> Result<Vec<ImageFile>, Refusal>;
}

/// A socket handed over, and what it is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Open {
    /// The snapshot that the socket speaks for.
    pub id: String,
    /// Where a dump goes: the cache's `HOST` or `HOST:PORT`. `None` is the configured one.
    pub to: Option<String>,
    /// The snapshot in which the images have pages (proxy only).
    pub parent: Option<String>,
    /// The attempt to move a process that it belongs to, 0 for none (proxy only).
    pub attempt: u64,
    /// What reading the snapshot means.
    pub reading: Reading,
    /// Whether it may be read while another restore has it, or after another has taken it: both processes are to run
    /// (cache only).
    pub copy: bool,
    /// Whether the restore will be one from a view (cache only).
    pub view: bool,
    /// Whether the socket listens, for any number of CRIU runs, or is one connection.
    pub listening: bool,
}

/// A socket handed over on which pages come, or are asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenPages {
    /// The snapshot that the pages belong to.
    pub id: String,
    /// The snapshot whose pages are the parent of the first round (proxy only).
    pub parent: Option<String>,
    /// Where they go, as in [`Open`] (proxy only).
    pub to: Option<String>,
    /// The attempt to move a process that they belong to, 0 for none (proxy only).
    pub attempt: u64,
    /// Whether the socket listens, or is one connection.
    pub listening: bool,
}

/// A number for an attempt to move a process that no other one has.
pub fn new_attempt() -> u64 {
    // Each has keys of its own, at random. Varlink's numbers have a sign, and 0 is none.
    (RandomState::new().hash_one(std::process::id()) >> 2) | 1
}

/// An attempt to move a process has failed: the process runs on here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Withdraw {
    /// The snapshot's id.
    pub id: String,
    /// The attempt, as [`Open`] and [`OpenPages`] named it.
    pub attempt: u64,
    /// Why it failed.
    pub reason: String,
    /// Where it went, as in [`Open`].
    pub to: Option<String>,
}

/// What it means that a snapshot is read from a socket (cache only).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reading {
    /// It is taken. One that was taken already is refused: its process may run.
    Take,
    /// It is taken, even if it was before: that restore failed.
    TakeAgain,
    /// Nothing: somebody looks at it.
    Look,
}

/// Why a daemon does not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It knows no such snapshot.
    #[error("no such snapshot")]
    NoSuchSnapshot,
    /// It will not, in words that tell the user why.
    #[error("{0}")]
    Refused(String),
}

impl Refusal {
    /// A socket that was handed over cannot be registered.
    #[allow(clippy::needless_pass_by_value)] // for map_err
    pub fn unusable(error: io::Error) -> Refusal {
        Refusal::Refused(format!("the socket cannot be used: {error}"))
    }
}

impl<B: Backend + ?Sized> Backend for Rc<B> {
    fn status(&self) -> Status {
        (**self).status()
    }

    fn list(&self) -> Vec<Snapshot> {
        (**self).list()
    }

    fn show(&self, id: &str) -> Option<(Snapshot, Vec<Image>)> {
        (**self).show(id)
    }

    fn snapshot(&self, id: &str) -> Option<Snapshot> {
        (**self).snapshot(id)
    }

    fn timeline(&self, id: &str) -> Option<Vec<Phase>> {
        (**self).timeline(id)
    }

    async fn drop_snapshot(&self, id: &str, peer: Peer) -> Result<(), Refusal> {
        (**self).drop_snapshot(id, peer).await
    }

    async fn withdraw(&self, request: Withdraw) -> Result<Withdrawn, Refusal> {
        (**self).withdraw(request).await
    }

    async fn connect(&self, to: Option<&str>, limit: Duration) -> Result<LinkStatus, Refusal> {
        (**self).connect(to, limit).await
    }

    fn open(&self, request: Open, socket: OwnedFd) -> Result<(), Refusal> {
        (**self).open(request, socket)
    }

    fn open_pages(&self, request: OpenPages, socket: OwnedFd) -> Result<(), Refusal> {
        (**self).open_pages(request, socket)
    }

    fn accept_changed_memory(&self, id: &str, peer: Peer) -> Result<(), Refusal> {
        (**self).accept_changed_memory(id, peer)
    }

    fn expect_dump(&self, pid: i32) -> Result<(), Refusal> {
        (**self).expect_dump(pid)
    }

    async fn finish_dump(&self, pid: i32, limit: Duration) -> Result<Snapshot, Refusal> {
        (**self).finish_dump(pid, limit).await
    }

    async fn prepare_view(&self, id: &str) -> Result<(), Refusal> {
        (**self).prepare_view(id).await
    }

    fn view(&self, id: &str) -> Result<Vec<ImageFile>, Refusal> {
        (**self).view(id)
    }
}
