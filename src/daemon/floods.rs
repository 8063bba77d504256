//! Messages that a peer can have the daemon say as often as it likes: so many of one kind about one host are said
//! within a minute, and then how many more there were.
//!
//! It is a layer before the one that writes, so that it holds for every message, whoever says it.

use std::collections::HashMap;
use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing::callsite::Identifier;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;
use tracing_subscriber::registry::LookupSpan;

use super::journal;
use super::local_peers::network;

/// So many messages of one kind about one host are said.
const SAID: u64 = 100;
/// So many of those that tell what becomes of a snapshot that has come: more than a link brings, and few enough for a journal.
const SAID_OF_HELD: u64 = 10_000;
/// In so much time.
const WINDOW: Duration = Duration::from_secs(60);
/// So many kinds and hosts are told apart. Further hosts count as one.
const TOLD_APART: usize = 1024;
/// What those are called.
const OTHERS: &str = "others";
/// So many networks within one of 48 bits, which is what a customer gets of IPv6, are told apart. Further ones count as that one.
const OF_A_SITE: usize = 64;
/// What a message is about that names no peer.
const NOBODY: &str = "nobody in particular";
/// An example of what was left out has no more characters.
const EXAMPLE_MAX: usize = 200;

/// Each is said once for a snapshot while a daemon runs, and it is what is looked for when one is missed.
const ALWAYS_SAID: [&str; 3] =
    [journal::SNAPSHOT_LOST, journal::SNAPSHOT_LEFT, journal::SNAPSHOT_HELD_AGAIN];

/// What a snapshot that has come goes through, by which its id is found in the journal. It has cost its sender bytes, and a
/// place among those that are held.
const OF_HELD: [&str; 6] = [
    journal::SNAPSHOT_SENT,
    journal::SNAPSHOT_WHOLE,
    journal::SNAPSHOT_TAKEN,
    journal::SNAPSHOT_DROPPED,
    journal::SNAPSHOT_EXPIRED,
    journal::ROUND_HELD,
];

/// What was said lately.
#[derive(Debug, Clone, Default)]
pub(super) struct Floods(Arc<Mutex<Lately>>);

/// The messages of the last minute, by where they are said in the code, and the host that they are about.
#[derive(Debug, Default)]
struct Lately(HashMap<(Identifier, String), Flood>);

/// Those of one kind about one host.
#[derive(Debug)]
struct Flood {
    /// The site of that host.
    site: Option<Ipv6Addr>,
    since: Instant,
    said: u64,
    left_out: u64,
    /// The first that was left out.
    example: String,
}

/// What is said at the end of a flood.
#[derive(Debug, PartialEq, Eq)]
struct LeftOut {
    host: String,
    count: u64,
    example: String,
}

impl Floods {
    /// Says what was left out in the minutes that are over; at the `end` in all of them.
    pub(super) fn tell_left_out(&self, end: bool) {
        // The lock is not held while that is said.
        let over = self.lately(|lately| lately.over(Instant::now(), end));
        for LeftOut { host, count, example } in over {
            tracing::warn!(
                message_id = journal::MESSAGES_LEFT_OUT,
                criu_peer = host,
                criu_left_out = count,
                "{count} more messages about {host} were left out within a minute, the first of them: {example}"
            );
        }
    }

