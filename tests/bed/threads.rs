//! A process to checkpoint that sees whether its memory was read after its end.
//!
//! When a thread ends, the kernel writes into the process's memory: it zeroes the word in which the thread's id stands,
//! for whoever joins the thread, and marks the robust mutexes that the thread holds as those of a dead owner. Images
//! that hold such a change give a process whose threads run and count as dead. This one knows all these
//! words, and what stands in them. On SIGUSR1 it writes a report, as `workload` does, with every word that is another.

#![allow(
    unsafe_code,
    reason = "only C's functions know robust mutexes and where a thread's id stands"
)]

mod pattern;

use std::cell::UnsafeCell;
use std::error::Error;
use std::os::unix::thread::JoinHandleExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;
use std::{env, fs, io, mem, process, ptr, thread};

use pattern::{checksum, fill};

const USAGE: &str = "\
usage: threads --mib N --out FILE [--seed S] [--threads T]

Fills N MiB with data that depends on S (default 1). T threads (default 16) count, some 200 a second each; each of them holds
a robust mutex, and the main thread waits for the end of the first, which never comes. Writes a line of JSON to FILE when all
of this is so and again at each SIGUSR1:
  counter   of the thread that has counted least
  checksum  of the N MiB
  changed   how many of the words that the kernel changes at a thread's end are changed; `changes` names them
";

struct Options {
    mib: usize,
    out: PathBuf,
    seed: u64,
    threads: usize,
}

/// A word of this process's memory that stays what it is while its thread runs.
struct Watched {
    what: String,
    word: &'static AtomicU32,
    value: u32,
}

/// What a counting thread tells when it is under way.
struct Started {
    watched: [Watched; 2],
    mutex: &'static RobustMutex,
    counter: &'static AtomicU64,
}

fn main() -> Result<(), Box<dyn Error>> {
    let options = parse(env::args().skip(1))?;
    let asked = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(signal_hook::consts::SIGUSR1, Arc::clone(&asked))?;

    let (tell, started) = mpsc::channel();
    let mut first = None;
    for number in 1..=options.threads {
        let tell = tell.clone();
        let thread = thread::Builder::new().spawn(move || count(number, &tell))?;
        first.get_or_insert(thread);
    }
    let first = first.ok_or("--threads must be at least 1")?;
    let own = id_word("the main thread's id".to_owned())?;
    let started: Vec<_> = started.iter().take(options.threads).collect();

    let joined: &AtomicBool = Box::leak(Box::new(AtomicBool::new(false)));
    thread::Builder::new().spawn(move || serve(&options, own, &started, joined, &asked))?;
    // SAFETY: nobody else joins this thread, whose handle is given away here.
    unsafe { libc::pthread_join(first.into_pthread_t(), ptr::null_mut()) };
    joined.store(true, Ordering::SeqCst);
    loop {
        thread::park();
    }
}

