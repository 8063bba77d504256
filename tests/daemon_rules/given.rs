//! A link on a socket that is connected already (`--ps-socket`, or systemd's `Accept=yes`).

use std::fs;
use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};

use criu_image_relay::daemon::CONTROL_SOCKET;
use rustix::process::Signal;

use crate::run::{CACHE, PROXY, Running, command, ctl, eventually, images, output, spawn};
use crate::speak::{Link, pairs, restore};

/// A daemon that has this socket as its link.
pub(crate) fn on(socket: &OwnedFd, binary: &str, dir: &Path) -> Running {
    let mut command = command(binary, dir);
    command.args(["--ps-socket", &socket.as_raw_fd().to_string()]);
    Running::with(&mut command, dir, &[socket.as_fd()])
}

#[test]
fn a_snapshot_passes_from_the_proxy_to_the_cache() {
    for (ours, theirs) in pairs() {
        let (source, destination) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (source, destination) = (source.path(), destination.path());
        let proxy = on(&ours, PROXY, source);
        let mut cache = on(&theirs, CACHE, destination);
        drop((ours, theirs));

        let pages: Vec<u8> = (0..=u8::MAX).cycle().take(3_000_001).collect();
        let images = images(source, &pages);
        let pushed = ctl(source, &["push", images.to_str().unwrap()]);
        assert_eq!(pushed, (0, String::new()));
        let extracted = destination.join("web");
        assert_eq!(ctl(destination, &["extract", extracted.to_str().unwrap()]).0, 0);
        assert_eq!(fs::read(extracted.join("pages-1.img")).unwrap(), pages);

        // Images by name go the same way, and are read back over it.
        let image = images.join("pages-1.img");
        let put = ["put", "--list", "named", image.to_str().unwrap()];
        assert_eq!(ctl(source, &put), (0, String::new()));
        let (back, there) = (source.join("back"), destination.join("there"));
        let read = ["get", "--to", back.to_str().unwrap(), "named", "pages-1.img"];
        assert_eq!(ctl(source, &read).0, 0);
        assert_eq!(ctl(source, &["finish", "named"]), (0, String::new()));
        let read = ["get", "--to", there.to_str().unwrap(), "named", "pages-1.img"];
        assert_eq!(ctl(destination, &read).0, 0);
        for dir in [back, there] {
            assert_eq!(fs::read(dir.join("pages-1.img")).unwrap(), pages);
        }
        assert_eq!(ctl(destination, &["finish", "named"]), (0, String::new()));

        // The restore is still to come when the proxy has gone.
        proxy.signal(Signal::TERM);
        assert!(proxy.status().success());
        assert!(cache.is_alive());
        assert_eq!(restore(destination, "pages-1.img"), pages);
        assert_eq!(cache.status().code(), Some(0));
    }
}

#[test]
fn a_proxy_that_was_given_its_link_sends_nowhere_else() {
    let [_, (ours, theirs)] = pairs();
    let dir = tempfile::tempdir().unwrap();
    let _proxy = on(&ours, PROXY, dir.path());
    let mut link = Link::new(theirs);
    link.welcome();
    let images = images(dir.path(), b"pages");
    let (status, said) = ctl(dir.path(), &["push", "--to", "host-b", images.to_str().unwrap()]);
    assert_eq!(status, 1, "{said}");
    assert!(said.contains("nothing can be sent to host-b:9996"), "{said}");
    assert!(said.contains("--ps-socket"), "{said}");
}

#[test]
fn address_and_port_are_ignored() {
    let [(ours, theirs), _] = pairs();
    let dir = tempfile::tempdir().unwrap();
    let used = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = used.local_addr().unwrap().port().to_string();
    let number = theirs.as_raw_fd().to_string();
    let mut command = Command::new(CACHE);
    command.current_dir(dir.path()).args(["-W", ".", "-c", "config.toml", "--port", &port]);
    fs::write(dir.path().join("config.toml"), "pages.listen = \"\"\n").unwrap();
    command.args(["--address", "127.0.0.1", "--ps-socket", &number]);
    let cache = Running::with(&mut command, dir.path(), &[theirs.as_fd()]);
    Link::new(ours).hello();
    drop(cache);
}

#[test]
fn a_cache_in_the_background_keeps_its_link() {
    for (ours, theirs) in pairs() {
        let dir = tempfile::tempdir().unwrap();
        let number = theirs.as_raw_fd().to_string();
        let mut command = command(CACHE, dir.path());
        command.args(["--ps-socket", &number, "--daemon", "--pidfile", "pid", "-o", "log"]);
        let started = output(&mut command, &[theirs.as_fd()]);
        assert_eq!(started, (0, String::new()));
        assert!(dir.path().join("pid").exists());
        drop(theirs);
        let mut link = Link::new(ours);
        link.hello();
        drop(link);
        assert!(eventually(|| !dir.path().join("pid").exists()));
    }
}

/// As systemd starts an instance for one connection: descriptor 3, and its name.
fn as_systemd_does(dir: &Path, socket: OwnedFd, name: &str) -> Command {
    let script = "export LISTEN_PID=$$ LISTEN_FDS=1; exec \"$@\" 3<&0 0</dev/null";
    let daemon = command(CACHE, dir);
    let mut shell = Command::new("sh");
    shell.current_dir(dir).env("LISTEN_FDNAMES", name).env_remove("JOURNAL_STREAM");
    shell.args(["-c", script, "sh", CACHE]).args(daemon.get_args()).stdin(socket);
    shell.stderr(Stdio::null());
    shell
}

#[test]
fn a_connection_from_systemd_is_served_too() {
    for (ours, theirs) in pairs() {
        let dir = tempfile::tempdir().unwrap();
        let mut command = as_systemd_does(dir.path(), theirs, "connection");
        let cache = Running::from(spawn(&mut command, &[]));
        drop(command);
        assert!(eventually(|| UnixStream::connect(dir.path().join(CONTROL_SOCKET)).is_ok()));
        let mut link = Link::new(ours);
        link.hello();
        drop(link);
        assert_eq!(cache.status().code(), Some(0));
    }
}

#[test]
fn a_connection_from_systemd_has_to_be_one() {
    let dir = tempfile::tempdir().unwrap();
    let listening = TcpListener::bind("127.0.0.1:0").unwrap().into();
    let (status, said) = output_of(as_systemd_does(dir.path(), listening, "connection"));
    assert_eq!(status, 1, "{said}");
    assert!(said.contains("named \"connection\" cannot be used"), "{said}");
    assert!(said.contains("listening socket"), "{said}");

    let [(_ours, theirs), _] = pairs();
    let (status, said) = output_of(as_systemd_does(dir.path(), theirs, "zebra"));
    assert_eq!(status, 1, "{said}");
    assert!(said.contains("\"zebra\""), "{said}");
}

fn output_of(mut command: Command) -> (i32, String) {
    let child = spawn(command.stderr(Stdio::piped()), &[]);
    let output = child.wait_with_output().unwrap();
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
}
