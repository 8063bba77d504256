//! Plans for made-up processes and links.

use super::*;

const MIB: f64 = 1_048_576.0;
/// What a round takes besides sending, half of it before the freeze.
const OVERHEAD: f64 = 0.1;
const FREEZE: f64 = 0.05;

/// A process and a link, for which rounds are made up.
struct Model {
    /// All memory, and the part of it that is written to, in MiB.
    memory: f64,
    working_set: f64,
    /// MiB a second.
    writes: f64,
    link: f64,
}

impl Model {
    fn dirty(&self, seconds: f64) -> f64 {
        (self.writes * seconds).min(self.working_set)
    }

    /// Follows the plan, and gives the rounds and how it ended.
    fn run(&self, plan: Plan) -> (Vec<Round>, Step) {
        let mut rounds = Vec::new();
        let mut send = self.memory;
        loop {
            let seconds = send / self.link;
            let since = seconds + OVERHEAD - FREEZE;
            let dirty = self.dirty(since);
            rounds.push(Round {
                bytes: whole(send * MIB),
                took: Duration::from_secs_f64(seconds + OVERHEAD),
                starting: Duration::from_secs_f64(OVERHEAD - FREEZE),
                handing_over: Duration::from_millis(5),
                stopped: Duration::from_secs_f64(FREEZE),
                sending: Duration::from_secs_f64(seconds),
                dirty: Dirty { bytes: whole(dirty * MIB), within: Duration::from_secs_f64(since) },
            });
            match plan.after(&rounds) {
                Step::Round => send = self.dirty(since + OVERHEAD - FREEZE),
                step => return (rounds, step),
            }
        }
    }
}

const PLAN: Plan = Plan { max_downtime: Duration::from_millis(300), max_rounds: 8 };

#[test]
fn an_idle_process_needs_one_round() {
    let model = Model { memory: 1024.0, working_set: 0.1, writes: 0.5, link: 500.0 };
    let (rounds, step) = model.run(PLAN);
    assert_eq!((rounds.len(), step), (1, Step::Dump));
}

#[test]
fn a_process_that_writes_a_twentieth_a_second_converges() {
    let model = Model { memory: 4096.0, working_set: 4096.0, writes: 205.0, link: 500.0 };
    let (rounds, step) = model.run(PLAN);
    assert_eq!(step, Step::Dump);
    assert!((2..=5).contains(&rounds.len()), "{}", rounds.len());
    let forecasts: Vec<_> =
        (1..=rounds.len()).map(|n| Forecast::after(&rounds[..n]).unwrap().freeze).collect();
    assert!(forecasts.is_sorted_by(|a, b| a > b), "{forecasts:?}");
    let last = Forecast::after(&rounds).unwrap();
    assert!((last.link_rate.unwrap() / MIB - 500.0).abs() < 1.0, "{last:?}");
    assert!((last.dirty_rate / MIB - 205.0).abs() < 1.0, "{last:?}");
}

#[test]
fn one_that_writes_faster_than_the_link_is_given_up_soon() {
    let model = Model { memory: 1024.0, working_set: 1024.0, writes: 900.0, link: 100.0 };
    let (rounds, step) = model.run(PLAN);
    assert_eq!(step, Step::GiveUp(Hopeless::NotShrinking));
    assert_eq!(rounds.len(), 3);
    let model = Model { memory: 1024.0, working_set: 1024.0, writes: 110.0, link: 100.0 };
    let (rounds, step) = model.run(PLAN);
    assert!(matches!(step, Step::GiveUp(_)), "{step:?}");
    assert!(rounds.len() <= 3, "{}", rounds.len());
    let forecast = Forecast::after(&rounds).unwrap();
    assert!(forecast.freeze > Duration::from_secs(9), "{forecast:?}");
}

#[test]
fn a_small_working_set_that_is_always_dirty_stops_shrinking() {
    let model = Model { memory: 1024.0, working_set: 60.0, writes: 4000.0, link: 100.0 };
    let (rounds, step) = model.run(PLAN);
    assert!(matches!(step, Step::GiveUp(_)), "{step:?}");
    assert!(rounds.len() <= 4, "{}", rounds.len());
    let forecast = Forecast::after(&rounds).unwrap();
    assert!((0.6..0.9).contains(&forecast.freeze.as_secs_f64()), "{forecast:?}");
}

