//! `wait`: until a snapshot can be restored, or was.

use tokio::time::{Instant, timeout_at};

use super::cli::{Daemon, Until, Wait};
use super::exit::{Exit, Failure};
use super::look::state_word;
use super::print::{Output, clean, progress, size, span};
use super::reach;
use crate::control::ClientError;
use crate::control::model::{Snapshot, SnapshotState};

/// Waits and prints what came.
pub(super) async fn run(daemon: &Daemon, output: Output, wait: &Wait) -> Result<(), Failure> {
    let done = until(daemon, wait).await?;
    output.print(&done, || line(&done))
}

/// Waits for as long as it may.
pub(super) async fn until(daemon: &Daemon, wait: &Wait) -> Result<Snapshot, Failure> {
    let mut last = None;
    let waited = follow(daemon, wait, &mut last);
    match wait.timeout {
        None => waited.await,
        Some(limit) => match timeout_at(Instant::now() + limit, waited).await {
            Ok(outcome) => outcome,
            Err(_) => Err(timed_out(wait, last.as_ref())),
        },
    }
}

/// Follows a snapshot to the state that is waited for, and leaves in `last` how far it came.
pub(super) async fn follow(
    daemon: &Daemon,
    wait: &Wait,
    last: &mut Option<Snapshot>,
) -> Result<Snapshot, Failure> {
    let id = &wait.snapshot;
    let mut client = reach::one(daemon).await?;
    let bar = progress(clean(id), None).with_message("not here yet");
    let mut watch = client.watch(id, wait.until == Until::Taken).await?;
    loop {
        let snapshot = match watch.next().await {
            Ok(Some(snapshot)) => snapshot,
            Ok(None) => {
                return Err(Failure::failed(format!("the daemon stopped telling of {id}")));
            }
            Err(ClientError::NoSuchSnapshot(_)) => return Err(gone(id, last.as_ref())),
            Err(error) => return Err(error.into()),
        };
        match (snapshot.state, wait.until) {
            (SnapshotState::Damaged, _) => {
                return Err(Failure::damaged(id, &clean(&snapshot.reason)));
            }
            (SnapshotState::Taken, _) | (SnapshotState::Whole, Until::Whole) => {
                return Ok(snapshot);
            }
            _ => {}
        }
        bar.set_position(snapshot.bytes);
        bar.set_message(format!("{} images, {}", snapshot.images, state_word(snapshot.state)));
        *last = Some(snapshot);
    }
}

fn line(snapshot: &Snapshot) -> String {
    let Snapshot { id, state, images, bytes, begun_ms, ended_ms, .. } = snapshot;
    let line = format!("{}: {}, {images} images, {}", clean(id), state_word(*state), size(*bytes));
    match ended_ms.checked_sub(*begun_ms) {
        Some(took) => format!("{line} in {}", span(took)),
        None => line,
    }
}

fn gone(id: &str, last: Option<&Snapshot>) -> Failure {
    let state = last.map_or("there", |last| state_word(last.state));
    Failure::new(Exit::NoSuchSnapshot, format!("snapshot {id} was {state} and is gone"))
        .cure("it was dropped, or its time to be kept is over")
}

/// It takes longer than it may.
pub(super) fn timed_out(wait: &Wait, last: Option<&Snapshot>) -> Failure {
    let state = match last {
        None => "it has not come".to_owned(),
        Some(last) => line(last),
    };
    let what = match wait.until {
        Until::Whole => "whole",
        Until::Taken => "taken",
    };
    let limit = wait.timeout.unwrap_or_default();
    let id = &wait.snapshot;
    Failure::new(Exit::TimedOut, format!("snapshot {id} is not {what} after {limit:?}: {state}"))
}
