//! Whether a restored process ever finds memory that was changed after CRIU froze it.
//!
//! While CRIU ends a process that it has dumped, the kernel writes into its memory (see tests/bed/threads.rs). Pages that are lent
//! rather than copied, and read after that, carry it. Each run dumps a process on one host by hand, with or without the
//! hook, disturbs the link in some way meanwhile, restores on the other host, and asks the process which of the
//! words that it knows have changed.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../hosts/bed.rs"]
#[allow(dead_code, reason = "what is not asked for here, other targets have")]
mod bed;
mod fault;
mod peers;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use bed::{BOTH, Bed, Host};
use fault::{Disturbed, Fault};
use serde_json::Value;

const USAGE: &str = "\
usage: tests/long/memory [OPTION…]     as root

  --runs N          of each (default 200)
  --way WAY         hook: criu dump --stream --action-script criu-imagectl
                    plain: criu dump --stream
                    both (default), in turn
                    streamer: criu-image-streamer and netcat; CRIU_IMAGE_STREAMER says where that program is. The reader that
                    faults stop is the netcat beside it
                    page-server: CRIU's own
                    directory: copied when CRIU has ended
                    peers: these three
  --fault FAULT     stopped: the cache is stopped (SIGSTOP) before the dump and goes on when it has ended, or after 300 ms
                    moment: the same, stopped at a moment of the dump's first 60 ms, another in each run
                    slow: the link moves 50 MB a second
                    none
                    all (default), in turn
  --program NAME    threads (default): tests/bed/threads.rs; jvm: tests/bed/Counting.java
  --mib M           its memory (default 1)
  --build DIR       the binaries to try (default: this checkout's)

A snapshot may be marked as one whose memory may have changed: then a restore has to refuse it without --accept-changed-memory,
and what it holds is counted apart. Ends with 0 if no process was restored with changed memory without that, and nothing failed.
";

/// Who takes the images from CRIU.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Way {
    Hook,
    Plain,
    Streamer,
    PageServer,
    Directory,
}

impl Way {
    fn name(self) -> &'static str {
        match self {
            Way::Hook => "hook",
            Way::Plain => "plain",
            Way::Streamer => "streamer",
            Way::PageServer => "page-server",
            Way::Directory => "directory",
        }
    }

    fn is_peer(self) -> bool {
        !matches!(self, Way::Hook | Way::Plain)
    }
}

const BY_HAND: [Way; 2] = [Way::Hook, Way::Plain];
const PEERS: [Way; 3] = [Way::Streamer, Way::PageServer, Way::Directory];
const FAULTS: [Fault; 4] = [Fault::Stopped, Fault::Moment, Fault::Slow, Fault::None];

struct Options {
    runs: u32,
    ways: Vec<Way>,
    faults: Vec<Fault>,
    jvm: bool,
    mib: u32,
    build: PathBuf,
}

/// How one run ended.
#[derive(Debug)]
struct Run {
    /// From CRIU's start to its end.
    dump: Duration,
    /// It was marked, and refused before it was accepted.
    marked: bool,
    /// What was another in the restored process; empty as it should be.
    changes: Vec<String>,
}

/// A process that runs on the other host.
struct Moved {
    /// From CRIU's start to its end.
    dump: Duration,
    /// Its snapshot was marked, and refused before it was accepted.
    marked: bool,
    /// The snapshot that the cache keeps.
    id: Option<String>,
}

/// What came of the runs of one way under one fault.
#[derive(Default, Clone)]
struct Count {
    dumps: Vec<Duration>,
    whole: u32,
    changed: u32,
    marked: u32,
    marked_and_changed: u32,
    failed: u32,
}

