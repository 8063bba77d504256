//! The options of the daemons.

use std::path::PathBuf;

use clap::{Args, Parser};

/// Exit status for a configuration that is refused: `EX_CONFIG` of sysexits.h, as systemd has it.
pub const EXIT_CONFIG: u8 = 78;

const EXIT_STATUS: &str = "\
Exit status:
  0   stopped as asked, or the configuration is good (--check-config)
  1   failed
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
systemctl start criu-image-proxy-stream.socket criu-image-proxy-control.socket\n\n\
Without systemd it binds its sockets itself, in --work-dir. Then:\n\n  \
criu dump --stream -D /run/criu-image/proxy -t PID",
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
criu-image-cache-control.socket\n\n\
Without systemd it binds its sockets itself, in --work-dir, and listens on the configured \
address. Then:\n\n  \
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

    /// Check the configuration, print the settings in force, and exit
    #[arg(long)]
    pub check_config: bool,

    /// Bind the sockets in DIR when systemd hands none over; made if it is missing
    #[arg(short = 'W', long, value_name = "DIR")]
    pub work_dir: Option<PathBuf>,

    /// Log more: -v debug, -vv trace
    #[arg(short, long, action = clap::ArgAction::Count)]
    pub verbose: u8,
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
