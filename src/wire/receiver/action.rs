//! What comes of a message.

use crate::criu::pages::{Run, Space};
use crate::wire::message::{PagesRequest, RegionRequest, SnapshotWithdraw};

/// What the cache has to do about a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Nothing.
    Nothing,
    /// A snapshot begins.
    Begin {
        /// Its number on this link.
        snapshot: u32,
        /// Its id.
        id: String,
        /// Whether it is kept for those who ask for it by its id.
        named: bool,
        /// The snapshot in which it has pages that its own images lack.
        parent: Option<String>,
        /// The attempt to move a process that it belongs to, 0 for none.
        attempt: u64,
    },
    /// A round of a snapshot's pages begins.
    BeginRound {
        /// The round's number on this link.
        snapshot: u32,
        /// The snapshot's id.
        id: String,
        /// The snapshot whose pages they are based on, if it is not this one itself.
        parent: Option<String>,
        /// The attempt that it belongs to.
        attempt: u64,
    },
    /// A page space begins.
    Space {
        /// The round's number.
        snapshot: u32,
        /// Which.
        space: Space,
    },
    /// Pages are as in the parent, or follow.
    Pages {
        /// The round's number.
        snapshot: u32,
        /// Which.
        run: Run,
    },
    /// The payload belongs to the pages that were announced last, after what has come of them.
    PageData {
        /// The round's number.
        snapshot: u32,
    },
    /// Nobody goes on with a snapshot that has only pages.
    Forget {
        /// Its id.
        id: String,
    },
    /// An attempt to move a process has failed: nothing that came of it may be restored.
    Withdraw(SnapshotWithdraw),
    /// A round has come that was announced so.
    CompleteRound {
        /// Its number.
        snapshot: u32,
        /// How many page spaces began.
        spaces: u64,
        /// How many bytes of pages came.
        bytes: u64,
    },
    /// The snapshot's id is appended to a list.
    List {
        /// The snapshot's number.
        snapshot: u32,
        /// The list's name.
        list: String,
    },
    /// An image begins.
    BeginImage {
        /// The snapshot's number.
        snapshot: u32,
        /// The image's number in the snapshot.
        image: u32,
        /// CRIU's name for it.
        name: String,
        /// Whether it goes on at the end of the image of that name.
        append: bool,
    },
    /// The payload belongs at the end of the image.
    Append {
        /// The snapshot's number.
        snapshot: u32,
        /// The image's number in the snapshot.
        image: u32,
    },
    /// The payload belongs to a snapshot that was given up: drop it.
    Discard,
    /// An image has ended.
    EndImage {
        /// The snapshot's number.
        snapshot: u32,
        /// The image's number in the snapshot.
        image: u32,
        /// How many bytes have come.
        size: u64,
    },
    /// A part of an image is asked for.
    Region(RegionRequest),
    /// Pages are asked for.
    RequestedPages(PagesRequest),
    /// Everything has come that was announced.
    Complete {
        /// The snapshot's number.
        snapshot: u32,
        /// How many images ended.
        images: u64,
        /// The sum of their sizes.
        bytes: u64,
        /// Whether it need not be a checkpoint by itself.
        partial: bool,
        /// Whether the memory may have changed before it was copied.
        memory_may_have_changed: bool,
    },
    /// The snapshot cannot be completed. Unless the peer aborted it itself, it is told.
    Damaged {
        /// The snapshot's number.
        snapshot: u32,
        /// Why.
        reason: String,
        /// Whether the peer knows, having said so itself.
        by_peer: bool,
    },
    /// The peer ends the link, and says why.
    Goodbye(String),
}
