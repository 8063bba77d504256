//! What has become of snapshots since the start, for scrapes.

use std::cell::Cell;

/// How many there were of each.
#[derive(Debug, Default)]
pub struct Tally {
    /// Became whole.
    pub whole: Cell<u64>,
    /// Failed, also those that had pages before and have them still.
    pub damaged: Cell<u64>,
    /// Were not accepted.
    pub refused: Cell<u64>,
    /// Were read by a restore.
    pub taken: Cell<u64>,
    /// Were dropped, by the operator or by who sent them.
    pub dropped: Cell<u64>,
    /// Had been kept long enough.
    pub expired: Cell<u64>,
    /// Had nothing but pages, which are those of another now.
    pub superseded: Cell<u64>,
    /// Rounds of pages that are held.
    pub rounds_held: Cell<u64>,
    /// Rounds of pages that failed.
    pub rounds_failed: Cell<u64>,
}

/// Counts one more.
pub fn one_more(count: &Cell<u64>) {
    count.set(count.get() + 1);
}
