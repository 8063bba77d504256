//! How long things took.

use std::time::Duration;

use prometheus_client::metrics::histogram::Histogram;

/// The upper bounds of the buckets, in seconds: from what nobody notices to what is too long for anybody.
const BOUNDS: [f64; 15] =
    [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 150.0, 600.0, 3600.0];

/// A histogram of durations.
#[derive(Debug, Clone)]
pub struct Durations(pub(super) Histogram);

impl Default for Durations {
    fn default() -> Durations {
        Durations(Histogram::new(BOUNDS))
    }
}

impl Durations {
    /// Something took so long.
    pub fn observe(&self, took: Duration) {
        self.0.observe(took.as_secs_f64());
    }
}
