//! Which keys there are, where they stand, and which one was meant.
//!
//! The known keys are those of the settings themselves, written out as a table: there is no list
//! of keys beside the types.

use super::error::Problem;
use std::ops::Range;
use toml::{
    Table, Value,
    de::{DeTable, DeValue},
};

/// The first key of `document`, in the order of the text, that `known` does not have, or that is
/// no table though it should be: its offset in bytes, and what is wrong with it.
pub(super) fn first_unknown(document: &DeTable<'_>, known: &Table) -> Option<(usize, Problem)> {
    let mut found = Vec::new();
    collect_unknown("", document, known, known, &mut found);
    found.into_iter().min_by_key(|(offset, _)| *offset)
}

fn collect_unknown(
    table: &str,
    document: &DeTable<'_>,
    known: &Table,
    root: &Table,
    found: &mut Vec<(usize, Problem)>,
) {
    for (key, value) in document {
        let offset = key.span().start;
        let path = join(table, key.get_ref());
        match (known.get(key.get_ref().as_ref()), value.get_ref()) {
            (None, _) => {
                let near = nearest(&path, root);
                found.push((offset, Problem::UnknownKey { key: path, near }));
            }
            (Some(Value::Table(known)), DeValue::Table(inner)) => {
                collect_unknown(&path, inner, known, root, found);
            }
            // serde would read a list as the table's values in order.
            (Some(Value::Table(_)), _) => {
                let cause = format!("expected a table, such as the lines that follow `[{path}]`");
                found.push((offset, Problem::Value { key: path, cause }));
            }
            (Some(_), _) => {}
        }
    }
}

/// The key, with its table, whose value holds the byte `offset`.
pub(super) fn key_at(document: &DeTable<'_>, offset: usize) -> Option<String> {
    let mut values = Vec::new();
    collect_values("", document, &mut values);
    // What stands in a table comes after it: the last is the innermost.
    values.into_iter().rfind(|(_, span)| span.contains(&offset)).map(|(path, _)| path)
}

fn collect_values(table: &str, document: &DeTable<'_>, values: &mut Vec<(String, Range<usize>)>) {
    for (key, value) in document {
        let path = join(table, key.get_ref());
        values.push((path.clone(), value.span()));
        if let DeValue::Table(inner) = value.get_ref() {
            collect_values(&path, inner, values);
        }
    }
}

/// The known key that `path` was probably meant to be: one spelt nearly so, in the same table
/// rather than in another.
fn nearest(path: &str, root: &Table) -> Option<String> {
    let mut known = Vec::new();
    collect_known("", root, &mut known);
    let (table, leaf) = split(path);
    let leaf = leaf.to_lowercase().replace('_', "-");
    known
        .into_iter()
        .map(|candidate| {
            let (other_table, other_leaf) = split(&candidate);
            let spelling = strsim::damerau_levenshtein(&leaf, other_leaf);
            (spelling, spelling + usize::from(table != other_table), candidate)
        })
        .filter(|(spelling, _, _)| *spelling <= (leaf.chars().count() / 3).max(1))
        .min_by_key(|(_, distance, _)| *distance)
        .map(|(_, _, candidate)| candidate)
}

fn collect_known(table: &str, known: &Table, paths: &mut Vec<String>) {
    for (key, value) in known {
        let path = join(table, key);
        if let Value::Table(inner) = value {
            collect_known(&path, inner, paths);
        }
        paths.push(path);
    }
}

fn join(table: &str, key: &str) -> String {
    if table.is_empty() { key.into() } else { format!("{table}.{key}") }
}

fn split(path: &str) -> (&str, &str) {
    path.rsplit_once('.').unwrap_or(("", path))
}
