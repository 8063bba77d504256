//! What was released goes on working: what a proxy and a cache of each release said to each other is kept in
//! `recordings/`, and today's daemons have to get on with either of them; so are its control interface and its
//! configuration. No root is needed.
//!
//! A release is recorded once, by `RECORD=1 cargo test --test compatibility`, into the directory of its version; after
//! that the files are not changed any more.
#![allow(clippy::unwrap_used)]

// Each target uses a part of what they share.
#[allow(dead_code)]
#[path = "../bad_input/criu.rs"]
mod criu;
#[allow(dead_code)]
#[path = "../bad_input/daemons.rs"]
mod daemons;
#[allow(dead_code)]
#[path = "../pages/page_client.rs"]
mod page_client;

mod config;
mod frame;
mod interface;
mod played;
mod recorded;
mod scenario;

use std::fs;
use std::path::{Path, PathBuf};

use crate::recorded::Recording;

/// The releases. None can be missing unnoticed.
const VERSIONS: [&str; 2] = ["0.1.0", "0.1.1"];

/// Files of a release that are kept as they were.
const FILES: [&str; 3] =
    ["config/proxy.toml", "config/cache.toml", "proto/org.criu.ImageRelay.varlink"];

#[test]
fn a_proxy_of_each_release_gets_on_with_todays_cache() {
    for version in VERSIONS {
        played::proxy(&Recording::of(version));
    }
}

#[test]
fn a_cache_of_each_release_gets_on_with_todays_proxy() {
    for version in VERSIONS {
        played::cache(&Recording::of(version));
    }
}

/// The recordings are of what daemons do say: so are today's.
#[test]
fn todays_daemons_get_on_with_each_other() {
    let recording = recorded::record();
    if std::env::var_os("RECORD").is_some() {
        let dir = recorded::dir(env!("CARGO_PKG_VERSION"));
        fs::create_dir_all(&dir).unwrap();
        recording.keep(env!("CARGO_PKG_VERSION"));
        for file in FILES {
            fs::copy(in_tree(file), dir.join(Path::new(file).file_name().unwrap())).unwrap();
        }
    }
    played::proxy(&recording);
    played::cache(&recording);
}

#[test]
fn a_client_of_each_release_can_call_todays_daemons() {
    let today = fs::read_to_string(in_tree(FILES[2])).unwrap();
    for version in VERSIONS {
        let path = recorded::dir(version).join("org.criu.ImageRelay.varlink");
        interface::assert_extends(&today, &fs::read_to_string(path).unwrap());
    }
}

#[test]
fn a_configuration_of_each_release_is_accepted() {
    let binaries = [
        (env!("CARGO_BIN_EXE_criu-image-proxy"), "proxy.toml"),
        (env!("CARGO_BIN_EXE_criu-image-cache"), "cache.toml"),
    ];
    for version in VERSIONS {
        for (binary, file) in binaries {
            let documented = fs::read_to_string(recorded::dir(version).join(file)).unwrap();
            config::assert_accepts(binary, &documented);
        }
    }
}

fn in_tree(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(file)
}
