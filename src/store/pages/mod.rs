//! Pages that come apart from images: over the page server, round by round.
//!
//! A **page space** is the memory of one task or one shmem segment. A **layer** is the pages that one snapshot
//! brought for one page space: a memfd that is only appended to. The **flat pagemap** is the newest page
//! for every address, over all layers of a chain.
//!
//! ```text
//!  round 1   aaaaaaaa            add                    layer 1  aaaaaaaa
//!  round 2   ppbbpppp            inherit and add        layer 2  bb
//!  round 3   ppppcc              and unmap              layer 3  cc
//!            ──────
//!  flat      aabbcc              once 1 and 2 are gone  layer 1  aa......   punched
//! ```
//!
//! A [`Round`] collects a snapshot's pages against its parent's [`Flat`], and becomes a `Flat` of its own, as a
//! whole or not at all. Which snapshots are kept is told by who holds their `Flat`: the store, a
//! restore that reads, a round that builds on it. There is no merging and no list of snapshots.
//!
//! - **Versions of an [`Index`] share their runs** (`tree.rs`): a parent costs nothing while it is kept, and
//!   is never touched. To move one map from parent to child instead would need an undo log for rounds that
//!   fail, and a copy of the whole map whenever a parent is kept. What a round costs grows with its own
//!   runs, each with the logarithm of the runs of its space; the length of the chain has no part in it.
//! - **A [`Run`] is a hold on its part of a [`Layer`]**, which counts the holds on each of its pages
//!   (`seen.rs`, by where that changes, so that a hold costs the same however long it is). What the last one lets go is punched out of the memfd and no longer charged for: bytes
//!   charged are what can be seen, plus the round that is coming.
//! - **An address that comes twice in a round is the peer's fault**: CRIU sends each once, in order. The order
//!   is not asked for.
//!
//! Not charged for are the indexes: some 250 bytes for a run of at least one page, for each snapshot that
//! holds that run cut otherwise.

mod flat;
mod index;
mod layer;
mod release;
mod round;
mod seen;
mod tree;

pub use crate::criu::pages::{PAGE_SIZE as PAGE, PageRange};

pub use flat::Flat;
pub use index::{Index, Part, Parts};
pub use layer::{Layer, Run};
pub use release::release_in_turns;
pub use round::{Place, Refused, Round};
pub use tree::Runs;

#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;
