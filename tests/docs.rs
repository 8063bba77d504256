//! Holds the pages of `docs/` against the code: options, message ids, keys, links, and the bytes of
//! every message.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use criu_image_relay::control::model::{Image, LinkStatus, Role, Snapshot, SnapshotState, Status};
use criu_image_relay::criu::remote::{Reply, Request, encode_id};
use criu_image_relay::criu::stream::{encode_reply, encode_request};
use criu_image_relay::wire::frame::{HEADER_LEN, Header, check_preface};
use criu_image_relay::wire::message::Message;
use serde_json::json;

#[path = "messages/mod.rs"]
mod messages;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: impl AsRef<Path>) -> String {
    let path = root().join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The pages of `docs/`, and those of the repository's root.
fn pages() -> Vec<PathBuf> {
    let docs = fs::read_dir(root().join("docs")).unwrap().map(|entry| entry.unwrap().path());
    let mut pages: Vec<_> =
        docs.filter(|path| path.extension().is_some_and(|x| x == "md")).collect();
    let others = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "RELEASING.md"];
    pages.extend(others.map(|name| root().join(name)));
    pages
}

fn help(binary: &str, arguments: &[&str]) -> String {
    let output = Command::new(binary).args(arguments).arg("--help").output().unwrap();
    assert!(output.status.success(), "{binary} {arguments:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// The options that a help text lists, by their long names.
fn options(help: &str) -> BTreeSet<String> {
    let listed = help.lines().map(str::trim_start).filter(|line| line.starts_with('-'));
    let long =
        listed.filter_map(|line| line.split_whitespace().find(|word| word.starts_with("--")));
    long.map(|word| name_of(word.trim_end_matches('.'))).collect()
}

/// An option without the value that may come after an equals sign.
fn name_of(option: &str) -> String {
    option.split('[').next().unwrap().to_owned()
}

/// The text below a heading, up to the next one.
fn section<'a>(page: &'a str, heading: &str) -> &'a str {
    let start = page.find(&format!("\n{heading}\n")).unwrap_or_else(|| panic!("no {heading:?}"));
    let body = &page[start + heading.len() + 2..];
    &body[..body.find("\n#").unwrap_or(body.len())]
}

/// The options that stand in the first column of a section's tables.
fn documented(section: &str) -> BTreeSet<String> {
    let rows = section.lines().filter_map(|line| line.strip_prefix("| `-"));
    let cells = rows.map(|row| format!("-{}", row.split('|').next().unwrap()).replace('`', ""));
    let long =
        |cell: String| cell.split([' ', ',']).find(|word| word.starts_with("--")).map(name_of);
    cells.filter_map(long).collect()
}

#[test]
fn every_option_and_command_stands_in_the_page_of_commands() {
    let page = read("docs/cli.md");
    let daemons = documented(section(&page, "## criu-image-proxy and criu-image-cache"));
    for daemon in [env!("CARGO_BIN_EXE_criu-image-proxy"), env!("CARGO_BIN_EXE_criu-image-cache")] {
        assert_eq!(options(&help(daemon, &[])), daemons, "{daemon}");
    }
    let ctl = env!("CARGO_BIN_EXE_criu-imagectl");
    let overview = help(ctl, &[]);
    let common = documented(section(&page, "### Options of every command"));
    assert_eq!(options(&overview), common);
    let commands = overview.split("Commands:\n").nth(1).unwrap().split("\n\n").next().unwrap();
    for command in commands.lines().map(|line| line.split_whitespace().next().unwrap()) {
        let own = documented(section(&page, &format!("### criu-imagectl {command}")));
        if command != "help" {
            let all = options(&help(ctl, &[command]));
            let own_by_help: BTreeSet<_> = all.difference(&common).cloned().collect();
            assert_eq!(own_by_help, own, "criu-imagectl {command}");
        }
    }
}

/// The keys of an object.
fn keys(object: &serde_json::Value) -> BTreeSet<String> {
    object.as_object().unwrap().keys().cloned().collect()
}

/// What the page shows as JSON for a command: an array with one object.
fn shown_json(page: &str, command: &str) -> serde_json::Value {
    let section = section(page, &format!("### criu-imagectl {command}"));
    let example = section.split("\n\n").find(|paragraph| paragraph.starts_with("    [{")).unwrap();
    serde_json::from_str::<Vec<_>>(example).unwrap().pop().unwrap()
}

