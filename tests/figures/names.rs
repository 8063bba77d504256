//! The page of names and the dashboard, held against real scrapes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::bed::Bed;
use crate::scrape::Scrape;

fn read(path: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

/// A name: its type, who has it, its labels.
type Name = (String, BTreeSet<String>, BTreeSet<String>);

fn words(cell: &str) -> BTreeSet<String> {
    let words = cell.split([',', ' ', '`']).map(str::trim).filter(|word| !word.is_empty());
    words.map(str::to_owned).collect()
}

/// The names that the page has.
fn documented() -> BTreeMap<String, Name> {
    let page = read("docs/metrics.md");
    let names = page.split("\n## Names\n").nth(1).and_then(|rest| rest.split("\n## ").next());
    let rows = names.unwrap().lines().filter_map(|line| line.strip_prefix("| `criu_image_relay_"));
    let row = |row: &str| {
        let cells: Vec<_> = row.split('|').map(str::trim).collect();
        let name = format!("criu_image_relay_{}", cells[0].trim_end_matches('`'));
        (name, (cells[1].to_owned(), words(cells[2]), words(cells[3])))
    };
    rows.map(row).collect()
}

/// The labels of a family, beside those that every one has.
fn labels(scrape: &Scrape, family: &str) -> BTreeSet<String> {
    let samples = scrape.0.iter().filter(|of| of.name == family).flat_map(|of| &of.samples);
    let labels = samples.flat_map(|sample| sample.labels.keys());
    labels.filter(|label| !["role", "le"].contains(&label.as_str())).cloned().collect()
}

#[test]
fn the_page_has_every_name_with_its_type_its_daemons_and_its_labels() {
    let bed = Bed::start();
    let mut scraped: BTreeMap<String, Name> = BTreeMap::new();
    for (role, scrape) in [("proxy", bed.proxy()), ("cache", bed.cache())] {
        for family in &scrape.0 {
            assert!(family.help.ends_with('.'), "{}: {}", family.name, family.help);
            assert!(family.unit.is_empty() || family.name.ends_with(&family.unit));
            let samples = || family.samples.iter();
            assert!(samples().all(|sample| sample.labels["role"] == role), "{}", family.name);
            let name = scraped.entry(family.name.clone()).or_default();
            name.0.clone_from(&family.kind);
            name.1.insert(role.to_owned());
            name.2.extend(labels(&scrape, &family.name));
        }
    }
    assert_eq!(scraped, documented());
}

/// Every text in a JSON document that stands under one of these keys.
fn texts_under<'j>(json: &'j Value, keys: &[&str], found: &mut Vec<&'j str>) {
    match json {
        Value::Object(fields) => {
            for (key, value) in fields {
                match value {
                    Value::String(text) if keys.contains(&key.as_str()) => found.push(text),
                    _ => texts_under(value, keys, found),
                }
            }
        }
        Value::Array(values) => values.iter().for_each(|value| texts_under(value, keys, found)),
        _ => {}
    }
}

fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

/// The names in a query, each with the matchers that follow it.
fn selectors(query: &str) -> Vec<(&str, Vec<(&str, &str)>)> {
    let mut selectors = Vec::new();
    for (at, _) in query.match_indices("criu_image_relay_") {
        let rest = &query[at..];
        let end = rest.find(|c| !is_word(c)).unwrap_or(rest.len());
        let (name, rest) = rest.split_at(end);
        let matchers = rest.strip_prefix('{').and_then(|rest| rest.split('}').next());
        let matchers = matchers.unwrap_or("").split(',').filter(|matcher| !matcher.is_empty());
        let parts = |matcher| {
            let end = str::find(matcher, |c| !is_word(c)).expect(matcher);
            (&matcher[..end], matcher[end..].trim_matches(['=', '~', '!', '"']))
        };
        selectors.push((name, matchers.map(parts).collect()));
    }
    selectors
}

/// The labels that a query groups by.
fn grouped_by(query: &str) -> Vec<&str> {
    let groups = query.split("by (").skip(1).map(|rest| rest.split(')').next().unwrap());
    groups.flat_map(|group| group.split(',')).map(str::trim).collect()
}

/// What Prometheus adds by itself.
const ADDED: [&str; 2] = ["instance", "job"];

#[test]
fn the_dashboard_asks_for_what_there_is() {
    let bed = Bed::start();
    let scrapes = [bed.proxy(), bed.cache()];
    let samples = || scrapes.iter().flat_map(|scrape| &scrape.0).flat_map(|of| &of.samples);
    let dashboard: Value =
        serde_json::from_str(&read("contrib/grafana/criu-image-relay.json")).unwrap();
    let mut queries = Vec::new();
    texts_under(&dashboard, &["expr", "query", "definition"], &mut queries);
    queries.retain(|query| query.contains("criu_image_relay_"));
    let mut asked = BTreeSet::new();
    for query in &queries {
        let selectors = selectors(query);
        assert!(!selectors.is_empty(), "{query}");
        for (name, matchers) in &selectors {
            let fits = |(label, value): &(&str, &str), of: &BTreeMap<String, String>| {
                let any = value.starts_with('$') || value.contains('|');
                of.get(*label).is_some_and(|own| any || own == value)
            };
            let own = matchers.iter().filter(|(label, _)| !ADDED.contains(label));
            let own: Vec<_> = own.collect();
            let there = samples().any(|sample| {
                sample.name == *name && own.iter().all(|matcher| fits(matcher, &sample.labels))
            });
            assert!(there, "no {name} {own:?} for {query}");
            asked.insert((*name).to_owned());
        }
        let name = selectors[0].0;
        for label in grouped_by(query).into_iter().filter(|label| !ADDED.contains(label)) {
            let there = samples().any(|of| of.name == name && of.labels.contains_key(label));
            assert!(there, "{name} has no {label} for {query}");
        }
    }
    // Each kind of figure is shown: states, bytes, durations, refusals.
    for name in ["snapshots", "held_bytes", "link_bytes_total", "refusals_total"] {
        assert!(asked.contains(&format!("criu_image_relay_{name}")), "{name}");
    }
    for duration in ["dump", "restore"] {
        let bucket = format!("criu_image_relay_{duration}_duration_seconds_bucket");
        assert!(asked.contains(&bucket), "{bucket}");
    }
}

#[test]
fn queries_are_taken_apart() {
    let query = "sum by (instance, le) (rate(criu_image_relay_a_bucket{role=\"proxy\",instance=~\"$i\"}[5m])) \
                 / criu_image_relay_b";
    let a = ("criu_image_relay_a_bucket", vec![("role", "proxy"), ("instance", "$i")]);
    assert_eq!(selectors(query), [a, ("criu_image_relay_b", vec![])]);
    assert_eq!(grouped_by(query), ["instance", "le"]);
}
