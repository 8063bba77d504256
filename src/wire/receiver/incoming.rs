//! What has come of the snapshots and rounds under way.

use std::collections::HashMap;

use super::Violation;

/// A number under way: its counts, by which its end is checked.
#[derive(Debug)]
pub(super) enum Incoming {
    Receiving(Counts),
    Round(Round),
    /// This side gave it up; the peer may not know yet.
    GivenUp,
}

/// A snapshot of images.
#[derive(Debug, Default)]
pub(super) struct Counts {
    pub(super) id: String,
    pub(super) open: HashMap<u32, OpenImage>,
    pub(super) next_image: u64,
    pub(super) images: u64,
    pub(super) bytes: u64,
}

/// A round of pages.
#[derive(Debug)]
pub(super) struct Round {
    pub(super) id: String,
    /// Whether a page space has begun.
    pub(super) open: bool,
    pub(super) spaces: u64,
    pub(super) bytes: u64,
    /// How many bytes of the pages that were announced last are still to come.
    pub(super) missing: u64,
}

#[derive(Debug)]
pub(super) struct OpenImage {
    pub(super) name: String,
    pub(super) size: u64,
}

impl Incoming {
    /// What has begun and not ended, in words.
    pub(super) fn unfinished(&self) -> Option<String> {
        match self {
            Incoming::Receiving(counts) => {
                let open = counts.open.values().next()?;
                Some(format!("it ended while image {} was still open", open.name))
            }
            Incoming::Round(round) => (round.missing > 0).then(|| round.cut_short()),
            Incoming::GivenUp => None,
        }
    }
}

impl Round {
    pub(super) fn cut_short(&self) -> String {
        format!("{} bytes of the pages that were announced did not come", self.missing)
    }
}

impl Counts {
    pub(super) fn new(id: &str) -> Counts {
        Counts { id: id.to_owned(), ..Counts::default() }
    }

    pub(super) fn no_such_image(&self, kind: &'static str, image: u32) -> Violation {
        Violation::NoSuchImage { kind, id: self.id.clone(), image }
    }
}
