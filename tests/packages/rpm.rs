//! The rpm: made of its spec file by Debian's compiler without a network, held against the Debian package, and
//! installed on a host. What Fedora's macros would say, `packaging/rpm/macros.test` says.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::bed::{Bed, Host};
use crate::built::{NAME, fresh_hosts, locked_crates, made, ok, package, repository};
use crate::content::{PROGRAMS, crates_in};

/// The directory that `packaging/build-rpm` filled, at the first call, with all tests of the spec file's %check;
/// `CRIU_IMAGE_RELAY_RPMS` names one to take instead, for work on these tests.
#[track_caller]
fn built() -> &'static Path {
    static BUILT: OnceLock<Option<PathBuf>> = OnceLock::new();
    let built = BUILT.get_or_init(|| {
        let build = repository().join("packaging/build-rpm");
        // Packed for these tests only.
        let command = ["env".into(), "XZ_OPT=-0".into(), build, "--debian".into()];
        made("CRIU_IMAGE_RELAY_RPMS", "rpm", |dir| [&command[..], &[dir.into()]].concat())
    });
    built.as_deref().expect("the rpm is there; the output of its build says why not")
}

/// Runs a command in the Debian tree that has rpm's tools; the directory of the build is the current one.
#[track_caller]
fn in_tree(command: &[&str]) -> String {
    let tree = repository().join("tests/bed/buildroot");
    ok(&[&[tree.to_str().unwrap(), "run", built().to_str().unwrap()], command].concat())
}

/// The path of the package as commands in the tree see it.
fn rpm() -> String {
    let all = in_tree(&["find", "RPMS", "-name", "*.rpm"]);
    let [one] = all.lines().collect::<Vec<_>>()[..] else { panic!("not one package:\n{all}") };
    one.to_owned()
}

/// What rpm tells of the package in a format of its own (`rpm --querytags`).
#[track_caller]
fn query(format: &str) -> String {
    in_tree(&["rpm", "-qp", "--nosignature", "--queryformat", format, &rpm()])
}

/// The root that rpm installed the package into, without scripts and without what it depends on.
fn installed() -> &'static Path {
    static ROOT: OnceLock<PathBuf> = OnceLock::new();
    ROOT.get_or_init(|| {
        let root = built().join("root");
        if root.exists() {
            fs::remove_dir_all(&root).unwrap();
        }
        // As root of a user namespace, who owns what is installed.
        let install = "rpm --root /build/root --nodeps --noscripts -i $0
            rpm --root /build/root --nodeps -V criu-image-relay";
        fs::create_dir(&root).unwrap();
        let differs = in_tree(&["unshare", "--map-root-user", "sh", "-ec", install, &rpm()]);
        assert_eq!(differs, "", "rpm -V finds that files are not as they were packaged");
        root
    })
}

