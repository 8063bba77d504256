//! A client for the figures, and what they say by a real OpenMetrics parser.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::process::{Command, Stdio};

use serde::Deserialize;
use serde_json::Number;

/// The figures of one name.
#[derive(Debug, Deserialize)]
pub(crate) struct Family {
    pub(crate) name: String,
    #[serde(rename = "type")]
    pub(crate) kind: String,
    pub(crate) unit: String,
    pub(crate) help: String,
    pub(crate) samples: Vec<Sample>,
}

/// One figure.
#[derive(Debug, Deserialize)]
pub(crate) struct Sample {
    pub(crate) name: String,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) value: Number,
}

/// A scrape, parsed.
#[derive(Debug)]
pub(crate) struct Scrape(pub(crate) Vec<Family>);

/// Says something, and reads to the end.
pub(crate) fn converse(mut stream: impl Read + Write, said: &[u8]) -> String {
    stream.write_all(said).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// What is shown to a client that asks as Prometheus does.
pub(crate) fn text(stream: impl Read + Write) -> String {
    let request = "GET /metrics HTTP/1.1\r\nHost: localhost\r\nUser-Agent: Prometheus/3.0\r\nAccept: \
                   application/openmetrics-text;version=1.0.0;q=0.5,*/*;q=0.2\r\n\r\n";
    let answer = converse(stream, request.as_bytes());
    let (head, body) = answer.split_once("\r\n\r\n").expect(&answer);
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    let kind = "Content-Type: application/openmetrics-text; version=1.0.0; charset=utf-8";
    assert!(head.lines().any(|line| line == kind), "{head}");
    assert!(head.lines().any(|line| line == format!("Content-Length: {}", body.len())), "{head}");
    body.to_owned()
}

impl Scrape {
    /// What the figures say.
    pub(crate) fn parse(text: &str) -> Scrape {
        // Not the first python3 in PATH: the module is Debian's.
        let mut parser = Command::new("/usr/bin/python3")
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/figures/parse.py"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        parser.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
        let output = parser.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}\n{text}");
        Scrape(serde_json::from_slice(&output.stdout).unwrap())
    }

    /// The figure of that name that has these labels beside the daemon's own.
    #[track_caller]
    pub(crate) fn count(&self, name: &str, labels: &[(&str, &str)]) -> u64 {
        let value = self.value(name, labels);
        value.as_u64().unwrap_or_else(|| panic!("{name} {labels:?} is {value}"))
    }

    /// The same for one that need not be whole.
    #[track_caller]
    pub(crate) fn seconds(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.value(name, labels).as_f64().unwrap()
    }

    #[track_caller]
    fn value(&self, name: &str, labels: &[(&str, &str)]) -> &Number {
        let name = format!("criu_image_relay_{name}");
        let mut samples = self.0.iter().flat_map(|family| &family.samples);
        let has = |sample: &Sample, (label, value): &(&str, &str)| {
            sample.labels.get(*label).is_some_and(|of| of == value)
        };
        let found = samples
            .find(|sample| sample.name == name && labels.iter().all(|label| has(sample, label)));
        &found.unwrap_or_else(|| panic!("no {name} {labels:?} in {self:?}")).value
    }
}
