//! What a second round costs when every second page has been written to since the first: the most runs that it can have,
//! each cut out of what the first one brought.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use criu_image_relay::criu::page_server::command::Command;
use criu_image_relay::criu::page_server::header::Dialect;
use criu_image_relay::criu::pages::{Contents, PAGE_SIZE, Run, Space};

use crate::daemons::Daemon;
use crate::page_client::{HELD, PageClient};

const TASK: Space = Space::Task(1);

/// Pages that the first round says in one go, as CRIU does: as many as it has in a pipe.
const CHUNK: u64 = 4096;
/// Runs that the second one says in one go.
const BATCH: usize = 512;

/// What a second round has cost.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cost {
    /// From its first byte to its status, for each run that was said.
    pub(crate) a_run: Duration,
    /// How long the cache's event loop ran for it on a processor, for each run.
    pub(crate) cpu_a_run: Duration,
    /// The slowest answer to `status` meanwhile.
    pub(crate) slowest_status: Duration,
}

/// Both daemons, linked, with room for so many MiB.
pub(crate) fn daemons(mib: u64) -> [Daemon; 2] {
    let (cache, address) = Daemon::cache(&[("store.max-bytes", &format!("\"{mib}M\""))]);
    [Daemon::proxy(address, &[]), cache]
}

/// Sends a first round of so many MiB, and a second one with every second page; then drops both.
pub(crate) fn second_round([proxy, cache]: &[Daemon; 2], mib: u64) -> Cost {
    let pages = (mib << 20) / PAGE_SIZE;
    let id = format!("web-{mib}");
    let mut client = PageClient::on(proxy.open_pages(&id), Dialect::Long);

    assert!(!client.open(TASK).unwrap());
    let bytes = vec![1; usize::try_from(CHUNK * PAGE_SIZE).unwrap()];
    for start in (0..pages).step_by(usize::try_from(CHUNK).unwrap()) {
        client.pages(TASK, start * PAGE_SIZE, false, &bytes).unwrap();
    }
    assert_eq!(client.force_close().unwrap(), HELD);

    let ended = AtomicBool::new(false);
    let (whole, slowest_status) = thread::scope(|scope| {
        let asked = scope.spawn(|| {
            let mut slowest = Duration::ZERO;
            while !ended.load(Ordering::Relaxed) {
                let since = Instant::now();
                cache.status();
                slowest = slowest.max(since.elapsed());
                thread::sleep(Duration::from_millis(1));
            }
            slowest
        });
        let (since, cpu_before) = (Instant::now(), cache.cpu_time());
        assert!(client.open(TASK).unwrap());
        let runs: Vec<u64> = (0..pages).collect();
        for batch in runs.chunks(BATCH) {
            let said: Vec<u8> = batch.iter().flat_map(|page| said_of(*page)).collect();
            client.say(&said).unwrap();
        }
        let status = client.close();
        let whole = (since.elapsed(), cache.cpu_time().saturating_sub(cpu_before));
        ended.store(true, Ordering::Relaxed);
        assert_eq!(status.unwrap(), HELD);
        (whole, asked.join().unwrap())
    });
    drop(client);
    cache.drop_snapshot(&id);
    if proxy.show(&id).is_some() {
        proxy.drop_snapshot(&id);
    }
    cache.assert_held(0);
    let [a_run, cpu_a_run] =
        <[Duration; 2]>::from(whole).map(|all| all / u32::try_from(pages).unwrap());
    Cost { a_run, cpu_a_run, slowest_status }
}

/// What is said of a page in the second round: each second one was written to.
fn said_of(page: u64) -> Vec<u8> {
    let dirty = page % 2 == 1;
    let contents = if dirty { Contents::Present { lazy: false } } else { Contents::Parent };
    let run = Run::new(page * PAGE_SIZE, 1, contents).unwrap();
    let mut said = Command::Pages { space: TASK, run }.header().encode(Dialect::Long).unwrap();
    if dirty {
        said.extend([2; 4096]);
    }
    said
}

#[test]
fn a_round_in_which_every_second_page_comes_costs_no_more_a_run_if_it_is_larger() {
    let daemons = daemons(1024);
    let [small, large] = [64, 256].map(|mib| second_round(&daemons, mib));
    assert!(large.cpu_a_run < 2 * small.cpu_a_run, "{large:?} after {small:?}");
}
