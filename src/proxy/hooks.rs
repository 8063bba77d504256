//! CRIU's action scripts: which dumps are waited for at their end, and what becomes of those.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::sync::{Notify, watch};
use tokio::time::timeout;

use crate::control::Refusal;
use crate::control::model::Snapshot;

/// CRIU runs that are known at once, besides those under way.
const KNOWN: usize = 1024;
/// How long after its action script a CRIU may begin to dump.
const EXPECTED_FOR: Duration = Duration::from_secs(600);
/// How long a dump may take to be seen whose action script waits already.
const BEGINS_WITHIN: Duration = Duration::from_secs(2);
/// How long a dump that is given up has to end.
const ENDS_WITHIN: Duration = Duration::from_secs(5);

/// The action scripts that have been heard, and the dumps that they may speak of, by CRIU's pid.
#[derive(Debug, Default)]
pub(super) struct Hooks {
    expected: RefCell<HashMap<i32, Instant>>,
    dumps: RefCell<HashMap<i32, Rc<Waited>>>,
    begun: Notify,
}

/// A dump that an action script may wait for.
#[derive(Debug)]
pub(super) struct Waited {
    /// Whether CRIU's action script has said that it will.
    expected: Cell<bool>,
    /// Whether it does.
    asked: watch::Sender<bool>,
    /// Why it does not want the snapshot any more.
    given_up: watch::Sender<Option<String>>,
    outcome: watch::Sender<Option<Result<Snapshot, String>>>,
}

impl Hooks {
    /// The action script of a CRIU says that it will wait at the end of its dump.
    pub(super) fn expect(&self, pid: i32) -> Result<(), Refusal> {
        if let Some(dump) = self.dumps.borrow().get(&pid).filter(|dump| !dump.has_ended()) {
            dump.expected.set(true);
            return Ok(());
        }
        // A process that had this pid before may have dumped as well.
        self.dumps.borrow_mut().remove(&pid);
        let mut expected = self.expected.borrow_mut();
        expected.retain(|_, since| since.elapsed() < EXPECTED_FOR);
        if expected.len() >= KNOWN {
            let what = format!("{KNOWN} dumps are expected already, and none of them has begun");
            return Err(Refusal::Refused(what));
        }
        expected.insert(pid, Instant::now());
        Ok(())
    }

    /// A dump of the CRIU of this pid begins; 0 is not known.
    pub(super) fn begin(&self, pid: i32) -> Rc<Waited> {
        let heard = self.expected.borrow_mut().remove(&pid);
        let dump = Rc::new(Waited {
            expected: Cell::new(heard.is_some_and(|since| since.elapsed() < EXPECTED_FOR)),
            asked: watch::Sender::new(false),
            given_up: watch::Sender::new(None),
            outcome: watch::Sender::new(None),
        });
        let mut dumps = self.dumps.borrow_mut();
        if dumps.len() >= KNOWN {
            dumps.retain(|_, dump| !dump.has_ended());
        }
        if pid != 0 {
            dumps.insert(pid, dump.clone());
            self.begun.notify_waiters();
        }
        dump
    }

    /// The dump of the CRIU of this pid. Its connection may be about to be accepted.
    async fn of(&self, pid: i32) -> Rc<Waited> {
        loop {
            let begun = self.begun.notified();
            if let Some(dump) = self.dumps.borrow().get(&pid) {
                return dump.clone();
            }
            begun.await;
        }
    }

    /// The action script waits: the dump of the CRIU of this pid is over when all that has come of it is
    /// acknowledged. Unless this is waited for to its end, the snapshot is given up.
    pub(super) async fn finish(&self, pid: i32, limit: Duration) -> Result<Snapshot, Refusal> {
        let dump = timeout(limit.min(BEGINS_WITHIN), self.of(pid)).await.map_err(|_| {
            Refusal::Refused(format!(
                "no dump of a CRIU with pid {pid} has come here: criu dump --stream has to lead to this proxy, \
                 and to be in its pid namespace"
            ))
        })?;
        dump.asked.send_replace(true);
        let waiting = Waiting(&dump);
        let outcome = if let Ok(outcome) = timeout(limit, dump.outcome()).await {
            outcome
        } else {
            dump.give_up(format!("CRIU's action script has waited {limit:?} for the cache"));
            // What was acknowledged in this very moment does not count for a script that is told it was not.
            match timeout(ENDS_WITHIN, dump.outcome()).await {
                Ok(Err(why)) => Err(why),
                _ => Err(format!("the cache has not acknowledged it within {limit:?}")),
            }
        };
        drop(waiting);
        outcome.map_err(Refusal::Refused)
    }
}

/// Who waits for the end of a dump.
struct Waiting<'a>(&'a Waited);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if !self.0.has_ended() {
            self.0.give_up("CRIU's action script has gone while it waited".to_owned());
        }
    }
}

impl Waited {
    /// Whether CRIU will not end or thaw its process before the end of the dump.
    pub(super) fn is_expected(&self) -> bool {
        self.expected.get()
    }

    /// Whether CRIU's action script waits.
    pub(super) fn is_asked(&self) -> bool {
        *self.asked.borrow()
    }