fn main() -> ExitCode {
    let options = parse();
    let bed = prepare(&options);
    let mut counts = vec![Count::default(); options.ways.len() * options.faults.len()];
    let start = Instant::now();
    for number in 1..=options.runs {
        for (index, count) in counts.iter_mut().enumerate() {
            let way = options.ways[index % options.ways.len()];
            let fault = options.faults[index / options.ways.len()];
            let name = format!("run{number}-{index}");
            match run(&bed, &options, &name, way, fault, number) {
                Ok(run) => count.add(&name, &run),
                Err(why) => {
                    println!("{name}: {way:?} {fault:?} FAILED: {why}");
                    count.failed += 1;
                    clean_up(&bed);
                }
            }
        }
        if number % 20 == 0 {
            println!("after {number} runs of each, {:.0?}", start.elapsed());
        }
    }
    tell(&options, &counts);
    let wrong = counts.iter().any(|count| count.changed + count.failed > 0);
    if wrong { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

fn parse() -> Options {
    let mut options = Options {
        runs: 200,
        ways: BY_HAND.to_vec(),
        faults: FAULTS.to_vec(),
        jvm: false,
        mib: 1,
        build: bed::build(),
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let value = arguments.next().unwrap_or_default();
        match (name.as_str(), value.as_str()) {
            ("--runs", runs) => options.runs = runs.parse().expect("--runs wants a number"),
            ("--mib", mib) => options.mib = mib.parse().expect("--mib wants a number"),
            ("--way", "hook") => options.ways = vec![Way::Hook],
            ("--way", "plain") => options.ways = vec![Way::Plain],
            ("--way", "both") => options.ways = BY_HAND.to_vec(),
            ("--way", "streamer") => options.ways = vec![Way::Streamer],
            ("--way", "page-server") => options.ways = vec![Way::PageServer],
            ("--way", "directory") => options.ways = vec![Way::Directory],
            ("--way", "peers") => options.ways = PEERS.to_vec(),
            ("--fault", "stopped") => options.faults = vec![Fault::Stopped],
            ("--fault", "moment") => options.faults = vec![Fault::Moment],
            ("--fault", "slow") => options.faults = vec![Fault::Slow],
            ("--fault", "none") => options.faults = vec![Fault::None],
            ("--fault", "all") => options.faults = FAULTS.to_vec(),
            ("--program", "threads") => options.jvm = false,
            ("--program", "jvm") => options.jvm = true,
            ("--build", dir) => options.build = std::path::absolute(dir).unwrap(),
            _ => {
                eprint!("{USAGE}");
                std::process::exit(if name == "--help" { 0 } else { 2 });
            }
        }
    }
    options
}

fn prepare(options: &Options) -> Bed {
    let bed = Bed::up_with(options.build.clone());
    if options.jvm {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bed/java");
        let made = Command::new(script).output().unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let tree = PathBuf::from(String::from_utf8(made.stdout).unwrap().trim());
        for host in BOTH {
            bed.copy(host, &tree, "/");
        }
    }
    peers::prepare(&bed, &options.ways);
    // The link comes up with the first snapshot, and stays.
    run(&bed, options, "warm", Way::Plain, Fault::None, 0).expect("a first migration");
    bed
}

impl Options {
    fn program(&self) -> &'static str {
        if self.jvm { "counting-jvm" } else { "threads" }
    }
}

/// Moves one process, and looks at it.
fn run(
    bed: &Bed,
    options: &Options,
    name: &str,
    way: Way,
    fault: Fault,
    number: u32,
) -> Result<Run, String> {
    let pid = bed.start(options.program(), Host::A, name, options.mib);
    let before = ask(bed, Host::A, name, &pid)?;
    let disturbed = Disturbed { fault, run: number };
    let moved = if way.is_peer() {
        Moved { dump: peers::migrate(bed, way, &pid, &disturbed)?, marked: false, id: None }
    } else {
        migrate(bed, way, &pid, &disturbed)?
    };
    let changes = examine(bed, options, name, &pid, &before)?;
    bed.run(Host::B, &["kill", "-KILL", &pid]);
    if let Some(id) = moved.id {
        bed.ok(Host::B, &["criu-imagectl", "--cache", "drop", &id]);
    }
    Ok(Run { dump: moved.dump, marked: moved.marked, changes })
}

/// Dumps it by hand and restores it.
fn migrate(bed: &Bed, way: Way, pid: &str, disturbed: &Disturbed) -> Result<Moved, String> {
    let mut command = Bed::dump(pid, Host::A.work_dir()).to_vec();
    if way == Way::Hook {
        command.extend(["--action-script", "criu-imagectl"]);
    }
    let cache = bed.daemon_pid(Host::B);
    let dump = disturbed.dump(bed, &command, Some((Host::B, &cache)))?;
    let id = arrived(bed)?;
    Ok(Moved { dump, marked: restore(bed, &id)?, id: Some(id) })
}

/// The id of the one snapshot that the cache holds, once it holds all of it.
fn arrived(bed: &Bed) -> Result<String, String> {
    let limit = Instant::now() + Duration::from_secs(60);
    loop {
        let listed = bed.list(Host::B);
        if let [snapshot] = &listed[..] {
            let (id, state) = (&snapshot["id"], &snapshot["state"]);
            match state.as_str().unwrap() {
                "receiving" => (),
                "whole" => return Ok(id.as_str().unwrap().to_owned()),
                _ => return Err(format!("the snapshot is {snapshot}")),
            }
        }
        if Instant::now() > limit {
            return Err(format!("no whole snapshot arrives, only {listed:?}"));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Restores it; says whether that was refused at first.
fn restore(bed: &Bed, id: &str) -> Result<bool, String> {
    const SWITCH: &str = "--accept-changed-memory";
    let told = |command: &[&str]| {
        let output = bed.run(Host::B, command);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.success() { Ok(()) } else { Err(error) }
    };
    match told(&["timeout", "60", "criu-imagectl", "restore", id]) {
        Ok(()) => Ok(false),
        Err(error) if error.contains(SWITCH) => {
            told(&["timeout", "60", "criu-imagectl", "restore", SWITCH, id])?;
            Ok(true)
        }
        Err(error) => Err(format!("criu-imagectl restore: {error}")),
    }
}

/// What is another in the restored process than it was before the dump.
fn examine(
    bed: &Bed,
    options: &Options,
    name: &str,
    pid: &str,
    before: &Value,
) -> Result<Vec<String>, String> {
    let after = match ask(bed, Host::B, name, pid) {
        Ok(after) => after,
        // A virtual machine that finds a thread dead is dead soon after it was restored.
        Err(why) => return Ok(vec![format!("it gives no report: {why}")]),
    };
    let mut changes = Vec::new();
    if after["changed"] != 0 {
        changes.push(after["changes"].to_string());
    }
    for field in ["pid", "checksum"] {
        if after[field] != before[field] {
            changes.push(format!("{field} {} was {}", after[field], before[field]));
        }
    }
    let counter = |report: &Value| report["counter"].as_u64().unwrap();
    let limit = Instant::now() + Duration::from_secs(5);
    while counter(&ask(bed, Host::B, name, pid)?) <= counter(&after) {
        if Instant::now() > limit {
            changes.push("a thread counts no more".to_owned());
            break;
        }
    }
    if options.jvm {
        changes.extend(end(bed, name, pid).err());
    }
    Ok(changes)
}

/// Ends a virtual machine in order: all its threads are joined before it says so.
fn end(bed: &Bed, name: &str, pid: &str) -> Result<(), String> {
    let script = "kill -TERM $2; for i in $(seq 500); do [ -d /proc/$2 ] || break; sleep 0.01; done
        if [ -d /proc/$2 ]; then echo does not end; else cat /tmp/workload-$1.json; fi
        cat /tmp/counting-jvm-error.log 2>/dev/null";
    let said = String::from_utf8(bed.run(Host::B, &["sh", "-c", script, "-", name, pid]).stdout);
    let said = said.unwrap();
    let report: Value = serde_json::from_str(&said).unwrap_or_default();
    if report["ended"] == true { Ok(()) } else { Err(format!("it does not end well: {said}")) }
}

fn ask(bed: &Bed, host: Host, name: &str, pid: &str) -> Result<Value, String> {
    let script = bed.script("ask");
    let side = if host == Host::A { "a" } else { "b" };
    let mut command = Command::new("timeout");
    command.arg("30").arg(script.get_program()).args(script.get_args()).args([side, name, pid]);
    let output = command.output().unwrap();
    serde_json::from_slice(&output.stdout)
        .map_err(|_| format!("{} {}", output.status, String::from_utf8_lossy(&output.stderr)))
}

/// After a failure: nothing of this run may be met by the next.
fn clean_up(bed: &Bed) {
    for host in BOTH {
        bed.run(host, &["pkill", "-KILL", "-x", "criu|threads|java|criu-image-stre|nc|tar"]);
    }
    bed.run(Host::A, &["sh", "-c", "tc qdisc del dev eth0 root 2>/dev/null"]);
    for snapshot in bed.list(Host::B) {
        bed.run(Host::B, &["criu-imagectl", "--cache", "drop", snapshot["id"].as_str().unwrap()]);
    }
}

impl Count {
    fn add(&mut self, name: &str, run: &Run) {
        self.dumps.push(run.dump);
        match (run.marked, run.changes.is_empty()) {
            (false, true) => self.whole += 1,
            (false, false) => {
                self.changed += 1;
                println!("{name}: CHANGED: {}", shortened(&run.changes.join("; ")));
            }
            (true, unchanged) => {
                self.marked += 1;
                self.marked_and_changed += u32::from(!unchanged);
            }
        }
    }
}

fn shortened(text: &str) -> String {
    text.chars().take(300).collect()
}

fn tell(options: &Options, counts: &[Count]) {
    println!(
        "\n{} {} MiB, {} runs of each; {}",
        options.program(),
        options.mib,
        options.runs,
        options.build.display()
    );
    println!(
        "way    fault     as before  CHANGED  marked (changed)  failed  dump: median, longest"
    );
    for (index, count) in counts.iter().enumerate() {
        let way = options.ways[index % options.ways.len()].name();
        let fault = format!("{:?}", options.faults[index / options.ways.len()]).to_lowercase();
        let mut dumps = count.dumps.clone();
        dumps.sort();
        println!(
            "{way:<11} {fault:<8} {:>10} {:>8} {:>7} {:>9} {:>7}  {:.0?}, {:.0?}",
            count.whole,
            count.changed,
            count.marked,
            format!("({})", count.marked_and_changed),
            count.failed,
            dumps.get(dumps.len() / 2).copied().unwrap_or_default(),
            dumps.last().copied().unwrap_or_default(),
        );
    }
}
