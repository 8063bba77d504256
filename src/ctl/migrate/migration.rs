//! A migration under way: rounds, then the final dump.

use std::fs::{self, DirBuilder};
use std::future::pending;
use std::io::{self, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::param::page_size;
use tokio::time::{Instant, sleep, timeout_at};

use super::args::Migrate;
use super::beforehand::{self, rehearse, tracking};
use super::commands::Commands;
use super::decision::{Decided, Decision};
use super::hand_over::{HandOver, in_a_line, runs_on, stands_still};
use super::plan::{self, Dirty, Extent, Forecast, Plan, Round, Step};
use super::report::{self, DumpTold, ForecastTold, Outcome, RoundTold, Summary, ms};
use super::{memory, this_program};
use crate::control::model::Withdrawn;
use crate::control::{Client, ClientError, new_attempt};
use crate::criu::stats::{DumpStats, STATS_DUMP};
use crate::ctl::criu::Run;
use crate::ctl::exit::Failure;
use crate::ctl::interrupts::Interrupts;
use crate::ctl::print::clean;
use crate::ctl::work_dir::WorkDir;

/// So many of the last snapshots are looked at for how fast the link is.
const LOOKED_AT: usize = 16;
/// How long the cache may take to say that it has given up what was sent. The process runs meanwhile.
const WITHDRAWN_WITHIN: Duration = Duration::from_secs(20);
/// How often a proxy that does not answer is asked again.
const ASKED_EVERY: Duration = Duration::from_millis(200);
/// How long a process may take to end that CRIU may have killed.
const DYING: Duration = Duration::from_secs(1);
const LOOK: Duration = Duration::from_millis(10);

/// A migration under way.
pub(super) struct Migration<'a> {
    args: &'a Migrate,
    id: String,
    /// Names this attempt to move the process.
    attempt: u64,
    /// The proxy's control socket.
    proxy: PathBuf,
    work_dir: WorkDir,
    page_server: SocketAddr,
    begun: Instant,
    /// How long criu takes to start; `None` if the kernel cannot tell which pages were written to.
    tracking: Option<Duration>,
    /// How long it takes to begin with handing over.
    handing_over: Duration,
    rounds: Vec<Round>,
    told: Vec<RoundTold>,
    /// When the process went on after the last round.
    thawed: Option<Instant>,
}

