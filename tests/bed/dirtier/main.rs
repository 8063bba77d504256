//! A process to checkpoint in rounds: it changes its memory when it is told to, page by page as it is told to.
//!
//! What every page holds follows from the commands, so that `dirtier expect` can tell the checksum that a report must
//! have. The process holds no file open while it waits: commands are files that it looks for and removes.

mod memory;
mod model;
mod run;
mod tell;

use std::error::Error;
use std::path::PathBuf;
use std::{env, process};

use model::{Command, Model, Sizes};

const USAGE: &str = "\
usage: dirtier run [--mib N] [--shared-mib N] [--seed S] --dir DIR
       dirtier tell DIR NAME COMMAND
       dirtier expect [--mib N] [--shared-mib N] [--seed S] [COMMAND…]

run      A process with private memory, and memory that it shares with the processes forked from it, all of it filled
         from the seed (default 1). It is called `a` and takes commands from DIR.
tell     Gives a command to the process NAME, waits until it is done and prints the answer, a line of JSON.
expect   Prints the checksums that a process reports which was told these commands, each of them one argument.

Commands; pages count from 0:
  dirty G K     write generation G into every K-th page of the private memory
  share G K     the same in the shared memory
  churn P       from now on dirty P % of the private memory per second, round and round (0: no more)
  churned N     for `expect` only: what N pages of churn have done, as the report counts them
  unmap I N     unmap N pages of the private memory from page I on
  move I N      remap these pages to another address; they stay the same pages
  fork NAME     fork a process called NAME that takes commands, too
  report        tell the checksums of both memories
  exit          end
";

fn main() -> Result<(), Box<dyn Error>> {
    let mut args: Vec<String> = env::args().skip(1).collect();
    let mode = if args.is_empty() { String::new() } else { args.remove(0) };
    match mode.as_str() {
        "run" => {
            let Given { sizes, dir, commands } = parse(args)?;
            if !commands.is_empty() {
                return Err(wrong(&commands.join(" ")));
            }
            run::run(sizes, dir.ok_or("--dir is missing")?)
        }
        "tell" => {
            let [dir, name, command @ ..] = &args[..] else { return Err(wrong("tell")) };
            let command: Command = command.join(" ").parse()?;
            println!("{}", tell::tell(dir.as_ref(), name, &command)?);
            Ok(())
        }
        "expect" => {
            let Given { sizes, commands, .. } = parse(args)?;
            let mut model = Model::new(sizes);
            for command in commands {
                model.apply(&command.parse()?)?;
            }
            let [private, shared] = model.checksums();
            println!("{{\"private\":\"{private:016x}\",\"shared\":\"{shared:016x}\"}}");
            Ok(())
        }
        "--help" | "-h" => {
            print!("{USAGE}");
            Ok(())
        }
        _ => {
            eprint!("{USAGE}");
            process::exit(2);
        }
    }
}

fn wrong(what: &str) -> Box<dyn Error> {
    format!("{what}: not understood\n{USAGE}").into()
}

#[derive(Default)]
struct Given {
    sizes: Sizes,
    dir: Option<PathBuf>,
    commands: Vec<String>,
}

fn parse(args: Vec<String>) -> Result<Given, Box<dyn Error>> {
    let mut given = Given::default();
    let mut args = args.into_iter();
    while let Some(arg) = args.next() {
        if !arg.starts_with("--") {
            given.commands.push(arg);
            continue;
        }
        let value = args.next().ok_or_else(|| wrong(&arg))?;
        match arg.as_str() {
            "--mib" => given.sizes.private = value.parse::<usize>()? * model::PAGES_PER_MIB,
            "--shared-mib" => given.sizes.shared = value.parse::<usize>()? * model::PAGES_PER_MIB,
            "--seed" => given.sizes.seed = value.parse()?,
            "--dir" => given.dir = Some(PathBuf::from(value)),
            _ => return Err(wrong(&arg)),
        }
    }
    Ok(given)
}
