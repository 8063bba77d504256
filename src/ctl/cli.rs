//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use super::exit::HELP;
use super::{hook, migrate, open, place, restore, watch};

/// The command line of `criu-imagectl`.
#[derive(Debug, Parser)]
#[command(
    name = "criu-imagectl",
    version,
    about = "Looks at and steers criu-image-proxy and criu-image-cache",
    long_about = "criu-imagectl asks criu-image-proxy (on the source host) and criu-image-cache (on \
the destination host) over their control sockets.\n\n\
Without --proxy, --cache or --socket it asks the daemon whose socket exists here. Where both run, \
status and list show both, and push, extract, view, put, get, migrate and restore know which one they \
need.\n\n\
Examples:\n  \
criu-imagectl status\n  \
criu-imagectl --cache list\n  \
criu-imagectl wait web && criu restore --stream -D /srv/web",
    after_help = HELP,
    subcommand_required = true,
    arg_required_else_help = true
)]
pub struct Cli {
    #[command(flatten)]
    pub(super) daemon: Daemon,

    /// Print results as JSON; errors stay text on stderr
    #[arg(long, global = true)]
    pub(super) json: bool,

    #[command(subcommand)]
    pub(super) command: Command,
}

/// Which daemon is asked.
#[derive(Debug, Default, Args)]
#[group(skip)]
pub(super) struct Daemon {
    /// Ask criu-image-proxy
    #[arg(long, global = true, conflicts_with_all = ["cache", "socket"])]
    pub(super) proxy: bool,

    /// Ask criu-image-cache
    #[arg(long, global = true, conflicts_with = "socket")]
    pub(super) cache: bool,

    /// Ask the instance NAME: criu-image-proxy@NAME.service or criu-image-cache@NAME.service
    #[arg(long, global = true, value_name = "NAME", value_parser = place::instance, conflicts_with = "socket")]
    pub(super) instance: Option<String>,

    /// Ask the daemon whose control socket is at PATH
    #[arg(long, global = true, value_name = "PATH")]
    pub(super) socket: Option<PathBuf>,
}

impl Daemon {
    /// Whether the options name one daemon at most. clap only compares those that stand on the same side of the
    /// command.
    pub(super) fn is_consistent(&self) -> bool {
        let ways = [self.proxy, self.cache, self.socket.is_some()];
        let named = ways.iter().filter(|way| **way).count();
        named <= 1 && !(self.socket.is_some() && self.instance.is_some())
    }
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Show the daemons at a glance: sessions, snapshots, memory, links
    #[command(after_help = "Example:\n  criu-imagectl status\n  criu-imagectl status --watch\n  \
criu-imagectl --json status --watch 10")]
    Status {
        /// Show them again and again, every 2 seconds or as often as this says, until it is interrupted;
        /// with --json each time is one line
        #[arg(
            long,
            value_name = "SECONDS",
            num_args = 0..=1,
            default_missing_value = "2",
            value_parser = watch::every
        )]
        watch: Option<Duration>,
    },

    /// List the snapshots
    #[command(after_help = "Example:\n  criu-imagectl --cache list")]
    List,

    /// Show a snapshot and its images
    #[command(after_help = super::timeline::HELP)]
    Show(Show),

    /// Wait until a snapshot is whole; it need not be there yet
    #[command(after_help = "Example, on the destination host:\n  \
criu-imagectl wait web --timeout 1min && criu restore --stream -D /srv/web\n\n\
The exit status is 5 if the snapshot is damaged and 6 if the time is over.")]
    Wait(Wait),

    /// Forget snapshots and free their memory
    #[command(after_help = "Example:\n  criu-imagectl --cache drop web db")]
    Drop {
        /// The snapshots' ids
        #[arg(required = true, value_name = "SNAPSHOT")]
        snapshots: Vec<String>,
    },

    /// Write a snapshot's images into a directory, readable by crit and criu restore -D
    #[command(after_help = "Example, on the destination host:\n  \
criu-imagectl extract /tmp/web && crit decode -i /tmp/web/inventory.img --pretty\n\n\
The cache keeps the snapshot; it does not count as taken. DIR is made with mode 0700 and the files \
with mode 0600: they are the memory of a process. If anything fails, what was written is removed.")]
    Extract(Extract),

    /// Make a directory for criu restore -D in which the pages are links into the cache's memory
    #[command(after_help = "Example, on the destination host, as root:\n  \
criu-imagectl view /tmp/web && criu restore -D /tmp/web\n\n\
For clients that know only directories, as runc does: nothing but small images is copied. The cache \
keeps the snapshot; it does not count as taken. The links lead to the snapshot as long as the cache \
holds it, and to nothing or something else after that: drop it when it is restored, and not before. \
If anything fails, what was made is removed. restore --view does all of it.")]
    View(View),

    /// Send a directory of images made by criu dump -D through the proxy
    #[command(after_help = "Example, on the source host:\n  \
