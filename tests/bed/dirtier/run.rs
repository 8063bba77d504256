//! The process that is told.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{fs, io, process, thread};

use crate::memory::{Memory, fork, reap};
use crate::model::{Command, PRIVATE, SHARED, Sizes, churn_step};

/// How often commands are looked for, and churn goes on.
const TICK: Duration = Duration::from_millis(5);
const TICKS_PER_SECOND: usize = 200;

struct Process {
    name: String,
    dir: PathBuf,
    private: Memory,
    shared: Memory,
    /// How many commands are done.
    done: u64,
    percent: usize,
    churned: usize,
    /// What is to be churned yet, in hundredths of a page per second.
    due: usize,
}

pub(crate) fn run(sizes: Sizes, dir: PathBuf) -> Result<(), Box<dyn Error>> {
    let mut process = Process {
        name: "a".to_owned(),
        dir,
        private: Memory::new(sizes.seed ^ PRIVATE, sizes.private, false)?,
        shared: Memory::new(sizes.seed ^ SHARED, sizes.shared, true)?,
        done: 0,
        percent: 0,
        churned: 0,
        due: 0,
    };
    process.answer("")?;
    loop {
        thread::sleep(TICK);
        reap();
        process.churn();
        // The file is open for a moment only, and gone before the command begins.
        let file = file(&process.dir, &process.name, "command");
        let command = match fs::read_to_string(&file) {
            Ok(command) => command,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error.into()),
        };
        fs::remove_file(&file)?;
        process.obey(&command.parse()?)?;
    }
}

impl Process {
    fn obey(&mut self, command: &Command) -> Result<(), Box<dyn Error>> {
        let mut more = String::new();
        match *command {
            Command::Dirty { generation, step } => {
                write(&mut self.private, generation.into(), step);
            }
            Command::Share { generation, step } => write(&mut self.shared, generation.into(), step),
            Command::Churn { percent } => self.percent = percent,
            Command::Churned { .. } => return Err("churned: for `expect` only".into()),
            Command::Unmap { from, count } => self.private.unmap(from, count)?,
            Command::Move { from, count } => self.private.remap(from, count)?,
            Command::Fork { ref name } => {
                for kind in ["command", "done"] {
                    let _ = fs::remove_file(file(&self.dir, name, kind));
                }
                if fork()? {
                    self.name.clone_from(name);
                    (self.done, self.percent) = (0, 0);
                    return Ok(self.answer("")?);
                }
            }
            Command::Report => {
                more = format!(
                    ",\"private\":\"{:016x}\",\"shared\":\"{:016x}\",\"churned\":{}",
                    self.private.checksum(),
                    self.shared.checksum(),
                    self.churned
                );
            }
            Command::Exit => {}
        }
        self.done += 1;
        self.answer(&more)?;
        if *command == Command::Exit {
            process::exit(0);
        }
        Ok(())
    }

    fn churn(&mut self) {
        self.due += self.private.len() * self.percent;
        while self.due >= 100 * TICKS_PER_SECOND {
            let (page, generation) = churn_step(self.churned, self.private.len());
            self.private.write(page, generation);
            self.churned += 1;
            self.due -= 100 * TICKS_PER_SECOND;
        }
    }

    /// Replaces the answer in one step: who finds it finds all of it.
    fn answer(&self, more: &str) -> io::Result<()> {
        let line = format!("{{\"done\":{},\"pid\":{}{more}}}\n", self.done, process::id());
        put(&file(&self.dir, &self.name, "done"), &line)
    }
}

fn write(memory: &mut Memory, generation: u64, step: usize) {
    for number in (0..memory.len()).step_by(step) {
        memory.write(number, generation);
    }
}

pub(crate) fn file(dir: &Path, name: &str, kind: &str) -> PathBuf {
    dir.join(format!("{name}.{kind}"))
}

pub(crate) fn put(path: &Path, text: &str) -> io::Result<()> {
    let new = path.with_extension("new");
    fs::write(&new, text)?;
    fs::rename(new, path)
}