fn parse(mut args: impl Iterator<Item = String>) -> Result<Options, Box<dyn Error>> {
    let (mut mib, mut out, mut seed, mut threads) = (None, None, 1, 16);
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

/// A thread that counts, with a robust mutex of its own, until the process ends.
fn count(number: usize, tell: &mpsc::Sender<Started>) {
    let counter: &AtomicU64 = Box::leak(Box::new(AtomicU64::new(0)));
    let mutex = RobustMutex::locked().unwrap_or_else(|error| panic!("a robust mutex: {error}"));
    let id = id_word(format!("thread {number}'s id"))
        .unwrap_or_else(|error| panic!("where a thread's id stands: {error}"));
    let holder = Watched {
        what: format!("the mutex of thread {number}"),
        word: mutex.word(),
        value: mutex.word().load(Ordering::SeqCst),
    };
    let _ = tell.send(Started { watched: [id, holder], mutex, counter });
    loop {
        thread::sleep(Duration::from_millis(5));
        counter.fetch_add(1, Ordering::SeqCst);
    }
}

/// The word that the kernel zeroes when this thread ends.
fn id_word(what: String) -> io::Result<Watched> {
    let mut address: *const AtomicU32 = ptr::null();
    // SAFETY: the kernel writes a pointer to where it is told.
    if unsafe { libc::prctl(libc::PR_GET_TID_ADDRESS, &raw mut address) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it lies in what the C library keeps of this thread, which outlives all others: no thread ends.
    let word = unsafe { address.as_ref() }.ok_or(io::ErrorKind::NotFound)?;
    Ok(Watched { what, word, value: word.load(Ordering::SeqCst) })
}

/// Reports, now and whenever it is asked for.
fn serve(
    options: &Options,
    main_id: Watched,
    started: &[Started],
    joined: &AtomicBool,
    asked: &AtomicBool,
) {
    let own_id = id_word("the reporting thread's id".to_owned())
        .unwrap_or_else(|error| panic!("where a thread's id stands: {error}"));
    let memory = fill(options.mib, options.seed);
    let both = [main_id, own_id];
    loop {
        let words = both.iter().chain(started.iter().flat_map(|thread| &thread.watched));
        let mut changes: Vec<String> = words.filter_map(change).collect();
        changes.extend(started.iter().filter_map(|thread| lost(thread.mutex)));
        if joined.load(Ordering::SeqCst) {
            changes.push("thread 1 runs and was joined".to_owned());
        }
        let slowest = started.iter().map(|thread| thread.counter.load(Ordering::SeqCst)).min();
        report(options, slowest.unwrap_or(0), &memory, &changes)
            .unwrap_or_else(|error| panic!("{}: {error}", options.out.display()));
        while !asked.swap(false, Ordering::SeqCst) {
            thread::sleep(Duration::from_millis(1));
        }
    }
}

fn change(watched: &Watched) -> Option<String> {
    let Watched { what, word, value } = watched;
    let now = word.load(Ordering::SeqCst);
    (now != *value).then(|| format!("{what} is {now}, not {value}"))
}

/// What the C library says of a mutex that its owner has not got any more.
fn lost(mutex: &RobustMutex) -> Option<String> {
    match mutex.try_lock() {
        libc::EBUSY => None,
        0 => Some("a mutex that is held can be locked".to_owned()),
        error => Some(format!("a mutex that is held: {}", io::Error::from_raw_os_error(error))),
    }
}

/// Replaces the report in one step: who finds it finds all of it.
fn report(
    options: &Options,
    counter: u64,
    memory: &[u64],
    changes: &[String],
) -> Result<(), Box<dyn Error>> {
    let line = serde_json::json!({
        "pid": process::id(),
        "counter": counter,
        "checksum": format!("{:016x}", checksum(memory)),
        "mib": options.mib,
        "threads": options.threads,
        "changed": changes.len(),
        "changes": changes,
        "ready": true,
    });
    let new = options.out.with_extension("tmp");
    fs::write(&new, format!("{line}\n"))?;
    fs::rename(&new, &options.out)?;
    Ok(())
}

/// A mutex whose next owner is told if its owner died.
struct RobustMutex(UnsafeCell<libc::pthread_mutex_t>);

// SAFETY: a mutex is made for several threads; only the C library's functions and atomic loads touch it.
unsafe impl Sync for RobustMutex {}

impl RobustMutex {
    /// A new one that is held by this thread. It stays where it is for good: the kernel knows its address.
    fn locked() -> io::Result<&'static RobustMutex> {
        let checked = |error: libc::c_int| match error {
            0 => Ok(()),
            error => Err(io::Error::from_raw_os_error(error)),
        };
        let mutex: &RobustMutex =
            Box::leak(Box::new(RobustMutex(UnsafeCell::new(libc::PTHREAD_MUTEX_INITIALIZER))));
        // SAFETY: the attributes are initialised before they are used, and nobody else knows the mutex yet.
        unsafe {
            let mut attributes: libc::pthread_mutexattr_t = mem::zeroed();
            checked(libc::pthread_mutexattr_init(&raw mut attributes))?;
            checked(libc::pthread_mutexattr_setrobust(
                &raw mut attributes,
                libc::PTHREAD_MUTEX_ROBUST,
            ))?;
            checked(libc::pthread_mutex_init(mutex.0.get(), &raw const attributes))?;
            checked(libc::pthread_mutex_lock(mutex.0.get()))?;
        }
        Ok(mutex)
    }

    /// Its first word, in which its owner and the kernel write who holds it.
    fn word(&self) -> &AtomicU32 {
        // SAFETY: glibc's mutexes begin with this word, as the kernel's robust lists want it.
        unsafe { &*self.0.get().cast() }
    }

    fn try_lock(&self) -> libc::c_int {
        // SAFETY: it is initialised, and nobody destroys it.
        unsafe { libc::pthread_mutex_trylock(self.0.get()) }
    }
}
