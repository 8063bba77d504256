//! The life of a daemon: sockets, readiness, reload, the orderly end.

use std::io;
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::LocalSet;
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::cli::Common;
use super::given::Given;
use super::journal;
use super::logging::Logging;
use super::notify;
use super::pidfile::PidFile;
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
    /// Resolves when there is nothing left to do: the link's socket was given (`--ps-socket`), and
    /// was closed. Returns whether nothing was lost with it. Otherwise a daemon is never done.
    fn over(&self) -> impl Future<Output = bool>;
    /// The last call: tells the journal what is lost.
    fn farewell(&self) -> impl Future<Output = ()>;
}

/// The settings in force: those of the file, and the options over them.
pub(super) fn load<D: Daemon>(options: &Common) -> Result<D::Settings, ConfigError> {
    let mut settings = D::Settings::load(options.config.as_deref())?;
    options.replace(settings.shared());
    Ok(settings)
}

/// Serves until the end. Returns whether that is a good one.
pub(super) fn run<D: Daemon>(
    options: &Common,
    mut settings: D::Settings,
    given: Given,
    logging: &Logging,
) -> Result<bool, Box<dyn std::error::Error>> {
    // Before anything that another daemon may be using; removed when this returns.
    let _pidfile = settings.shared().pidfile.as_deref().map(PidFile::claim).transpose()?;
    // While there is one thread, and before anything else can open descriptors.
    let sockets = Sockets::acquire(D::wanted(&settings), given.link)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let local = LocalSet::new();
    runtime.block_on(local.run_until(async {
        let mut signals = Signals::listen()?;
        let served = sockets.describe(D::wanted(&settings).work_dir);
        let daemon = D::start(settings, sockets)?;
        // Who is told looks into the log.
        let (message_id, version) = (journal::DAEMON_STARTED, env!("CARGO_PKG_VERSION"));
        tracing::info!(message_id, "{} {version} serves {served}", D::NAME);
        given.readiness.report()?;
        notify::ready(&daemon.status_line()).await;
        let well = serve(&*daemon, options, logging, &mut signals).await;
        let message_id = journal::DAEMON_STOPPING;
        tracing::info!(message_id, "{} stops: {}", D::NAME, daemon.status_line());
        drain(&*daemon, &mut signals).await;
        daemon.farewell().await;
        logging.tell_left_out(true);
        let message_id = journal::DAEMON_STOPPED;
        tracing::info!(message_id, "{} has stopped: {}", D::NAME, daemon.status_line());
        Ok(well)
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

/// Until the daemon is told to stop, or has nothing left to do. Returns whether that is well. The same task that pings the watchdog looks at every part of
/// the daemon for the status line, so a ping proves that the event loop and they work.
async fn serve<D: Daemon>(
    daemon: &D,
    options: &Common,
    logging: &Logging,
    signals: &mut Signals,
) -> bool {
    let mut over = pin!(daemon.over());
    let mut tick = interval(notify::watchdog_interval().map_or(TICK, |limit| limit.min(TICK)));
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut shown = String::new();
    loop {
        tokio::select! {
            _ = signals.terminate.recv() => return true,
            _ = signals.interrupt.recv() => return true,
            well = &mut over => {
                tracing::info!("the socket that was given as the link is closed: the daemon ends");
                return well;
            }
            _ = signals.hang_up.recv() => {
                reload(daemon, options, logging).await;
                shown.clear();
            }
            _ = tick.tick() => {
                daemon.tick();
                logging.tell_left_out(false);
                let line = daemon.status_line();
                if line != shown {
                    notify::status(&line).await;
                    shown = line;
                }
                notify::watchdog().await;
            }
        }
    }
}

/// Reads the configuration again. One that is refused changes nothing.
async fn reload<D: Daemon>(daemon: &D, options: &Common, logging: &Logging) {
    notify::reloading().await;
    logging.reopen();
    match load::<D>(options) {
        Ok(mut settings) => {
            logging.set_level(settings.shared().log.level);
            daemon.reload(settings);
            tracing::info!(message_id = journal::CONFIG_RELOADED, "configuration reloaded");
        }
        Err(error) => tracing::error!(
            message_id = journal::CONFIG_REFUSED,
            criu_reason = %error,
            "configuration not reloaded, the old one stays: {error}"
        ),
    }
    notify::ready(&daemon.status_line()).await;
}

/// Lets the sessions under way end, as long as they make progress. A second signal ends that.
async fn drain<D: Daemon>(daemon: &D, signals: &mut Signals) {
    daemon.stop_accepting();
    let mut tick = interval(TICK);
    let mut progress = (daemon.progress(), Instant::now());
    while daemon.sessions() > 0 {
        notify::stopping(&format!("stopping: {}", daemon.status_line()), DRAIN_PATIENCE).await;
        tokio::select! {
            () = signals.stop() => {
                tell_cut(daemon, "the daemon was told to stop once more");
                break;
            }
            _ = tick.tick() => {
                daemon.tick();
                notify::watchdog().await;
            }
        }
        if daemon.progress() != progress.0 {
            progress = (daemon.progress(), Instant::now());
        } else if progress.1.elapsed() > DRAIN_PATIENCE {
            tell_cut(daemon, &format!("they made no progress for {DRAIN_PATIENCE:?}"));
            break;
        }
    }
    notify::stopping("stopped", Duration::from_secs(5)).await;
}

fn tell_cut(daemon: &impl Daemon, criu_reason: &str) {
    let (message_id, sessions) = (journal::SESSIONS_CUT, daemon.sessions());
    tracing::warn!(message_id, criu_reason, "{sessions} sessions are cut off: {criu_reason}");
}
