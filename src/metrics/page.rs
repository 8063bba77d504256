//! What a scrape shows.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

use super::durations::Durations;
use super::refusals::Refusals;
use crate::control::model::{Role, Status};

/// What every name begins with.
const PREFIX: &str = "criu_image_relay";

/// The figures of one moment.
#[derive(Debug)]
pub struct Page {
    role: Role,
    families: Vec<Family>,
}

/// The figures of one name.
#[derive(Debug)]
struct Family {
    name: &'static str,
    help: &'static str,
    unit: Option<Unit>,
    kind: MetricType,
    /// By the value of this label, unless there is only one.
    label: Option<&'static str>,
    values: Vec<(String, Value)>,
}

#[derive(Debug)]
enum Value {
    Gauge(u64),
    Seconds(f64),
    Counter(u64),
    Durations(Durations),
    Info(&'static str, String),
}

impl Page {
    /// What both daemons have, as `criu-imagectl status` tells it.
    pub fn of(status: &Status) -> Page {
        let mut page = Page { role: status.role, families: Vec::new() };
        let version = Value::Info("version", status.version.clone());
        page.add(("build", "The version of the daemon."), (None, MetricType::Info), alone(version));
        #[allow(clippy::cast_precision_loss)] // exact for some 280000 years
        let started = Value::Seconds(status.started_ms as f64 / 1e3);
        page.add(
            ("start_time", "When the daemon started, since the epoch."),
            (Some(Unit::Seconds), MetricType::Gauge),
            alone(started),
        );
        page.gauge("sessions", "CRIU runs and other clients that are connected.", status.sessions);
        let up = status.links.iter().filter(|link| link.up).count() as u64;
        page.gauge("links", "Links that are up.", up);
        page.bytes_counter(
            "link",
            "Images and pages that were moved over links.",
            status.total_bytes,
        );
        page
    }

    /// A figure that goes up and down.
    pub fn gauge(&mut self, name: &'static str, help: &'static str, value: u64) {
        self.add((name, help), (None, MetricType::Gauge), alone(Value::Gauge(value)));
    }

    /// The same in bytes.
    pub fn bytes_gauge(&mut self, name: &'static str, help: &'static str, value: u64) {
        let kind = (Some(Unit::Bytes), MetricType::Gauge);
        self.add((name, help), kind, alone(Value::Gauge(value)));
    }

    /// Several that a label tells apart.
    pub fn gauges<W: Into<String>>(
        &mut self,
        name: &'static str,
        help: &'static str,
        label: &'static str,
        values: impl IntoIterator<Item = (W, u64)>,
    ) {
        let values = values.into_iter().map(|(of, value)| (of.into(), Value::Gauge(value)));
        self.add((name, help), (None, MetricType::Gauge), (Some(label), values.collect()));
    }

    /// A figure that only grows.
    pub fn counter(&mut self, name: &'static str, help: &'static str, value: u64) {
        self.add((name, help), (None, MetricType::Counter), alone(Value::Counter(value)));
    }

    /// The same in bytes.
    pub fn bytes_counter(&mut self, name: &'static str, help: &'static str, value: u64) {
        let kind = (Some(Unit::Bytes), MetricType::Counter);
        self.add((name, help), kind, alone(Value::Counter(value)));
    }

    /// Several that a label tells apart.
    pub fn counters(
        &mut self,
        name: &'static str,
        help: &'static str,
        label: &'static str,
        values: impl IntoIterator<Item = (&'static str, u64)>,
    ) {
        let values = values.into_iter().map(|(of, value)| (of.to_owned(), Value::Counter(value)));
        self.add((name, help), (None, MetricType::Counter), (Some(label), values.collect()));
    }

    /// How long something took.
    pub fn durations(&mut self, name: &'static str, help: &'static str, durations: &Durations) {
        let kind = (Some(Unit::Seconds), MetricType::Histogram);
        self.add((name, help), kind, alone(Value::Durations(durations.clone())));
    }

    /// How long things took that a label tells apart.
    pub fn durations_by<'d>(
        &mut self,
        name: &'static str,
        help: &'static str,
        label: &'static str,
        durations: impl IntoIterator<Item = (&'static str, &'d Durations)>,
    ) {
        let kind = (Some(Unit::Seconds), MetricType::Histogram);
        let durations = durations.into_iter();
        let values = durations.map(|(of, took)| (of.to_owned(), Value::Durations(took.clone())));
        self.add((name, help), kind, (Some(label), values.collect()));
    }

    /// Peers that were refused.
    pub fn refusals(&mut self, refusals: &Refusals) {
        let help = "Peers that were refused, or whose session was ended, by reason.";
        self.counters("refusals", help, "reason", refusals.counts());
    }

