//! What a migration tells: a line for each round while it is under way, and a summary.

use std::io::{self, Write};
use std::time::Duration;

use serde::Serialize;

use super::plan::{Extent, Forecast, Hopeless, Round};
use crate::ctl::print::{clean, size};

/// How it ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "outcome", rename_all = "kebab-case")]
pub(super) enum Outcome {
    /// The cache has it, and the process is gone here.
    Migrated,
    /// The cache has it, and the process runs on here (`--leave-running`).
    Copied,
    /// The goal is out of reach, and the process runs on here.
    GivenUp {
        /// In words.
        why: String,
    },
}

/// The summary.
#[derive(Debug, Serialize)]
pub(super) struct Summary {
    pub(super) snapshot: String,
    pub(super) tree: u32,
    #[serde(flatten)]
    pub(super) outcome: Outcome,
    /// The cache.
    pub(super) peer: String,
    pub(super) rounds: Vec<RoundTold>,
    /// What was expected of the final dump.
    pub(super) forecast: ForecastTold,
    /// The final dump.
    pub(super) dump: Option<DumpTold>,
    /// All pages and images that were sent.
    pub(super) bytes: u64,
    pub(super) max_downtime_ms: u64,
    pub(super) milliseconds: u64,
}

/// A round in the summary.
#[derive(Debug, Serialize)]
pub(super) struct RoundTold {
    bytes: u64,
    milliseconds: u64,
    frozen_ms: u64,
    dirty_bytes: u64,
    dirty_bytes_per_second: u64,
    link_bytes_per_second: Option<u64>,
    forecast_ms: u64,
}

/// The forecast in the summary.
#[derive(Debug, Serialize)]
pub(super) struct ForecastTold {
    bytes: u64,
    frozen_ms: u64,
    /// Null if it is not known; then it is frozen for longer.
    link_bytes_per_second: Option<u64>,
}

/// The final dump in the summary.
#[derive(Debug, Serialize)]
pub(super) struct DumpTold {
    /// Bytes of the pages that it sent; not known if CRIU left no statistics.
    pub(super) bytes: Option<u64>,
    pub(super) milliseconds: u64,
    pub(super) frozen_ms: Option<u64>,
}

impl RoundTold {
    /// A round, and what was forecast after it.
    pub(super) fn new(round: &Round, forecast: &Forecast) -> RoundTold {
        RoundTold {
            bytes: round.bytes,
            milliseconds: ms(round.took),
            frozen_ms: ms(round.stopped),
            dirty_bytes: round.dirty.bytes,
            dirty_bytes_per_second: per_second(forecast.dirty_rate),
            link_bytes_per_second: forecast.link_rate.map(per_second),
            forecast_ms: ms(forecast.freeze),
        }
    }
}

impl From<&Forecast> for ForecastTold {
    fn from(forecast: &Forecast) -> ForecastTold {
        ForecastTold {
            bytes: forecast.bytes,
            frozen_ms: ms(forecast.freeze),
            link_bytes_per_second: forecast.link_rate.map(per_second),
        }
    }
}

impl Summary {
    /// As text.
    pub(super) fn text(&self) -> String {
        let Summary { snapshot, bytes, rounds, .. } = self;
        let (snapshot, peer) = (clean(snapshot), clean(&self.peer));
        let (sent, took) = (size(*bytes), seconds(self.milliseconds));
        let rounds = match rounds.len() {
            0 => "no rounds".to_owned(),
            1 => "1 round".to_owned(),
            n => format!("{n} rounds"),
        };
        let frozen = self.dump.as_ref().and_then(|dump| dump.frozen_ms);
        let frozen = frozen.map_or_else(String::new, |ms| format!(", frozen for {}", seconds(ms)));
        match self.outcome {
            Outcome::Migrated => {
                format!("{snapshot}: {rounds} and the dump, {sent}: at {peer} in {took}{frozen}")
            }
            Outcome::Copied => format!(
                "{snapshot}: {rounds} and the dump, {sent}: copied to {peer} in {took}{frozen}; it runs \
                 on here"
            ),
            Outcome::GivenUp { .. } => {
                format!("{snapshot}: {rounds}, {sent} sent in vain: given up, it runs on here")
            }
        }
    }
}

/// Tells a round on stderr. If that cannot be written, nobody reads it.
pub(super) fn tell_round(number: usize, round: &Round, forecast: &Forecast) {
    let _ = writeln!(
        io::stderr(),
        "round {number}: {} in {}, frozen for {}; dirty since: {}, {}; link: {}; a freeze now: {}",
        size(round.bytes),
        seconds(ms(round.took)),
        seconds(ms(round.stopped)),
        size(round.dirty.bytes),
        rate(forecast.dirty_rate),
        link(forecast),
        seconds(ms(forecast.freeze)),
    );
}

/// The same where there is none.
pub(super) fn tell_no_round(extent: &Extent, forecast: &Forecast) {
    let Extent { bytes, runs, tasks } = extent;
    let _ = writeln!(
        io::stderr(),
        "no rounds: {} in {runs} runs, of {tasks} processes; link: {}; a freeze now: {} {}",
        size(*bytes),
        link(forecast),
        about(forecast),
        seconds(ms(forecast.freeze)),
    );
}

