//! What many connections to one port cost those who work: the answers to `status`, and a push.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../bad_input/criu.rs"]
#[allow(dead_code, reason = "what is not asked for here, other targets have")]
mod criu;
#[path = "../bad_input/daemons.rs"]
#[allow(dead_code, reason = "what is not asked for here, other targets have")]
mod daemons;

use std::collections::VecDeque;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use criu_image_relay::control::model::SnapshotState;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::{set_socket_linger, socket_error};
use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, socket_with};

use criu::{Criu, RECORDS};
use daemons::{Daemon, have_many_files, unused_address};

const USAGE: &str = "\
usage: tests/long/connections [--connections N] [--build DIR]

Makes many connections at once to each TCP port of both daemons in turn: silent ones that stay, and such as are opened and closed
over and over, always as many at once. Meanwhile it asks the daemon for its status all the time, and sends snapshots of 64 MiB.
Prints for each port and kind how many connections were established, the slowest answer to `status`, and how long a snapshot took.
All of the silent ones are established before anything is measured. That is not to say that the daemon serves them all: where a port has fewer
places, the rest waits in the socket's backlog, or makes way (the kernel lets net.core.somaxconn wait). Of those that come and go it counts what was established in the end.
The rows without a crowd, and of a crowd at a port where nobody accepts, say what the machine itself is good for at that time, with the crowd's own work on it: they bound
nothing. On two cores most of what a crowd costs that comes and goes is its own. Exit status 0 says that every silent connection was established, that every
answer came within 100 ms, and that no crowd made a snapshot take more than twice its time (the median of several) without one.

  --connections N   so many at once (default: 2000)
  --build DIR       the binaries to try (default: this checkout's)
";

/// How long an answer to `status` may take.
const AT_ONCE: Duration = Duration::from_millis(100);
/// What a snapshot holds.
const SNAPSHOT: usize = 64 << 20;
/// So many are sent each time; the median counts.
const SNAPSHOTS: usize = 7;
/// How much longer they may take for a crowd.
const SLOWER: f64 = 2.0;
/// How long it may take until a silent crowd is there.
const ALL_THERE: Duration = Duration::from_secs(20);

/// What is asked for.
struct Wanted {
    help: bool,
    connections: usize,
    build: Option<String>,
}

fn main() -> ExitCode {
    let Some(wanted) = wanted(std::env::args().skip(1)) else {
        eprint!("{USAGE}");
        return ExitCode::from(2);
    };
    match wanted.build {
        _ if wanted.help => {
            print!("{USAGE}");
            ExitCode::SUCCESS
        }
        Some(build) => with_build(wanted.connections, &build),
        None => ExitCode::from(u8::from(!trial(wanted.connections))),
    }
}

/// What the command line wants.
fn wanted(mut told: impl Iterator<Item = String>) -> Option<Wanted> {
    let mut wanted = Wanted { help: false, connections: 2000, build: None };
    while let Some(option) = told.next() {
        match option.as_str() {
            "--help" | "-h" => wanted.help = true,
            "--connections" => wanted.connections = told.next()?.parse().ok().filter(|n| *n > 0)?,
            "--build" => wanted.build = Some(told.next()?),
            _ => return None,
        }
    }
    Some(wanted)
}

/// The same with other binaries.
fn with_build(connections: usize, build: &str) -> ExitCode {
    let again = std::env::current_exe().unwrap();
    let build = std::path::absolute(build).unwrap();
    let mut command = Command::new(again);
    command.env("CRIU_IMAGE_RELAY_BUILD", build);
    let ended = command.args(["--connections", &connections.to_string()]).status().unwrap();
    ExitCode::from(u8::from(!ended.success()))
}

/// A crowd, by what it does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Crowd {
    /// Connects and says nothing.
    Silent,
    /// Connects and goes, over and over.
    ComingAndGoing,
}

/// Tries all ports. Returns whether all bounds were held.
fn trial(connections: usize) -> bool {
    have_many_files();
    let [pages, more_pages, metrics, more_metrics] = [(); 4].map(|()| unused_address());
    let said = [pages, more_pages, metrics, more_metrics].map(|at| format!("{:?}", at.to_string()));
    // The system's own units let the daemons have as many open files.
    let (cache, link) = Daemon::cache_with_files(
        FILES,
        &[
            ("store.max-bytes", "\"256M\""),
            ("pages.listen", &said[0]),
            ("metrics.listen", &said[2]),
        ],
    );
    let proxy = Daemon::proxy_with_files(
        Some(FILES),
        link,
        &[("pages.listen", &said[1]), ("metrics.listen", &said[3])],
    );
    let bytes = vec![7; SNAPSHOT];
    let push = |_| push(&proxy, &cache, &bytes);

    // The first one makes the link.
    push(0);
    let alone = median((0..SNAPSHOTS).map(push).collect());
    println!("a push of {} MiB takes {} ms without a crowd\n", SNAPSHOT >> 20, millis(alone));
    println!("port             crowd             connections   slowest status   push   times");
    // Nobody accepts there: what it costs to make the crowd, and to turn it away.
    let nobody = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let ports = [
        ("nobody's", &cache, nobody.local_addr().unwrap()),
        ("link", &cache, link),
        ("cache's pages", &cache, pages),
        ("cache's metrics", &cache, metrics),
        ("proxy's pages", &proxy, more_pages),
        ("proxy's metrics", &proxy, more_metrics),
    ];
    let mut all_well = true;
    for (port, daemon, address) in ports {
        let is_ours = port != "nobody's";
        for (crowd, connections) in
            [(Crowd::Silent, 0), (Crowd::Silent, connections), (Crowd::ComingAndGoing, connections)]
        {
            if !is_ours && crowd == Crowd::Silent {
                continue;
            }
            let (made, slowest, took) = with_crowd(crowd, connections, (daemon, address), || {
                (0..SNAPSHOTS).map(push).collect()
            });
            let took = median(took);
            let times = took.as_secs_f64() / alone.as_secs_f64();
            let broken = [
                (crowd == Crowd::Silent && made < connections, "  not all could connect"),
                (slowest > AT_ONCE, "  an answer came late"),
                (times > SLOWER, "  a push took too long"),
            ];
            let broken = broken.iter().filter(|(is, _)| *is && is_ours && connections > 0);
            let why: String = broken.map(|(_, why)| *why).collect();
            let kind = match crowd {
                Crowd::Silent if connections == 0 => "none",
                Crowd::Silent => "silent",
                Crowd::ComingAndGoing => "coming and going",
            };
            println!(
                "{port:15}  {kind:16} {made:12} {:>13} ms {:>6} {times:7.2}{why}",
                millis(slowest),
                millis(took)
            );
            all_well &= why.is_empty();
        }
    }
    all_well
}

