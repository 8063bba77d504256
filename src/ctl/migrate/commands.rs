//! The runs of CRIU that a migration consists of.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use super::args::Migrate;
use super::hand_over::HandOver;
use crate::ctl::criu::{LOG, Run};

/// Where the pages and the small images of a migration go.
#[derive(Debug)]
pub(super) struct Commands<'a> {
    pub(super) args: &'a Migrate,
    /// The directory with the rounds' directories.
    pub(super) work_dir: &'a Path,
    /// The page server; `None` in a dry run.
    pub(super) page_server: Option<SocketAddr>,
    /// The rounds that have been made; the next one is incremental, if there is one.
    pub(super) rounds: usize,
}

impl Commands<'_> {
    /// Whether the kernel tells which pages were written to.
    pub(super) fn check(&self) -> Run {
        self.run("check", vec!["--feature".into(), "mem_dirty_track".into()])
    }

    /// The next round: a pre-dump.
    pub(super) fn round(&self) -> Run {
        let mut arguments = self.common();
        arguments.push("--track-mem".into());
        arguments.extend(self.parent());
        arguments.extend(self.args.options.iter().cloned());
        self.run("pre-dump", arguments)
    }

    /// The final dump. Its action script is this program, which hands the snapshot over.
    pub(super) fn dump(&self, hand_over: &HandOver, this_program: &Path) -> Run {
        let mut arguments = self.common();
        if self.rounds > 0 {
            arguments.push("--track-mem".into());
            arguments.extend(self.parent());
        }
        if self.args.leave_running {
            arguments.push("--leave-running".into());
        }
        // CRIU runs the scripts that it is given last to first: this one after the user's.
        arguments.extend(["--action-script".into(), this_program.into()]);
        arguments.extend(self.args.options.iter().cloned());
        let environment = vec![hand_over.to_environment()];
        Run { environment, ..self.run("dump", arguments) }
    }

    /// The directory of the next round, or of the final dump.
    pub(super) fn dir(&self) -> PathBuf {
        self.work_dir.join((self.rounds + 1).to_string())
    }

    fn common(&self) -> Vec<OsString> {
        let (address, port) = match self.page_server {
            Some(server) => (server.ip().to_string(), server.port().to_string()),
            None => ("127.0.0.1".to_owned(), "PORT".to_owned()),
        };
        let [tree, dir] = [self.args.tree.to_string().into(), self.dir().into_os_string()];
        let mut arguments: Vec<OsString> = vec!["-t".into(), tree, "-D".into(), dir];
        let server = ["--page-server", "--address", &address, "--port", &port, "-o", LOG];
        arguments.extend(server.map(OsString::from));
        arguments
    }

    fn parent(&self) -> Vec<OsString> {
        match self.rounds {
            0 => Vec::new(),
            // CRIU takes it as relative to its images directory.
            last => vec!["--prev-images-dir".into(), format!("../{last}").into()],
        }
    }

    fn run(&self, action: &str, rest: Vec<OsString>) -> Run {
        let mut arguments = vec![action.into()];
        arguments.extend(rest);
        let what = format!("criu {action}");
        Run { program: self.args.criu.criu.clone(), what, arguments, environment: Vec::new() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ctl::cli::{Cli, Command};
    use clap::Parser;

    fn migrate(arguments: &[&str]) -> Migrate {
        let words = ["criu-imagectl", "migrate"].iter().chain(arguments);
        match Cli::try_parse_from(words).unwrap().command {
            Command::Migrate(args) => args,
            other => panic!("{other:?}"),
        }
    }

    fn commands(args: &Migrate, rounds: usize) -> Commands<'_> {
        let page_server = Some("127.0.0.1:4000".parse().unwrap());
        Commands { args, work_dir: Path::new("/w"), page_server, rounds }
    }

    fn hand_over() -> HandOver {
        HandOver {
            socket: "/c".into(),
            snapshot: "web".to_owned(),
            to: None,
            dir: "/w/3".into(),
            attempt: 7,
        }
    }

    #[test]
    fn a_round_names_the_one_before_it() {
        let args = migrate(&["-t", "7", "--", "--shell-job"]);
        assert_eq!(
            commands(&args, 0).round().line(),
            "criu pre-dump -t 7 -D /w/1 --page-server --address 127.0.0.1 --port 4000 -o criu.log \
             --track-mem --shell-job"
        );
        assert_eq!(
            commands(&args, 2).round().line(),
            "criu pre-dump -t 7 -D /w/3 --page-server --address 127.0.0.1 --port 4000 -o criu.log \
             --track-mem --prev-images-dir ../2 --shell-job"
        );
    }

    #[test]
    fn the_final_dump_hands_over_after_all_other_scripts() {
        let args = migrate(&["-t", "7", "--criu", "/opt/criu", "--leave-running", "--", "--x"]);
        let run = commands(&args, 2).dump(&hand_over(), Path::new("/bin/criu-imagectl"));
        assert_eq!(
            run.line(),
            "/opt/criu dump -t 7 -D /w/3 --page-server --address 127.0.0.1 --port 4000 -o criu.log \
             --track-mem --prev-images-dir ../2 --leave-running --action-script /bin/criu-imagectl --x"
        );
        assert_eq!(run.environment.len(), 1);
    }

    #[test]
    fn a_dump_without_rounds_tracks_nothing() {
        let args = migrate(&["-t", "7"]);
        let dry = Commands { page_server: None, ..commands(&args, 0) };
        assert_eq!(
            dry.dump(&hand_over(), Path::new("/x")).line(),
            "criu dump -t 7 -D /w/1 --page-server --address 127.0.0.1 --port PORT -o criu.log \
             --action-script /x"
        );
        assert_eq!(dry.check().line(), "criu check --feature mem_dirty_track");
    }

    #[test]
    fn a_pid_is_wanted() {
        for wrong in [&["-t", "0"][..], &["-t", "-1"], &["-t", "web"], &[]] {
            let words = ["criu-imagectl", "migrate"].iter().chain(wrong);
            assert!(Cli::try_parse_from(words).is_err(), "{wrong:?}");
        }
    }
}
