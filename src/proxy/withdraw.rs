//! An attempt to move a process has failed: the process runs on here, and nothing that came of the attempt may be
//! restored.

use std::rc::Rc;
use std::time::Duration;

use tokio::time::timeout;

use super::Proxy;
use super::link::Links;
use crate::config::ProxySettings;
use crate::control::Withdraw;
use crate::control::model::Withdrawn;
use crate::daemon::journal;
use crate::wire::message::Outcome;

/// How often the cache is asked, if links break under it.
const TRIES: usize = 3;
/// How long a link may take to come up again. Who has the attempt withdrawn waits for it.
const LINK_WITHIN: Duration = Duration::from_secs(4);

impl Proxy {
    /// Ends what is being sent of an attempt, and has the cache give up what came of it. The error says why the
    /// cache could not be asked.
    pub(super) async fn withdraw(
        &self,
        request: &Withdraw,
        cache: &str,
    ) -> Result<Withdrawn, String> {
        let Withdraw { id, attempt, reason, .. } = request;
        let settings = self.settings();
        let limit = settings.link.ack_timeout;
        let own = self.records.find(id).filter(|record| record.attempt() == *attempt);
        if let Some(record) = &own {
            record.stop(reason);
            self.records.remove(record);
            // Its abort goes first.
            let _ = timeout(limit, record.settled()).await;
            tracing::info!(
                message_id = journal::SNAPSHOT_DROPPED,
                criu_snapshot = id,
                "snapshot {id} is withdrawn: {reason}"
            );
        }
        let withdrawn = self.withdraw_at_cache(id, *attempt, reason, cache).await?;
        if withdrawn == Withdrawn::Unsaid && own.is_some_and(|record| record.has_left_pages()) {
            let connection = self.links.connect(cache, &settings).await?;
            connection.forget_pages(id).await;
        }
        Ok(withdrawn)
    }

    /// Has the cache give up what came of an attempt. If it cannot be asked now, it is told as soon as it can be, until the proxy
    /// gives up waiting for a link.
    pub(super) async fn withdraw_at_cache(
        &self,
        id: &str,
        attempt: u64,
        reason: &str,
        cache: &str,
    ) -> Result<Withdrawn, String> {
        let withdrawal = Withdrawal {
            links: self.links.clone(),
            settings: self.settings(),
            id: id.to_owned(),
            attempt,
            reason: reason.to_owned(),
            cache: cache.to_owned(),
        };
        let answer = withdrawal.ask(LINK_WITHIN).await;
        if answer.is_err() {
            tokio::task::spawn_local(withdrawal.tell_late());
        }
        answer
    }
}

/// What the cache is told of an attempt that has failed.
struct Withdrawal {
    links: Rc<Links>,
    settings: Rc<ProxySettings>,
    id: String,
    attempt: u64,
    reason: String,
    cache: String,
}

impl Withdrawal {
    /// Asks the cache to give up what came of the attempt, over a link that may take so long to come up.
    async fn ask(&self, patience: Duration) -> Result<Withdrawn, String> {
        let Withdrawal { links, settings, id, attempt, reason, cache } = self;
        let limit = settings.link.ack_timeout;
        for _ in 0..TRIES {
            let connection = links.connect_within(cache, settings, patience).await?;
            if !connection.withdraws() {
                return Ok(Withdrawn::Unsaid);
            }
            let answer = connection.withdraw(id, *attempt, reason);
            match connection.within(limit, answer).await {
                Ok(Some(Outcome::Withdrawn)) => return Ok(Withdrawn::Withdrawn),
                Ok(Some(Outcome::Taken)) => return Ok(Withdrawn::Taken),
                Ok(Some(Outcome::Unknown)) => return Ok(Withdrawn::Unknown),
                // An answer of a later version.
                Ok(Some(Outcome::Unspecified)) => return Ok(Withdrawn::Unsaid),
                Ok(None) => {}
                Err(_) => return Err(format!("the cache {cache} has not answered for {limit:?}")),
            }
        }
        Err(format!("the link to {cache} breaks again and again"))
    }

    /// Nobody waits for the answer any more, but what came is not to be restored.
    async fn tell_late(self) {
        let Withdrawal { id, cache, .. } = &self;
        match self.ask(self.settings.link.give_up_after).await {
            Ok(withdrawn) => {
                let (calls_for_somebody, what) = told_late(withdrawn, id, cache);
                if calls_for_somebody {
                    tracing::warn!(criu_snapshot = id, "{what}");
                } else {
                    tracing::info!(criu_snapshot = id, "{what}");
                }
            }
            Err(why) => tracing::debug!("the cache was not told that {id} is withdrawn: {why}"),
        }
    }
}

/// What is said of an answer that came late, and whether somebody has to do something.
fn told_late(withdrawn: Withdrawn, id: &str, cache: &str) -> (bool, String) {
    match withdrawn {
        Withdrawn::Withdrawn | Withdrawn::Unknown => {
            (false, format!("the cache {cache} has heard late that snapshot {id} is withdrawn"))
        }
        Withdrawn::Taken => {
            let why = "the process may run there and here: end one of the two";
            (
                true,
                format!(
                    "a restore has taken snapshot {id} at the cache {cache}, which heard too late that it is withdrawn: {why}"
                ),
            )
        }
        Withdrawn::Unsaid => {
            let why = "see there, and if it is whole, drop it";
            (
                true,
                format!("the cache {cache} cannot say whether snapshot {id} is withdrawn: {why}"),
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_may_run_twice_calls_for_somebody() {
        let told = |withdrawn| told_late(withdrawn, "web", "hostb:9996");
        let (calls, what) = told(Withdrawn::Taken);
        assert!(calls && what.contains("a restore has taken snapshot web"), "{what}");
        assert!(told(Withdrawn::Unsaid).0);
        assert!(!told(Withdrawn::Withdrawn).0 && !told(Withdrawn::Unknown).0);
    }
}
