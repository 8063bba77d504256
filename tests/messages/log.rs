//! Holds what a daemon has logged against the page of operations: each message that an operator acts on has its
//! id, its level and its fields.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use super::messages::{Event, events, fields};

static EVENTS: LazyLock<BTreeMap<String, Event>> =
    LazyLock::new(|| events().into_iter().map(|event| (event.id.clone(), event)).collect());

/// Looks at all lines of a log.
pub(crate) fn check(lines: &[String]) {
    let mut messages: Vec<String> = Vec::new();
    for line in lines {
        match messages.last_mut() {
            // A message may have several lines.
            Some(message) if level(line).is_none() => message.extend(["\n", line]),
            _ => messages.push(line.clone()),
        }
    }
    for message in &messages {
        check_message(message);
    }
}

fn check_message(message: &str) {
    let Some(level) = level(message) else { return };
    let there = fields_of(message);
    let known = fields();
    for (field, times) in &there {
        assert!(known.contains(field), "the page does not know {field}: {message}");
        assert_eq!(*times, 1, "{field} would be in the journal twice: {message}");
    }
    let id = message.split(" message_id=\"").nth(1).map(|rest| rest.split('"').next().unwrap());
    let Some(id) = id else {
        assert!(!["warning", "error"].contains(&level), "nothing tells what to do: {message}");
        return;
    };
    let event = EVENTS.get(id).unwrap_or_else(|| panic!("the page does not know it: {message}"));
    assert_eq!(level, event.level, "{}: {message}", event.name);
    for field in &event.fields {
        assert!(there.contains_key(field), "{} without {field}: {message}", event.name);
    }
}

/// The level of a message, if a message begins here: after the time.
fn level(line: &str) -> Option<&'static str> {
    let mut words = line.split_whitespace();
    words.next().filter(|time| time.ends_with('Z') && time.contains('T'))?;
    match words.next()? {
        "ERROR" => Some("error"),
        "WARN" => Some("warning"),
        "INFO" => Some("info"),
        "DEBUG" | "TRACE" => Some("debug"),
        _ => None,
    }
}

/// The fields of a message and of its span, as the journal names them, and how often each is there.
fn fields_of(message: &str) -> BTreeMap<String, usize> {
    let mut fields = BTreeMap::new();
    for part in message.split([' ', '{']).filter(|part| part.starts_with("criu_")) {
        if let Some((name, _)) = part.split_once('=') {
            *fields.entry(name.to_uppercase()).or_default() += 1;
        }
    }
    fields
}