#[test]
fn every_field_of_the_json_stands_in_the_page_of_commands() {
    let page = read("docs/cli.md");
    let link = LinkStatus { peer: String::new(), up: true, why: String::new() };
    let status = Status {
        role: Role::Cache,
        version: String::new(),
        started_ms: 0,
        sessions: 0,
        receiving: 0,
        whole: 0,
        taken: 0,
        damaged: 0,
        held_bytes: 0,
        max_bytes: 0,
        total_bytes: 0,
        rate: 0,
        links: vec![link.clone()],
    };
    let shown = shown_json(&page, "status");
    assert_eq!(keys(&shown), keys(&json!(status)));
    assert_eq!(keys(&shown["links"][0]), keys(&json!(link)));

    let snapshot = Snapshot {
        id: String::new(),
        state: SnapshotState::Whole,
        reason: String::new(),
        peer: String::new(),
        images: 0,
        bytes: 0,
        begun_ms: 0,
        ended_ms: 0,
        needs_view: String::new(),
        memory_may_have_changed: None,
    };
    let mut always = keys(&json!(snapshot));
    // The command adds it.
    always.insert("daemon".to_owned());
    assert_eq!(keys(&shown_json(&page, "list")), always);
    let marked = Snapshot { memory_may_have_changed: Some(true), ..snapshot };
    let list = section(&page, "### criu-imagectl list");
    for rare in keys(&json!(marked)).difference(&always) {
        assert!(list.contains(&format!("`{rare}`")), "{rare}");
    }

    let show = section(&page, "### criu-imagectl show");
    let image = Image { name: "core-7.img".to_owned(), bytes: 14, whole: true };
    for key in keys(&json!(image)) {
        assert!(show.contains(&format!("{key:?}: ")), "{key}");
    }
}

/// A man page as `generate` writes it, without roff's escapes.
fn man_page(dir: &Path, file: &str) -> String {
    let page = fs::read_to_string(dir.join(file)).unwrap_or_else(|error| panic!("{file}: {error}"));
    page.replace("\\-", "-")
}

#[test]
fn every_option_and_command_stands_in_its_man_page() {
    let dir = tempfile::tempdir().unwrap();
    let ctl = env!("CARGO_BIN_EXE_criu-imagectl");
    let generate = Command::new(ctl).args(["generate", "man"]).arg(dir.path()).status().unwrap();
    assert!(generate.success());
    let holds = |file: &str, help: &str| {
        let (page, options) = (man_page(dir.path(), file), options(help));
        assert!(!options.is_empty(), "{file}");
        for option in options {
            assert!(page.contains(&option), "{file}: {option}");
        }
    };
    for (file, daemon) in [
        ("criu-image-proxy.8", env!("CARGO_BIN_EXE_criu-image-proxy")),
        ("criu-image-cache.8", env!("CARGO_BIN_EXE_criu-image-cache")),
    ] {
        holds(file, &help(daemon, &[]));
    }
    let overview = help(ctl, &[]);
    holds("criu-imagectl.1", &overview);
    let commands = overview.split("Commands:\n").nth(1).unwrap().split("\n\n").next().unwrap();
    for command in commands.lines().map(|line| line.split_whitespace().next().unwrap()) {
        if command != "help" {
            holds(&format!("criu-imagectl-{command}.1"), &help(ctl, &[command]));
            assert!(man_page(dir.path(), "criu-imagectl.1").contains(command), "{command}");
        }
    }
}

/// The ids in the code, with their names.
fn message_ids() -> BTreeMap<String, String> {
    let code = read("src/daemon/journal.rs");
    let constants = code.lines().filter_map(|line| line.strip_prefix("pub const "));
    let ids = constants.map(|constant| {
        let name = constant.split(':').next().unwrap();
        (constant.split('"').nth(1).unwrap().to_owned(), name.to_owned())
    });
    ids.collect()
}

#[test]
fn every_message_id_stands_in_the_page_of_operations() {
    let ids = message_ids();
    for id in ids.keys() {
        let right = id.len() == 32 && id.bytes().all(|b| b"0123456789abcdef".contains(&b));
        assert!(right, "{id}");
    }
    let rows = messages::events();
    assert_eq!(rows.len(), ids.len());
    let page: BTreeMap<_, _> = rows.into_iter().map(|event| (event.id, event.name)).collect();
    assert_eq!(page, ids);
}

