//! The units are what they say of each other: what stands in several of them is the same in each.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

const DAEMONS: [&str; 2] = ["proxy", "cache"];

fn units() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("systemd")
}

/// What a unit sets, in its order, without comments.
fn settings(unit: &str) -> Vec<String> {
    let path = units().join(unit);
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{unit}: {error}"));
    let set = |line: &&str| !line.is_empty() && !line.starts_with(['#', ';']);
    text.lines().filter(set).map(ToOwned::to_owned).collect()
}

/// The values of a key, one after the other.
fn values(settings: &[String], key: &str) -> Vec<String> {
    let value = |line: &String| line.strip_prefix(key)?.strip_prefix('=').map(ToOwned::to_owned);
    settings.iter().filter_map(value).collect()
}

/// The sockets that a service names.
fn sockets(service: &str) -> Vec<String> {
    let named = values(&settings(service), "Sockets").join(" ");
    named.split_whitespace().map(ToOwned::to_owned).collect()
}

/// The sockets of a daemon's figures, of which no service has any: a service starts the sockets that it names.
fn figures(daemon: &str) -> [String; 2] {
    ["", "@"].map(|at| format!("criu-image-{daemon}-metrics{at}.socket"))
}

/// A setting of a plain unit as an instance's template has it.
fn of_instance(setting: &str, daemon: &str) -> String {
    let name = format!("criu-image-{daemon}");
    let mut words = Vec::new();
    for word in setting.split(' ') {
        let (key, value) = word.split_once('=').unwrap_or(("", word));
        let unit = value.strip_suffix(".socket").map(|unit| format!("{unit}@%i.socket"));
        let unit = unit
            .or_else(|| (value == format!("{name}.service")).then(|| format!("{name}@%i.service")));
        let value = unit.unwrap_or_else(|| value.to_owned());
        words.push(if key.is_empty() { value } else { format!("{key}={value}") });
    }
    let setting = words.join(" ");
    if setting == format!("ExecStart=/usr/bin/{name}") {
        return format!("{setting} --config /etc/criu-image-relay/{daemon}@%i.toml");
    }
    setting
        .replace(
            &format!("Description=CRIU image {daemon}:"),
            &format!("Description=CRIU image {daemon} %i:"),
        )
        .replace(&format!("/run/criu-image/{daemon}/"), &format!("/run/criu-image/{daemon}@%i/"))
}

#[test]
fn an_instance_has_the_settings_of_the_plain_service() {
    for daemon in DAEMONS {
        let plain = settings(&format!("criu-image-{daemon}.service"));
        let expected: Vec<_> = plain.iter().map(|setting| of_instance(setting, daemon)).collect();
        assert_eq!(settings(&format!("criu-image-{daemon}@.service")), expected);
        // All that is of this machine only is bound by who may open it.
        for kind in ["stream", "remote", "control"] {
            let plain = settings(&format!("criu-image-{daemon}-{kind}.socket"));
            let expected: Vec<_> =
                plain.iter().map(|setting| of_instance(setting, daemon)).collect();
            assert_eq!(settings(&format!("criu-image-{daemon}-{kind}@.socket")), expected);
        }
    }
}

#[test]
fn no_socket_of_an_instance_has_a_port() {
    for daemon in DAEMONS {
        let named = sockets(&format!("criu-image-{daemon}@.service")).into_iter();
        let [_, figures] = figures(daemon);
        for socket in named.map(|socket| socket.replace("@%i", "@")).chain([figures]) {
            let socket = settings(&socket);
            let guards = |key| values(&socket, key).join(" ");
            let listens = guards("ListenStream");
            assert!(listens.starts_with(&format!("/run/criu-image/{daemon}@%i/")), "{listens}");
            assert_eq!(guards("SocketMode"), "0660", "{listens}");
            assert_eq!(guards("SocketGroup"), "criu-image", "{listens}");
            assert_eq!(guards("DirectoryMode"), "0755", "{listens}");
        }
    }
}

#[test]
fn a_service_and_its_sockets_name_each_other() {
    let mut named = BTreeSet::new();
    for daemon in DAEMONS {
        for at in ["", "@"] {
            let service = format!("criu-image-{daemon}{at}.service");
            for socket in sockets(&service) {
                let file = socket.replace("@%i", "@");
                let back = values(&settings(&file), "Service").join(" ");
                assert_eq!(back.replace("@%i", "@"), service, "{file}");
                let kind = file.rsplit('-').next().unwrap().trim_end_matches(".socket");
                let name = values(&settings(&file), "FileDescriptorName");
                assert_eq!(name, [kind.trim_end_matches('@')], "{file}");
                named.insert(file);
            }
        }
    }
    // Nothing starts these before they are enabled.
    for daemon in DAEMONS {
        let of_figures = figures(daemon);
        for (file, instance) in of_figures.iter().zip(["", "@%i"]) {
            assert!(!named.contains(file), "{file} is started by its service");
            let socket = settings(file);
            let service = format!("criu-image-{daemon}{instance}.service");
            assert_eq!(values(&socket, "Service"), [service], "{file}");
            assert_eq!(values(&socket, "FileDescriptorName"), ["metrics"], "{file}");
        }
        named.extend(of_figures);
    }
    let there = fs::read_dir(units()).unwrap().map(|entry| entry.unwrap().file_name());
    let there = there.map(|name| name.into_string().unwrap());
    assert_eq!(there.filter(|name| name.ends_with(".socket")).collect::<BTreeSet<_>>(), named);
}

#[test]
fn proxy_and_cache_are_confined_alike_but_for_what_they_do() {
    let [proxy, cache] = DAEMONS.map(|daemon| {
        let settings = settings(&format!("criu-image-{daemon}.service"));
        let begin = settings.iter().position(|setting| setting.starts_with("User=")).unwrap();
        settings[begin..].iter().cloned().collect::<BTreeSet<_>>()
    });
    let keys: BTreeSet<_> = proxy
        .symmetric_difference(&cache)
        .map(|setting| setting.split('=').next().unwrap())
        .collect();
    assert_eq!(keys, BTreeSet::from(["ExecPaths", "IPAddressDeny", "RestrictAddressFamilies"]));
}

#[test]
fn every_line_of_hardening_stands_in_the_page_of_security() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/security.md");
    let page = fs::read_to_string(page).unwrap();
    let table = page.split("### The units, line by line").nth(1).unwrap();
    let table = table.split("\n#").next().unwrap();
    for daemon in DAEMONS {
        let settings = settings(&format!("criu-image-{daemon}.service"));
        let begin = settings.iter().position(|setting| setting.starts_with("User=")).unwrap();
        for setting in &settings[begin..] {
            let (key, value) = setting.split_once('=').unwrap();
            let explained =
                table.contains(&format!("`{key}={value}`")) || table.contains(&format!("`{key}=`"));
            assert!(explained, "{setting}");
        }
    }
}
