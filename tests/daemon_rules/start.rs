//! Each way to start a daemon, and what may come of it.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;

use criu_image_relay::criu::stream::{CAPTURE_SOCKET, SERVE_SOCKET};
use criu_image_relay::daemon::CONTROL_SOCKET;
use rustix::process::Signal;

use crate::run::{CACHE, PROXY, WAYS, Way, command, eventually, read_pid, start};

#[test]
fn one_that_serves() {
    for way in WAYS {
        for binary in [PROXY, CACHE] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path();
            let mut daemon = start(way, &mut command(binary, path), path).unwrap();
            assert_eq!(read_pid(path), Some(daemon.pid), "{way:?}");
            assert_eq!(fs::metadata(path.join("pid")).unwrap().mode() & 0o777, 0o644);
            assert_eq!(fs::metadata(path.join("log")).unwrap().mode() & 0o777, 0o600);
            assert!(UnixStream::connect(path.join(CONTROL_SOCKET)).is_ok());

            daemon.signal(Signal::TERM);
            assert!(eventually(|| !daemon.is_alive()));
            assert!(!path.join("pid").exists(), "{way:?}");
        }
    }
}

#[test]
fn one_in_the_background_has_left_the_terminal() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path();
    let daemon = start(Way::Daemon, &mut command(PROXY, path), path).unwrap();
    let pid = daemon.pid.as_raw_nonzero();
    let proc = Path::new("/proc").join(pid.to_string());
    for standard in ["fd/0", "fd/1", "fd/2"] {
        assert_eq!(fs::read_link(proc.join(standard)).unwrap(), Path::new("/dev/null"));
    }
    assert_eq!(fs::read_link(proc.join("cwd")).unwrap(), Path::new("/"));
    let stat = fs::read_to_string(proc.join("stat")).unwrap();
    let (name, rest) = stat.split_once(") ").unwrap();
    // ps(1) shows so much of a name.
    assert!(name.ends_with("(criu-image-prox"), "{stat}");
    let session = rest.split(' ').nth(3).unwrap();
    assert_eq!(session, pid.to_string(), "{stat}");
}

#[test]
fn a_port_in_use() {
    for way in WAYS {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path();
        let other = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = other.local_addr().unwrap();
        fs::write(
            path.join("config.toml"),
            format!("listen = \"{address}\"\npages.listen = \"\"\n"),
        )
        .unwrap();
        let mut command = Command::new(CACHE);
        command.current_dir(path).args(["-c", "config.toml", "-W", "."]);
        let (status, said) = start(way, &mut command, path).err().unwrap();
        assert_eq!(status, 1, "{way:?}: {said}");
        assert!(said.contains(&format!("cannot listen on {address}")), "{way:?}: {said}");
        assert!(fs::read_to_string(path.join("log")).unwrap().contains("cannot listen"));
        assert!(!path.join("pid").exists());
    }
}

#[test]
fn a_socket_in_use() {
    for way in WAYS {
        for (binary, name) in [(PROXY, CAPTURE_SOCKET), (CACHE, SERVE_SOCKET)] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path();
            let _other = UnixListener::bind(path.join(name)).unwrap();
            let (status, said) = start(way, &mut command(binary, path), path).err().unwrap();
            assert_eq!(status, 1, "{way:?}: {said}");
            assert!(said.contains("another process listens there"), "{way:?}: {said}");
            assert!(!path.join("pid").exists());
        }
    }
}

#[test]
fn a_second_one() {
    for way in WAYS {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path();
        let mut first = start(way, &mut command(PROXY, path), path).unwrap();
        // In the same place, and elsewhere with the same pid file.
        for work_dir in [".", "elsewhere"] {
            let mut second = Command::new(PROXY);
            second.current_dir(path).args(["-c", "config.toml", "-W", work_dir]);
            let (status, said) = start(way, &mut second, path).err().unwrap();
            let running = format!("already running with pid {}", first.pid);
            assert_eq!(status, 1, "{way:?}: {said}");
            assert!(said.contains(&running), "{way:?}: {said}");
        }
        assert!(first.is_alive());
        assert_eq!(read_pid(path), Some(first.pid));
        assert!(UnixStream::connect(path.join(CONTROL_SOCKET)).is_ok());
    }
}

#[test]
fn a_stale_pid_file() {
    for way in WAYS {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path();
        let mut killed = start(way, &mut command(CACHE, path), path).unwrap();
        let old = killed.pid;
        killed.signal(Signal::KILL);
        assert!(eventually(|| !killed.is_alive()));
        assert_eq!(read_pid(path), Some(old));

        let next = start(way, &mut command(CACHE, path), path).unwrap();
        assert_ne!(next.pid, old);
        assert_eq!(read_pid(path), Some(next.pid), "{way:?}");
    }
}

#[test]
fn somebodys_text_in_place_of_a_pid_file() {
    for way in WAYS {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path();
        fs::write(path.join("pid"), "dear diary\n").unwrap();
        let (status, said) = start(way, &mut command(CACHE, path), path).err().unwrap();
        assert_eq!(status, 1, "{way:?}: {said}");
        assert!(said.contains("holds no pid"), "{way:?}: {said}");
        assert_eq!(fs::read_to_string(path.join("pid")).unwrap(), "dear diary\n");
    }
}
