//! A process to checkpoint: much memory, each page of it different, and a counter that goes on.
//!
//! It holds no file open and keeps nothing outside its memory, so whatever it reports after a restore came
//! through the images. On SIGUSR1 it writes a report: the counter has gone on from where it was and the checksum over
//! all of the memory is what it was before.

mod pattern;

use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use std::{env, fs, process, thread};

use pattern::{checksum, fill};

const USAGE: &str = "\
usage: workload --mib N --out FILE [--seed S] [--threads T]

Fills N MiB with data that depends on S (default 1), then counts, about 1000 a second. Writes a line of JSON to FILE when
the memory is filled and again at each SIGUSR1. T more threads (default 0) do nothing, to be checkpointed too.
";

struct Options {
    mib: usize,
    out: PathBuf,
    seed: u64,
    threads: usize,
}

fn main() -> Result<(), Box<dyn Error>> {
    let options = parse(env::args().skip(1))?;
    let asked = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(signal_hook::consts::SIGUSR1, Arc::clone(&asked))?;
    for _ in 0..options.threads {
        thread::spawn(|| {
            loop {
                thread::sleep(Duration::from_millis(10));
            }
        });
    }

    let memory = fill(options.mib, options.seed);
    let mut counter: u64 = 0;
    report(&options, counter, &memory)?;
    loop {
        thread::sleep(Duration::from_millis(1));
        counter += 1;
        if asked.swap(false, Ordering::SeqCst) {
            report(&options, counter, &memory)?;
        }
    }
}

fn parse(mut args: impl Iterator<Item = String>) -> Result<Options, Box<dyn Error>> {
    let (mut mib, mut out, mut seed, mut threads) = (None, None, 1, 0);
    while let Some(name) = args.next() {
        if name == "--help" || name == "-h" {
            print!("{USAGE}");
            process::exit(0);
        }
        let value = args.next().ok_or_else(|| format!("{name}: no value\n{USAGE}"))?;
        match name.as_str() {
            "--mib" => mib = Some(value.parse()?),
            "--out" => out = Some(PathBuf::from(value)),
            "--seed" => seed = value.parse()?,
            "--threads" => threads = value.parse()?,
            _ => return Err(format!("{name}: unknown\n{USAGE}").into()),
        }
    }
    Ok(Options {
        mib: mib.ok_or("--mib is missing")?,
        out: out.ok_or("--out is missing")?,
        seed,
        threads,
    })
}

/// Replaces the report in one step: who finds it finds all of it.
fn report(options: &Options, counter: u64, memory: &[u64]) -> std::io::Result<()> {
    let line = format!(
        "{{\"pid\":{},\"counter\":{counter},\"checksum\":\"{:016x}\",\"mib\":{},\"ready\":true}}\n",
        process::id(),
        checksum(memory),
        options.mib,
    );
    let new = with_suffix(&options.out, ".tmp");
    fs::write(&new, line)?;
    fs::rename(&new, &options.out)
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}
