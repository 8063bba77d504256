//! Images pass through memory: neither daemon opens, makes or looks at a directory of images.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use criu_image_relay::criu::remote::{CACHE_SOCKET, PROXY_SOCKET};
use criu_image_relay::criu::stream::{CAPTURE_SOCKET, SERVE_SOCKET};
use criu_image_relay::daemon::CONTROL_SOCKET;

use crate::clients::{Client, ROOM};
use crate::daemons::{Daemon, eventually, unused_address};
use crate::hosts::Hosts;

/// What a daemon may look at anywhere: the system's own files.
const SYSTEM: [&str; 6] = ["/etc/", "/sys/", "/lib/", "/lib64/", "/usr/lib/", "/run/systemd/"];
/// What leads out of `/proc`.
const ELSEWHERE: [&str; 4] = ["/fd", "/root", "/cwd", ".."];
/// What makes, moves or removes a file.
const CHANGES: [&str; 8] =
    ["creat", "link", "mkdir", "mknod", "rename", "rmdir", "symlink", "truncate"];

/// The files that one daemon has business with.
struct Allowed {
    binary: &'static str,
    dir: PathBuf,
    sockets: [&'static str; 3],
}

impl Allowed {
    fn has(&self, path: &str) -> bool {
        // unix(7): a socket's path may be longer than what can be bound; see `sys::unix::bind`.
        let socket = |path: &str| self.sockets.contains(&path);
        if let Some(rest) = path.strip_prefix("/proc/self/fd/") {
            return rest.split_once('/').is_some_and(|(_, name)| socket(name));
        }
        let own = || {
            let name = Path::new(path).strip_prefix(&self.dir).ok()?.to_str()?;
            Some(matches!(name, "" | "config.toml") || socket(name))
        };
        // A descriptor that is open already has no path.
        path.is_empty()
            || path == self.binary
            || path == "/dev/null"
            || path == "/dev/urandom"
            || (path.starts_with("/proc/") && !ELSEWHERE.iter().any(|link| path.contains(link)))
            || (SYSTEM.iter().any(|dir| path.starts_with(dir)) && !path.contains(".."))
            || own() == Some(true)
    }

    /// What is wrong with a line of the trace: `PID CALL("PATH", …) = RESULT`.
    fn complaint(&self, line: &str) -> Option<String> {
        let (_, call) = line.split_once(' ')?;
        let (name, arguments) = call.trim_start().split_once('(')?;
        // The daemon's own directory is there.
        let refused = arguments.contains("EEXIST") && name == "mkdir";
        if arguments.contains("O_CREAT") || (!refused && CHANGES.iter().any(|c| name.contains(c))) {
            // A link is read with a call of that name, too.
            if !name.contains("readlink") {
                return Some(format!("makes or changes a file: {line}"));
            }
        }
        let quoted = arguments.split('"').skip(1).step_by(2);
        // What follows is a command's arguments, or what the kernel answers.
        let paths = match name {
            "execve" | "readlink" | "readlinkat" => 1,
            "getcwd" => 0,
            _ => usize::MAX,
        };
        let alien = quoted.take(paths).find(|path| !self.has(path))?;
        Some(format!("looks at {alien}: {line}"))
    }
}

/// The files of a directory, by name.
fn names(dir: &Path) -> BTreeSet<String> {
    fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
}

/// Starts a daemon whose calls that take a file's name are written down.
fn traced<T>(start: impl FnOnce(&str) -> Result<T, String>, trace: &Path) -> T {
    let exec = format!("exec strace -D -f -e trace=%file -o {}", trace.display());
    start(&exec).unwrap_or_else(|log| {
        panic!(
            "the daemon does not start under strace, which has to be there and permitted:\n{log}"
        )
    })
}

/// The trace of a daemon that has stopped.
#[track_caller]
fn lines(trace: &Path) -> Vec<String> {
    let read = || fs::read_to_string(trace).unwrap();
    assert!(eventually(|| read().contains("+++ exited with 0 +++")), "{}", read());
    read().lines().map(str::to_owned).collect()
}

#[test]
fn neither_daemon_touches_a_file_that_is_not_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let (of_proxy, of_cache) = (dir.path().join("proxy"), dir.path().join("cache"));
    let address = unused_address();
    let cache = traced(|exec| Daemon::cache_by(exec, address, ROOM), &of_cache);
    let proxy = traced(|exec| Daemon::proxy_by(exec, address, &[]), &of_proxy);
    let hosts = Hosts { proxy, cache, address };