impl<'a> Migration<'a> {
    /// Opens the way to the cache.
    pub(super) async fn prepare(
        args: &'a Migrate,
        id: String,
        mut client: Client,
        interrupts: &mut Interrupts,
    ) -> Result<Migration<'a>, Failure> {
        let begun = Instant::now();
        let untouched = |failure: Failure| {
            failure.note(format!("process {} was not touched, and runs on here", args.tree))
        };
        beforehand::link(&mut client, args, interrupts).await.map_err(untouched)?;
        let what = format!("migrate-{}", args.tree);
        let work_dir = args.criu.make_work_dir(&what)?;
        let tracking = tracking(args, work_dir.path(), interrupts).await?;
        // CRIU runs its scripts in another directory.
        let proxy = std::path::absolute(client.path())
            .map_err(|error| Failure::failed(format!("{}: {error}", client.path().display())))?;
        let handing_over = rehearse(&proxy, &id, work_dir.path(), interrupts).await?;
        let failed = |error: io::Error| Failure::failed(format!("no page server: {error}"));
        let listener = TcpListener::bind(("127.0.0.1", 0)).map_err(failed)?;
        let page_server = listener.local_addr().map_err(failed)?;
        let (attempt, to) = (new_attempt(), args.to.as_deref());
        client.open_pages_of_attempt(&id, attempt, to, listener.into()).await?;
        Ok(Migration {
            args,
            id,
            attempt,
            proxy,
            work_dir,
            page_server,
            begun,
            tracking,
            handing_over,
            rounds: Vec::new(),
            told: Vec::new(),
            thawed: None,
        })
    }

    /// Moves the process, unless that takes too long.
    pub(super) async fn run(&mut self, interrupts: &mut Interrupts) -> Result<Summary, Failure> {
        let plan = Plan { max_downtime: self.args.max_downtime, max_rounds: self.args.max_rounds };
        let (forecast, step) = match self.tracking {
            Some(starting) if plan.max_rounds > 0 => loop {
                self.round(starting, interrupts).await?;
                let forecast = self.tell_round()?;
                match plan.after(&self.rounds) {
                    Step::Round => {}
                    step => break (forecast, step),
                }
            },
            _ => {
                let pids = memory::tree(self.args.tree);
                let extent = Extent {
                    bytes: memory::held(&pids),
                    // Where it cannot be counted, it is not forecast.
                    runs: memory::runs(&pids).unwrap_or(0),
                    tasks: pids.len() as u64,
                };
                let forecast = Forecast::of_everything(extent, self.known_rate().await);
                report::tell_no_round(&extent, &forecast);
                (forecast, plan.without_rounds(&forecast))
            }
        };
        if let Step::GiveUp(hopeless) = step {
            let why = report::why(hopeless, &forecast, self.args.max_downtime);
            if !self.args.force {
                return Ok(self.summary(Outcome::GivenUp { why }, &forecast, None).await);
            }
            let _ = writeln!(io::stderr(), "{why}; the final dump is made all the same (--force)");
        }
        let dump = self.dump(interrupts).await?;
        let outcome = if self.args.leave_running { Outcome::Copied } else { Outcome::Migrated };
        Ok(self.summary(outcome, &forecast, Some(dump)).await)
    }

    /// A pre-dump.
    async fn round(
        &mut self,
        starting: Duration,
        interrupts: &mut Interrupts,
    ) -> Result<(), Failure> {
        let begun = Instant::now();
        let (run, dir) = (self.commands().round(), self.commands().dir());
        self.criu(&run, &dir, interrupts).await?;
        let took = begun.elapsed();
        let stats = stats(&dir)?;
        let bytes = bytes(&stats);
        let gathered = self.thawed.map(|thawed| begun + starting - thawed);
        // CRIU does not tell when the process went on: after its start and the freeze.
        let thawed = begun + (starting + stats.stopped()).min(took);
        let pids = memory::tree(self.args.tree);
        let dirty = memory::dirty(&pids);
        let within = thawed.elapsed();
        let dirty = match dirty {
            Ok(bytes) => Dirty { bytes, within },
            Err(_) => Dirty::guessed(bytes, gathered, within),
        };
        let (stopped, sending) = (stats.stopped(), stats.memory_write);
        // What a dump has and a round has not.
        let handing_over = self.handing_over + plan::of_tasks(pids.len() as u64);
        self.rounds.push(Round { bytes, took, starting, handing_over, stopped, sending, dirty });
        self.thawed = Some(thawed);
        Ok(())
    }

    fn tell_round(&mut self) -> Result<Forecast, Failure> {
        let (Some(round), Some(forecast)) = (self.rounds.last(), Forecast::after(&self.rounds))
        else {
            return Err(Failure::failed("no round was made"));
        };
        report::tell_round(self.rounds.len(), round, &forecast);
        self.told.push(RoundTold::new(round, &forecast));
        Ok(forecast)
    }

    /// How fast the link to the cache is, by what the proxy has sent over it before.
    async fn known_rate(&self) -> Option<f64> {
        let mut client = Client::connect(&self.proxy).await.ok()?;
        let peer = client.show(&self.id).await.ok()?.0.peer;
        let mut sent = Vec::new();
        let before = client.list().await.ok()?;
        for snapshot in before.iter().rev().filter(|before| before.peer == peer).take(LOOKED_AT) {
            let phases = client.timeline(&snapshot.id).await.unwrap_or_default();
            sent.extend(phases.iter().filter(|phase| !phase.failed && phase.ended_ms > 0).map(
                |phase| {
                    (
                        phase.bytes,
                        Duration::from_millis(phase.ended_ms.saturating_sub(phase.begun_ms)),
                    )
                },
            ));
        }
        plan::known_rate(sent)
    }

    /// The final dump; CRIU ends it when the cache has the whole snapshot.
    async fn dump(&mut self, interrupts: &mut Interrupts) -> Result<DumpTold, Failure> {
        let begun = Instant::now();
        let dir = self.commands().dir();
        let hand_over = self.hand_over(dir.clone());
        let run = self.commands().dump(&hand_over, &this_program()?);
        self.criu(&run, &dir, interrupts).await?;
        // It has happened, whatever the statistics say.
        let stats = stats(&dir).ok();
        Ok(DumpTold {
            bytes: stats.as_ref().map(bytes),
            milliseconds: ms(begun.elapsed()),
            frozen_ms: stats.map(|stats| ms(stats.stopped())),
        })
    }

    async fn criu(
        &self,
        run: &Run,
        dir: &Path,
        interrupts: &mut Interrupts,
    ) -> Result<(), Failure> {
        // One that came before this run: it need not begin.
        interrupts.during(async {}).await?;
        // CRIU would hold the process until the proxy has given up.
        beforehand::link(&mut Client::connect(&self.proxy).await?, self.args, interrupts).await?;
        DirBuilder::new()
            .mode(0o700)
            .create(dir)
            .map_err(|error| Failure::failed(format!("{}: {error}", dir.display())))?;
        let call_off = async {
            let decision = Decision::at(self.work_dir.path());
            match decision.decide(Decided::CalledOff) {
                // CRIU ends the process, and so does the migration.
                Ok(Decided::HandedOver) => {}
                // What it sends to closes, and CRIU undoes everything by itself.
                _ => _ = self.withdraw(&runs_on("it was called off")).await,
            }
        };
        let hopeless = async {
            let why = stands_still(&self.proxy).await;
            if Decision::at(self.work_dir.path()).may_have_sent() {
                // CRIU waits for its script, which comes to an end by itself.
                return pending().await;
            }
            why
        };
        run.run(dir, interrupts, call_off, hopeless).await
    }

    fn commands(&self) -> Commands<'_> {
        Commands {
            args: self.args,
            work_dir: self.work_dir.path(),
            page_server: Some(self.page_server),
            rounds: self.rounds.len(),
        }
    }

    /// What CRIU's action script is to do with the images in `dir`.
    fn hand_over(&self, dir: PathBuf) -> HandOver {
        let (socket, snapshot) = (self.proxy.clone(), self.id.clone());
        HandOver { socket, snapshot, to: self.args.to.clone(), dir, attempt: self.attempt }
    }

    /// Has the cache give up what was sent, and tell those who wait for it. At the proxy the page server closes,
    /// which ends a run of CRIU. A proxy that has just died is back in a moment, so it is asked again for a while.
    async fn withdraw(&self, reason: &str) -> Result<Withdrawn, Failure> {
        let hand_over = self.hand_over(PathBuf::new());
        let mut last =
            Failure::failed(format!("the proxy has not answered for {WITHDRAWN_WITHIN:?}"));
        let until = Instant::now() + WITHDRAWN_WITHIN;
        while let Ok(answer) = timeout_at(until, hand_over.withdraw(reason)).await {
            match answer {
                Ok(withdrawn) => return Ok(withdrawn),
                // The proxy lives, and has tried for as long as it does; or it is one of 0.1.0.
                Err(refused @ ClientError::Refused(_)) => return Err(refused.into()),
                Err(error) => last = error.into(),
            }
            sleep(ASKED_EVERY).await;
        }
        Err(last)
    }

    /// Nothing was frozen, and nothing will be: what was sent is of no use to anybody.
    pub(super) async fn give_up(&self, why: &str, interrupts: &mut Interrupts) {
        // Who waits at the cache waits on, if it cannot be told; there is nothing to restore.
        let _ = interrupts.during(self.withdraw(&runs_on(why))).await;
    }

    /// A failure, with what has become of the process and of what was sent.
    pub(super) async fn broken_off(
        &self,
        failure: Failure,
        interrupts: &mut Interrupts,
    ) -> Failure {
        let failure = self.with_reason_of_proxy(failure).await;
        let decision = Decision::at(self.work_dir.path());
        let may_have_sent = decision.may_have_sent();
        if decision.decided() == Some(Decided::HandedOver) && !self.args.leave_running {
            self.ends_within(DYING).await;
        }
        let (id, tree) = (clean(&self.id), self.args.tree);
        let at_b = "on the destination host: criu-imagectl --cache show";
        if !memory::lives(tree) {
            // Whatever is at the cache is the only copy.
            if !may_have_sent {
                let gone = format!("its process ended while it was moved: {}", in_a_line(&failure));
                let _ = interrupts.during(self.withdraw(&gone)).await;
                return failure.cure(format!("there is no process {tree} any more"));
            }
            return failure.unsure(
                format!("process {tree} is gone here, and the cache may have all of it"),
                format!("{at_b} {id}; if it is whole: criu-imagectl restore {id}"),
            );
        }
        let asked = interrupts.during(self.withdraw(&runs_on(&in_a_line(&failure)))).await;
        let answer = asked.unwrap_or_else(|interrupted| Err(interrupted.into()));
        let runs_on = format!("process {tree} runs on here");
        match answer {
            Ok(Withdrawn::Taken) => failure.unsure(
                format!("process {tree} runs here, and a restore has taken snapshot {id}: it may run twice"),
                format!("see whether it runs on the destination host, and end one of the two: here by kill {tree}"),
            ),
            Ok(Withdrawn::Withdrawn) if may_have_sent => {
                failure.note(format!("{runs_on}, and the cache has dropped its copy of {id}"))
            }
            Ok(_) | Err(_) if !may_have_sent => failure.note(runs_on),
            Ok(Withdrawn::Withdrawn) => failure.note(runs_on),
            Ok(Withdrawn::Unknown) => failure.unsure(
                format!("{runs_on}. The cache has no snapshot {id}: it was never whole there, or was restored and dropped"),
                format!("see on the destination host whether process {tree} runs there, too: journalctl CRIU_SNAPSHOT={id}"),
            ),
            Ok(Withdrawn::Unsaid) => failure.unsure(
                format!("{runs_on}. Whether the cache has snapshot {id} is not known: its version cannot say"),
                format!("{at_b} {id}; if it is whole: criu-imagectl --cache drop {id}; if it is taken, end one of the two processes"),
            ),
            Err(why) => failure.unsure(
                format!("{runs_on}. Whether the cache has snapshot {id} is not known: {why}"),
                format!("{at_b} {id}; if it is whole: criu-imagectl --cache drop {id}; if it is taken, end one of the two processes"),
            ),
        }
    }

    /// Adds what the proxy knows of it: CRIU says only that its page server has gone.
    async fn with_reason_of_proxy(&self, failure: Failure) -> Failure {
        let shown = async { Client::connect(&self.proxy).await?.show(&self.id).await };
        match shown.await {
            Ok((snapshot, _)) if !snapshot.reason.is_empty() => {
                failure.with_reason_of_proxy(&clean(&snapshot.reason))
            }
            _ => failure,
        }
    }

    /// Waits for the end of the process, for so long.
    async fn ends_within(&self, limit: Duration) {
        let until = Instant::now() + limit;
        while memory::lives(self.args.tree) && Instant::now() < until {
            sleep(LOOK).await;
        }
    }

    async fn summary(
        &mut self,
        outcome: Outcome,
        forecast: &Forecast,
        dump: Option<DumpTold>,
    ) -> Summary {
        let peer = match Client::connect(&self.proxy).await {
            Ok(mut client) => client.show(&self.id).await.map(|(snapshot, _)| snapshot.peer),
            Err(error) => Err(error),
        };
        let in_rounds: u64 = self.rounds.iter().map(|round| round.bytes).sum();
        let in_dump = dump.as_ref().and_then(|dump| dump.bytes).unwrap_or(0);
        Summary {
            snapshot: self.id.clone(),
            tree: self.args.tree,
            outcome,
            peer: peer.unwrap_or_default(),
            rounds: std::mem::take(&mut self.told),
            forecast: ForecastTold::from(forecast),
            dump,
            bytes: in_rounds + in_dump,
            max_downtime_ms: ms(self.args.max_downtime),
            milliseconds: ms(self.begun.elapsed()),
        }
    }
}

fn stats(dir: &Path) -> Result<DumpStats, Failure> {
    let path = dir.join(STATS_DUMP);
    let failed = |what: String| Failure::failed(format!("{}: {what}", path.display()));
    let bytes = fs::read(&path).map_err(|error| failed(error.to_string()))?;
    DumpStats::decode(&bytes).map_err(|bad| failed(bad.to_string()))
}

fn bytes(stats: &DumpStats) -> u64 {
    stats.pages_written.saturating_mul(page_size() as u64)
}
