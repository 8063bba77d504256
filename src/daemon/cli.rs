//! The options of the daemons.

use std::io;
use std::os::fd::RawFd;
use std::path::{PathBuf, absolute};

use clap::{Args, Parser, value_parser};
use tracing::Level;

use crate::config::{self, Shared};

/// Exit status for options that cannot be followed, clap's own.
pub const EXIT_USAGE: u8 = 2;

/// Exit status for a configuration that is refused: `EX_CONFIG` of sysexits.h, as systemd has it.
pub const EXIT_CONFIG: u8 = 78;

const EXIT_STATUS: &str = "\
Exit status:
  0   stopped as asked, or the configuration is good (--check-config); with --daemon: it serves now;
      with --ps-socket: the socket was closed and nothing was lost
  1   failed; with --ps-socket: a snapshot was cut when the socket was closed
  2   wrong usage
  78  the configuration is refused";

/// The options of `criu-image-proxy`.
#[derive(Debug, Parser)]
#[command(
    name = "criu-image-proxy",
    version,
    about = "Takes CRIU's images on the source host and forwards them to a cache",
    long_about = "criu-image-proxy takes the images of CRIU's dumps on the source host, over the \
socket streamer-capture.sock in its work-dir, and forwards them through memory to a \
criu-image-cache on the destination host.\n\n\
It is meant to be started by systemd:\n\n  \
systemctl start criu-image-proxy-stream.socket criu-image-proxy-remote.socket \\\n      \
criu-image-proxy-control.socket\n\n\
Without systemd it binds its sockets itself, in --work-dir, and keeps the rules of CRIU's own \
daemons:\n\n  \
criu-image-proxy --daemon --pidfile FILE --log-file FILE --address CACHE\n\n\
Then:\n\n  \
criu dump --stream -D /run/criu-image/proxy -t PID --action-script criu-imagectl",
    after_help = EXIT_STATUS
)]
pub struct ProxyCli {
    #[command(flatten)]
    /// What both daemons have.
    pub common: Common,
}

/// The options of `criu-image-cache`.
#[derive(Debug, Parser)]
#[command(
    name = "criu-image-cache",
    version,
    about = "Holds CRIU's images on the destination host and serves them to the restore",
    long_about = "criu-image-cache receives the images of CRIU's dumps from criu-image-proxy, holds \
them in memory, and serves them to CRIU's restores over the socket streamer-serve.sock in its \
work-dir.\n\n\
It is meant to be started by systemd:\n\n  \
systemctl start criu-image-cache-link.socket criu-image-cache-stream.socket \\\n      \
criu-image-cache-remote.socket criu-image-cache-control.socket\n\n\
Without systemd it binds its sockets itself, in --work-dir, listens on the configured address, \
and keeps the rules of CRIU's own daemons:\n\n  \
criu-image-cache --daemon --pidfile FILE --log-file FILE --address ADDR\n\n\
Then:\n\n  \
criu restore --stream -D /run/criu-image/cache",
    after_help = EXIT_STATUS
)]
pub struct CacheCli {
    #[command(flatten)]
    /// What both daemons have.
    pub common: Common,
}

/// The options that both daemons have.
#[derive(Debug, Clone, Args)]
pub struct Common {
    /// Read the configuration from FILE instead of the one in /etc/criu-image-relay
    #[arg(short, long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// Check the configuration, print the settings in force, options included, and exit
    #[arg(long)]
    pub check_config: bool,

    /// Bind the sockets in DIR when systemd hands none over; made if it is missing
    #[arg(short = 'W', long, value_name = "DIR")]
    pub work_dir: Option<PathBuf>,

    /// At the cache: listen on ADDR. At the proxy: send to the cache at ADDR. A name or an IP
    /// address, IPv6 with or without brackets; replaces that part of `listen` or `cache`
    #[arg(long, value_name = "ADDR", value_parser = config::host)]
    pub address: Option<String>,

    /// The port of that address [default: that of the configuration, or 9996]
    #[arg(long, value_name = "PORT", value_parser = value_parser!(u16).range(1..))]
    pub port: Option<u16>,

    /// Use the open descriptor FD as the link: a connected stream socket, TCP or unix. Nothing is
    /// connected to or listened on then, --address and --port are ignored. When the other side closes
    /// it, the daemon ends; a cache serves the whole snapshots that it holds first
    #[arg(long, value_name = "FD")]
    pub ps_socket: Option<RawFd>,

    /// Go to the background. Returns when the daemon serves, with status 0, or has failed. Needs
    /// --log-file where there is no journal. Not for systemd services, which need no such thing
    #[arg(short, long)]
    pub daemon: bool,

    /// Write the daemon's pid to FILE, which is removed at the end. A second daemon with the same
    /// FILE does not start
    #[arg(long, value_name = "FILE")]
    pub pidfile: Option<PathBuf>,

    /// Write one zero byte to the open descriptor FD once the daemon serves, and close it. Not
    /// together with --daemon
    #[arg(long, value_name = "FD")]
    pub status_fd: Option<RawFd>,

    /// Append logs to FILE instead of the journal or stderr; SIGHUP opens it anew after a rotation
    #[arg(short = 'o', long, value_name = "FILE")]
    pub log_file: Option<PathBuf>,

    /// Log more: -v debug, -vv trace
    #[arg(short, long, action = clap::ArgAction::Count)]
    pub verbose: u8,

    /// What --daemon starts: the pipe to the process that waits until it is ready.
    #[arg(long, hide = true)]
    pub(super) ready_fd: Option<RawFd>,
}

impl Common {
    /// The same with every path absolute: in the background the daemon works in `/`.
    pub(super) fn resolved(&self) -> io::Result<Common> {
        let mut resolved = self.clone();
        let Common { config, work_dir, pidfile, log_file, .. } = &mut resolved;
        for path in [config, work_dir, pidfile, log_file].into_iter().flatten() {
            *path = absolute(&*path)?;
        }
        Ok(resolved)
    }

    /// Puts the options over the settings of the file.
    pub(super) fn replace(&self, mut settings: Shared<'_>) {
        settings.set_address(self.address.as_deref(), self.port);
        if let Some(work_dir) = &self.work_dir {
            settings.work_dir.clone_from(work_dir);
        }
        *settings.daemon |= self.daemon;
        if self.pidfile.is_some() {
            settings.pidfile.clone_from(&self.pidfile);
        }
        if self.log_file.is_some() {
            settings.log.file.clone_from(&self.log_file);
        }
        let least = match self.verbose {
            0 => settings.log.level,
            1 => Level::DEBUG,
            _ => Level::TRACE,
        };
        settings.log.level = settings.log.level.max(least);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_options_are_consistent() {
        ProxyCli::command().debug_assert();
        CacheCli::command().debug_assert();
    }
}