/// What is not known takes time, too.
fn about(forecast: &Forecast) -> &'static str {
    if forecast.link_rate.is_some() { "about" } else { "at least" }
}

/// How long a freeze would take, and why that is too long, in words.
pub(super) fn why(hopeless: Hopeless, forecast: &Forecast, goal: Duration) -> String {
    let about = about(forecast);
    let (freeze, goal) = (seconds(ms(forecast.freeze)), seconds(ms(goal)));
    let why = match hopeless {
        Hopeless::FasterThanLink => {
            format!(
                "the process writes {}, the link carries {}",
                rate(forecast.dirty_rate),
                link(forecast)
            )
        }
        Hopeless::NotShrinking => {
            format!(
                "further rounds do not shorten it; the process writes {}",
                rate(forecast.dirty_rate)
            )
        }
        Hopeless::RoundsUsedUp => "all rounds are used up".to_owned(),
        Hopeless::NoRounds => format!(
            "no rounds can be made, and it has {} of memory; link: {}",
            size(forecast.bytes),
            link(forecast)
        ),
        Hopeless::UnknownLink => format!(
            "no rounds can be made, nothing of size was sent yet by which the speed of the link is known, and at 1 Gbit/s \
             its {} of memory alone take {}",
            size(forecast.bytes),
            seconds(ms(forecast.at_1_gbit()))
        ),
    };
    format!("a freeze would take {about} {freeze}, {goal} are allowed: {why}")
}

fn rate(rate: f64) -> String {
    format!("{}/s", size(per_second(rate)))
}

fn link(forecast: &Forecast) -> String {
    forecast.link_rate.map_or_else(|| "not known".to_owned(), rate)
}

/// Milliseconds for a person: `84 ms`, `1.2 s`, `75 s`.
pub(super) fn seconds(ms: u64) -> String {
    match ms {
        0..=999 => format!("{ms} ms"),
        1_000..=9_999 => format!("{}.{} s", ms / 1000, ms % 1000 / 100),
        _ => format!("{} s", ms / 1000),
    }
}

/// A duration in whole milliseconds.
pub(super) fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // `as` saturates.
fn per_second(rate: f64) -> u64 {
    rate as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_known_is_said() {
        let extent = Extent { bytes: 586 << 20, runs: 150_000, tasks: 1 };
        let goal = Duration::from_millis(300);
        let unknown = Forecast::of_everything(extent, None);
        assert_eq!(
            why(Hopeless::NoRounds, &unknown, goal),
            "a freeze would take at least 4.7 s, 300 ms are allowed: no rounds can be made, and it has 586 MiB of \
             memory; link: not known"
        );
        let unknown = why(Hopeless::UnknownLink, &unknown, goal);
        assert!(
            unknown.ends_with("at 1 Gbit/s its 586 MiB of memory alone take 4.9 s"),
            "{unknown}"
        );
        let known = Forecast::of_everything(extent, Some(600e6));
        let known = why(Hopeless::NoRounds, &known, goal);
        assert!(known.starts_with("a freeze would take about 5.7 s,"), "{known}");
    }

    fn summary(outcome: Outcome) -> Summary {
        let round = Round { bytes: 1 << 30, ..Round::default() };
        let forecast = Forecast::of_everything(Extent { bytes: 1 << 20, runs: 1, tasks: 1 }, None);
        Summary {
            snapshot: "web".to_owned(),
            tree: 7,
            outcome,
            peer: "hostb:9996".to_owned(),
            rounds: vec![RoundTold::new(&round, &forecast)],
            forecast: ForecastTold::from(&forecast),
            dump: Some(DumpTold { bytes: Some(1 << 20), milliseconds: 95, frozen_ms: Some(84) }),
            bytes: 3 << 29,
            max_downtime_ms: 300,
            milliseconds: 1234,
        }
    }

    fn given_up() -> Outcome {
        Outcome::GivenUp { why: "too fast".to_owned() }
    }

    #[test]
    fn a_summary_reads_well() {
        assert_eq!(
            summary(Outcome::Migrated).text(),
            "web: 1 round and the dump, 1.5 GiB: at hostb:9996 in 1.2 s, frozen for 84 ms"
        );
        assert_eq!(
            summary(given_up()).text(),
            "web: 1 round, 1.5 GiB sent in vain: given up, it runs on here"
        );
        let json = serde_json::to_value(summary(given_up())).unwrap();
        assert_eq!((&json["outcome"], &json["why"]), (&"given-up".into(), &"too fast".into()));
        assert_eq!(json["rounds"][0]["bytes"], 1 << 30);
        assert_eq!(json["dump"]["frozen_ms"], 84);
    }

    #[test]
    fn times_read_well() {
        let cases = [(84, "84 ms"), (1_250, "1.2 s"), (75_000, "75 s")];
        for (ms, text) in cases {
            assert_eq!(seconds(ms), text);
        }
    }
}
