//! `generate`: man pages and shell completions, for packagers.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use clap::{Command, CommandFactory};
use clap_complete::Shell;

use super::cli::{Cli, Generate};
use super::exit::Failure;
use super::man::Page;
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
    let page = Page::of(command);
    page.write(&mut File::create(dir.join(page.file()))?)?;
    command.get_subcommands().filter(|sub| !sub.is_hide_set()).try_for_each(|sub| pages(sub, dir))
}

fn completions(mut command: Command, dir: &Path) -> io::Result<()> {
    let name = command.get_name().to_owned();
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        clap_complete::generate_to(shell, &mut command, &name, dir)?;
    }
    Ok(())
}
