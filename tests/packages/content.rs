//! What is in the package.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::Value;

use crate::bed::Host;
use crate::built::{
    NAME, field, files, fresh_hosts, install, locked_crates, ok, package, package_passes_its_tests,
    repository, unpacked,
};

pub(crate) const PROGRAMS: [&str; 3] = ["criu-image-proxy", "criu-image-cache", "criu-imagectl"];

/// Made twice by Debian 13's compiler without a network, after the tests that need no root; the same bytes both
/// times; nothing for lintian to complain about.
#[test]
fn the_package_is_reproducible_and_clean() {
    assert!(package().exists());
}

#[test]
fn the_package_has_what_the_install_script_installs() {
    let stage = tempfile::tempdir().unwrap();
    let install = repository().join("packaging/install");
    ok(&[
        install.to_str().unwrap(),
        &format!("--destdir={}", stage.path().display()),
        &format!("--build={}", crate::bed::build().display()),
        "--zshdir=/usr/share/zsh/vendor-completions",
    ]);
    let installed = files(stage.path());

    assert_eq!(packaged(package()), installed);
}

/// The files of a package under the names that the install script gives them.
fn packaged(package: &Path) -> BTreeSet<String> {
    let doc = format!("/usr/share/doc/{NAME}");
    let debians = |path: &str| match path.strip_prefix(&doc) {
        Some("/changelog.gz") => format!("{doc}/CHANGELOG.md"),
        Some("/copyright") => format!("{doc}/LICENSE"),
        _ => path.strip_suffix(".gz").unwrap_or(path).to_owned(),
    };
    let unpacked = unpacked(package);
    files(unpacked.path())
        .into_iter()
        .filter(|path| !path.starts_with("/DEBIAN/") && !path.starts_with("/usr/share/lintian/"))
        .filter(|path| !path.ends_with("/changelog.Debian.gz"))
        .map(|path| debians(&path))
        .collect()
}

/// A maintainer script without what a tool has put into it: cargo-deb stops the units that it knows, once more.
fn written(script: &str) -> String {
    let mut parts = script.split("# Automatically added by ");
    let first = parts.next().unwrap();
    let end = "# End automatically added section\n";
    let others = parts.map(|part| part.split_once(end).unwrap().1);
    [first].into_iter().chain(others).collect::<String>().trim_end().to_owned()
}

/// The one made by cargo-deb, which needs no more than a Rust toolchain.
#[test]
fn the_convenience_package_has_the_same_files_and_says_the_same() {
    let tool = ok(&[repository().join("tests/bed/cargo-deb")]);
    let path = format!("PATH={}:{}", tool.trim(), std::env::var("PATH").unwrap());
    let script = repository().join("packaging/cargo-deb");
    let made = ok(&["env", &path, script.to_str().unwrap()]);
    let made = Path::new(made.lines().last().unwrap());
    assert_eq!(packaged(made), packaged(package()));

    let [ours, debians] = [made, package()].map(unpacked);
    for name in ["conffiles", "prerm"] {
        let [ours, debians] = [&ours, &debians].map(|dir| {
            written(&std::fs::read_to_string(dir.path().join("DEBIAN").join(name)).unwrap())
        });
        assert_eq!(ours, debians, "{name}");
    }
    for name in ["Version", "Section", "Recommends", "Architecture"] {
        assert_eq!(field(made, name), field(package(), name), "{name}");
    }
    // What comes after the line that is a summary.
    let text = |package| field(package, "Description").split_once("\n CRIU").unwrap().1.to_owned();
    assert_eq!(text(made), text(package()));

    let bed = fresh_hosts(None);
    install(&bed, Host::A, made);
    package_passes_its_tests(&bed, Host::A);
}

#[test]
fn all_configuration_is_the_administrators() {
    let unpacked = unpacked(package());
    let conffiles = std::fs::read_to_string(unpacked.path().join("DEBIAN/conffiles")).unwrap();
    let below_etc: BTreeSet<_> =
        files(unpacked.path()).into_iter().filter(|path| path.starts_with("/etc/")).collect();
    assert_eq!(conffiles.lines().map(ToOwned::to_owned).collect::<BTreeSet<_>>(), below_etc);
    assert_eq!(below_etc.len(), 2);
}

#[test]
fn the_programs_need_no_newer_libraries_than_debian_12_has() {
    let depends = field(package(), "Depends");
    let libc = depends.split(", ").find_map(|one| one.strip_prefix("libc6 (>= ")).unwrap();
    let (_, minor) = libc.trim_end_matches(')').split_once('.').unwrap();
    assert!(minor.parse::<u32>().unwrap() <= 36, "{depends}");
}

/// As a scanner of vulnerabilities reads it.
pub(crate) fn crates_in(program: &Path) -> BTreeSet<(String, String)> {
    let section = tempfile::NamedTempFile::new().unwrap();
    let dump = format!(".dep-v0={}", section.path().display());
    ok(&["objcopy", "--dump-section", &dump, program.to_str().unwrap(), "/dev/null"]);
    let inflate =
        "import sys, zlib; print(zlib.decompress(open(sys.argv[1], 'rb').read()).decode())";
    let list = ok(&["python3", "-c", inflate, section.path().to_str().unwrap()]);
    let list: Value = serde_json::from_str(&list).unwrap();
    let packages = list["packages"].as_array().unwrap().iter();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    packages.map(|package| (text(&package["name"]), text(&package["version"]))).collect()
}

#[test]
fn each_program_lists_the_crates_that_it_is_made_of() {
    let locked = locked_crates();
    let unpacked = unpacked(package());
    let third_party = format!("usr/share/doc/{NAME}/third-party.txt.gz");
    let licences = ok(&["zcat", unpacked.path().join(third_party).to_str().unwrap()]);
    for program in PROGRAMS {
        let crates = crates_in(&unpacked.path().join("usr/bin").join(program));
        assert!(crates.is_subset(&locked), "{program}: {:?}", crates.difference(&locked));
        for name in ["tokio", "rustix", "prost"] {
            assert!(crates.iter().any(|one| one.0 == name), "{program} without {name}");
            assert!(licences.lines().any(|line| line.starts_with(&format!("{name} "))), "{name}");
        }
    }
}
