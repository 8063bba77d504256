//! What the daemons tell over the control socket. Sizes are in bytes, times in milliseconds since
//! the epoch unless a name says otherwise.

use serde::{Deserialize, Serialize};
use zlink::introspect::Type;

/// Which of the two daemons answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Type)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// `criu-image-proxy`, on the source host.
    Proxy,
    /// `criu-image-cache`, on the destination host.
    Cache,
}

/// A daemon at a glance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Type)]
pub struct Status {
    /// Which daemon this is.
    pub role: Role,
    /// Its version, as `--version` prints it.
    pub version: String,
    /// When it started.
    pub started_ms: u64,
    /// CRIU runs connected now.
    pub sessions: u64,
    /// Snapshots that are still arriving (cache) or being sent (proxy).
    pub receiving: u64,
    /// Whole snapshots that no restore has taken (cache), or that the cache acknowledged (proxy).
    pub whole: u64,
    /// Snapshots that a restore has taken and that are still kept.
    pub taken: u64,
    /// Damaged snapshots still listed.
    pub damaged: u64,
    /// Bytes of images in memory now; at the proxy, those that wait to be sent.
    pub held_bytes: u64,
    /// The limit of `held_bytes`.
    pub max_bytes: u64,
    /// Bytes that came in since the start.
    pub total_bytes: u64,
    /// Bytes a second over the last seconds.
    pub rate: u64,
    /// The links, one for each peer.
    pub links: Vec<LinkStatus>,
}

/// The connection to one peer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Type)]
pub struct LinkStatus {
    /// The peer's address.
    pub peer: String,
    /// Whether it is connected.
    pub up: bool,
    /// Why it is in that state, in words: `connected`, `idle`, `connection refused`, ….
    pub why: String,
}

/// What became of an attempt to move a process that was withdrawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Type)]
#[serde(rename_all = "lowercase")]
pub enum Withdrawn {
    /// The cache has nothing of it that could be restored.
    Withdrawn,
    /// A restore is reading it or has read it: the process may run there.
    Taken,
    /// The cache has nothing of it: it never came, was dropped, or was kept long enough after a restore.
    Unknown,
    /// The cache cannot say, as its version does not know how.
    Unsaid,
}

/// How far a snapshot has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Type)]
#[serde(rename_all = "lowercase")]
pub enum SnapshotState {
    /// An `open` directory names it, and nothing of it has come.
    Awaited,
    /// Images or pages are coming.
    Receiving,
    /// Its pages are held, its images are still to come.
    Paged,
    /// Complete and acknowledged; can be restored.
    Whole,
    /// Cut short, aborted or oversized; can never be restored.
    Damaged,
    /// A restore has read it.
    Taken,
}

/// A snapshot as `list` shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Type)]
pub struct Snapshot {
    /// Its id: the work-dir name.
    pub id: String,
    /// Its state.
    pub state: SnapshotState,
    /// Why it is damaged; empty otherwise.
    pub reason: String,
    /// Who sent it (cache: the proxy's name and address) or where it goes (proxy: the cache).
    pub peer: String,
    /// How many images it has so far.
    pub images: u64,
    /// How many bytes it has so far.
    pub bytes: u64,
    /// When its first byte came.
    pub begun_ms: u64,
    /// When it became whole or damaged; 0 before.
    pub ended_ms: u64,
    /// Why it has to be restored from a view and not through the stream; empty otherwise (cache). A cache of 0.1.0
    /// does not say.
    #[serde(default)]
    pub needs_view: String,
    /// Present, and true, if the memory in it may have changed before it was copied.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_may_have_changed: Option<bool>,
}

/// One image of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Type)]
pub struct Image {
    /// CRIU's name for it, such as `core-7.img`.
    pub name: String,
    /// Bytes so far.
    pub bytes: u64,
    /// Whether its end has come.
    pub whole: bool,
}

/// An image of a snapshot as a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Type)]
pub struct ImageFile {
    /// CRIU's name for it.
    pub name: String,
    /// Its size.
    pub bytes: u64,
    /// What opens it as long as the snapshot is held: a link in `/proc`.
    pub path: String,
}
