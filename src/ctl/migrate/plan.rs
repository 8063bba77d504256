//! After each round: one more, the final dump, or neither?
//!
//! A final dump freezes the process for as long as a round of so many pages takes from its first
//! to its last moment. That is what is forecast: what the last round took, less the time that its pages
//! took on the way, plus the time that the pages will take that are dirty when the process is frozen.
//! A round includes the time in which CRIU starts, while the process still runs; the final dump writes more
//! small images instead, and has them handed over, which is rehearsed once and added.

use std::time::Duration;

/// What the speed of the link is taken for as long as nothing was sent, where it has to be taken for something:
/// 1 Gbit/s, in bytes a second.
pub(super) const UNMEASURED_LINK: f64 = 125e6;

/// What a final dump costs beside its bytes, as measured on two cores: a small process that is alone, each further
/// one with its images, and each run of pages.
const OF_DUMP: Duration = Duration::from_millis(250);
const OF_TASK: Duration = Duration::from_millis(4);
const OF_RUN: Duration = Duration::from_micros(30);

/// Fewer bytes than this disappear in the buffers on the way.
const TELLING: u64 = 16 << 20;

/// A round that does not bring the forecast under this part of the shortest one so far is stale.
const SHRINKS: f64 = 0.9;
/// So many stale rounds in a row say that it has stopped shrinking.
const STALE_ROUNDS: usize = 2;

/// What one pre-dump did, and what has become dirty since.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Round {
    /// Bytes of the pages that it sent.
    pub(super) bytes: u64,
    /// From the start of criu to its end.
    pub(super) took: Duration,
    /// How long criu takes to start, before it freezes the process.
    pub(super) starting: Duration,
    /// How long it takes to begin with handing over, which a round does not have.
    pub(super) handing_over: Duration,
    /// How long the process stood still in it.
    pub(super) stopped: Duration,
    /// How long sending pages took.
    pub(super) sending: Duration,
    /// What is dirty now.
    pub(super) dirty: Dirty,
}

/// Memory that was written to.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Dirty {
    /// Bytes of the pages that were written to.
    pub(super) bytes: u64,
    /// The time in which they were: since the process went on after the round.
    pub(super) within: Duration,
}

impl Dirty {
    /// What is dirty when it cannot be counted: pages become so as fast as those of the round before did,
    /// which were written to within `gathered`. Of a first round, which sends everything, all is.
    pub(super) fn guessed(sent: u64, gathered: Option<Duration>, within: Duration) -> Dirty {
        let rate = gathered.and_then(|gathered| rate(sent, gathered));
        let bytes = rate.map_or(sent, |rate| whole(rate * within.as_secs_f64()));
        Dirty { bytes, within }
    }
}

/// What would come of freezing the process now.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Forecast {
    /// How long it would stand still.
    pub(super) freeze: Duration,
    /// How many bytes of pages would be sent in that time.
    pub(super) bytes: u64,
    /// How many bytes a second become dirty.
    pub(super) dirty_rate: f64,
    /// How many bytes a second reach the cache; `None` if nothing is known of it, and the freeze is what it would
    /// be if that took no time.
    pub(super) link_rate: Option<f64>,
}

/// How much a dump has to bring.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Extent {
    /// Bytes of pages.
    pub(super) bytes: u64,
    /// Runs of pages that follow each other.
    pub(super) runs: u64,
    /// Processes.
    pub(super) tasks: u64,
}

/// Why the goal cannot be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Hopeless {
    /// The process writes faster than the link carries.
    FasterThanLink,
    /// Further rounds do not make it shorter.
    NotShrinking,
    /// As many rounds as are allowed were made.
    RoundsUsedUp,
    /// Nothing but the final dump can be done, and that takes too long.
    NoRounds,
    /// The same, and it may take too long: that depends on a link of which nothing is known.
    UnknownLink,
}

/// What to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// One more round.
    Round,
    /// The final dump: the goal is within reach.
    Dump,
    /// Nothing: the goal is out of reach.
    GiveUp(Hopeless),
}

/// What is wanted.
#[derive(Debug, Clone, Copy)]
pub(super) struct Plan {
    /// How long the process may stand still.
    pub(super) max_downtime: Duration,
    /// How many rounds may be made before the final dump.
    pub(super) max_rounds: usize,
}

impl Plan {
    /// The next step after these rounds, of which there is at least one.
    pub(super) fn after(&self, rounds: &[Round]) -> Step {
        let freezes: Vec<_> = (1..=rounds.len())
            .filter_map(|n| Some(Forecast::after(&rounds[..n])?.freeze))
            .collect();
        let (Some(now), Some(freeze)) = (Forecast::after(rounds), freezes.last()) else {
            return Step::Round;
        };
        if *freeze <= self.max_downtime {
            Step::Dump
        } else if rounds.len() >= self.max_rounds {
            Step::GiveUp(Hopeless::RoundsUsedUp)
        } else if rounds.len() > 1 && now.link_rate.is_some_and(|rate| now.dirty_rate >= rate) {
            // The first round is no judge: what it took is the time to send all there is.
            Step::GiveUp(Hopeless::FasterThanLink)
        } else if is_stale(&freezes) {
            Step::GiveUp(Hopeless::NotShrinking)
        } else {
            Step::Round
        }
    }

