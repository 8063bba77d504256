//! The events that an operator acts on, by `MESSAGE_ID` (journald's `sd_journal_send(3)`,
//! `journalctl MESSAGE_ID=…`). An id never changes its meaning.
//!
//! Fields that go with them: `CRIU_SNAPSHOT`, `CRIU_IMAGE`, `CRIU_IMAGES`, `CRIU_BYTES`,
//! `CRIU_SECONDS`, `CRIU_PEER`.

/// A proxy has sent a snapshot, and the cache has acknowledged it.
pub const SNAPSHOT_SENT: &str = "3f2a7d4be1d84c6f9a0c5e7b21d6f801";
/// A cache holds a whole snapshot.
pub const SNAPSHOT_WHOLE: &str = "3f2a7d4be1d84c6f9a0c5e7b21d6f802";
/// A snapshot is damaged.
pub const SNAPSHOT_DAMAGED: &str = "3f2a7d4be1d84c6f9a0c5e7b21d6f803";
/// A restore has read a snapshot.
pub const SNAPSHOT_TAKEN: &str = "3f2a7d4be1d84c6f9a0c5e7b21d6f804";
/// A snapshot is no longer held.
pub const SNAPSHOT_DROPPED: &str = "3f2a7d4be1d84c6f9a0c5e7b21d6f805";
/// A link is up.
pub const LINK_UP: &str = "3f2a7d4be1d84c6f9a0c5e7b21d6f806";
/// A link is lost, or could not be had.
pub const LINK_LOST: &str = "3f2a7d4be1d84c6f9a0c5e7b21d6f807";
/// A cache holds a round of a snapshot's pages.
pub const ROUND_HELD: &str = "3f2a7d4be1d84c6f9a0c5e7b21d6f809";
/// A peer was refused or broke a protocol.
pub const PEER_REFUSED: &str = "3f2a7d4be1d84c6f9a0c5e7b21d6f808";