criu dump -t PID -D /tmp/web && criu-imagectl push /tmp/web --to hostb\n\n\
It ends when the cache has acknowledged the snapshot. Files that are not CRIU's images (logs, \
statistics) are left out. Of a dump with a parent (--prev-images-dir) the other pages have to be at the \
cache already: they came with --page-server (open --pages), or in the snapshot --parent, which was pushed \
before. What a restore gets then is as if it had been one dump.")]
    Push(Push),

    /// Make CRIU's stream socket in a directory of your choice, and a page server
    #[command(after_help = open::args::HELP)]
    Open(open::args::Open),

    /// Have CRIU wait until the cache has a dump; its action script
    #[command(after_help = hook::HELP)]
    Hook(hook::Hook),

    /// Move a running process: its memory in rounds, then the rest while it stands still
    #[command(after_help = migrate::args::HELP)]
    Migrate(migrate::args::Migrate),

    /// Restore a process from a snapshot; it waits until the snapshot is whole
    #[command(after_help = restore::args::HELP)]
    Restore(restore::args::Restore),

    /// Put images into a snapshot by name, through the proxy
    #[command(after_help = "Examples, on the source host:\n  \
criu-imagectl put --list --finish web /tmp/web/*.img\n  \
tar -c /srv/web | criu-imagectl put --name rootfs.tar web -\n\n\
Each image is at the cache when the next begins, and all are when it ends. If one fails, the \
snapshot is damaged: begin it anew with --list.")]
    Put(Put),

    /// Get images of a snapshot by name, from the cache
    #[command(after_help = "Examples, on the destination host:\n  \
criu-imagectl get web rootfs.tar | tar -x -C /\n  \
criu-imagectl get --to /tmp/web web inventory.img pstree.img\n  \
criu-imagectl get --ids\n\n\
At the cache it waits until the snapshot is whole, and may be called before the dump. At the proxy \
(--proxy) it reads what a dump needs of those before it. The snapshot does not count as taken. DIR is \
made with mode 0700 and the files with mode 0600. If anything fails, what was written is removed.")]
    Get(Get),

    /// End a dump at the proxy, or a restore at the cache, of images by name
    #[command(after_help = "Examples:\n  \
criu-imagectl --proxy finish web --images 20   # the dump: it is whole\n  \
criu-imagectl --cache finish web               # the restore: it is taken")]
    Finish(Finish),

    /// Write man pages or shell completions, for packagers
    #[command(hide = true)]
    Generate {
        /// What to write
        what: Generate,
        /// Into this directory
        dir: PathBuf,
    },
}

/// `show`
#[derive(Debug, Args)]
pub(super) struct Show {
    /// Show where the time went: rounds, dump, acknowledgement, arrival, wait, restore
    #[arg(long)]
    pub(super) timeline: bool,

    /// Add what --json show --timeline printed on the other host
    #[arg(long, value_name = "FILE", requires = "timeline")]
    pub(super) with: Option<PathBuf>,

    /// Draw the timeline into a file
    #[arg(long, value_name = "FILE", requires = "timeline")]
    pub(super) svg: Option<PathBuf>,

    /// The snapshot's id
    pub(super) snapshot: String,
}

/// `wait`
#[derive(Debug, Args)]
pub(super) struct Wait {
    /// The snapshot's id
    pub(super) snapshot: String,

    /// Give up after this time, as in 30, 1.5s, 500ms, 10min, 2h
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub(super) timeout: Option<Duration>,

    /// Wait for this state
    #[arg(long = "for", value_name = "STATE", default_value = "whole")]
    pub(super) until: Until,
}

/// The state that `wait` waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Until {
    /// It can be restored
    Whole,
    /// A restore has read it
    Taken,
}

/// `extract`
#[derive(Debug, Args)]
pub(super) struct Extract {
    /// The snapshot, if it is not called as DIR is
    #[arg(long, value_name = "ID")]
    pub(super) snapshot: Option<String>,

    /// Take it even if the memory in it may have changed before it was copied
    #[arg(long)]
    pub(super) accept_changed_memory: bool,

    /// Replace images that are there already
    #[arg(long)]
    pub(super) force: bool,

    /// Where the images go; made if it is missing
    pub(super) dir: PathBuf,
}

/// `view`
#[derive(Debug, Args)]
pub(super) struct View {
    /// The snapshot, if it is not called as DIR is
    #[arg(long, value_name = "ID")]
    pub(super) snapshot: Option<String>,

    /// Take it even if the memory in it may have changed before it was copied
    #[arg(long)]
    pub(super) accept_changed_memory: bool,

    /// Replace images that are there already
    #[arg(long)]
    pub(super) force: bool,

    /// The directory; made if it is missing
    pub(super) dir: PathBuf,
}

/// `push`
#[derive(Debug, Args)]
pub(super) struct Push {
    /// The snapshot's id, if not DIR's name
    #[arg(long, value_name = "ID")]
    pub(super) snapshot: Option<String>,

    /// The cache it goes to, instead of the configured one
    #[arg(long, value_name = "HOST[:PORT]")]
    pub(super) to: Option<String>,

    /// The snapshot that the parent of an incremental dump was pushed as
    #[arg(long, value_name = "ID")]
    pub(super) parent: Option<String>,

    /// Say which files are left out
    #[arg(short, long)]
    pub(super) verbose: bool,

    /// The directory with the images
    pub(super) dir: PathBuf,
}

/// `put`
#[derive(Debug, Args)]
pub(super) struct Put {
    /// Append the snapshot's id to this list of ids first, which begins the snapshot anew if it has
    /// failed; without NAME, to the list that has no name
    #[arg(long, value_name = "NAME", num_args = 0..=1, require_equals = true, default_missing_value = "")]
    pub(super) list: Option<String>,

    /// Write on at the end of images that are there
    #[arg(long)]
    pub(super) append: bool,

    /// The image's name, if not FILE's
    #[arg(long)]
    pub(super) name: Option<String>,

    /// End the dump: the snapshot is whole, with these images and no others
    #[arg(long)]
    pub(super) finish: bool,

    /// The snapshot's id
    pub(super) snapshot: String,

    /// What becomes an image of the file's name; - is stdin, and needs --name
    #[arg(value_name = "FILE")]
    pub(super) files: Vec<PathBuf>,
}

/// `get`
#[derive(Debug, Args)]
pub(super) struct Get {
    /// Print a list of snapshot ids, oldest first, instead; without NAME, the one that has no name
    #[arg(
        long,
        value_name = "NAME",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "",
        conflicts_with_all = ["snapshot", "to", "force"]
    )]
    pub(super) ids: Option<String>,

    /// Take it even if the memory in it may have changed before it was copied
    #[arg(long, conflicts_with = "ids")]
    pub(super) accept_changed_memory: bool,

    /// Write the images into DIR, which is made if it is missing, instead of one to stdout
    #[arg(long, value_name = "DIR")]
    pub(super) to: Option<PathBuf>,

    /// Replace images that are in DIR already
    #[arg(long, requires = "to")]
    pub(super) force: bool,

    /// The snapshot's id
    #[arg(required_unless_present = "ids")]
    pub(super) snapshot: Option<String>,

    /// The images' names
    #[arg(value_name = "IMAGE", required_unless_present = "ids")]
    pub(super) images: Vec<String>,
}

/// `finish`
#[derive(Debug, Args)]
pub(super) struct Finish {
    /// How many images were written, one that was appended to counted each time; another number
    /// damages the snapshot (proxy only)
    #[arg(long, value_name = "N")]
    pub(super) images: Option<u64>,

    /// The snapshot's id
    pub(super) snapshot: String,
}

/// What `generate` writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Generate {
    /// Man pages
    Man,
    /// Completions for bash, zsh and fish
    Completions,
}

/// Reads a duration: seconds, or a number with ms, s, min or h.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || "a duration is wanted, as in 30, 1.5s, 500ms, 10min, 2h".to_owned();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let number: f64 = number.parse().map_err(|_| wrong())?;
    let seconds = match unit.trim() {
        "" | "s" => number,
        "ms" => number / 1e3,
        "min" => number * 60.0,
        "h" => number * 3600.0,
        _ => return Err(wrong()),
    };
    Duration::try_from_secs_f64(seconds).map_err(|_| wrong())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_has_an_example() {
        for command in Cli::command().get_subcommands().filter(|command| !command.is_hide_set()) {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.contains("Example"), "{}", command.get_name());
        }
    }

    #[test]
    fn durations_have_units() {
        assert_eq!(duration("30"), Ok(Duration::from_secs(30)));
        assert_eq!(duration("1.5s"), Ok(Duration::from_millis(1500)));
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(duration("10min"), Ok(Duration::from_secs(600)));
        for wrong in ["", "s", "-1", "1 week", "1e400"] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn only_one_daemon_can_be_named() {
        assert!(Cli::try_parse_from(["criu-imagectl", "--proxy", "--cache", "list"]).is_err());
        let one_is_named = |before: &[&str], after: &[&str]| {
            let cli = Cli::try_parse_from([&["criu-imagectl"], before, &["list"], after].concat());
            cli.is_ok_and(|cli| cli.daemon.is_consistent())
        };
        let instance: &[&str] = &["--instance", "b"];
        assert!(one_is_named(instance, &["--cache"]));
        assert!(one_is_named(&["--proxy", "--instance", "b"], &[]));
        for (before, after) in [
            (instance, &["--socket", "/s"][..]),
            (&[], &["--socket", "/s", "--instance", "b"]),
            (&["--proxy"], &["--cache"]),
            (&["--cache"], &["--socket", "/s"]),
        ] {
            assert!(!one_is_named(before, after), "{before:?} {after:?}");
        }
        assert!(Cli::try_parse_from(["criu-imagectl", "list", "--cache"]).is_ok());
    }
}