    /// What to do when no round can be made: the final dump, or nothing.
    pub(super) fn without_rounds(&self, forecast: &Forecast) -> Step {
        if forecast.freeze > self.max_downtime {
            Step::GiveUp(Hopeless::NoRounds)
        } else if forecast.link_rate.is_none() && forecast.at_1_gbit() > self.max_downtime {
            Step::GiveUp(Hopeless::UnknownLink)
        } else {
            Step::Dump
        }
    }
}

impl Forecast {
    /// What the rounds so far tell; `None` if there is none.
    pub(super) fn after(rounds: &[Round]) -> Option<Forecast> {
        let last = rounds.last()?;
        let link_rate = link_rate(rounds);
        let dirty_rate = rate(last.dirty.bytes, last.dirty.within).unwrap_or(0.0);
        let until_frozen = whole(dirty_rate * last.starting.as_secs_f64());
        let bytes = last.dirty.bytes.saturating_add(until_frozen);
        let fixed = last.took.saturating_sub(time(last.bytes, link_rate));
        let fixed = fixed.saturating_add(last.handing_over);
        let freeze = fixed.saturating_add(time(bytes, link_rate));
        Some(Forecast { freeze, bytes, dirty_rate, link_rate: Some(link_rate) })
    }

    /// When there was no round: all memory has to go, as fast as others have gone before, if any have.
    pub(super) fn of_everything(extent: Extent, link_rate: Option<f64>) -> Forecast {
        let Extent { bytes, runs, tasks } = extent;
        let sending = link_rate.map_or(Duration::ZERO, |rate| time(bytes, rate));
        let costs = [OF_DUMP, of_tasks(tasks), each(OF_RUN, runs), sending];
        let freeze = costs.into_iter().fold(Duration::ZERO, Duration::saturating_add);
        Forecast { freeze, bytes, dirty_rate: 0.0, link_rate }
    }

    /// How long the bytes alone take on a link of 1 Gbit/s.
    pub(super) fn at_1_gbit(&self) -> Duration {
        time(self.bytes, UNMEASURED_LINK)
    }
}

/// What the images of processes cost beside the first one, which a round does not have.
pub(super) fn of_tasks(tasks: u64) -> Duration {
    each(OF_TASK, tasks.saturating_sub(1))
}

fn each(cost: Duration, count: u64) -> Duration {
    cost.saturating_mul(u32::try_from(count).unwrap_or(u32::MAX))
}

/// The speed of a link by what was sent over it, each so many bytes within some time: the highest, as nothing is
/// faster than its link. What is small tells nothing.
pub(super) fn known_rate(sent: impl IntoIterator<Item = (u64, Duration)>) -> Option<f64> {
    let large = sent.into_iter().filter(|(bytes, _)| *bytes >= TELLING);
    large.filter_map(|(bytes, within)| rate(bytes, within)).max_by(f64::total_cmp)
}

/// Whether the last rounds have brought next to nothing.
fn is_stale(freezes: &[Duration]) -> bool {
    let Some(before) = freezes.len().checked_sub(STALE_ROUNDS) else { return false };
    let (before, last) = freezes.split_at(before);
    match (before.iter().min(), last.iter().min()) {
        (Some(before), Some(last)) => *last > before.mul_f64(SHRINKS),
        _ => false,
    }
}

/// Bytes a second over all rounds: the small ones disappear in the buffers on the way and tell nothing
/// by themselves.
fn link_rate(rounds: &[Round]) -> f64 {
    let bytes = rounds.iter().map(|round| round.bytes).sum();
    let sending = rounds.iter().map(|round| round.sending).sum();
    rate(bytes, sending).filter(|rate| *rate > 0.0).unwrap_or(UNMEASURED_LINK)
}

#[allow(clippy::cast_precision_loss)] // Rates need no more than 52 bits.
fn rate(bytes: u64, within: Duration) -> Option<f64> {
    (!within.is_zero()).then(|| bytes as f64 / within.as_secs_f64())
}

/// How long so many bytes take.
#[allow(clippy::cast_precision_loss)]
fn time(bytes: u64, rate: f64) -> Duration {
    Duration::try_from_secs_f64(bytes as f64 / rate).unwrap_or(Duration::MAX)
}

/// A number of bytes as an integer; it is never negative.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // `as` saturates.
fn whole(bytes: f64) -> u64 {
    bytes as u64
}

#[cfg(test)]
mod tests;