#[test]
fn one_that_shrinks_slowly_uses_its_rounds_up() {
    let model = Model { memory: 8192.0, working_set: 8192.0, writes: 80.0, link: 100.0 };
    let plan = Plan { max_downtime: Duration::from_millis(150), max_rounds: 4 };
    let (rounds, step) = model.run(plan);
    assert_eq!((rounds.len(), step), (4, Step::GiveUp(Hopeless::RoundsUsedUp)));
    let (rounds, step) = model.run(Plan { max_downtime: Duration::from_secs(3600), ..plan });
    assert_eq!((rounds.len(), step), (1, Step::Dump));
}

#[test]
fn one_bad_round_is_not_the_end() {
    let round = |dirty: u64| Round {
        bytes: 1 << 30,
        took: Duration::from_millis(1100),
        starting: Duration::from_millis(50),
        handing_over: Duration::from_millis(5),
        stopped: Duration::from_millis(50),
        sending: Duration::from_secs(1),
        dirty: Dirty { bytes: dirty << 20, within: Duration::from_secs(10) },
    };
    assert_eq!(PLAN.after(&[round(900), round(950)]), Step::Round);
    assert_eq!(PLAN.after(&[round(900), round(950), round(500)]), Step::Round);
    let stale = [round(900), round(950), round(890)];
    assert_eq!(PLAN.after(&stale), Step::GiveUp(Hopeless::NotShrinking));
}

#[test]
fn what_cannot_be_counted_is_guessed() {
    let second = Duration::from_secs(1);
    let first = Dirty::guessed(1000, None, second);
    assert_eq!((first.bytes, first.within), (1000, second));
    assert_eq!(Dirty::guessed(1000, Some(4 * second), second).bytes, 250);
    assert_eq!(Dirty::guessed(1000, Some(Duration::ZERO), second).bytes, 1000);
}

#[test]
fn without_rounds_all_memory_counts_and_its_runs_and_processes() {
    let step = |extent, rate| PLAN.without_rounds(&Forecast::of_everything(extent, rate));
    let small = Extent { bytes: 10 << 20, runs: 40, tasks: 1 };
    for rate in [None, Some(600e6)] {
        assert_eq!(step(small, rate), Step::Dump);
        for big in [Extent { runs: 150_000, ..small }, Extent { tasks: 300, ..small }] {
            assert_eq!(step(big, rate), Step::GiveUp(Hopeless::NoRounds), "{big:?}");
        }
    }
    let big = Extent { bytes: 1 << 30, ..small };
    assert_eq!(step(big, Some(600e6)), Step::GiveUp(Hopeless::NoRounds));
    // Nobody knows.
    assert_eq!(step(big, None), Step::GiveUp(Hopeless::UnknownLink));
}

/// What was measured: processes that were frozen for so many milliseconds, over a link of some 640 MB/s.
#[test]
fn a_forecast_without_rounds_is_of_the_right_size() {
    for (mib, runs, tasks, frozen) in [
        (4, 30, 1, 269),
        (512, 30, 1, 1245),
        (117, 30_000, 1, 1539),
        (234, 60_000, 1, 1997),
        (23, 7_500, 300, 1878),
    ] {
        let extent = Extent { bytes: mib << 20, runs, tasks };
        let freeze = Forecast::of_everything(extent, Some(640e6)).freeze.as_secs_f64() * 1000.0;
        let ratio = freeze / f64::from(frozen);
        assert!((0.7..1.5).contains(&ratio), "{extent:?}: {freeze} ms instead of {frozen}");
    }
}

#[test]
fn a_link_is_as_fast_as_the_fastest_that_it_carried() {
    let second = Duration::from_secs(1);
    assert_eq!(known_rate([]), None);
    assert_eq!(known_rate([(1 << 20, second / 1000), (1 << 30, Duration::ZERO)]), None);
    assert_eq!(known_rate([(100 << 20, second), (300 << 20, 2 * second)]), Some(150.0 * MIB));
}

#[test]
fn nothing_measured_is_no_division_by_zero() {
    let rounds = [Round::default()];
    let forecast = Forecast::after(&rounds).unwrap();
    assert_eq!((forecast.freeze, forecast.bytes), (Duration::ZERO, 0));
    assert_eq!(PLAN.after(&rounds), Step::Dump);
    assert_eq!(Forecast::after(&[]), None);
    let endless = Dirty { bytes: u64::MAX, within: Duration::from_nanos(1) };
    let rounds = [Round { dirty: endless, ..Round::default() }; 2];
    assert!(matches!(PLAN.after(&rounds), Step::GiveUp(_)));
}
