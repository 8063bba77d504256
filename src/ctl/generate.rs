//! `generate`: man pages and shell completions, for packagers.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use clap::{Command, CommandFactory};
use clap_complete::Shell;
use clap_mangen::Man;

use super::cli::{Cli, Generate};
use super::exit::Failure;
use crate::daemon::cli::{CacheCli, ProxyCli};

/// The commands that there are.
fn commands() -> Vec<Command> {
    vec![Cli::command(), ProxyCli::command(), CacheCli::command()]
}

/// Writes them into a directory, which is made if it is missing.
pub(super) fn run(what: Generate, dir: &Path) -> Result<(), Failure> {
    let written = fs::create_dir_all(dir).and_then(|()| {
        commands().into_iter().try_for_each(|command| match what {
            Generate::Man => man(command, dir),
            Generate::Completions => completions(command, dir),
        })
    });
    written.map_err(|error| Failure::failed(format!("{}: {error}", dir.display())))
}

/// A page for the command, and one for each of its commands.
fn man(mut command: Command, dir: &Path) -> io::Result<()> {
    command = command.disable_help_subcommand(true);
    command.build();
    pages(&command, dir)
}

fn pages(command: &Command, dir: &Path) -> io::Result<()> {
    let name = command.get_display_name().unwrap_or_else(|| command.get_name()).to_owned();
    // The daemons are in section 8, as their units say.
    let section = if name.starts_with("criu-imagectl") { "1" } else { "8" };
    let page = Man::new(command.clone()).section(section);
    page.render(&mut File::create(dir.join(format!("{name}.{section}")))?)?;
    command.get_subcommands().filter(|sub| !sub.is_hide_set()).try_for_each(|sub| pages(sub, dir))
}

fn completions(mut command: Command, dir: &Path) -> io::Result<()> {
    let name = command.get_name().to_owned();
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        clap_complete::generate_to(shell, &mut command, &name, dir)?;
    }
    Ok(())
}
