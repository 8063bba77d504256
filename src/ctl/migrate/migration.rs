//! A migration under way: rounds, then the final dump.

use std::fs::{self, DirBuilder};
use std::io::{self, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::param::page_size;

use super::args::Migrate;
use super::beforehand::{rehearse, tracking};
use super::commands::Commands;
use super::hand_over::HandOver;
use super::plan::{self, Dirty, Extent, Forecast, Plan, Round, Step};
use super::report::{self, DumpTold, ForecastTold, Outcome, RoundTold, Summary, ms};
use super::{memory, this_program};
use crate::control::Client;
use crate::control::model::SnapshotState;
use crate::criu::stats::{DumpStats, STATS_DUMP};
use crate::ctl::criu::Run;
use crate::ctl::exit::Failure;
use crate::ctl::interrupts::Interrupts;
use crate::ctl::work_dir::WorkDir;

/// So many of the last snapshots are looked at for how fast the link is.
const LOOKED_AT: usize = 16;

/// A migration under way.
pub(super) struct Migration<'a> {
    args: &'a Migrate,
    id: String,
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
        client.open_pages(&id, None, args.to.as_deref(), listener.into()).await?;
        Ok(Migration {
            args,
            id,
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
        let hand_over = HandOver {
            socket: self.proxy.clone(),
            snapshot: self.id.clone(),
            to: self.args.to.clone(),
            dir: dir.clone(),
        };
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
        DirBuilder::new()
            .mode(0o700)
            .create(dir)
            .map_err(|error| Failure::failed(format!("{}: {error}", dir.display())))?;
        let call_off = async {
            HandOver::call_off(self.work_dir.path());
            self.forget().await;
        };
        run.run(dir, interrupts, call_off).await
    }

    fn commands(&self) -> Commands<'_> {
        Commands {
            args: self.args,
            work_dir: self.work_dir.path(),
            page_server: Some(self.page_server),
            rounds: self.rounds.len(),
        }
    }

    /// Has what was sent forgotten. Its page server closes, which ends a run of CRIU.
    pub(super) async fn forget(&self) {
        if let Ok(mut client) = Client::connect(&self.proxy).await {
            // There may be nothing of it.
            let _ = client.drop_snapshot(&self.id).await;
        }
    }

    /// A failure, with what has become of the process and of what was sent.
    pub(super) async fn runs_on(&self, failure: Failure) -> Failure {
        let (id, tree) = (&self.id, self.args.tree);
        let whole = match Client::connect(&self.proxy).await {
            Ok(mut client) => {
                client.show(id).await.is_ok_and(|(now, _)| now.state == SnapshotState::Whole)
            }
            Err(_) => false,
        };
        self.forget().await;
        if whole {
            failure.cure(format!(
                "the cache has snapshot {id}, whole: if process {tree} runs here, have it dropped there \
                 (criu-imagectl --cache drop) before it is restored"
            ))
        } else if failure.has_cure() {
            failure
        } else if memory::name(tree).is_ok() {
            failure.cure(format!("process {tree} runs on here"))
        } else {
            failure.cure(format!("there is no process {tree} any more"))
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
