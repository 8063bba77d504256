//! What a scrape of the proxy shows.

use super::Proxy;
use super::records::Tally;
use crate::daemon::local_peers::{NotAdmitted, Owner, admit_stream};
use crate::metrics;
use crate::metrics::page::Page;
use crate::metrics::refusals::Refusals;
use crate::sys::connected::Stream;

/// What is counted for scrapes alone. The rest is where `criu-imagectl` has it from.
#[derive(Debug, Default)]
pub(super) struct Figures {
    pub(super) refusals: Refusals,
}

impl metrics::Figures for Proxy {
    fn page(&self) -> Page {
        let status = self.status();
        let mut page = Page::of(&status);
        let links = status.links.iter().map(|link| (link.peer.clone(), u64::from(link.up)));
        page.gauges("link_up", "Whether the link to a cache is up.", "peer", links);
        let help = "Snapshots that are listed now, by state.";
        page.gauges("snapshots", help, "state", self.records.counts().by_state());
        page.bytes_gauge("held", "Copied pages that wait to be sent.", status.held_bytes);
        page.bytes_gauge("quota", "How much may wait (memory.max-bytes).", status.max_bytes);
        let Tally { ended, rounds, dumps, round_durations } = self.records.tally();
        page.counters(
            "snapshots_ended",
            "Snapshots that have ended.",
            "outcome",
            ended.by_outcome(["sent", "damaged"]),
        );
        let help = "Rounds of pages that have ended.";
        page.counters("rounds", help, "outcome", rounds.by_outcome(["held", "failed"]));
        page.durations_by(
            "dump_duration",
            "From the first page or image of a dump that was sent to the cache's acknowledgement.",
            "protocol",
            dumps.by_protocol(),
        );
        page.durations(
            "round_duration",
            "From the first command of a round of pages until the cache held it.",
            round_durations,
        );
        let help = "Pages that clients have been given back.";
        page.bytes_counter("read", help, self.served.get());
        page.refusals(&self.figures.refusals);
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
