//! The last moment of a migration: CRIU has written every image and the process is frozen.
//!
//! CRIU runs this program as its action script, without arguments. What it is to do stands in the
//! environment, which CRIU passes on. There is no file to run: `/run` may be mounted `noexec`. As CRIU's
//! `criu/cr-dump.c` and `criu/util.c` (`cr_system`) have it since 3.15: unless the script ends with
//! status 0, also when it is killed, CRIU thaws the process and lets it run on.

use std::env;
use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::{Signal, set_parent_process_death_signal};
use serde::{Deserialize, Serialize};
use tokio::select;
use tokio::time::{sleep, timeout};

use super::decision::{Decided, Decision};
use crate::control::model::Withdrawn;
use crate::control::{Client, ClientError};
use crate::ctl::cli::{Daemon, Push};
use crate::ctl::criu::Run;
use crate::ctl::exit::{Exit, Failure};
use crate::ctl::interrupts::Interrupts;
use crate::ctl::print::Output;
use crate::ctl::push;

/// Where it stands in the environment.
const VARIABLE: &str = "CRIU_IMAGECTL_HAND_OVER";
/// Set by CRIU for its action scripts, and only for them.
const ACTION: &str = "CRTOOLS_SCRIPT_ACTION";
/// When the images are written and the process is still frozen.
const POST_DUMP: &str = "post-dump";
/// No action of CRIU's: all is done that can be done before.
const REHEARSAL: &str = "rehearsal";
/// CRIU's images directory, as /proc/PID/fd/N of CRIU's own: set for its action scripts.
const IMAGE_DIR: &str = "CRTOOLS_IMAGE_DIR";
/// How long the process may stay frozen for what the cache says to a withdrawal.
const WITHDRAWN_WITHIN: Duration = Duration::from_secs(5);
/// How often the proxy is asked whether it is there, and how long it may take to say so.
const ASKED_EVERY: Duration = Duration::from_secs(2);
const ANSWERS_WITHIN: Duration = Duration::from_secs(5);
/// The same for a CRIU that is sending pages: it cannot be asked to stop, so it gets more time.
const ANSWERS_CRIU_WITHIN: Duration = Duration::from_secs(10);

/// The snapshot to hand over.
#[allow(clippy::unsafe_derive_deserialize)] // of tokio's select! in a method, which upholds nothing of the fields
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::ctl) struct HandOver {
    /// The proxy's control socket.
    pub(super) socket: PathBuf,
    /// The snapshot's id.
    pub(super) snapshot: String,
    /// The cache that it goes to, if not the configured one.
    pub(super) to: Option<String>,
    /// The directory with its images.
    pub(super) dir: PathBuf,
    /// Names this attempt to move the process, so that the cache can give up what came of it, and nothing else.
    pub(super) attempt: u64,
}

impl HandOver {
    /// What CRIU has asked this process to do, if it was CRIU who started it.
    pub(in crate::ctl) fn asked() -> Option<Result<HandOver, Failure>> {
        let called_by_criu = env::args_os().len() == 1 && env::var_os(ACTION).is_some();
        let asked = env::var(VARIABLE).ok().filter(|_| called_by_criu)?;
        let malformed = |error| Failure::failed(format!("{VARIABLE}: {error}"));
        Some(serde_json::from_str(&asked).map_err(malformed))
    }

    /// What the script and `migrate` agree on.
    fn decision(&self) -> Decision {
        Decision::at(self.dir.parent().unwrap_or(&self.dir))
    }

    /// How CRIU passes it on.
    pub(super) fn to_environment(&self) -> (&'static str, OsString) {
        // Without it, as for a path that is not UTF-8, the script fails, and so does the dump.
        (VARIABLE, serde_json::to_string(self).unwrap_or_default().into())
    }

    /// This program, as CRIU will run it, with nothing to hand over.
    pub(super) fn rehearsal(&self, this_program: &Path) -> Run {
        Run {
            program: this_program.to_owned(),
            what: "the hand-over".to_owned(),
            arguments: Vec::new(),
            environment: vec![self.to_environment(), (ACTION, REHEARSAL.into())],
        }
    }

    /// Pushes the images and waits until the cache has acknowledged the whole snapshot. Then, and only then, CRIU
    /// is told to end the process.
    ///
    /// Whatever ends the wait before, the cache gives up what it has, and CRIU lets the process go on. Only if a
    /// restore has it by then, the process has moved all the same: one of the two has to go.
    pub(in crate::ctl) async fn run(self) -> Result<(), Failure> {
        match env::var_os(ACTION) {
            Some(action) if action == POST_DUMP => {}
            Some(action) if action == REHEARSAL => {
                Client::connect(&self.socket).await?.status().await?;
                return Ok(());
            }
            _ => return Ok(()),
        }
        let decision = self.decision();
        let mut criu = Criu::watch()?;
        let failed = |error: io::Error| Failure::failed(format!("the work directory: {error}"));
        if decision.decided() == Some(Decided::CalledOff) {
            return Err(called_off());
        }
        decision.begin_sending().map_err(failed)?;
        let pushed = select! {
            pushed = self.push() => pushed,
            why = silence(&self.socket, ANSWERS_WITHIN) => Err(why),
            () = decision.called_off() => Err(called_off()),
            () = criu.gone() => Err(Failure::failed("criu has gone")),
        };
        let failure = match pushed {
            Ok(()) => match decision.decide(Decided::HandedOver).map_err(failed)? {
                Decided::HandedOver => return Ok(()),
                Decided::CalledOff => called_off(),
            },
            Err(failure) => failure,
        };
        let withdrawn =
            timeout(WITHDRAWN_WITHIN, self.withdraw(&runs_on(&in_a_line(&failure)))).await;
        if matches!(withdrawn, Ok(Ok(Withdrawn::Taken))) && criu.is_there() {
            let _ = decision.decide(Decided::HandedOver);
            return Ok(());
        }
        Err(failure)
    }

