//! What is in the package.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::Value;

use crate::built::{NAME, field, files, ok, package, repository, unpacked};

const PROGRAMS: [&str; 3] = ["criu-image-proxy", "criu-image-cache", "criu-imagectl"];

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

    let doc = format!("/usr/share/doc/{NAME}");
    let unpacked = unpacked();
    let packaged: BTreeSet<_> = files(unpacked.path())
        .into_iter()
        .filter(|path| !path.starts_with("/DEBIAN/"))
        // Debian's own, see packaging/debian/rules.
        .filter(|path| !path.starts_with("/usr/share/lintian/"))
        .filter(|path| *path != format!("{doc}/changelog.Debian.gz"))
        .map(|path| {
            if path == format!("{doc}/changelog.gz") { format!("{doc}/CHANGELOG.md") } else { path }
        })
        .map(
            |path| if path == format!("{doc}/copyright") { format!("{doc}/LICENSE") } else { path },
        )
        .map(|path| path.strip_suffix(".gz").map_or(path.clone(), ToOwned::to_owned))
        .collect();
    assert_eq!(packaged, installed);
}

#[test]
fn all_configuration_is_the_administrators() {
    let unpacked = unpacked();
    let conffiles = std::fs::read_to_string(unpacked.path().join("DEBIAN/conffiles")).unwrap();
    let below_etc: BTreeSet<_> =
        files(unpacked.path()).into_iter().filter(|path| path.starts_with("/etc/")).collect();
    assert_eq!(conffiles.lines().map(ToOwned::to_owned).collect::<BTreeSet<_>>(), below_etc);
    assert_eq!(below_etc.len(), 2);
}

#[test]
fn the_programs_need_no_newer_libraries_than_debian_12_has() {
    let depends = field("Depends");
    let libc = depends.split(", ").find_map(|one| one.strip_prefix("libc6 (>= ")).unwrap();
    let (_, minor) = libc.trim_end_matches(')').split_once('.').unwrap();
    assert!(minor.parse::<u32>().unwrap() <= 36, "{depends}");
}

/// As a scanner of vulnerabilities reads it.
fn crates_in(program: &Path) -> BTreeSet<(String, String)> {
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
    let lock = std::fs::read_to_string(repository().join("Cargo.lock")).unwrap();
    let lock: toml::Value = toml::from_str(&lock).unwrap();
    let text = |value: &toml::Value| value.as_str().unwrap().to_owned();
    let locked: BTreeSet<_> = lock["package"]
        .as_array()
        .unwrap()
        .iter()
        .map(|package| (text(&package["name"]), text(&package["version"])))
        .collect();
    let unpacked = unpacked();
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
