//! The page of names, held against real scrapes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

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