    fn add(
        &mut self,
        (name, help): (&'static str, &'static str),
        (unit, kind): (Option<Unit>, MetricType),
        (label, values): (Option<&'static str>, Vec<(String, Value)>),
    ) {
        self.families.push(Family { name, help, unit, kind, label, values });
    }

    /// All of it, as it goes to the client.
    pub fn text(self) -> Result<String, fmt::Error> {
        let role = match self.role {
            Role::Proxy => "proxy",
            Role::Cache => "cache",
        };
        let labels = [("role".into(), role.into())];
        let mut registry = Registry::with_prefix_and_labels(PREFIX, labels.into_iter());
        registry.register_collector(Box::new(self));
        let mut text = String::new();
        encode(&mut text, &registry)?;
        Ok(text)
    }
}

fn alone(value: Value) -> (Option<&'static str>, Vec<(String, Value)>) {
    (None, vec![(String::new(), value)])
}

impl Collector for Page {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        for Family { name, help, unit, kind, label, values } in &self.families {
            let mut metric = encoder.encode_descriptor(name, help, unit.as_ref(), *kind)?;
            for (of, value) in values {
                match label {
                    Some(label) => value.encode(metric.encode_family(&[(*label, of.as_str())])?)?,
                    None => value.encode(metric.encode_family(&NO_LABELS)?)?,
                }
            }
        }
        Ok(())
    }
}

const NO_LABELS: [(&str, &str); 0] = [];

impl Value {
    fn encode(&self, metric: MetricEncoder<'_>) -> fmt::Result {
        match self {
            Value::Gauge(value) => ConstGauge::new(*value).encode(metric),
            Value::Seconds(value) => ConstGauge::new(*value).encode(metric),
            Value::Counter(value) => ConstCounter::new(*value).encode(metric),
            Value::Durations(durations) => durations.0.encode(metric),
            Value::Info(name, value) => Info::new([(*name, value.as_str())]).encode(metric),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::control::model::LinkStatus;

    fn status() -> Status {
        let link = |up| LinkStatus { peer: "b".to_owned(), up, why: String::new() };
        Status {
            role: Role::Cache,
            version: "1.2".to_owned(),
            started_ms: 1_500,
            sessions: 3,
            receiving: 0,
            whole: 0,
            taken: 0,
            damaged: 0,
            held_bytes: 0,
            max_bytes: 0,
            total_bytes: u64::MAX,
            rate: 0,
            links: vec![link(true), link(false)],
        }
    }

    #[test]
    fn it_is_openmetrics_text_in_the_order_in_which_it_was_put_together() {
        let mut page = Page::of(&status());
        page.gauges("snapshots", "Snapshots.", "state", [("whole", 2), ("taken", 0)]);
        let took = Durations::default();
        took.observe(Duration::from_millis(20));
        page.durations_by("dump_duration", "Dumps.", "protocol", [("stream", &took)]);
        let text = page.text().unwrap();
        let expected = "\
# HELP criu_image_relay_build The version of the daemon.
# TYPE criu_image_relay_build info
criu_image_relay_build_info{role=\"cache\",version=\"1.2\"} 1
# HELP criu_image_relay_start_time_seconds When the daemon started, since the epoch.
# TYPE criu_image_relay_start_time_seconds gauge
# UNIT criu_image_relay_start_time_seconds seconds
criu_image_relay_start_time_seconds{role=\"cache\"} 1.5
# HELP criu_image_relay_sessions CRIU runs and other clients that are connected.
# TYPE criu_image_relay_sessions gauge
criu_image_relay_sessions{role=\"cache\"} 3
# HELP criu_image_relay_links Links that are up.
# TYPE criu_image_relay_links gauge
criu_image_relay_links{role=\"cache\"} 1
# HELP criu_image_relay_link_bytes Images and pages that were moved over links.
# TYPE criu_image_relay_link_bytes counter
# UNIT criu_image_relay_link_bytes bytes
criu_image_relay_link_bytes_total{role=\"cache\"} 18446744073709551615
# HELP criu_image_relay_snapshots Snapshots.
# TYPE criu_image_relay_snapshots gauge
criu_image_relay_snapshots{role=\"cache\",state=\"whole\"} 2
criu_image_relay_snapshots{role=\"cache\",state=\"taken\"} 0
# HELP criu_image_relay_dump_duration_seconds Dumps.
# TYPE criu_image_relay_dump_duration_seconds histogram
# UNIT criu_image_relay_dump_duration_seconds seconds
criu_image_relay_dump_duration_seconds_sum{role=\"cache\",protocol=\"stream\"} 0.02
criu_image_relay_dump_duration_seconds_count{role=\"cache\",protocol=\"stream\"} 1
criu_image_relay_dump_duration_seconds_bucket{role=\"cache\",le=\"0.01\",protocol=\"stream\"} 0
criu_image_relay_dump_duration_seconds_bucket{role=\"cache\",le=\"0.025\",protocol=\"stream\"} 1
";
        assert!(text.starts_with(expected), "{text}");
        assert!(text.ends_with("# EOF\n"), "{text}");
    }

    #[test]
    fn what_a_peer_says_cannot_break_a_line() {
        let mut page = Page::of(&status());
        page.gauges("link_up", "Links.", "peer", [("a\"b\\c\nd", 1)]);
        let text = page.text().unwrap();
        assert!(text.contains("peer=\"a\\\"b\\\\c\\nd\"} 1\n"), "{text}");
    }
}
