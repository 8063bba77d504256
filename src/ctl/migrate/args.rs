//! `migrate`: its command line.

use std::ffi::OsString;
use std::time::Duration;

use clap::Args;

use crate::ctl::cli::duration;
use crate::ctl::criu::CriuArgs;

/// What follows the options in the help and the man page.
pub(in crate::ctl) const HELP: &str = "\
Example, on the source host:
  criu-imagectl migrate --tree 4711 --to hostb --snapshot web -- --tcp-established
and on the destination host, before or after:
  criu-imagectl restore web

Memory is sent in rounds while the process runs: first all of it, then what was written to since. When \
the rest fits into --max-downtime at the speed that was measured, the process is frozen and dumped. \
CRIU kills it when the cache has acknowledged the whole snapshot, and not before; whatever fails until \
then, the process runs on here. The time of the restore comes on top.

If the goal cannot be reached (the process writes faster than the link carries, further rounds do not \
help, or --max-rounds are used up), it is not frozen at all: exit status 7. Nor is it on SIGINT, SIGTERM \
or SIGHUP: CRIU is left to undo what it has done, and the cache drops what was sent: exit status 8, or 9 if \
the cache cannot say that it has. If CRIU has been told to end the process by then, or a restore has the \
snapshot, the process moves all the same: exit status 0. A second signal kills CRIU, which may leave the \
process without its connections; so does a proxy that does not answer for 10 s. Without a link to the cache the process is not \
touched at all: exit status 3.

Rounds need a kernel with soft-dirty tracking (criu check --feature mem_dirty_track). Without it, or \
with --max-rounds 0, there is only the final dump; how long it freezes the process is reckoned from its \
memory, by how fast the proxy has sent before, and from its processes and runs of pages.";

/// `migrate`
#[derive(Debug, Args)]
#[allow(clippy::struct_excessive_bools)] // Each is an option.
pub(in crate::ctl) struct Migrate {
    /// The process to move, with all its children
    #[arg(short, long, value_name = "PID", value_parser = clap::value_parser!(u32).range(1..))]
    pub(in crate::ctl) tree: u32,

    /// The cache that it goes to, instead of the configured one
    #[arg(long, value_name = "HOST[:PORT]")]
    pub(in crate::ctl) to: Option<String>,

    /// The snapshot's id; by default the process's name and pid, as in web-4711
    #[arg(long, value_name = "ID")]
    pub(in crate::ctl) snapshot: Option<String>,

    /// How long the process may be frozen here
    #[arg(long, value_name = "DURATION", default_value = "300ms", value_parser = duration)]
    pub(in crate::ctl) max_downtime: Duration,

    /// How many rounds may be sent before the final dump
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub(in crate::ctl) max_rounds: usize,

    /// Make the final dump even if it takes longer than --max-downtime
    #[arg(long)]
    pub(in crate::ctl) force: bool,

    /// Let the process run on here after the dump: a copy, not a move
    #[arg(long)]
    pub(in crate::ctl) leave_running: bool,

    #[command(flatten)]
    pub(in crate::ctl) criu: CriuArgs,

    /// Print the criu commands and do nothing
    #[arg(long)]
    pub(in crate::ctl) dry_run: bool,

    /// Options for every criu pre-dump and dump, after --
    #[arg(last = true, value_name = "CRIU-OPTION")]
    pub(in crate::ctl) options: Vec<OsString>,
}
