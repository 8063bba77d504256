//! `restore`: its command line.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use crate::ctl::cli::duration;
use crate::ctl::criu::CriuArgs;

/// What follows the options in the help and the man page.
pub(in crate::ctl) const HELP: &str = "\
Example, on the destination host, before or after the dump:
  criu-imagectl restore web -- --tcp-established
or by systemd, which runs the same:
  systemctl start criu-image-restore@web

It waits until the snapshot is whole, then criu restores the process in the background and ends. The \
snapshot is taken then, and not if that fails: CRIU's errors are told, and it may be restored once more. A cache that \
is restarted meanwhile is waited for.

One restore gets a snapshot: a second one is refused unless it is asked for as a copy. With --view criu finds the \
images in a directory (criu restore -D), for plugins that read files. What CRIU does not get right from a pipe \
is restored like that in any case, and the command says so: firewall rules (nftables) of a network \
namespace, private memory in huge pages or of a plugin.";

/// `restore`
#[allow(clippy::struct_excessive_bools)] // Each is an option.
#[derive(Debug, Args)]
pub(in crate::ctl) struct Restore {
    /// Restore a snapshot once more that was taken already, because its process does not run
    #[arg(long)]
    pub(in crate::ctl) again: bool,

    /// Restore a snapshot that another restore has, or waits for, or has taken: both processes are to run
    #[arg(long)]
    pub(in crate::ctl) copy: bool,

    /// Restore it even if the memory in it may have changed before it was copied
    #[arg(long)]
    pub(in crate::ctl) accept_changed_memory: bool,

    /// Give up if the snapshot is not whole after this time, as in 30, 1.5s, 500ms, 10min, 2h
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub(in crate::ctl) timeout: Option<Duration>,

    /// Write the pid of the restored process to FILE
    #[arg(long, value_name = "FILE")]
    pub(in crate::ctl) pidfile: Option<PathBuf>,

    /// Restore from a directory in which the pages are links into the cache's memory, instead of
    /// through the stream
    #[arg(long)]
    pub(in crate::ctl) view: bool,

    /// Restore through the stream even what needs a view: firewall rules are lost then, and memory in
    /// huge pages makes the restore fail
    #[arg(long, conflicts_with = "view")]
    pub(in crate::ctl) stream: bool,

    #[command(flatten)]
    pub(in crate::ctl) criu: CriuArgs,

    /// The snapshot's id
    pub(in crate::ctl) snapshot: String,

    /// Options for criu restore, after --
    #[arg(last = true, value_name = "CRIU-OPTION")]
    pub(in crate::ctl) options: Vec<OsString>,
}
