//! Telling the process a command.

use std::error::Error;
use std::path::Path;
use std::time::{Duration, Instant};
use std::{fs, thread};

use serde_json::Value;

use crate::model::Command;
use crate::run::{file, put};

/// Under emulation a report of much memory takes its time.
const LIMIT: Duration = Duration::from_secs(100);

/// What a process says of itself.
struct Answer {
    /// How many commands are done.
    done: u64,
    lives: bool,
    line: String,
}

/// Gives a command to a process and waits until it is done; returns the answer.
pub(crate) fn tell(dir: &Path, name: &str, command: &Command) -> Result<String, Box<dyn Error>> {
    let limit = Instant::now() + LIMIT;
    let path = file(dir, name, "done");
    let before = loop {
        if let Some(answer) = read(&path)? {
            break answer.done;
        }
        wait(name, "has not begun", limit)?;
    };
    put(&file(dir, name, "command"), &command.to_string())?;
    loop {
        if let Some(answer) = read(&path)? {
            let done = answer.done > before;
            if done && (*command != Command::Exit || !answer.lives) {
                return Ok(answer.line);
            }
            if !done && !answer.lives {
                return Err(format!("{name} has ended: {}", answer.line).into());
            }
        }
        wait(name, "has not done it", limit)?;
    }
}

fn read(path: &Path) -> Result<Option<Answer>, Box<dyn Error>> {
    let Ok(line) = fs::read_to_string(path) else { return Ok(None) };
    let line = line.trim().to_owned();
    let answer: Value = serde_json::from_str(&line)?;
    let (Some(done), Some(pid)) = (answer["done"].as_u64(), answer["pid"].as_u64()) else {
        return Err(format!("{}: {line}", path.display()).into());
    };
    Ok(Some(Answer { done, lives: Path::new(&format!("/proc/{pid}")).exists(), line }))
}

fn wait(name: &str, what: &str, limit: Instant) -> Result<(), Box<dyn Error>> {
    if Instant::now() > limit {
        return Err(format!("{name} {what} in {} s", LIMIT.as_secs()).into());
    }
    thread::sleep(Duration::from_millis(5));
    Ok(())
}
