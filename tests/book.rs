//! The book as mdBook renders it: nothing is missing in it, and every link within it leads somewhere.
//!
//! ```text
//! cargo test --release --test book
//! ```
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Component, Path, PathBuf};
use std::process::Command;

/// What a page of the book names and links to.
#[derive(Default)]
struct Page {
    anchors: BTreeSet<String>,
    links: Vec<String>,
}

/// The values of an attribute in a page.
fn attributes<'a>(html: &'a str, name: &str) -> Vec<&'a str> {
    let start = format!(" {name}=\"");
    html.split(start.as_str()).skip(1).map(|rest| rest.split('"').next().unwrap()).collect()
}

fn read(path: &Path) -> Page {
    let html = fs::read_to_string(path).unwrap();
    // What is around it is mdBook's own.
    let main = html.split("<main>").nth(1).and_then(|rest| rest.split("</main>").next());
    let links = ["href", "src"].iter().flat_map(|name| attributes(main.unwrap_or(""), name));
    Page {
        anchors: attributes(&html, "id").into_iter().map(Into::into).collect(),
        links: links.filter(|link| !link.contains(':')).map(Into::into).collect(),
    }
}

/// Where a link of a page leads, without `..`.
fn target(page: &Path, link: &str) -> PathBuf {
    let mut path = page.parent().unwrap().to_owned();
    for part in Path::new(link).components() {
        match part {
            Component::ParentDir => assert!(path.pop(), "{link}"),
            part => path.push(part),
        }
    }
    path
}

#[test]
fn every_link_of_the_rendered_book_leads_somewhere() {
    let dir = tempfile::tempdir().unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bed/mdbook");
    let built = Command::new(script).arg("build").arg(dir.path()).output().unwrap();
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));

    let files = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().path());
    let html = files.filter(|path| path.extension().is_some_and(|extension| extension == "html"));
    let pages: BTreeMap<PathBuf, Page> = html.map(|path| (path.clone(), read(&path))).collect();
    let mut followed = 0;
    for (path, page) in &pages {
        for link in &page.links {
            let (file, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = if file.is_empty() { path.clone() } else { target(path, file) };
            assert!(target.is_file(), "{}: {link}", path.display());
            let there = || pages[&target].anchors.contains(anchor);
            assert!(anchor.is_empty() || there(), "{}: {link}", path.display());
            followed += 1;
        }
    }
    assert!(pages.len() > 15 && followed > 200, "{} pages, {followed} links", pages.len());
}

#[test]
fn what_the_book_includes_is_in_it() {
    let dir = tempfile::tempdir().unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bed/mdbook");
    assert!(Command::new(script).arg("build").arg(dir.path()).status().unwrap().success());
    let page = |name: &str| fs::read_to_string(dir.path().join(name)).unwrap();
    assert!(page("configuration.html").contains("#max-bytes = "));
    assert!(page("definitions.html").contains("interface org.criu.ImageRelay"));
    for name in ["index.html", "how-it-works.html"] {
        assert!(page(name).contains("way-of-the-data.svg"), "{name}");
    }
}