#[test]
fn every_field_stands_in_the_page_of_operations() {
    let known = messages::fields();
    for event in messages::events() {
        assert!(event.fields.is_subset(&known), "{event:?}");
    }
    let mut code = String::new();
    let mut dirs = vec![root().join("src")];
    while let Some(dir) = dirs.pop() {
        for path in fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()) {
            if path.is_dir() { dirs.push(path) } else { code.push_str(&read(path)) }
        }
    }
    for field in known {
        let name = field.to_lowercase();
        let set = [" =", ","].iter().any(|after| code.contains(&format!("{name}{after}")));
        assert!(set, "{field}");
    }
}

/// The entries of the catalog: an id, the lines of its head, its text.
fn catalog() -> Vec<(String, Vec<String>, String)> {
    let text = read("systemd/catalog/criu-image-relay.catalog");
    let entries = text.split("\n\n-- ").skip(1);
    let entry = |entry: &str| {
        let (head, text) = entry.trim_end().split_once("\n\n").unwrap();
        let mut head = head.lines().map(str::to_owned);
        (head.next().unwrap(), head.collect(), text.to_owned())
    };
    entries.map(entry).collect()
}

/// The names between two @.
fn variables(text: &str) -> impl Iterator<Item = &str> {
    let name = |word: &&str| {
        !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_uppercase() || byte == b'_')
    };
    text.split('@').skip(1).filter(name)
}

#[test]
fn every_message_id_is_in_the_catalog_and_no_other() {
    let ids: Vec<_> = catalog().into_iter().map(|(id, ..)| id).collect();
    assert_eq!(ids.iter().cloned().collect::<BTreeSet<_>>().len(), ids.len(), "each once");
    assert_eq!(ids.into_iter().collect::<BTreeSet<_>>(), message_ids().into_keys().collect());
}

#[test]
fn every_entry_of_the_catalog_says_what_it_means_and_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let ctl = env!("CARGO_BIN_EXE_criu-imagectl");
    let generate = Command::new(ctl).args(["generate", "man"]).arg(dir.path()).status().unwrap();
    assert!(generate.success());
    let events: BTreeMap<_, _> =
        messages::events().into_iter().map(|event| (event.id.clone(), event)).collect();
    for (id, head, text) in catalog() {
        let event = &events[&id];
        let heads = head.iter().map(|line| line.split_once(": ").unwrap());
        let (names, values): (Vec<_>, Vec<_>) = heads.unzip();
        assert_eq!(names, ["Subject", "Defined-By", "Support", "Documentation"], "{event:?}");
        let (page, chapter) = values[3].strip_prefix("man:").unwrap().split_once('(').unwrap();
        for daemon in ["criu-image-proxy", "criu-image-cache"] {
            let page = page.replace("@SYSLOG_IDENTIFIER@", daemon);
            let page = format!("{page}.{}", chapter.trim_end_matches(')'));
            let there = dir.path().join(&page).exists() || page == "systemd.exec.5";
            assert!(there, "{event:?}: {page}");
        }
        assert!(text.contains("\n\nNext: "), "{event:?}");
        for name in variables(&format!("{}\n{text}", head.join("\n"))) {
            let there = event.fields.contains(name) || name == "SYSLOG_IDENTIFIER";
            assert!(there, "{event:?} need not have {name}");
        }
        for line in text.lines() {
            assert!(!line.starts_with(['#', ';']), "that is a comment: {line}");
            assert!(line.len() < 80, "{line}");
            let command = line.starts_with("    ");
            assert!(!command || !line.contains("@CRIU_"), "a peer chooses it: {line}");
        }
    }
}

