//! The packages under test, and how they come onto a host.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use crate::bed::{Bed, Host};

/// The package's name.
pub(crate) const NAME: &str = "criu-image-relay";

pub(crate) fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Runs a command that has to succeed; returns what it printed.
#[track_caller]
pub(crate) fn ok<S: AsRef<OsStr> + std::fmt::Debug>(command: &[S]) -> String {
    let mut run = Command::new(&command[0]);
    let output = run.args(&command[1..]).stdin(Stdio::null()).output().unwrap();
    let out = String::from_utf8_lossy(&output.stdout).into_owned();
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{out}\n{err}", output.status);
    out
}

/// The package, built at the first call: twice, compared, and looked at by lintian. A build that failed is not tried
/// again.
#[track_caller]
pub(crate) fn package() -> &'static Path {
    static PACKAGE: OnceLock<Option<PathBuf>> = OnceLock::new();
    let package = PACKAGE.get_or_init(|| {
        let check = repository().join("packaging/check-reproducible");
        let dir = made("CRIU_IMAGE_RELAY_PACKAGES", "packages", |dir| vec![check, dir.into()])?;
        let debs = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path());
        let name = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().to_owned();
        let mut found = debs.filter(|path| {
            let is_deb = path.extension().is_some_and(|end| end == "deb");
            is_deb && name(path).starts_with(&format!("{NAME}_"))
        });
        let package = found.next().unwrap_or_else(|| panic!("no package in {}", dir.display()));
        assert_eq!(found.next(), None);
        Some(package)
    });
    package.as_deref().expect("the package is there; the output of its build says why not")
}

/// The directory that the environment names in `given`, or a new one that is filled by a command, whose output is seen;
/// that one is kept until the next run, to be looked at. Nothing if the command failed.
pub(crate) fn made(
    given: &str,
    name: &str,
    command: impl FnOnce(&Path) -> Vec<PathBuf>,
) -> Option<PathBuf> {
    if let Some(dir) = std::env::var_os(given) {
        return Some(dir.into());
    }
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    if dir.exists() {
        fs::remove_dir_all(&dir).unwrap();
    }
    fs::create_dir_all(&dir).unwrap();
    let command = command(&dir);
    let status = Command::new(&command[0]).args(&command[1..]).stdin(Stdio::null()).status();
    status.unwrap().success().then_some(dir)
}

/// A field of a package.
pub(crate) fn field(package: &Path, name: &str) -> String {
    ok(&["dpkg-deb", "--field", package.to_str().unwrap(), name]).trim().to_owned()
}

/// A package's files, unpacked; its own are below `DEBIAN`.
pub(crate) fn unpacked(package: &Path) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let package = package.to_str().unwrap();
    ok(&["dpkg-deb", "--raw-extract", package, dir.path().to_str().unwrap()]);
    dir
}

/// The same package as a higher version, without building it again: what is in the programs is not what an
/// upgrade changes.
pub(crate) fn higher_version() -> tempfile::TempDir {
    let tree = unpacked(package());
    let control = tree.path().join("DEBIAN/control");
    let old = fs::read_to_string(&control).unwrap();
    let new =
        old.replacen(&format!("Version: {}", field(package(), "Version")), "Version: 99.0-1", 1);
    assert_ne!(old, new);
    fs::write(&control, new).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (tree.path().to_str().unwrap(), dir.path().join("higher.deb"));
    ok(&["dpkg-deb", "--root-owner-group", "--build", from, to.to_str().unwrap()]);
    dir
}

/// Name and version of each crate in `Cargo.lock`.
pub(crate) fn locked_crates() -> BTreeSet<(String, String)> {
    let lock = fs::read_to_string(repository().join("Cargo.lock")).unwrap();
    let lock: toml::Value = toml::from_str(&lock).unwrap();
    let text = |value: &toml::Value| value.as_str().unwrap().to_owned();
    let packages = lock["package"].as_array().unwrap().iter();
    packages.map(|package| (text(&package["name"]), text(&package["version"]))).collect()
}

/// All files below a directory, as paths below it.
pub(crate) fn files(dir: &Path) -> BTreeSet<String> {
    let list = ok(&["find", dir.to_str().unwrap(), "-type", "f", "-printf", "/%P\\n"]);
    list.lines().map(ToOwned::to_owned).collect()
}

/// Two hosts with Debian 13 or another, and nothing of the relay but the process that the tests move.
pub(crate) fn fresh_hosts(rootfs: Option<&str>) -> Bed {
    let bed = Bed::bare(rootfs.map(Path::new));
    let workload = crate::bed::build().join("examples/workload");
    for host in crate::bed::BOTH {
        bed.copy(host, &workload, "/usr/bin/workload");
    }
    bed
}

/// Installs a package as its users do; its dependencies are there.
#[track_caller]
pub(crate) fn install(bed: &Bed, host: Host, package: &Path) {
    bed.copy(host, package, "/tmp/package.deb");
    bed.ok(host, &["apt-get", "install", "-q", "-y", "/tmp/package.deb"]);
    bed.ok(host, &["rm", "/tmp/package.deb"]);
}

/// Its state as dpkg tells it, `installed` or `config-files`; nothing for one that is not known.
pub(crate) fn state(bed: &Bed, host: Host) -> String {
    let query = bed.run(host, &["dpkg-query", "--show", "--showformat=${db:Status-Status}", NAME]);
    String::from_utf8_lossy(&query.stdout).trim().to_owned()
}

/// Runs what autopkgtest would, where the package is installed.
#[track_caller]
pub(crate) fn package_passes_its_tests(bed: &Bed, host: Host) {
    for test in ["smoke", "migration"] {
        let script = repository().join("packaging/debian/tests").join(test);
        bed.copy(host, &script, "/tmp/test");
        let run = "mkdir /tmp/work && AUTOPKGTEST_TMP=/tmp/work /tmp/test && rm -r /tmp/work";
        bed.ok(host, &["sh", "-c", run]);
    }
}