    // As the old clients have it, an id is the path of a directory that is there.
    let ids = [1, 2, 3].map(|k| dir.path().join(format!("ckpt-{k}")).display().to_string());
    for id in &ids {
        fs::create_dir(id).unwrap();
        fs::write(Path::new(id).join("tmpfs-dev-0-0.tar.gz.img"), "not this").unwrap();
    }
    let ids = ids.each_ref().map(String::as_str);
    for client in [Client::Python, Client::compiled()] {
        client.fill(&hosts, "web", 200, &ids);
        client.check(&hosts, "web", 200, &ids);
    }
    for id in ids {
        assert_eq!(names(Path::new(id)).len(), 1);
    }

    let Hosts { proxy, cache, .. } = hosts;
    for (daemon, trace, binary, sockets) in [
        (
            proxy,
            of_proxy,
            env!("CARGO_BIN_EXE_criu-image-proxy"),
            [CONTROL_SOCKET, CAPTURE_SOCKET, PROXY_SOCKET],
        ),
        (
            cache,
            of_cache,
            env!("CARGO_BIN_EXE_criu-image-cache"),
            [CONTROL_SOCKET, SERVE_SOCKET, CACHE_SOCKET],
        ),
    ] {
        let allowed = Allowed { binary, dir: daemon.dir().to_owned(), sockets };
        let made = names(&allowed.dir);
        assert!(made.iter().all(|name| name == "config.toml" || sockets.contains(&name.as_str())));
        daemon.stop();
        let lines = lines(&trace);
        // It has been traced from its first to its last call.
        assert!(lines.iter().any(|line| line.contains("config.toml")), "{lines:#?}");
        let complaints: Vec<_> = lines.iter().filter_map(|line| allowed.complaint(line)).collect();
        assert_eq!(complaints, [""; 0]);
    }
}

#[test]
fn a_daemon_that_touched_another_file_would_be_seen() {
    let sockets = [CONTROL_SOCKET, SERVE_SOCKET, CACHE_SOCKET];
    let allowed = Allowed { binary: "/srv/cache", dir: "/tmp/work".into(), sockets };
    for seen in [
        r#"7 openat(AT_FDCWD, "/var/lib/criu/core-7.img", O_RDONLY|O_CLOEXEC) = 9"#,
        r#"7 openat(5, "core-7.img", O_RDONLY) = 9"#,
        r#"7 openat(AT_FDCWD, "/tmp/work/config.toml", O_WRONLY|O_CREAT, 0600) = 9"#,
        r#"7 openat(AT_FDCWD, "/tmp/work/core-7.img", O_RDONLY) = -1 ENOENT (No such file)"#,
        r#"7 openat(AT_FDCWD, "/proc/self/fd/5/core-7.img", O_RDONLY) = 9"#,
        r#"7 openat(AT_FDCWD, "/proc/self/cwd/core-7.img", O_RDONLY) = 9"#,
        r#"7 openat(AT_FDCWD, "/dev/shm/core-7.img", O_RDWR) = 9"#,
        r#"7 statx(AT_FDCWD, "/tmp", AT_STATX_SYNC_AS_STAT, STATX_ALL, {stx_mask=…}) = 0"#,
        r#"7 newfstatat(AT_FDCWD, "/etc/../srv", {st_mode=S_IFDIR|0755, …}, 0) = 0"#,
        r#"7 mkdir("/tmp/work", 0777) = 0"#,
        r#"7 rename("/tmp/work/cache.sock", "/tmp/work/control.sock" <unfinished ...>"#,
        r#"7 access("/srv/ckpt/1", F_OK) = -1 ENOENT (No such file or directory)"#,
    ] {
        assert!(allowed.complaint(seen).is_some(), "{seen}");
    }
    for unseen in [
        r#"7 execve("/srv/cache", ["/srv/cache", "--config", "/x"], 0x7ff /* 9 vars */) = 0"#,
        r#"7 readlink("/proc/self/exe", "/srv/cache", 4096) = 10"#,
        r#"7 mkdir("/tmp/work", 0777) = -1 EEXIST (File exists)"#,
        r#"7 chmod("/proc/self/fd/5/img-cache.sock", 0600) = 0"#,
        "7 +++ exited with 0 +++",
    ] {
        assert_eq!(allowed.complaint(unseen), None);
    }
}