#[test]
fn every_key_that_the_pages_name_with_its_table_exists() {
    let mut keys = BTreeSet::new();
    for file in ["config/proxy.toml", "config/cache.toml"] {
        let (text, mut table) = (read(file), "");
        for line in text.lines() {
            if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
                table = name;
            } else if let Some((key, _)) = line.strip_prefix('#').and_then(|l| l.split_once(" = "))
            {
                keys.insert(format!("{table}.{key}"));
            }
        }
    }
    for page in pages() {
        for word in read(&page).split('`').skip(1).step_by(2) {
            let table = word.split_once('.').map_or("", |(table, _)| table);
            let named = ["link", "sessions", "store", "remote", "pages", "metrics", "log"]
                .contains(&table)
                && word.bytes().all(|b| b.is_ascii_lowercase() || b == b'-' || b == b'.')
                && !["link.rs", "link.proto", "link.sock", "pages.sock", "metrics.sock"]
                    .contains(&word);
            assert!(!named || keys.contains(word), "{}: {word}", page.display());
        }
    }
}

/// A heading as a link names it.
fn anchor(heading: &str) -> String {
    let kept = heading.trim_start_matches('#').trim().to_lowercase();
    let kept = kept.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}

#[test]
fn every_link_leads_somewhere() {
    for page in pages() {
        let text = read(&page);
        for link in linked(&text).iter().filter(|link| !link.contains("://")) {
            let (path, name) = link.split_once('#').unwrap_or((link, ""));
            let target =
                if path.is_empty() { page.clone() } else { page.parent().unwrap().join(path) };
            assert!(target.exists(), "{}: {link}", page.display());
            let there = || read(&target).lines().any(|l| l.starts_with('#') && anchor(l) == name);
            assert!(name.is_empty() || there(), "{}: {link}", page.display());
        }
    }
}

/// The pages that a page of the book's links lead to, in their order.
fn linked(page: &str) -> Vec<String> {
    let links = page.split("](").skip(1).map(|rest| rest.split(')').next().unwrap());
    links.map(Into::into).collect()
}

#[test]
fn every_page_of_docs_is_a_chapter_of_the_book_once() {
    let mut chapters = linked(&read("docs/SUMMARY.md"));
    chapters.sort();
    let docs = pages().into_iter().filter(|page| page.parent().unwrap().ends_with("docs"));
    let names = docs.map(|page| page.file_name().unwrap().to_str().unwrap().to_owned());
    let mut pages: Vec<_> = names.filter(|name| name != "SUMMARY.md").collect();
    pages.sort();
    assert_eq!(chapters, pages);
}

#[test]
fn the_book_stands_by_itself() {
    for page in pages().into_iter().filter(|page| page.parent().unwrap().ends_with("docs")) {
        let text = read(&page);
        for link in linked(&text) {
            assert!(!link.starts_with("../"), "{}: {link} is not in the book", page.display());
        }
        let included = text.split("{{#include ").skip(1).map(|rest| rest.split("}}").next());
        for path in included {
            let file = page.parent().unwrap().join(path.unwrap());
            assert!(file.is_file(), "{}: {}", page.display(), file.display());
        }
    }
}

/// The text of all the code, with strings that go over several lines in one piece.
fn code(dir: &Path) -> String {
    let mut text = String::new();
    for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
        let path = entry.path();
        match path.extension() {
            _ if path.is_dir() => text.push_str(&code(&path)),
            Some(extension) if extension == "rs" => {
                let file = fs::read_to_string(&path).unwrap();
                let mut lines = file.split("\\\n");
                text.push_str(lines.next().unwrap_or_default());
                lines.for_each(|line| text.push_str(line.trim_start()));
            }
            _ => {}
        }
    }
    text
}

#[test]
fn the_messages_in_the_page_of_troubles_are_those_of_the_code() {
    let (page, code) = (read("docs/troubleshooting.md"), code(&root().join("src")));
    let mut found = 0;
    for table in page.split("\n| message |").skip(1) {
        let rows = table.lines().skip(2).take_while(|line| line.starts_with('|'));
        // A cell may have words of our own beside the message, which is in backquotes.
        for message in rows.filter_map(|row| row.split('|').nth(1)?.split('`').nth(1)) {
            for part in message.split('…').filter(|part| part.trim().len() > 3) {
                let known = code.contains(part.trim()) || part.starts_with("criu-imagectl ");
                assert!(known, "{message:?}: no {:?} in the code", part.trim());
                found += 1;
            }
        }
    }
    assert!(found > 20, "{found}");
}