    fn lately<T>(&self, look: impl FnOnce(&mut Lately) -> T) -> T {
        look(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Lately {
    /// Whether a message is said. `text` is it.
    fn is_said(
        &mut self,
        kind: Identifier,
        Host { name, mut site }: Host,
        at_most: u64,
        now: Instant,
        text: impl FnOnce() -> String,
    ) -> bool {
        let mut key = (kind, name);
        // A whole site does not take the places of everybody else.
        if let Some(network) = site.filter(|_| !self.0.contains_key(&key)) {
            if self.of_site(&key.0, network) >= OF_A_SITE {
                key.1 = format!("{network}/48");
                site = None;
            }
        }
        if self.0.len() >= TOLD_APART && !self.0.contains_key(&key) {
            OTHERS.clone_into(&mut key.1);
        }
        let new = Flood { site, since: now, said: 0, left_out: 0, example: String::new() };
        let flood = self.0.entry(key).or_insert(new);
        if flood.said < at_most {
            flood.said += 1;
            return true;
        }
        if flood.left_out == 0 {
            flood.example = text().chars().take(EXAMPLE_MAX).collect();
        }
        flood.left_out += 1;
        false
    }

    /// How many hosts of a site have had messages of one kind said.
    fn of_site(&self, kind: &Identifier, site: Ipv6Addr) -> usize {
        let of_it = |((known, _), flood): &(&(Identifier, String), &Flood)| {
            flood.site == Some(site) && known == kind
        };
        self.0.iter().filter(of_it).count()
    }

    /// Forgets those whose minute is over, or all; tells what was left out of them.
    fn over(&mut self, now: Instant, all: bool) -> Vec<LeftOut> {
        let mut over = Vec::new();
        self.0.retain(|(_, host), flood| {
            let goes_on = !all && now.saturating_duration_since(flood.since) < WINDOW;
            if !goes_on && flood.left_out > 0 {
                let (host, example) = (host.clone(), std::mem::take(&mut flood.example));
                over.push(LeftOut { host, count: flood.left_out, example });
            }
            goes_on
        });
        over
    }
}

/// The host, or the user of this one, that messages are about.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Host {
    name: String,
    /// Its network of 48 bits, if it has an address of IPv6.
    site: Option<Ipv6Addr>,
}

impl Host {
    /// That of a peer, by the peer's name in a message. Whoever has an address of IPv6 has as many as it likes in the same network.
    fn of(peer: &str) -> Host {
        let ip = peer.parse::<SocketAddr>().map(|address| address.ip().to_canonical());
        match ip {
            Ok(IpAddr::V4(ip)) => Host::named(&ip.to_string()),
            Ok(IpAddr::V6(ip)) => {
                Host { name: format!("{}/64", network(ip, 64)), site: Some(network(ip, 48)) }
            }
            // "pid N (uid N)", for one.
            Err(_) => match peer.split_once(" (").and_then(|(_, user)| user.strip_suffix(')')) {
                Some(user) if peer.starts_with("pid ") => Host::named(user),
                _ => Host::named(peer),
            },
        }
    }

    fn named(name: &str) -> Host {
        Host { name: name.to_owned(), site: None }
    }
}

/// The host that a span is about.
struct About(Host);

/// What is looked at of a message, or of a span.
#[derive(Debug, Default)]
struct Looked {
    host: Option<Host>,
    always_said: bool,
    of_held: bool,
}

impl Visit for Looked {
    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "criu_peer" => self.host = Some(Host::of(value)),
            "message_id" => {
                self.of_held = OF_HELD.contains(&value);
                self.always_said =
                    value == journal::MESSAGES_LEFT_OUT || ALWAYS_SAID.contains(&value);
            }
            _ => {}
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "criu_peer" {
            self.host = Some(Host::of(&format!("{value:?}")));
        }
    }
}

/// The text of a message.
#[derive(Debug, Default)]
struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            self.0 = format!("{value:?}");
        }
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Floods {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let mut looked = Looked::default();
        attributes.record(&mut looked);
        if let (Some(host), Some(span)) = (looked.host, context.span(id)) {
            span.extensions_mut().insert(About(host));
        }
    }

    fn event_enabled(&self, event: &Event<'_>, context: Context<'_, S>) -> bool {
        // Who has less important ones said wants to see them.
        if *event.metadata().level() > Level::INFO {
            return true;
        }
        let mut looked = Looked::default();
        event.record(&mut looked);
        if looked.always_said {
            return true;
        }
        let of_span = || {
            let spans = context.event_scope(event)?;
            spans
                .into_iter()
                .find_map(|span| span.extensions().get::<About>().map(|About(host)| host.clone()))
        };
        let host = looked.host.or_else(of_span).unwrap_or_else(|| Host::named(NOBODY));
        let at_most = if looked.of_held { SAID_OF_HELD } else { SAID };
        let text = || {
            let mut text = Text::default();
            event.record(&mut text);
            text.0
        };
        let kind = event.metadata().callsite();
        self.lately(|lately| lately.is_said(kind, host, at_most, Instant::now(), text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tracing_subscriber::layer::SubscriberExt;

    #[test]
    fn a_peer_is_known_by_its_host_or_user() {
        for (peer, host) in [
            ("192.0.2.7:4711", "192.0.2.7"),
            ("[::ffff:192.0.2.7]:4711", "192.0.2.7"),
            ("[2001:db8:1:2:3::4]:4711", "2001:db8:1:2::/64"),
            ("pid 17 (uid 1000)", "uid 1000"),
            ("hostb.example.net:9996", "hostb.example.net:9996"),
            ("unix socket", "unix socket"),
        ] {
            assert_eq!(Host::of(peer).name, host);
        }
    }

    /// Counts the messages that are said.
    #[derive(Clone, Default)]
    struct Said(Arc<Mutex<Vec<String>>>);

    impl<S: Subscriber> Layer<S> for Said {
        fn on_event(&self, event: &Event<'_>, _context: Context<'_, S>) {
            let mut text = Text::default();
            event.record(&mut text);
            self.0.lock().unwrap().push(text.0);
        }
    }

    #[test]
    fn of_a_flood_some_are_said_and_then_how_many_more_there_were() {
        let (floods, said) = (Floods::default(), Said::default());
        let layers = tracing_subscriber::registry().with(floods.clone()).with(said.clone());
        tracing::subscriber::with_default(layers, || {
            for port in 1..=SAID + 7 {
                let peer = format!("192.0.2.7:{port}");
                let span = tracing::error_span!("link", criu_peer = %peer);
                span.in_scope(|| tracing::warn!("refused {port}"));
                tracing::debug!("not bounded");
            }
            tracing::warn!("somebody else is told of");
            floods.tell_left_out(false);
            floods.tell_left_out(true);
            floods.tell_left_out(true);
        });
        let said = said.0.lock().unwrap();
        let count = |part: &str| said.iter().filter(|said| said.contains(part)).count() as u64;
        assert_eq!(count("refused") - 1, SAID);
        assert_eq!(count("not bounded"), SAID + 7);
        assert_eq!(count("somebody else"), 1);
        assert_eq!(
            said.last().unwrap(),
            "7 more messages about 192.0.2.7 were left out within a minute, the first of them: refused 101"
        );
    }

    #[test]
    fn what_becomes_of_a_snapshot_is_said_far_longer() {
        let (floods, said) = (Floods::default(), Said::default());
        let layers = tracing_subscriber::registry().with(floods.clone()).with(said.clone());
        tracing::subscriber::with_default(layers, || {
            let span = tracing::error_span!("link", criu_peer = "192.0.2.7:1");
            let _within = span.enter();
            for id in 0..5 * SAID {
                tracing::info!(message_id = journal::SNAPSHOT_WHOLE, "whole {id}");
                tracing::warn!(message_id = journal::SNAPSHOT_REFUSED, "refused {id}");
            }
        });
        let said = said.0.lock().unwrap();
        let count = |part: &str| said.iter().filter(|said| said.contains(part)).count() as u64;
        assert_eq!((count("whole"), count("refused")), (5 * SAID, SAID));
    }

    #[test]
    fn a_minute_later_the_same_is_said_again() {
        let (mut lately, start) = (Lately::default(), Instant::now());
        let kind = tracing::callsite::Identifier(&CALLSITE);
        let host = || "a".to_owned();
        let say = |lately: &mut Lately, now| {
            lately.is_said(kind.clone(), Host::named(&host()), SAID, now, host)
        };
        for _ in 0..SAID {
            assert!(say(&mut lately, start));
        }
        assert!(!say(&mut lately, start));
        assert_eq!(lately.over(start + WINDOW / 2, false), []);
        let left_out = LeftOut { host: host(), count: 1, example: host() };
        assert_eq!(lately.over(start + WINDOW, false), [left_out]);
        assert!(say(&mut lately, start + WINDOW));
        assert_eq!(lately.over(start + 3 * WINDOW, false), [], "nothing was left out");
    }

    #[test]
    fn hosts_that_are_too_many_to_be_told_apart_count_as_one() {
        let (mut lately, now) = (Lately::default(), Instant::now());
        let kind = tracing::callsite::Identifier(&CALLSITE);
        for host in 0..3 * TOLD_APART {
            let host = Host::named(&host.to_string());
            lately.is_said(kind.clone(), host, SAID, now, String::new);
        }
        assert!(lately.0.len() <= TOLD_APART + 1);
        let left_out: Vec<_> = lately.over(now, true);
        assert_eq!(left_out.len(), 1);
        assert_eq!((left_out[0].host.as_str(), left_out[0].count), (OTHERS, 2 * 1024 - SAID));
    }

    #[test]
    fn a_site_with_many_networks_is_one_host_and_takes_nobodys_place() {
        let (mut lately, now) = (Lately::default(), Instant::now());
        let kind = tracing::callsite::Identifier(&CALLSITE);
        let mut say = |peer: &str| {
            lately.is_said(kind.clone(), Host::of(peer), SAID, now, || peer.to_owned())
        };
        let attacker =
            (0..=u16::MAX).filter(|network| say(&format!("[2001:db8:1:{network:x}::1]:1")));
        assert_eq!(attacker.count() as u64, OF_A_SITE as u64 + SAID);
        // Those of other sites are told apart.
        for peer in ["[2001:db8:2::1]:1", "[2001:db8:3::1]:1", "192.0.2.7:1"] {
            for _ in 0..SAID {
                assert!(say(peer), "{peer}");
            }
            assert!(!say(peer));
        }
        let left_out = lately.over(now, true);
        let site = left_out.iter().find(|left_out| left_out.host == "2001:db8:1::/48").unwrap();
        assert_eq!(site.count, (1 << 16) - OF_A_SITE as u64 - SAID);
        assert!(left_out.iter().all(|left_out| left_out.host != OTHERS), "{left_out:?}");
    }

    struct AnyCallsite;

    static CALLSITE: AnyCallsite = AnyCallsite;

    impl tracing::Callsite for AnyCallsite {
        fn set_interest(&self, _: tracing::subscriber::Interest) {}

        fn metadata(&self) -> &tracing::Metadata<'_> {
            unreachable!("nobody asks")
        }
    }
}
