//! A snapshot that is dropped gives back what it held without keeping anybody waiting, however much that is.

use std::iter;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::daemons::{Daemon, Settings};
use crate::proxy_standin::ProxyStandin;

/// How long an answer of the cache may take, whatever else it does.
const AT_ONCE: Duration = Duration::from_millis(100);
const ROOMY: Settings<'static> = &[("store.max-bytes", "\"8G\"")];

/// Drops a snapshot, and returns the slowest answer until all of it has been given back.
fn drop_it(cache: &Daemon, id: &str) -> Duration {
    let ended = AtomicBool::new(false);
    thread::scope(|scope| {
        let asked = scope.spawn(|| {
            let mut slowest = Duration::ZERO;
            while !ended.load(Ordering::Relaxed) {
                let since = Instant::now();
                cache.status();
                slowest = slowest.max(since.elapsed());
            }
            slowest
        });
        cache.drop_snapshot(id);
        cache.assert_held(0);
        ended.store(true, Ordering::Relaxed);
        asked.join().unwrap()
    })
}

#[test]
fn what_a_snapshot_of_gigabytes_held_is_given_back_while_others_are_answered() {
    const SMALL: u32 = 1000;
    const LARGE: u32 = 1;
    let (cache, address) = Daemon::cache(ROOMY);
    let mut proxy = ProxyStandin::connect(address);
    let mib = vec![1; 1 << 20];
    proxy.begin(0, "web");
    let sizes = iter::repeat_n(1, SMALL as usize).chain(iter::repeat_n(1000, LARGE as usize));
    for (image, size) in (0..).zip(sizes) {
        proxy.begin_image(0, image, &format!("pages-{image}.img"));
        for at in 0..size {
            proxy.data(0, image, (at * mib.len()) as u64, &mib);
        }
        proxy.end_image(0, image, size * mib.len());
    }
    let images = SMALL + LARGE;
    proxy.complete(0, images, images.into(), 2000 * mib.len());
    let slowest = drop_it(&cache, "web");
    assert!(slowest < AT_ONCE, "an answer took {slowest:?}");
}
