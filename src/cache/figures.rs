//! What a scrape of the cache shows.

use super::{Cache, StateCounts};
use crate::daemon::local_peers::{NotAdmitted, Owner, admit_stream};
use crate::metrics;
use crate::metrics::durations::Durations;
use crate::metrics::page::Page;
use crate::metrics::refusals::Refusals;
use crate::sys::connected::Stream;

/// What is counted for scrapes alone. The rest is where `criu-imagectl` has it from, and in the store.
#[derive(Debug, Default)]
pub(super) struct Figures {
    pub(super) refusals: Refusals,
    /// From the first message of a snapshot until it was whole.
    pub(super) received: Durations,
    /// The same of rounds, until they were held.
    pub(super) rounds: Durations,
    /// From the first image that a restore was given to its end.
    pub(super) restores: Durations,
}

impl metrics::Figures for Cache {
    fn page(&self) -> Page {
        let status = self.status();
        let mut page = Page::of(&status);
        let help = "Snapshots that are listed now, by state.";
        page.gauges("snapshots", help, "state", StateCounts::of(&self.store).by_state());
        page.bytes_gauge("held", "Images and pages in memory, as charged.", status.held_bytes);
        page.bytes_gauge("quota", "How much may be charged (store.max-bytes).", status.max_bytes);
        let help = "Snapshots and rounds that wait for room now.";
        page.gauge("quota_waiting", help, self.store.quota().waiting());
        let help = "Images and pages that restores and other clients have read.";
        page.bytes_counter("read", help, self.served.get());
        self.add_tally(&mut page);
        let Figures { refusals, received, rounds, restores } = &self.figures;
        let help = "From the first message of a snapshot until it was whole.";
        page.durations("receive_duration", help, received);
        let help = "From the first message of a round of pages until it was held.";
        page.durations("round_duration", help, rounds);
        let help = "From the first image that a restore was given to its end.";
        page.durations("restore_duration", help, restores);
        page.refusals(refusals);
        page
    }

    async fn admit(&self, client: &Stream) -> Result<Owner, NotAdmitted> {
        let settings = self.settings();
        let allowed = [&settings.allow_uids[..], &settings.metrics.allow_uids].concat();
        admit_stream(client, &allowed, settings.insecure).await
    }

    fn refusals(&self) -> &Refusals {
        &self.figures.refusals
    }
}

impl Cache {
    /// What has become of snapshots since the start.
    fn add_tally(&self, page: &mut Page) {
        let tally = self.store.tally();
        let ended = [
            ("whole", tally.whole.get()),
            ("damaged", tally.damaged.get()),
            ("refused", tally.refused.get()),
        ];
        page.counters("snapshots_ended", "Snapshots that have ended.", "outcome", ended);
        let help = "Restores that have read a snapshot.";
        page.counter("snapshots_taken", help, tally.taken.get());
        let forgotten = [
            ("dropped", tally.dropped.get()),
            ("expired", tally.expired.get()),
            ("superseded", tally.superseded.get()),
        ];
        let help = "Snapshots that are listed no more, by reason.";
        page.counters("snapshots_forgotten", help, "reason", forgotten);
        let rounds = [("held", tally.rounds_held.get()), ("failed", tally.rounds_failed.get())];
        page.counters("rounds", "Rounds of pages that have ended.", "outcome", rounds);
    }
}
