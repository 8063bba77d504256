//! Options that cannot be followed are refused before anything begins.

use std::fs::File;
use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::process::Command;

use rustix::net::{AddressFamily, SocketType, socket};

use crate::run::{CACHE, PROXY, command, output, pipe};

#[test]
fn a_daemon_in_the_background_and_what_excludes_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path();
    let (_ours, theirs) = pipe();
    let number = theirs.as_raw_fd().to_string();
    let both = ["--daemon", "--status-fd", &number, "--log-file", "log"];
    let (status, said) = output(command(CACHE, path).args(both), &[theirs.as_fd()]);
    assert_eq!(status, 2, "{said}");
    assert!(said.contains("exclude each other"), "{said}");

    // As systemd starts it: the pid is known only to the process itself.
    let mut shell = Command::new("sh");
    shell.args(["-c", "export LISTEN_PID=$$ LISTEN_FDS=1; exec \"$@\" 3</dev/null", "sh", CACHE]);
    shell.current_dir(path).args(["-c", "config.toml", "-W", ".", "-o", "log", "--daemon"]);
    let (status, said) = output(&mut shell, &[]);
    assert_eq!(status, 2, "{said}");
    assert!(said.contains("a service needs no --daemon"), "{said}");

    if !Path::new("/run/systemd/journal/socket").exists() {
        let (status, said) = output(command(CACHE, path).arg("-d"), &[]);
        assert_eq!(status, 2, "{said}");
        assert!(said.contains("needs --log-file"), "{said}");
    }
    assert!(!path.join("control.sock").exists());
}

#[test]
fn descriptors_that_are_not_what_they_are_said_to_be() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path();
    let listening = OwnedFd::from(TcpListener::bind("127.0.0.1:0").unwrap());
    let lonely = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
    let file = OwnedFd::from(File::create(path.join("file")).unwrap());
    let (ours, _theirs) = pipe();
    for (option, fd, cause) in [
        ("--status-fd", &ours, "it is open for reading only"),
        ("--ps-socket", &file, "it is not a socket"),
        ("--ps-socket", &listening, "it is a listening socket"),
        ("--ps-socket", &lonely, "it is not connected"),
    ] {
        for binary in [PROXY, CACHE] {
            let number = fd.as_raw_fd().to_string();
            let (status, said) =
                output(command(binary, path).args([option, &number]), &[fd.as_fd()]);
            assert_eq!(status, 2, "{said}");
            assert!(said.contains(&format!("{option} {number}: {cause}")), "{said}");
        }
    }
    for (option, number, cause) in [
        ("--status-fd", "99", "it is not open"),
        ("--status-fd", "1", "standard streams"),
        ("--ps-socket", "2", "standard streams"),
        ("--ps-socket", "99", "it is not open"),
    ] {
        let (status, said) = output(command(CACHE, path).args([option, number]), &[]);
        assert_eq!(status, 2, "{said}");
        assert!(said.contains(cause), "{said}");
    }
    let number = file.as_raw_fd().to_string();
    let twice = ["--status-fd", &number, "--ps-socket", &number];
    let (status, said) = output(command(CACHE, path).args(twice), &[file.as_fd()]);
    assert_eq!(status, 2, "{said}");
    assert!(said.contains("named twice"), "{said}");
}

#[test]
fn nobody_reads_that_it_serves() {
    let dir = tempfile::tempdir().unwrap();
    let (ours, theirs) = pipe();
    drop(ours);
    let number = theirs.as_raw_fd().to_string();
    let mut command = command(CACHE, dir.path());
    let (status, said) = output(command.args(["--status-fd", &number]), &[theirs.as_fd()]);
    assert_eq!(status, 1, "{said}");
    assert!(said.contains("nobody reads --status-fd"), "{said}");
}

#[test]
fn a_configuration_that_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.toml"), "zebra = 1\n").unwrap();
    let mut command = command(CACHE, dir.path());
    let (status, said) = output(command.args(["--daemon", "--log-file", "log"]), &[]);
    assert_eq!(status, 78, "{said}");
    assert!(said.contains("unknown key `zebra`"), "{said}");
}
