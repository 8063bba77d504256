//! The start of a daemon, up to where it serves: the rules that CRIU's own daemons have.

use std::io;
use std::process::ExitCode;

use rustix::process::{Resource, getrlimit, setrlimit};

use super::background;
use super::cli::{Common, EXIT_CONFIG, EXIT_USAGE};
use super::given::{BadDescriptor, Given};
use super::logging::{self, Logging};
use super::service::{self, Daemon, load};
use crate::config::{ConfigError, Settings};

/// Why the daemon does not even begin: nothing logs yet.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{0}")]
    Usage(String),
    #[error("{0}")]
    Descriptor(#[from] BadDescriptor),
    #[error("{0}")]
    Config(#[from] ConfigError),
    #[error("{0}")]
    Io(#[from] io::Error),
}

impl Failure {
    fn status(&self) -> u8 {
        match self {
            Failure::Usage(_) | Failure::Descriptor(_) => EXIT_USAGE,
            Failure::Config(_) => EXIT_CONFIG,
            Failure::Io(_) => 1,
        }
    }
}

/// The body of a daemon's `main`.
pub fn main<D: Daemon>(options: &Common) -> ExitCode {
    match begin::<D>(options) {
        Ok(status) => status,
        Err(failure) => {
            if !logging::tell_failure(&failure) {
                eprintln!("{}: {failure}", D::NAME);
            }
            ExitCode::from(failure.status())
        }
    }
}

fn begin<D: Daemon>(options: &Common) -> Result<ExitCode, Failure> {
    let options = options.resolved()?;
    let mut settings = load::<D>(&options)?;
    if options.check_config {
        print!("{}", settings.to_toml());
        return Ok(ExitCode::SUCCESS);
    }
    let background = *settings.shared().daemon || options.ready_fd.is_some();
    // This sets FD_CLOEXEC on them, so that no option takes one of them as well.
    let from_systemd = sd_notify::listen_fds().is_ok_and(|sockets| sockets.len() > 0);
    if background {
        let log_file = settings.shared().log.file.is_some();
        if let Some(objection) = background::objection(&options, log_file, from_systemd) {
            return Err(Failure::Usage(objection));
        }
        if options.ready_fd.is_none() {
            return Ok(background::start()?);
        }
    }
    let given = Given::take(&options)?;
    if background {
        background::enter(D::NAME)?;
    }
    let logging = Logging::start(settings.shared().log, background)?;
    raise_descriptor_limit();
    match service::run::<D>(&options, settings, given, &logging) {
        Ok(true) => Ok(ExitCode::SUCCESS),
        Ok(false) => Ok(ExitCode::FAILURE),
        Err(error) => {
            logging::failed(&error);
            if !logging.is_on_stderr() {
                eprintln!("{}: {error}", D::NAME);
            }
            Ok(ExitCode::FAILURE)
        }
    }
}

/// An image is a descriptor or two; the soft limit is a default for programs that use select(2).
fn raise_descriptor_limit() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::debug!("the limit of open files stays as it is: {error}");
    }
}
