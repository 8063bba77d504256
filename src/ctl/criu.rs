//! Running CRIU.
//!
//! It is not killed in the middle of what it does: its parasite code would be left to clean up after
//! itself, and network locks would stay. An interrupt takes away what it works with (its page server),
//! so that it fails and undoes everything by itself. Only a second one kills it, and a proxy that does not answer any more:
//! what CRIU waits for would never come.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::process::Stdio;

use clap::Args;
use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{Child, Command};
use tokio::select;

use super::complaints::told;
use super::exit::{Exit, Failure};
use super::interrupts::Interrupts;
use super::work_dir::WorkDir;

/// CRIU's log, in its directory.
pub(super) const LOG: &str = "criu.log";
/// What it says before it has a log.
const OUTPUT: &str = "criu.out";
/// So much of the end of a log is looked at.
const TAIL: u64 = 64 << 10;

/// Which CRIU is run, and where: the options of commands that run it.
#[derive(Debug, Args)]
pub(super) struct CriuArgs {
    /// The criu to run
    #[arg(long, value_name = "PATH", default_value = "criu")]
    pub(super) criu: PathBuf,

    /// Where the work directory for CRIU's small images, sockets and logs is made: on a tmpfs; by
    /// default /run/criu-image, or the user's runtime directory
    #[arg(long, value_name = "DIR")]
    pub(super) work_dir: Option<PathBuf>,

    /// Keep the work directory; otherwise it is removed, also after a failure
    #[arg(long)]
    pub(super) keep: bool,
}

impl CriuArgs {
    /// Makes the work directory, whose name begins with `what`.
    pub(super) fn make_work_dir(&self, what: &str) -> Result<WorkDir, Failure> {
        WorkDir::make(self.work_dir.as_deref(), what, self.keep)
    }
}

/// A run of CRIU, before it is one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Run {
    /// The program.
    pub(super) program: PathBuf,
    /// What it does, for messages: `criu dump`.
    pub(super) what: String,
    /// Its arguments.
    pub(super) arguments: Vec<OsString>,
    /// What is added to its environment.
    pub(super) environment: Vec<(&'static str, OsString)>,
}

impl Run {
    /// As a shell reads it.
    pub(super) fn line(&self) -> String {
        let words = std::iter::once(self.program.as_os_str())
            .chain(self.arguments.iter().map(OsString::as_os_str));
        words.map(|word| quoted(&word.to_string_lossy())).collect::<Vec<_>>().join(" ")
    }

    /// Whether it ends with status 0; it says nothing. It only looks, so it is killed when nobody waits for
    /// that any more.
    pub(super) async fn succeeds(&self) -> Result<bool, Failure> {
        let mut command = self.command();
        command.stdout(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
        Ok(command.status().await.map_err(|error| self.not_run(&error))?.success())
    }

    /// Runs it with its log in `dir`. At the first interrupt `call_off` begins, which is to make it
    /// fail; the second one kills it, and so does `hopeless`, when it says why nothing will come of the run.
    pub(super) async fn run(
        &self,
        dir: &Path,
        interrupts: &mut Interrupts,
        call_off: impl Future<Output = ()>,
        hopeless: impl Future<Output = Failure>,
    ) -> Result<(), Failure> {
        let failed = |error: io::Error| Failure::failed(format!("{}: {error}", dir.display()));
        let output = File::create(dir.join(OUTPUT)).map_err(failed)?;
        let mut command = self.command();
        command.stdout(output.try_clone().map_err(failed)?).stderr(output);
        let mut child = command.spawn().map_err(|error| self.not_run(&error))?;
        let mut interrupted = false;
        let mut called_off = false;
        let mut given_up = None;
        let (mut call_off, mut hopeless) = (pin!(call_off), pin!(hopeless));
        let status = loop {
            select! {
                status = child.wait() => break status,
                _ = interrupts.next() => {
                    if interrupted {
                        terminate(&child);
                    }
                    interrupted = true;
                }
                () = &mut call_off, if interrupted && !called_off => called_off = true,
                why = &mut hopeless, if given_up.is_none() => {
                    terminate(&child);
                    given_up = Some(why);
                }
            }
        };
        let status = status.map_err(|error| self.not_run(&error))?;
        if status.success() {
            // What is done is done, whoever wanted to stop it.
            Ok(())
        } else if interrupted {
            Err(Failure::new(Exit::Interrupted, format!("{} was interrupted", self.what)))
        } else if let Some(why) = given_up {
            Err(why)
        } else {
            let why = complaints(dir).into_iter().map(|line| format!("\n    {line}"));
            let why: String = why.collect();
            Err(Failure::failed(format!("{} failed: {status}{why}", self.what)))
        }
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).envs(self.environment.iter().cloned());
        // Ctrl-C on a terminal goes to the whole foreground group: it would kill CRIU.
        command.stdin(Stdio::null()).process_group(0);
        command
    }

    fn not_run(&self, error: &io::Error) -> Failure {
        let program = self.program.display();
        Failure::failed(format!("{program} cannot be run: {error}"))
            .cure("install CRIU, or say where it is with --criu")
    }
}

fn terminate(child: &Child) {
    let pid = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
    if let Some(pid) = pid {
        // It has ended in the meantime, if this fails.
        let _ = kill_process(pid, Signal::TERM);
    }
}

/// What CRIU complained of.
fn complaints(dir: &Path) -> Vec<String> {
    told(&[OUTPUT, LOG].map(|name| tail(&dir.join(name)).unwrap_or_default()).concat())
}

/// The end of CRIU's log in its directory.
pub(super) fn log_tail(dir: &Path) -> String {
    tail(&dir.join(LOG)).unwrap_or_default()
}

fn tail(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let len = fs::metadata(path)?.len();
    file.seek(SeekFrom::Start(len.saturating_sub(TAIL)))?;
    let mut bytes = Vec::new();
    file.take(TAIL).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// A word as a shell reads it back.
pub(super) fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+,:@%=".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shell_reads_words_back() {
        assert_eq!(quoted("/srv/web-1"), "/srv/web-1");
        assert_eq!(quoted("/srv/my web's"), r"'/srv/my web'\''s'");
        assert_eq!(quoted(""), "''");
        let run = Run {
            program: "criu".into(),
            what: "criu dump".into(),
            arguments: ["dump", "-D", "/a b"].map(OsString::from).into(),
            environment: Vec::new(),
        };
        assert_eq!(run.line(), "criu dump -D '/a b'");
    }

    #[test]
    fn what_is_told_is_of_the_output_and_the_log() {
        let dir = tempfile::tempdir().unwrap();
        assert!(complaints(dir.path()).is_empty());
        fs::write(dir.path().join(OUTPUT), "criu-imagectl: x: no\n").unwrap();
        fs::write(dir.path().join(LOG), "Error (criu/x.c:1): no\nWarn\n").unwrap();
        assert_eq!(complaints(dir.path()), ["criu-imagectl: x: no", "Error (criu/x.c:1): no"]);
    }
}
