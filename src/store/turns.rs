//! Long work on the event loop, in steps: between them others have their turn.

use std::pin::pin;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

/// How long a step takes.
const STEP: Duration = Duration::from_millis(2);
/// The clock is looked at after so many pieces of work, each of which takes some microseconds at most.
const PIECES: u32 = 64;

/// Counts what one piece of work after the other takes.
#[derive(Debug)]
pub(super) struct Turns {
    since: Instant,
    pieces: u32,
}

impl Turns {
    /// A step begins.
    pub(super) fn new() -> Turns {
        Turns { since: Instant::now(), pieces: 0 }
    }

    /// A small piece of work is done: the others have their turn if that is due.
    pub(super) async fn pass(&mut self) {
        self.pieces += 1;
        if self.pieces >= PIECES {
            self.pass_after_much().await;
        }
    }

    /// The same after a piece that takes longer than a look at the clock.
    pub(super) async fn pass_after_much(&mut self) {
        self.pieces = 0;
        if self.since.elapsed() >= STEP {
            tokio::task::yield_now().await;
            self.since = Instant::now();
        }
    }
}

/// Does work in one go that waits for nothing but its turns, where there is nobody else to have one.
pub(super) fn at_once<T>(work: impl Future<Output = T>) -> T {
    let mut work = pin!(work);
    let mut context = Context::from_waker(Waker::noop());
    loop {
        if let Poll::Ready(done) = work.as_mut().poll(&mut context) {
            return done;
        }
    }
}