/// The blocks of the pages of protocols that are marked as `kind`: what they say, and their bytes.
fn blocks(kind: &str) -> Vec<(String, Vec<u8>)> {
    let protocols = |page: &PathBuf| page.to_str().unwrap().contains("/docs/protocol");
    let text: String = pages().into_iter().filter(protocols).map(read).collect();
    let mark = format!("\n```{kind}\n");
    let marked = text.split(&mark).skip(1);
    let parse = |block: &str| {
        let (said, hex) = block.split("\n```").next().unwrap().split_once('\n').unwrap();
        let bytes = hex.split_whitespace().map(|byte| u8::from_str_radix(byte, 16).unwrap());
        (said.to_owned(), bytes.collect())
    };
    marked.map(parse).collect()
}

/// A message as the page writes it: the name of its kind, its fields, the length of its payload.
fn written(message: &Message, payload_len: usize) -> String {
    let debug = format!("{message:?}");
    let fields = debug.find('{').map_or("", |start| &debug[start..debug.len() - 1]);
    let payload = if payload_len > 0 { format!("+ {payload_len}") } else { String::new() };
    format!("{} {fields} {payload}", message.kind().as_str_name()).trim_end().to_owned()
}

#[test]
fn the_frames_decode_to_what_the_page_says() {
    let mut kinds = BTreeMap::new();
    for (said, bytes) in blocks("frame") {
        let header = Header::decode(bytes[..HEADER_LEN].try_into().unwrap()).unwrap();
        assert_eq!(header.message_len, bytes.len() - HEADER_LEN, "{said}");
        let message = Message::decode(header, &bytes[HEADER_LEN..]).unwrap();
        assert_eq!(written(&message, header.payload_len), said);
        assert_eq!(message.encode(header.payload_len), bytes, "{said}");
        kinds.insert(header.kind, said);
    }
    assert!(kinds.into_keys().eq(1..=25), "one block for each kind");
}

#[test]
fn the_preface_and_crius_messages_are_what_the_page_says() {
    let [(_, preface)] = &blocks("preface")[..] else { panic!("one preface") };
    assert_eq!(check_preface(preface[..].try_into().unwrap()), Ok(()));
    let messages = blocks("criu");
    assert_eq!(messages.len(), 3);
    for (said, bytes) in messages {
        let encoded = match said.split_once(' ').unwrap() {
            ("request", name) => encode_request(name),
            (_, exists) => encode_reply(exists == "true"),
        };
        assert_eq!(encoded, bytes, "{said}");
    }
}

/// The words of a line of a `remote` block, those in quotes without them.
fn words(said: &str) -> Vec<String> {
    let mut words = Vec::new();
    for (index, part) in said.split('"').enumerate() {
        match index % 2 {
            0 => words.extend(part.split_whitespace().map(Into::into)),
            _ => words.push(part.to_owned()),
        }
    }
    words
}

/// What follows a word.
fn after(words: &[String], word: &str) -> Option<String> {
    words.iter().position(|w| w == word).map(|index| words[index + 1].clone())
}

/// The request that a line of the page describes.
fn request(words: &[String]) -> Request {
    let field = |name| after(words, name).unwrap();
    let (name, snapshot, mode) = (field("name"), field("snapshot_id"), field("open_mode"));
    let flag = |name: &str| words.iter().any(|word| word == name);
    let acknowledge = flag("acknowledge");
    if flag("finish") {
        let images = after(words, "images").map(|images| images.parse().unwrap());
        return Request::EndOfDump { snapshot, images, acknowledge };
    }
    match mode.as_str() {
        "0" => Request::Read { snapshot, name, pipe: flag("pipe").then_some(true) },
        mode => Request::Write { snapshot, name, append: mode == "1024", acknowledge },
    }
}

#[test]
fn the_messages_of_the_remote_protocol_are_what_the_page_says() {
    let blocks = blocks("remote");
    assert_eq!(blocks.len(), 8);
    for (said, bytes) in blocks {
        let words = words(&said);
        let encoded = match words[0].as_str() {
            "header" => request(&words).encode(),
            "id" => encode_id(&words[1]),
            _ => {
                let reply = Reply {
                    error: after(&words, "error").unwrap().parse().unwrap(),
                    reason: after(&words, "reason").unwrap_or_default(),
                    size: after(&words, "size").map(|size| size.parse().unwrap()),
                };
                reply.encode()
            }
        };
        assert_eq!(encoded, bytes, "{said}");
    }
}