    async fn push(&self) -> Result<(), Failure> {
        let daemon = Daemon { socket: Some(self.socket.clone()), ..Daemon::default() };
        let (snapshot, to) = (Some(self.snapshot.clone()), self.to.clone());
        let push = Push { snapshot, to, dir: self.dir.clone(), parent: None, verbose: false };
        push::attempt(&daemon, Output { json: false }, &push, self.attempt).await
    }

    /// Has the cache give up what came of this attempt, and tell that to whoever waits for it.
    pub(super) async fn withdraw(&self, reason: &str) -> Result<Withdrawn, ClientError> {
        let mut client = Client::connect(&self.socket).await?;
        client.withdraw(&self.snapshot, self.attempt, reason, self.to.as_deref()).await
    }
}

/// What whoever waits for the snapshot is told of a migration that has failed.
pub(super) fn runs_on(why: &str) -> String {
    format!("its migration failed, and it runs on at the source: {why}")
}

/// A failure in one line: what CRIU complained of has several.
pub(super) fn in_a_line(failure: &Failure) -> String {
    failure.to_string().lines().map(str::trim).collect::<Vec<_>>().join("; ")
}

fn called_off() -> Failure {
    Failure::new(Exit::Interrupted, "the migration was called off")
}

/// Resolves when the proxy does not answer any more.
async fn silence(socket: &Path, limit: Duration) -> Failure {
    loop {
        sleep(ASKED_EVERY).await;
        match answer(socket, limit).await {
            Some(Ok(())) => {}
            Some(Err(failure)) => return failure,
            None => return silent_for(limit),
        }
    }
}

/// Resolves when a proxy that is there does not answer while CRIU sends pages to it. One that has gone has closed its
/// page server, so that CRIU fails by itself.
pub(super) async fn stands_still(socket: &Path) -> Failure {
    while answer(socket, ANSWERS_CRIU_WITHIN).await.is_some() {
        sleep(ASKED_EVERY).await;
    }
    silent_for(ANSWERS_CRIU_WITHIN)
}

/// Whether the proxy can be asked; `None` if it does not answer in time.
async fn answer(socket: &Path, limit: Duration) -> Option<Result<(), Failure>> {
    let status = async { Client::connect(socket).await?.patient().status().await };
    let asked = timeout(limit, status).await;
    asked.ok().map(|answer| Ok(answer.map(drop)?))
}

fn silent_for(limit: Duration) -> Failure {
    Failure::failed(format!("the proxy has not answered for {limit:?}"))
}

/// The CRIU whose script this is. When it has gone nobody waits for the script, and the process runs.
struct Criu {
    ended: Interrupts,
    /// A directory of its own that only it can show.
    dir: Option<PathBuf>,
}

impl Criu {
    /// From now on its end is seen.
    fn watch() -> Result<Criu, Failure> {
        let ended = Interrupts::catch()?;
        set_parent_process_death_signal(Some(Signal::TERM))
            .map_err(|error| Failure::failed(format!("PR_SET_PDEATHSIG: {error}")))?;
        Ok(Criu { ended, dir: env::var_os(IMAGE_DIR).map(PathBuf::from) })
    }

    /// Resolves when it has gone, or somebody else ends the script.
    async fn gone(&mut self) {
        if self.is_there() {
            self.ended.next().await;
        }
    }

    /// Whether it is there.
    fn is_there(&self) -> bool {
        self.dir.as_ref().is_none_or(|dir| dir.exists())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_passes_the_environment_unchanged() {
        let hand_over = HandOver {
            socket: "/run/a b".into(),
            snapshot: "web \"1\"".to_owned(),
            to: Some("hostb:1".to_owned()),
            dir: "/w/3".into(),
            attempt: 7,
        };
        let (name, value) = hand_over.to_environment();
        assert_eq!(name, VARIABLE);
        let back: HandOver = serde_json::from_str(value.to_str().unwrap()).unwrap();
        assert_eq!(back, hand_over);
        assert!(HandOver::asked().is_none());
    }

    #[tokio::test]
    async fn a_proxy_that_is_not_there_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let why = silence(&dir.path().join("control.sock"), ANSWERS_WITHIN).await;
        assert_eq!(why.exit, Exit::Unreachable);
    }
}