#[test]
fn rpmlint_finds_nothing_that_is_not_argued() {
    for file in ["rpmlint.toml", "macros.test"] {
        fs::copy(repository().join("packaging/rpm").join(file), built().join("SPECS").join(file))
            .unwrap();
    }
    // rpmlint reads the spec file by rpm, which has no option for macros there but a file for them.
    let lint = "cp SPECS/macros.test .rpmmacros; echo '%_dbpath /build/db' >>.rpmmacros
        trap 'rm -r .rpmmacros db' EXIT
        rpmlint --config SPECS/rpmlint.toml --strict SRPMS/*.rpm SPECS/*.spec \"$0\"";
    let found = in_tree(&["bash", "-ec", lint, &rpm()]);
    println!("{found}");
    assert!(found.contains("2 packages and 1 specfiles checked; 0 errors, 0 warnings"), "{found}");
}

#[test]
fn the_rpm_and_the_deb_install_the_same_files() {
    let compare = repository().join("packaging/rpm/compare");
    fs::copy(compare, built().join("compare")).unwrap();
    fs::copy(package(), built().join("package.deb")).unwrap();
    let differences = in_tree(&["./compare", &rpm(), "package.deb"]);
    assert_eq!(differences, "");
}

#[test]
fn rpm_knows_what_is_configuration_and_what_a_licence() {
    // c is configuration, n what the administrator has changed is not replaced, l a licence.
    let list = query("[%{FILEFLAGS:fflags} %{FILENAMES}\n]");
    let below = |dir: &str| -> Vec<&str> {
        list.lines().filter(|line| line.contains(&format!(" {dir}/"))).collect()
    };
    assert_eq!(
        below("/etc"),
        [
            " /etc/criu-image-relay",
            "cn /etc/criu-image-relay/cache.toml",
            "cn /etc/criu-image-relay/proxy.toml",
        ]
    );
    let licences = below("/usr/share/licenses/criu-image-relay");
    assert!(licences.iter().all(|line| line.starts_with("l ")), "{licences:?}");
    assert_eq!(licences.len(), 4);
    assert!(!list.contains("preset"), "what is enabled is for the distribution to say");
}

/// The parts of a licence that all hold.
fn all_of(licence: &str) -> BTreeSet<String> {
    let mut depth = 0;
    let mut parts = vec![String::new()];
    for word in licence.split_whitespace() {
        if depth == 0 && word == "AND" {
            parts.push(String::new());
            continue;
        }
        depth += word.matches('(').count();
        depth -= word.matches(')').count();
        let part = parts.last_mut().unwrap();
        part.push_str(if part.is_empty() { "" } else { " " });
        part.push_str(word);
    }
    parts.iter().map(|part| part.trim_matches(['(', ')']).to_owned()).collect()
}

#[test]
fn the_licence_of_the_rpm_has_those_of_all_crates() {
    let tag = all_of(&query("%{LICENSE}"));
    let list = format!("usr/share/licenses/{NAME}/LICENSE.dependencies");
    let list = fs::read_to_string(installed().join(list)).unwrap();
    let listed: BTreeSet<_> =
        list.lines().flat_map(|line| all_of(line.split_once(": ").unwrap().0)).collect();
    assert_eq!(listed, tag);
}

/// What follows a plus sign is not compared, and no rpm can have it.
fn without_build((name, version): (String, String)) -> (String, String) {
    (name, version.split('+').next().unwrap().to_owned())
}

#[test]
fn the_rpm_says_which_crates_it_has_in_itself_and_its_programs_do() {
    let provides = query("[%{PROVIDENEVRS}\n]");
    let bundled: BTreeSet<_> = provides
        .lines()
        .filter_map(|line| line.strip_prefix("bundled(crate(")?.split_once(")) = "))
        .map(|(name, version)| (name.to_owned(), version.to_owned()))
        .collect();
    let locked: BTreeSet<_> = locked_crates().into_iter().map(without_build).collect();
    assert!(bundled.is_subset(&locked), "{:?}", bundled.difference(&locked));
    for program in PROGRAMS {
        let crates = crates_in(&installed().join("usr/bin").join(program)).into_iter();
        let crates: BTreeSet<_> =
            crates.map(without_build).filter(|(name, _)| name != NAME).collect();
        assert!(crates.iter().any(|(name, _)| name == "tokio"), "{program}: {crates:?}");
        // Also what only their build needed.
        assert!(crates.is_subset(&locked), "{program}: {:?}", crates.difference(&locked));
    }
}

/// The units of the package that have something to be enabled by.
fn units() -> BTreeSet<String> {
    let dir = installed().join("usr/lib/systemd/system");
    let files = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    files
        .filter(|file| fs::read_to_string(file.path()).unwrap().contains("\n[Install]\n"))
        .map(|file| file.file_name().into_string().unwrap())
        .collect()
}

#[test]
fn the_rpms_scripts_name_every_unit_that_can_be_enabled() {
    for (name, verb) in [("%{POSTIN}", "preset"), ("%{PREUN}", "disable --now")] {
        let script = query(name);
        let line = script.lines().find_map(|line| line.split_once(verb)).unwrap().1;
        let units_of_it = line.split_whitespace().filter(|word| word.starts_with("criu-"));
        assert_eq!(units_of_it.map(ToOwned::to_owned).collect::<BTreeSet<_>>(), units(), "{verb}");
    }
}

/// Brings what rpm has installed onto a host, does what systemd's own package does there when files of these
/// kinds come, and runs the package's script; under Fedora's policy, by which nothing is enabled by itself.
fn bring(bed: &Bed, host: Host) {
    let files = tempfile::tempdir().unwrap();
    let list = query("[.%{FILENAMES}\n]");
    fs::write(files.path().join("list"), list).unwrap();
    let (list, root) = (files.path().join("list"), files.path().join("root"));
    fs::create_dir(&root).unwrap();
    let copy = "tar -C \"$0\" --no-recursion --owner=0 --group=0 -c -T \"$1\" | tar -C \"$2\" -x";
    let from = installed().to_str().unwrap();
    ok(&[
        "bash",
        "-ec",
        "-o",
        "pipefail",
        copy,
        from,
        list.to_str().unwrap(),
        root.to_str().unwrap(),
    ]);
    bed.copy(host, &root, "/");
    let policy = "mkdir -p /etc/systemd/system-preset
        echo 'disable *' >/etc/systemd/system-preset/99-default-disable.preset
        systemd-sysusers
        systemd-tmpfiles --create criu-image-relay.conf
        systemctl daemon-reload";
    bed.ok(host, &["sh", "-ec", policy]);
    script(bed, host, "%{POSTIN}", "1");
}

/// Runs a script of the package with the argument that rpm would give it: how many versions there are then.
fn script(bed: &Bed, host: Host, name: &str, count: &str) {
    bed.ok(host, &["sh", "-c", &query(name), "script", count]);
}

/// The package's units that are enabled, or running.
fn awake(bed: &Bed, host: Host) -> Vec<String> {
    let list = |what: &[&str]| {
        bed.ok(host, &[&["systemctl", "--plain", "--no-legend"], what, &["criu-image-*"]].concat())
    };
    let files = list(&["list-unit-files"]);
    assert!(files.lines().count() >= units().len(), "{files}");
    let enabled = files.lines().filter(|line| line.split_whitespace().nth(1) == Some("enabled"));
    let active = list(&["list-units", "--state=active,activating"]);
    enabled.chain(active.lines()).map(ToOwned::to_owned).collect()
}

#[test]
fn an_rpm_enables_nothing_serves_when_enabled_and_stops_when_removed() {
    let bed = fresh_hosts(None);
    bring(&bed, Host::A);
    bring(&bed, Host::B);
    bed.trust();
    let none: [&str; 0] = [];
    for host in crate::bed::BOTH {
        assert_eq!(awake(&bed, host), none);
        let sockets: Vec<_> = units()
            .into_iter()
            .filter(|unit| unit.starts_with(host.daemon()) && !unit.contains('@'))
            .collect();
        let mut enable = vec!["systemctl", "enable", "--now"];
        enable.extend(sockets.iter().map(String::as_str));
        bed.ok(host, &enable);
    }

    assert_ne!(awake(&bed, Host::B), none);
    let put = ["criu-imagectl", "put", "--list", "--finish", "from-a", "/etc/hostname"];
    bed.ok(Host::A, &put);
    assert_eq!(bed.ok(Host::B, &["criu-imagectl", "get", "from-a", "hostname"]), "host-a\n");

    // An upgrade: the new package's script, then the old one's.
    script(&bed, Host::B, "%{POSTIN}", "2");
    script(&bed, Host::B, "%{PREUN}", "1");
    assert_eq!(bed.ok(Host::B, &["criu-imagectl", "get", "from-a", "hostname"]), "host-a\n");

    script(&bed, Host::B, "%{PREUN}", "0");
    assert_eq!(awake(&bed, Host::B), none);
}
