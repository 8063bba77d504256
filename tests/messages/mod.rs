//! What the page of operations says of the messages in the journal.

use std::collections::BTreeSet;
use std::path::Path;

/// An event, as its row has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Event {
    /// Its name in the code.
    pub name: String,
    /// `info`, `warning` or `error`.
    pub level: String,
    /// Its `MESSAGE_ID`.
    pub id: String,
    /// The fields that it always has.
    pub fields: BTreeSet<String>,
}

/// Every event, in the order of the page.
pub(crate) fn events() -> Vec<Event> {
    let page = section();
    let table = page.split("| event |").nth(1).unwrap().split("\n\n").next().unwrap();
    let event = |row: &str| {
        let cells: Vec<_> = row.split(" | ").collect();
        let [what, level, id, fields, _] = cells[..] else { panic!("{row}") };
        let name = what.trim_start_matches("| ").split([':', ' ']).next().unwrap();
        let quoted = |cell: &str| cell.split('`').skip(1).step_by(2).map(str::to_owned).collect();
        let id: Vec<String> = quoted(id);
        let fields: Vec<String> = quoted(fields);
        Event {
            name: name.to_owned(),
            level: level.to_owned(),
            id: id[0].clone(),
            fields: fields.into_iter().collect(),
        }
    };
    table.lines().skip(2).map(event).collect()
}

/// Every field of the daemons' own.
pub(crate) fn fields() -> BTreeSet<String> {
    let page = section();
    let rows = page.lines().filter_map(|line| line.strip_prefix("| `CRIU_"));
    rows.map(|row| format!("CRIU_{}", row.split('`').next().unwrap())).collect()
}

fn section() -> String {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/operations.md");
    let page = std::fs::read_to_string(page).unwrap();
    let section = page.split("\n### Messages\n").nth(1).unwrap();
    section.split("\n#").next().unwrap().to_owned()
}
