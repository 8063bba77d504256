//! Descriptors that whoever started the daemon gave to it: by number, on the command line. They
//! belong to this one run, so that no configuration names them.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{OwnedFd, RawFd};

use rustix::fs::{OFlags, fcntl_getfl};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};
use tokio::sync::watch;

use super::cli::Common;
use crate::sys::connected::Connected;
use crate::sys::inherited;

/// A descriptor that cannot be what an option says it is.
#[derive(Debug, thiserror::Error)]
#[error("{option} {number}: {cause}")]
pub(super) struct BadDescriptor {
    option: &'static str,
    number: RawFd,
    cause: String,
}

/// What was given.
#[derive(Debug)]
pub(super) struct Given {
    /// Whom to tell that the daemon serves.
    pub(super) readiness: Readiness,
    /// The link (`--ps-socket`).
    pub(super) link: Option<Connected>,
}

impl Given {
    /// Takes the descriptors that the options name. To be called while there is one thread.
    pub(super) fn take(options: &Common) -> Result<Given, BadDescriptor> {
        let mut readiness = Readiness { waiting: None, detach: options.ready_fd.is_some() };
        let telling = [("--ready-fd", options.ready_fd), ("--status-fd", options.status_fd)];
        for (option, number) in telling {
            if let Some(number) = number {
                readiness.waiting = Some((option, take(option, number, writable)?));
            }
        }
        let adopt = |fd| Connected::adopt(fd).map_err(|error| error.to_string());
        let link = options.ps_socket.map(|number| take("--ps-socket", number, adopt));
        Ok(Given { readiness, link: link.transpose()? })
    }
}

fn take<T>(
    option: &'static str,
    number: RawFd,
    check: impl FnOnce(OwnedFd) -> Result<T, String>,
) -> Result<T, BadDescriptor> {
    let taken = inherited::take(number).map_err(|error| error.to_string());
    taken.and_then(check).map_err(|cause| BadDescriptor { option, number, cause })
}

fn writable(fd: OwnedFd) -> Result<File, String> {
    let mode = fcntl_getfl(&fd).map_err(|error| error.to_string())? & OFlags::ACCMODE;
    if mode == OFlags::RDONLY {
        return Err("it is open for reading only".to_owned());
    }
    Ok(fd.into())
}

/// Who waits until the daemon serves: a status descriptor's reader, or the process that `--daemon`
/// was said to.
#[derive(Debug)]
pub(super) struct Readiness {
    waiting: Option<(&'static str, File)>,
    detach: bool,
}

impl Readiness {
    /// The daemon serves. Whoever waited and has gone meanwhile wanted no daemon.
    pub(super) fn report(self) -> io::Result<()> {
        if self.detach {
            // Until now the terminal was to hear of failures.
            let null = File::options().read(true).write(true).open("/dev/null")?;
            dup2_stdin(&null)?;
            dup2_stdout(&null)?;
            dup2_stderr(&null)?;
        }
        if let Some((option, mut file)) = self.waiting {
            file.write_all(&[0]).map_err(|error| {
                io::Error::new(error.kind(), format!("nobody reads {option}: {error}"))
            })?;
        }
        Ok(())
    }
}

/// How the link ended that runs on a given socket. Where none was given it never ends.
#[derive(Debug, Default)]
pub struct GivenLink(watch::Sender<Option<bool>>);

impl GivenLink {
    /// It has ended; `well` if nothing was lost with it.
    pub fn ended(&self, well: bool) {
        self.0.send_replace(Some(well));
    }

    /// Waits for its end.
    pub async fn over(&self) -> bool {
        let mut ended = self.0.subscribe();
        // The sender is in self: it is not dropped while this waits.
        ended.wait_for(Option::is_some).await.is_ok_and(|ended| *ended == Some(true))
    }
}
