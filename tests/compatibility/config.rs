//! Configurations: what a release understood, today's daemons do.

use std::process::Command;

/// The daemon with this name accepts a file that sets every key that `documented` names.
#[track_caller]
pub(crate) fn assert_accepts(binary: &str, documented: &str) {
    let lines = documented.lines().map(|line| match line.strip_prefix('#') {
        Some(set) if is_set(set) => set,
        _ => line,
    });
    let set: Vec<_> = lines.collect();
    assert!(set.iter().filter(|line| is_set(line)).count() > 10, "{set:?}");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.toml");
    std::fs::write(&path, set.join("\n")).unwrap();
    let checked = Command::new(binary).arg("--check-config").arg("--config").arg(path).output();
    let checked = checked.unwrap();
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
    assert!(checked.stderr.is_empty(), "{}", String::from_utf8_lossy(&checked.stderr));
}

/// Whether a line is `key = value`, and no prose.
fn is_set(line: &str) -> bool {
    line.split_once(" = ").is_some_and(|(key, _)| {
        !key.is_empty() && key.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'-')
    })
}
