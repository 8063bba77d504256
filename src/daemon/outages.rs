//! What the journal hears of a link that comes and goes: each outage once, and not every one of a link that is lost
//! again and again.

use std::cell::Cell;
use std::time::{Duration, Instant};

use super::journal;

/// After a loss that was told, further ones are left out for so long.
const QUIET: Duration = Duration::from_secs(60);

/// The outages of one link. Its peer is in the span in which it is told of.
#[derive(Debug, Default)]
pub struct Outages {
    /// When a loss was told last.
    told: Cell<Option<Instant>>,
    last: Cell<Last>,
    /// Whether it was told that the link cannot be had.
    missing: Cell<bool>,
}

/// What the journal has heard last.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Last {
    /// Nothing of an outage that still lasts.
    #[default]
    Well,
    /// That it is down.
    Down,
    /// That it is up; a loss was left out since.
    LeftOut,
}

/// What to say of a link that is up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Up {
    /// It is up.
    Plain,
    /// It is up again: that it was down was told.
    Back,
    /// Nothing: that it was down was left out.
    LeftOut,
}

impl Outages {
    /// A link is up. `link` names it and its ends.
    pub fn tell_up(&self, link: &str) {
        match self.up() {
            Up::Plain => tracing::info!(message_id = journal::LINK_UP, "{link} is up"),
            Up::Back => tracing::info!(message_id = journal::LINK_BACK, "{link} is up again"),
            Up::LeftOut => tracing::debug!("{link} is up once more"),
        }
    }

    /// It cannot be had; `what` is not there, in words.
    pub fn tell_missing(&self, what: &str, criu_reason: &str) {
        if self.missing() {
            tracing::warn!(message_id = journal::NO_LINK, criu_reason, "{what}: {criu_reason}");
        } else {
            tracing::debug!("still {what}: {criu_reason}");
        }
    }

    /// It is over, by the peer's fault or not, and so many snapshots were lost with it.
    pub fn tell_over(&self, link: &str, criu_reason: &str, fault: bool, lost: usize) {
        if fault {
            let message_id = journal::PROTOCOL_ERROR;
            tracing::warn!(message_id, criu_reason, "{link} ended: {criu_reason}");
        }
        if lost == 0 {
            if !fault {
                let message_id = journal::LINK_ENDED;
                tracing::info!(message_id, criu_reason, "idle {link} ended: {criu_reason}");
            }
        } else if self.lost(Instant::now()) {
            tracing::warn!(
                message_id = journal::LINK_LOST,
                criu_snapshots = lost as u64,
                criu_reason,
                "{link} lost with {lost} snapshots under way: {criu_reason}"
            );
        } else {
            tracing::debug!(
                "{link} lost once more, with {lost} snapshots under way: {criu_reason}"
            );
        }
    }

    /// Whether it is down, as far as the journal knows.
    pub fn is_down(&self) -> bool {
        self.last.get() == Last::Down
    }

    fn lost(&self, now: Instant) -> bool {
        let tell = self.told.get().is_none_or(|told| now.saturating_duration_since(told) >= QUIET);
        if tell {
            self.told.set(Some(now));
            self.last.set(Last::Down);
        } else if self.last.get() == Last::Well {
            self.last.set(Last::LeftOut);
        }
        tell
    }

    fn missing(&self) -> bool {
        self.last.set(Last::Down);
        !self.missing.replace(true)
    }

    fn up(&self) -> Up {
        self.missing.set(false);
        match self.last.take() {
            Last::Well => Up::Plain,
            Last::Down => Up::Back,
            Last::LeftOut => Up::LeftOut,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_outage_is_told_once() {
        let (link, start) = (Outages::default(), Instant::now());
        assert_eq!(link.up(), Up::Plain);
        assert!(link.lost(start));
        assert!(link.missing());
        assert!(!link.missing(), "it still is");
        assert_eq!(link.up(), Up::Back);
        assert!(link.missing(), "another outage");
        assert_eq!(link.up(), Up::Back);
        assert_eq!(link.up(), Up::Plain, "nothing was wrong since");
    }

    #[test]
    fn a_link_that_is_lost_again_and_again_is_told_of_once_a_minute() {
        let (link, start) = (Outages::default(), Instant::now());
        assert!(link.lost(start));
        assert_eq!(link.up(), Up::Back);
        for second in 1..60 {
            assert!(!link.lost(start + Duration::from_secs(second)));
            assert_eq!(link.up(), Up::LeftOut);
        }
        assert!(link.lost(start + QUIET));
        assert_eq!(link.up(), Up::Back);
    }

    #[test]
    fn a_loss_that_was_left_out_is_told_when_it_lasts() {
        let (link, start) = (Outages::default(), Instant::now());
        assert!(link.lost(start));
        assert_eq!(link.up(), Up::Back);
        assert!(!link.lost(start + Duration::from_secs(1)));
        assert!(!link.is_down());
        assert!(link.missing());
        assert!(link.is_down());
        assert_eq!(link.up(), Up::Back);
    }
}
