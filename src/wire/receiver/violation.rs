//! What ends a link.

/// A peer that breaks the protocol: the link cannot be trusted and ends.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// A message that this side never gets, or not now.
    #[error("a {0} out of order")]
    OutOfOrder(&'static str),
    /// An answer to a request that this side has not made.
    #[error("a REGION for the request number {0}, which was not made")]
    NotAsked(u32),
    /// A number that was never begun, or has ended.
    #[error("a {kind} for snapshot number {snapshot}, which is not under way")]
    NoSuchSnapshot {
        /// The message.
        kind: &'static str,
        /// The number it named.
        snapshot: u32,
    },
    /// A peer that begins more and more, and ends none.
    #[error("{0} snapshots begun on one link, and none of them ended")]
    TooManySnapshots(usize),
    /// A number that is in use, or was.
    #[error("snapshot number {0} begun twice on one link")]
    SnapshotTwice(u32),
    /// An image that was never begun, or has ended.
    #[error("a {kind} for image number {image} of snapshot {id}, which is not open")]
    NoSuchImage {
        /// The message.
        kind: &'static str,
        /// The snapshot's id.
        id: String,
        /// The number it named.
        image: u32,
    },
    /// A message about images for a round of pages, or the other way round.
    #[error("a {kind} for snapshot number {snapshot}, which {is}")]
    WrongContents {
        /// The message.
        kind: &'static str,
        /// The number it named.
        snapshot: u32,
        /// What that is.
        is: &'static str,
    },
    /// More bytes of pages than were announced.
    #[error("{len} bytes of pages of snapshot {id}, of which {missing} bytes were announced")]
    TooManyPages {
        /// The snapshot's id.
        id: String,
        /// How many have come.
        len: u64,
        /// How many were to come.
        missing: u64,
    },
    /// An image number that is in use, or was.
    #[error("image number {image} of snapshot {id} begun twice")]
    ImageTwice {
        /// The snapshot's id.
        id: String,
        /// The number.
        image: u32,
    },
    /// Bytes that do not continue the image.
    #[error("image {name} of snapshot {id} goes on at byte {offset}, but {expected} have come")]
    Gap {
        /// The snapshot's id.
        id: String,
        /// The image's name.
        name: String,
        /// Where the payload would belong.
        offset: u64,
        /// Where it should.
        expected: u64,
    },
}