    /// Resolves when CRIU's action script waits: CRIU has handed over all that it has.
    pub(super) async fn asked(&self) {
        // The sender is in `self`.
        let _ = self.asked.subscribe().wait_for(|asked| *asked).await;
    }

    /// Resolves, with the reason, when the snapshot is not wanted any more.
    pub(super) async fn given_up(&self) -> String {
        let mut given_up = self.given_up.subscribe();
        let reason = given_up.wait_for(Option::is_some).await;
        reason.ok().and_then(|reason| reason.clone()).unwrap_or_default()
    }

    /// The dump has ended: with a snapshot that the cache has acknowledged, or why not.
    pub(super) fn end(&self, outcome: Result<Snapshot, String>) {
        self.outcome.send_replace(Some(outcome));
    }

    fn has_ended(&self) -> bool {
        self.outcome.borrow().is_some()
    }

    fn give_up(&self, reason: String) {
        self.given_up.send_replace(Some(reason));
    }

    async fn outcome(&self) -> Result<Snapshot, String> {
        let mut outcome = self.outcome.subscribe();
        let outcome = outcome.wait_for(Option::is_some).await;
        let outcome = outcome.ok().and_then(|outcome| outcome.clone());
        outcome.unwrap_or_else(|| Err("the proxy has ended".to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::model::SnapshotState;

    const LONG: Duration = Duration::from_secs(60);

    fn sent() -> Snapshot {
        Snapshot {
            id: "web".to_owned(),
            state: SnapshotState::Whole,
            reason: String::new(),
            peer: "host-b:9996".to_owned(),
            images: 20,
            bytes: 4096,
            begun_ms: 1,
            ended_ms: 2,
            needs_view: String::new(),
            memory_may_have_changed: None,
        }
    }

    #[tokio::test]
    async fn a_hook_hears_of_its_dump_when_the_cache_has_it_and_as_often_as_it_asks() {
        let hooks = Hooks::default();
        hooks.expect(7).unwrap();
        let (dump, other) = (hooks.begin(7), hooks.begin(8));
        assert!(dump.is_expected() && !other.is_expected());
        let ends = async {
            dump.asked().await;
            dump.end(Ok(sent()));
        };
        let (finished, ()) = tokio::join!(hooks.finish(7, LONG), ends);
        assert_eq!(finished, Ok(sent()));
        assert_eq!(hooks.finish(7, LONG).await, Ok(sent()));
        assert!(!other.is_asked());
    }

    #[tokio::test]
    async fn a_hook_may_be_heard_before_or_after_its_criu_connects_and_for_one_dump() {
        let hooks = Hooks::default();
        let dump = hooks.begin(7);
        hooks.expect(7).unwrap();
        assert!(dump.is_expected());
        dump.end(Ok(sent()));
        assert!(!hooks.begin(7).is_expected(), "another CRIU of that pid has said nothing");
    }

    #[tokio::test]
    async fn a_hook_of_a_dump_that_is_not_here_or_fails_is_refused() {
        let hooks = Hooks::default();
        let Err(Refusal::Refused(why)) = hooks.finish(7, LONG).await else { panic!() };
        assert!(why.starts_with("no dump of a CRIU with pid 7 has come here"), "{why}");
        // Its connection is accepted a little later.
        let late = async {
            tokio::task::yield_now().await;
            hooks.begin(7).end(Ok(sent()));
        };
        assert_eq!(tokio::join!(hooks.finish(7, LONG), late).0, Ok(sent()));
        hooks.expect(7).unwrap();
        let limit = Duration::from_millis(20);
        assert!(hooks.finish(7, limit).await.is_err(), "that was another CRIU of this pid");
        hooks.begin(7).end(Err("the link broke".to_owned()));
        let refused = Err(Refusal::Refused("the link broke".to_owned()));
        assert_eq!(hooks.finish(7, LONG).await, refused);
    }

    #[tokio::test]
    async fn a_dump_is_given_up_when_its_hook_has_waited_long_enough_or_has_gone() {
        let hooks = Hooks::default();
        let dump = hooks.begin(7);
        let ends = async { dump.end(Err(dump.given_up().await)) };
        let (finished, ()) = tokio::join!(hooks.finish(7, Duration::from_millis(20)), ends);
        let why = "CRIU's action script has waited 20ms for the cache".to_owned();
        assert_eq!(finished, Err(Refusal::Refused(why)));

        let dump = hooks.begin(8);
        let waits = timeout(Duration::from_millis(20), hooks.finish(8, LONG));
        assert!(waits.await.is_err());
        assert_eq!(dump.given_up().await, "CRIU's action script has gone while it waited");
    }

    #[tokio::test]
    async fn dumps_that_never_begin_are_not_expected_without_end() {
        let hooks = Hooks::default();
        (0..1024).for_each(|pid| hooks.expect(pid).unwrap());
        assert!(hooks.expect(1024).is_err());
        (1..3000).for_each(|pid| hooks.begin(pid).end(Ok(sent())));
        assert!(hooks.dumps.borrow().len() <= KNOWN);
    }
}
