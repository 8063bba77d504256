//! The last moment of a migration: CRIU has written every image and the process is frozen.
//!
//! CRIU runs this program as its action script, without arguments. What it is to do stands in the
//! environment, which CRIU passes on. There is no file to run: `/run` may be mounted `noexec`. As CRIU's
//! `criu/cr-dump.c` and `criu/util.c` (`cr_system`) have it since 3.15: unless the script ends with
//! status 0, also when it is killed, CRIU thaws the process and lets it run on.

use std::env;
use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::control::Client;
use crate::ctl::cli::{Daemon, Push};
use crate::ctl::criu::Run;
use crate::ctl::exit::{Exit, Failure};
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
/// A file in the work directory: the process is to stay here.
const CALLED_OFF: &str = "called-off";

/// The snapshot to hand over.
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
}

impl HandOver {
    /// What CRIU has asked this process to do, if it was CRIU who started it.
    pub(in crate::ctl) fn asked() -> Option<Result<HandOver, Failure>> {
        let called_by_criu = env::args_os().len() == 1 && env::var_os(ACTION).is_some();
        let asked = env::var(VARIABLE).ok().filter(|_| called_by_criu)?;
        let malformed = |error| Failure::failed(format!("{VARIABLE}: {error}"));
        Some(serde_json::from_str(&asked).map_err(malformed))
    }

    /// Keeps a script that has not begun from handing over.
    pub(super) fn call_off(work_dir: &Path) {
        // Then the script fails for want of what was sent, in all likelihood.
        let _ = File::create(work_dir.join(CALLED_OFF));
    }

    fn called_off(&self) -> PathBuf {
        self.dir.with_file_name(CALLED_OFF)
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

    /// Pushes the images and waits until the cache has acknowledged the whole snapshot.
    pub(in crate::ctl) async fn run(self) -> Result<(), Failure> {
        match env::var_os(ACTION) {
            Some(action) if action == POST_DUMP => {}
            Some(action) if action == REHEARSAL => {
                Client::connect(&self.socket).await?.status().await?;
                return Ok(());
            }
            _ => return Ok(()),
        }
        if self.called_off().exists() {
            return Err(Failure::new(Exit::Interrupted, "the migration was called off"));
        }
        let daemon = Daemon { socket: Some(self.socket), ..Daemon::default() };
        let (snapshot, to, dir) = (Some(self.snapshot), self.to, self.dir);
        let push = Push { snapshot, to, dir, parent: None, verbose: false };
        push::run(&daemon, Output { json: false }, &push).await
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
        };
        let (name, value) = hand_over.to_environment();
        assert_eq!(name, VARIABLE);
        let back: HandOver = serde_json::from_str(value.to_str().unwrap()).unwrap();
        assert_eq!(back, hand_over);
        assert!(HandOver::asked().is_none());
    }

    #[test]
    fn it_can_be_called_off() {
        let work_dir = tempfile::tempdir().unwrap();
        let hand_over = HandOver {
            socket: "/c".into(),
            snapshot: "web".to_owned(),
            to: None,
            dir: work_dir.path().join("3"),
        };
        assert!(!hand_over.called_off().exists());
        HandOver::call_off(work_dir.path());
        assert!(hand_over.called_off().exists());
    }
}
