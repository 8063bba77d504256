//! `open`: its command line.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Args;

/// What follows the options in the help and the man page.
pub(in crate::ctl) const HELP: &str = "\
Examples:
  criu-imagectl --proxy open /srv/web   # then: criu dump --stream -D /srv/web -t PID, with the action script criu-imagectl
  criu-imagectl --cache open /srv/web   # then: criu restore --stream -D /srv/web
  criu-imagectl --proxy open --pages /srv/web   # then: criu pre-dump --page-server ...

The directory's name is the snapshot's. The sockets are made here and handed to the daemon, which needs \
no right to the directory. It prints the criu commands to use.

With --pages memory goes in rounds, criu pre-dumps with --page-server, each into a directory of its own: \
what was written to since the round before. The images of the last one, which is a criu dump, are then \
pushed. migrate does all of it.";

/// `open`
#[derive(Debug, Args)]
pub(in crate::ctl) struct Open {
    /// The snapshot's id, if not DIR's name
    #[arg(long, value_name = "ID")]
    pub(in crate::ctl) snapshot: Option<String>,

    /// The cache that the dump goes to, instead of the configured one (proxy only)
    #[arg(long, value_name = "HOST[:PORT]")]
    pub(in crate::ctl) to: Option<String>,

    /// Restore a snapshot once more that was taken already: the restore failed (cache only)
    #[arg(long)]
    pub(in crate::ctl) again: bool,

    /// Open a page server, too: for rounds of pages (proxy) and for criu lazy-pages; by default on a free
    /// port of 127.0.0.1
    #[arg(
        long,
        value_name = "ADDRESS:PORT",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "127.0.0.1:0"
    )]
    pub(in crate::ctl) pages: Option<SocketAddr>,

    /// The snapshot whose pages the first round is incremental to (proxy only)
    #[arg(long, value_name = "ID", requires = "pages")]
    pub(in crate::ctl) parent: Option<String>,

    /// The directory; it must exist
    pub(in crate::ctl) dir: PathBuf,
}
