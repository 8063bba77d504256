//! The waits of a sender for the quota, as the journal hears of them: each once, however many pieces it takes.

use std::cell::Cell;
use std::pin::pin;
use std::time::{Duration, Instant};

use crate::daemon::journal;
use crate::store::Exhausted;

/// Who waits again so soon has not stopped waiting: each piece that got room makes the next one wait.
const SAME: Duration = Duration::from_secs(10);

/// The waits on one link.
#[derive(Debug, Default)]
pub(super) struct Waits {
    /// When somebody was seen waiting last.
    last: Cell<Option<Instant>>,
}

impl Waits {
    /// Charges for a part of the snapshot `id`: `charge` is done at once, or waits.
    pub(super) async fn charge<T>(
        &self,
        id: &str,
        charge: impl Future<Output = Result<T, Exhausted>>,
    ) -> Result<T, Exhausted> {
        let mut charge = pin!(charge);
        let at_once = tokio::select! {
            biased;
            charged = charge.as_mut() => Some(charged),
            () = std::future::ready(()) => None,
        };
        let charged = if let Some(charged) = at_once {
            charged
        } else {
            if self.begins(Instant::now()) {
                tell_reached(id);
            }
            let charged = charge.await;
            self.last.set(charged.is_ok().then(Instant::now));
            charged
        };
        if let Err(exhausted) = &charged {
            tell_exhausted(id, exhausted);
        }
        charged
    }

    /// Somebody waits. Returns whether that is another wait.
    fn begins(&self, now: Instant) -> bool {
        let last = self.last.replace(Some(now));
        last.is_none_or(|last| now.saturating_duration_since(last) >= SAME)
    }
}

fn tell_reached(id: &str) {
    tracing::warn!(
        message_id = journal::QUOTA_REACHED,
        criu_snapshot = id,
        "the quota (store.max-bytes) is reached: snapshot {id} waits for room"
    );
}

fn tell_exhausted(id: &str, exhausted: &Exhausted) {
    tracing::warn!(
        message_id = journal::QUOTA_EXHAUSTED,
        criu_snapshot = id,
        criu_reason = %exhausted,
        "there is no room for snapshot {id}: {exhausted}"
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Quota;

    #[test]
    fn a_wait_that_goes_on_with_the_next_piece_is_one() {
        let (waits, start) = (Waits::default(), Instant::now());
        assert!(waits.begins(start));
        for second in 1..100 {
            assert!(!waits.begins(start + Duration::from_secs(second)));
        }
        assert!(waits.begins(start + Duration::from_secs(99) + SAME), "another");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn what_has_room_does_not_wait() {
        let (waits, quota) = (Waits::default(), Quota::new(10));
        let charge = |bytes| quota.charge(bytes, || 0, Duration::from_millis(10));
        let held = waits.charge("web", charge(8)).await.unwrap();
        assert!(waits.charge("web", charge(11)).await.is_err(), "it can never fit");
        assert_eq!(waits.last.get(), None);
        let (waited, ()) = tokio::join!(waits.charge("web", charge(4)), async { drop(held) });
        assert!(waited.is_ok() && waits.last.get().is_some());
        assert!(waits.charge("db", charge(8)).await.is_err());
        assert_eq!(waits.last.get(), None, "the next one that waits is another");
    }
}
