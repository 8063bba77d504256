//! Bytes a second, for people.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// The rate is that of this much time.
const WINDOW: Duration = Duration::from_secs(5);

/// Samples of a growing number of bytes.
#[derive(Debug, Default)]
pub struct Rate {
    samples: RefCell<VecDeque<(Instant, u64)>>,
    rate: Cell<u64>,
}

impl Rate {
    /// Takes a sample: `total` bytes by now.
    pub fn sample(&self, total: u64) {
        self.sample_at(Instant::now(), total);
    }

    /// Bytes a second over the last seconds.
    pub fn per_second(&self) -> u64 {
        self.rate.get()
    }

    fn sample_at(&self, now: Instant, total: u64) {
        let mut samples = self.samples.borrow_mut();
        samples.push_back((now, total));
        while samples.len() > 2 && samples[1].0 + WINDOW <= now {
            samples.pop_front();
        }
        let Some(&(then, before)) = samples.front() else { return };
        let millis = now.duration_since(then).as_millis();
        let bytes = u128::from(total.saturating_sub(before));
        let rate = (bytes * 1000).checked_div(millis).unwrap_or(0);
        self.rate.set(u64::try_from(rate).unwrap_or(u64::MAX));
    }
}

/// A number of bytes with a unit, K = 1024.
pub fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let power = (bytes.ilog2() / 10).min(5);
    #[allow(clippy::cast_precision_loss)] // one decimal is shown
    let value = bytes as f64 / (1u64 << (10 * power)) as f64;
    format!("{value:.1} {}", UNITS[power as usize - 1])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_that_of_the_last_seconds() {
        let rate = Rate::default();
        let start = Instant::now();
        for second in 0..10 {
            rate.sample_at(start + Duration::from_secs(second), second * 1000);
        }
        assert_eq!(rate.per_second(), 1000);
        for second in 10..20 {
            rate.sample_at(start + Duration::from_secs(second), 9000);
        }
        assert_eq!(rate.per_second(), 0);
    }

    #[test]
    fn bytes_are_shown_with_k_as_1024() {
        assert_eq!(human_bytes(1023), "1023 B");
        assert_eq!(human_bytes(1536), "1.5 KiB");
        assert_eq!(human_bytes(1 << 30), "1.0 GiB");
        assert_eq!(human_bytes(u64::MAX), "16384.0 PiB");
    }
}
