//! The life of a daemon: configuration, sockets, readiness, reload, the orderly end.

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::rc::Rc;
use std::time::Duration;

use rustix::process::{Resource, getrlimit, setrlimit};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::LocalSet;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tracing::Level;

use super::cli::{Common, EXIT_CONFIG};
use super::logging::Logging;
use super::notify;
use super::sockets::{Sockets, Wanted};
use crate::config::{ConfigError, Settings};

/// How often the status line is renewed.
const TICK: Duration = Duration::from_secs(1);
/// A session that makes no progress for this long no longer holds up the end.
const DRAIN_PATIENCE: Duration = Duration::from_secs(30);

/// What the proxy and the cache differ in.
pub trait Daemon: Sized + 'static {
    /// Its name, as the binary and the units have it.
    const NAME: &'static str;
    /// What its configuration is parsed into.
    type Settings: Settings;

    /// What it listens on.
    fn wanted(settings: &Self::Settings) -> Wanted<'_>;
    /// The configured level of its logs.
    fn level(settings: &Self::Settings) -> Level;
    /// Takes `--work-dir` over.
    fn set_work_dir(settings: &mut Self::Settings, work_dir: PathBuf);

    /// Starts to serve the sockets, in tasks of the current `LocalSet`.
    fn start(settings: Self::Settings, sockets: Sockets) -> io::Result<Rc<Self>>;
    /// Puts another configuration in force.
    fn reload(&self, settings: Self::Settings);
    /// Called once a second.
    fn tick(&self);
    /// What it does now, in one line.
    fn status_line(&self) -> String;
    /// How many sessions are under way.
    fn sessions(&self) -> usize;
    /// Grows with every byte moved.
    fn progress(&self) -> u64;
    /// Accepts nothing from now on.
    fn stop_accepting(&self);
    /// The last call: tells the journal what is lost.
    fn farewell(&self);
}

/// The body of a daemon's `main`.
pub fn main<D: Daemon>(options: &Common) -> ExitCode {
    let settings = match load::<D>(options) {
        Ok(settings) => settings,
        Err(error) => {
            eprintln!("{}: {error}", D::NAME);
            return ExitCode::from(EXIT_CONFIG);
        }
    };
    if options.check_config {
        print!("{}", settings.to_toml());
        return ExitCode::SUCCESS;
    }
    let logging = Logging::start(D::level(&settings), options.verbose);
    raise_descriptor_limit();
    match run::<D>(options, settings, &logging) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn load<D: Daemon>(options: &Common) -> Result<D::Settings, ConfigError> {
    let mut settings = D::Settings::load(options.config.as_deref())?;
    if let Some(work_dir) = &options.work_dir {
        D::set_work_dir(&mut settings, work_dir.clone());
    }
    Ok(settings)
}

fn run<D: Daemon>(
    options: &Common,
    settings: D::Settings,
    logging: &Logging,
) -> Result<(), Box<dyn std::error::Error>> {
    // While there is one thread, and before anything else can open descriptors.
    let sockets = Sockets::acquire(D::wanted(&settings))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let local = LocalSet::new();
    runtime.block_on(local.run_until(async {
        let mut signals = Signals::listen()?;
        let daemon = D::start(settings, sockets)?;
        notify::ready(&daemon.status_line());
        tracing::info!("{} {} serves", D::NAME, env!("CARGO_PKG_VERSION"));
        serve(&*daemon, options, logging, &mut signals).await;
        drain(&*daemon, &mut signals).await;
        daemon.farewell();
        Ok(())
    }))
}

/// The signals that a daemon acts on.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hang_up: Signal,
}

impl Signals {
    fn listen() -> io::Result<Signals> {
        Ok(Signals {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hang_up: signal(SignalKind::hangup())?,
        })
    }

    async fn stop(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// Until the daemon is told to stop. The same task that pings the watchdog looks at every part of
/// the daemon for the status line, so a ping proves that the event loop and they work.
async fn serve<D: Daemon>(daemon: &D, options: &Common, logging: &Logging, signals: &mut Signals) {
    let mut tick = interval(notify::watchdog_interval().map_or(TICK, |limit| limit.min(TICK)));
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut shown = String::new();
    loop {
        tokio::select! {
            _ = signals.terminate.recv() => return,
            _ = signals.interrupt.recv() => return,
            _ = signals.hang_up.recv() => {
                reload(daemon, options, logging);
                shown.clear();
            }
            _ = tick.tick() => {
                daemon.tick();
                let line = daemon.status_line();
                if line != shown {
                    notify::status(&line);
                    shown = line;
                }
                notify::watchdog();
            }
        }
    }
}

/// Reads the configuration again. One that is refused changes nothing.
fn reload<D: Daemon>(daemon: &D, options: &Common, logging: &Logging) {
    notify::reloading();
    match load::<D>(options) {
        Ok(settings) => {
            logging.set_level(D::level(&settings));
            daemon.reload(settings);
            tracing::info!("configuration reloaded");
        }
        Err(error) => tracing::error!("configuration not reloaded, the old one stays: {error}"),
    }
    notify::ready(&daemon.status_line());
}

/// Lets the sessions under way end, as long as they make progress. A second signal ends that.
async fn drain<D: Daemon>(daemon: &D, signals: &mut Signals) {
    daemon.stop_accepting();
    let mut tick = interval(TICK);
    let mut progress = (daemon.progress(), Instant::now());
    while daemon.sessions() > 0 {
        notify::stopping(&format!("stopping: {}", daemon.status_line()), DRAIN_PATIENCE);
        tokio::select! {
            () = signals.stop() => break,
            _ = tick.tick() => {
                daemon.tick();
                notify::watchdog();
            }
        }
        if daemon.progress() != progress.0 {
            progress = (daemon.progress(), Instant::now());
        } else if progress.1.elapsed() > DRAIN_PATIENCE {
            tracing::warn!("{} sessions made no progress and are ended", daemon.sessions());
            break;
        }
    }
    notify::stopping("stopped", Duration::from_secs(5));
}

/// An image is a descriptor or two; the soft limit is a default for programs that use select(2).
fn raise_descriptor_limit() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::debug!("the limit of open files stays as it is: {error}");
    }
}
