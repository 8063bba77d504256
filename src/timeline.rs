//! When the phases of a snapshot's way began and ended, for `criu-imagectl show --timeline`.

use serde::{Deserialize, Serialize};
use zlink::introspect::Type;

use crate::sys::clock::now_ms;

/// How many phases are remembered; rounds can go on for days.
const KEPT: usize = 256;

/// A part of a snapshot's way, as one of the daemons sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Type)]
#[serde(rename_all = "lowercase")]
pub enum PhaseName {
    /// A round of pages, until the cache holds them. The process runs on.
    Round,
    /// From CRIU's first image to its last, at the proxy. The process stands still, from a little before on.
    Dump,
    /// From then until the cache has acknowledged the snapshot, at the proxy.
    Acknowledgement,
    /// From the first image until the snapshot is whole, at the cache.
    Arrival,
    /// While a restore is bound to the snapshot, which is whole, at the cache.
    Restore,
}

/// When a phase began and ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Type)]
pub struct Phase {
    /// Which it is.
    pub name: PhaseName,
    /// When it began: milliseconds since the epoch.
    pub begun_ms: u64,
    /// When it ended: milliseconds since the epoch, 0 while it goes on.
    pub ended_ms: u64,
    /// The bytes of images and pages that came in it.
    pub bytes: u64,
    /// Whether it ended before its time.
    pub failed: bool,
}

/// The phases of one snapshot, in the order in which they began.
#[derive(Debug, Clone, Default)]
pub struct Timeline(Vec<Phase>);

impl Timeline {
    /// A phase begins. There may be one of another name that goes on.
    pub fn begin(&mut self, name: PhaseName) {
        if self.0.len() >= KEPT {
            self.0.remove(0);
        }
        self.0.push(Phase { name, begun_ms: now_ms(), ended_ms: 0, bytes: 0, failed: false });
    }

    /// A phase ends, if it has begun.
    pub fn end(&mut self, name: PhaseName, bytes: u64, failed: bool) {
        let open = self.0.iter_mut().rev().find(|phase| phase.name == name && phase.ended_ms == 0);
        if let Some(phase) = open {
            // The clock may have been set back.
            (phase.ended_ms, phase.bytes, phase.failed) =
                (now_ms().max(phase.begun_ms), bytes, failed);
        }
    }

    /// It never was: nothing happened in it.
    pub fn leave(&mut self, name: PhaseName) {
        if self.is_in(name) {
            let last = self.0.iter().rposition(|phase| phase.name == name);
            last.map(|last| self.0.remove(last));
        }
    }

    /// Whether a phase of that name goes on.
    pub fn is_in(&self, name: PhaseName) -> bool {
        self.0.iter().any(|phase| phase.name == name && phase.ended_ms == 0)
    }

    /// All of them.
    pub fn phases(&self) -> &[Phase] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_begin_and_end() {
        let mut timeline = Timeline::default();
        timeline.end(PhaseName::Dump, 1, false);
        timeline.begin(PhaseName::Round);
        timeline.begin(PhaseName::Dump);
        timeline.end(PhaseName::Round, 4096, false);
        assert!(timeline.is_in(PhaseName::Dump) && !timeline.is_in(PhaseName::Round));
        timeline.end(PhaseName::Dump, 7, true);
        timeline.begin(PhaseName::Round);
        timeline.leave(PhaseName::Round);
        timeline.leave(PhaseName::Round);
        let told = timeline.phases().iter();
        let told: Vec<_> = told.map(|phase| (phase.name, phase.bytes, phase.failed)).collect();
        assert_eq!(told, [(PhaseName::Round, 4096, false), (PhaseName::Dump, 7, true)]);
        assert!(timeline.phases().iter().all(|phase| phase.ended_ms >= phase.begun_ms));
    }

    #[test]
    fn the_oldest_are_forgotten() {
        let mut timeline = Timeline::default();
        timeline.begin(PhaseName::Dump);
        for _ in 0..1000 {
            timeline.begin(PhaseName::Round);
            timeline.end(PhaseName::Round, 0, false);
        }
        assert_eq!(timeline.phases().len(), KEPT);
        assert!(!timeline.is_in(PhaseName::Dump));
    }
}