/// As many as a unit's `LimitNOFILE=` is for.
const FILES: u32 = 16384;

fn millis(time: Duration) -> String {
    format!("{:.1}", time.as_secs_f64() * 1e3)
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

/// Sends a snapshot, and says how long that took until the cache held it whole.
fn push(proxy: &Daemon, cache: &Daemon, bytes: &[u8]) -> Duration {
    let mut dump = Criu::in_dir_of("web", proxy);
    let since = Instant::now();
    dump.write("core-7.img", RECORDS);
    dump.write("pages-1.img", bytes);
    dump.complete();
    cache.assert_state("web", SnapshotState::Whole);
    let took = since.elapsed();
    cache.drop_snapshot("web");
    cache.assert_held(0);
    if proxy.show("web").is_some() {
        proxy.drop_snapshot("web");
    }
    took
}

/// Does something while there is a crowd at a daemon's port. Returns how many connections were made, the slowest answer of the
/// daemon to `status` from before the first connection to after the last, and what was done. Of a silent crowd all
/// connections have been made before it is done.
fn with_crowd<T>(
    crowd: Crowd,
    connections: usize,
    (daemon, address): (&Daemon, SocketAddr),
    done: impl FnOnce() -> T,
) -> (usize, Duration, T) {
    let (made, crowded) = (AtomicUsize::new(0), AtomicBool::new(false));
    let (no_more, nobody) = (AtomicBool::new(false), AtomicBool::new(false));
    let all = |threads: &AtomicBool| threads.load(Ordering::Relaxed);
    thread::scope(|scope| {
        let asked = scope.spawn(|| {
            let mut slowest = Duration::ZERO;
            while !all(&nobody) {
                let since = Instant::now();
                daemon.status();
                slowest = slowest.max(since.elapsed());
                thread::sleep(Duration::from_millis(1));
            }
            slowest
        });
        let coming = scope.spawn(|| {
            let mut there: VecDeque<OwnedFd> = VecDeque::new();
            while !all(&no_more) {
                if there.len() < connections {
                    there.push_back(begin_to_connect(address));
                    continue;
                }
                match crowd {
                    Crowd::Silent if !crowded.load(Ordering::Relaxed) => {
                        let all = connected_within(ALL_THERE, &there);
                        made.store(all, Ordering::Relaxed);
                    }
                    Crowd::Silent => thread::sleep(Duration::from_millis(10)),
                    Crowd::ComingAndGoing => {
                        made.fetch_add(usize::from(has_connected(&there[0])), Ordering::Relaxed);
                        there.pop_front();
                    }
                }
                crowded.store(true, Ordering::Relaxed);
            }
        });
        while !all(&crowded) {
            thread::sleep(Duration::from_millis(1));
        }
        let done = done();
        no_more.store(true, Ordering::Relaxed);
        coming.join().unwrap();
        nobody.store(true, Ordering::Relaxed);
        (made.load(Ordering::Relaxed), asked.join().unwrap(), done)
    })
}

/// Connects without waiting: where the daemon takes nobody more for now, the kernel goes on trying.
fn begin_to_connect(address: SocketAddr) -> OwnedFd {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::INET, SocketType::STREAM, flags, None).unwrap();
    // Closed at once: a port in TIME_WAIT could not be had again.
    set_socket_linger(&socket, Some(Duration::ZERO)).unwrap();
    match connect(&socket, &address) {
        Ok(()) | Err(Errno::INPROGRESS) => socket,
        Err(error) => panic!("{error}"),
    }
}

/// How many connections have come to be, as soon as all have, or when the time is over.
fn connected_within(time: Duration, connections: &VecDeque<OwnedFd>) -> usize {
    let deadline = Instant::now() + time;
    loop {
        let connected = connections.iter().filter(|socket| has_connected(socket)).count();
        if connected == connections.len() || Instant::now() > deadline {
            return connected;
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// Whether a connection has come to be.
fn has_connected(socket: &OwnedFd) -> bool {
    let mut polled = [PollFd::new(socket, PollFlags::OUT)];
    let there = poll(&mut polled, Some(&Timespec::default())).unwrap() == 1;
    there && socket_error(socket).is_ok_and(|error| error.is_ok())
}
