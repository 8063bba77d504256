//! The control interface: who knows only that of a release can call today's daemons.

use std::collections::BTreeMap;

/// What an interface says, by "type Status" and the like: the fields or words of each list in parentheses.
type Said<'a> = BTreeMap<&'a str, Vec<Vec<&'a str>>>;

/// Takes a description apart, as far as this one goes: lists are not nested in it.
fn take_apart(description: &str) -> Said<'_> {
    let starts = description.match_indices('\n').map(|(at, _)| at + 1);
    let entries = starts.filter_map(|at| {
        let entry = &description[at..];
        ["type ", "method ", "error "].iter().any(|word| entry.starts_with(word)).then_some(entry)
    });
    let said = entries.map(|entry| {
        let (name, rest) = entry.split_once('(').unwrap();
        let end = rest.find("\n\n").unwrap_or(rest.len());
        let lists = rest[..end].split('(').map(|list| {
            let (list, _) = list.split_once(')').unwrap();
            list.split(',').map(str::trim).filter(|word| !word.is_empty()).collect()
        });
        (name.trim(), lists.collect())
    });
    said.collect()
}

/// Whether today's interface is one for clients of an older one. They may meet fields and words that they do not know, and
/// give no value to parameters that they do not know.
pub(crate) fn assert_extends(today: &str, older: &str) {
    let today = take_apart(today);
    for (name, lists) in take_apart(older) {
        let now = today.get(name).unwrap_or_else(|| panic!("{name} has gone"));
        for (list, now) in lists.iter().zip(now) {
            for word in list {
                assert!(now.contains(word), "{name}: {word} has gone");
            }
        }
        if name.starts_with("method ") {
            let new = now[0].iter().filter(|parameter| !lists[0].contains(parameter));
            for parameter in new {
                assert!(parameter.contains(": ?"), "{name} asks for {parameter}");
            }
        }
    }
}

#[test]
fn what_breaks_a_client_is_seen() {
    let older = "\ntype A (b: int, c: int)\n\nmethod D(e: int) -> (f: int)\n";
    assert_extends(older, older);
    let wider =
        "\ntype A (b: int, c: int, g: int)\n\nmethod D(e: int, h: ?int) -> (f: int, i: int)\n";
    assert_extends(wider, older);
    for breaking in [
        "\nmethod D(e: int) -> (f: int)\n",
        "\ntype A (b: int)\n\nmethod D(e: int) -> (f: int)\n",
        "\ntype A (b: int, c: string)\n\nmethod D(e: int) -> (f: int)\n",
        "\ntype A (b: int, c: int)\n\nmethod D(e: int, h: int) -> (f: int)\n",
        "\ntype A (b: int, c: int)\n\nmethod D(e: int) -> ()\n",
    ] {
        std::panic::catch_unwind(|| assert_extends(breaking, older)).unwrap_err();
    }
}
