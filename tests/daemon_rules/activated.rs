//! Sockets that systemd made: by name, and of more kinds than the daemons make themselves.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};

use criu_image_relay::criu::page_server::command::Command as PageCommand;
use criu_image_relay::criu::page_server::header::Dialect;
use criu_image_relay::criu::stream::{CAPTURE_SOCKET, SERVE_SOCKET};
use criu_image_relay::daemon::CONTROL_SOCKET;

use crate::run::{CACHE, PROXY, Running, SOON, command, eventually, spawn};
use crate::speak::Link;

/// Puts descriptors where systemd has them, from 3 on, and becomes the daemon.
const ACTIVATE: &str = "import fcntl, os, sys
fds = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 100) for fd in sys.argv[1].split(',')]
for number, fd in enumerate(fds, 3):
    os.dup2(fd, number)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(fds)))
os.execv(sys.argv[2], sys.argv[2:])
";

/// A daemon as systemd starts it, with these sockets by these names.
pub(crate) fn activated(binary: &str, dir: &Path, sockets: &[(&str, OwnedFd)]) -> Command {
    let numbers: Vec<_> = sockets.iter().map(|(_, fd)| fd.as_raw_fd().to_string()).collect();
    let names: Vec<_> = sockets.iter().map(|(name, _)| *name).collect();
    let mut python = Command::new("python3");
    python.args(["-c", ACTIVATE, &numbers.join(","), binary]).args(["--config", "config.toml"]);
    // Makes the configuration.
    command(binary, dir);
    python.current_dir(dir).env("LISTEN_FDNAMES", names.join(":")).stdin(Stdio::null());
    python.env_remove("JOURNAL_STREAM").env_remove("NOTIFY_SOCKET").env_remove("WATCHDOG_USEC");
    python
}

fn unix(dir: &Path, name: &str) -> OwnedFd {
    UnixListener::bind(dir.join(name)).unwrap().into()
}

/// Whether a page server is there that takes part in its protocol.
fn serves_pages(mut socket: impl Read + Write) -> bool {
    let close = PageCommand::Close.header().encode(Dialect::Short).unwrap();
    socket.write_all(&close).unwrap();
    let mut status = [0xff; 4];
    socket.read_exact(&mut status).is_ok() && status == [0; 4]
}

#[test]
fn links_and_pages_come_on_sockets_of_either_family() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let tcp = || TcpListener::bind("127.0.0.1:0").unwrap();
    let (tcp_link, tcp_pages) = (tcp(), tcp());
    let [link_at, pages_at] = [&tcp_link, &tcp_pages].map(|tcp| tcp.local_addr().unwrap());
    let sockets = [
        ("link", unix(dir, "link.sock")),
        ("control", unix(dir, CONTROL_SOCKET)),
        ("pages", tcp_pages.into()),
        ("stream", unix(dir, SERVE_SOCKET)),
        ("pages", unix(dir, "pages.sock")),
        ("link", tcp_link.into()),
    ];
    let inherited = sockets.each_ref().map(|(_, fd)| fd.as_fd());
    let _cache = Running::with(&mut activated(CACHE, dir, &sockets), dir, &inherited);

    Link::new(UnixStream::connect(dir.join("link.sock")).unwrap().into()).hello();
    Link::new(TcpStream::connect(link_at).unwrap().into()).hello();
    let unix = UnixStream::connect(dir.join("pages.sock")).unwrap();
    unix.set_read_timeout(Some(SOON)).unwrap();
    assert!(serves_pages(unix));
    let tcp = TcpStream::connect(pages_at).unwrap();
    tcp.set_read_timeout(Some(SOON)).unwrap();
    assert!(serves_pages(tcp));
}

#[test]
fn a_socket_that_is_missing_is_named_by_its_unit() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    for (binary, stream, missing) in [
        (PROXY, CAPTURE_SOCKET, "criu-image-proxy-control"),
        (CACHE, SERVE_SOCKET, "criu-image-cache-control"),
    ] {
        let sockets = [("stream", unix(dir, stream))];
        let mut command = activated(binary, dir, &sockets);
        let child = spawn(command.stderr(Stdio::piped()), &[sockets[0].1.as_fd()]);
        let output = child.wait_with_output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{said}");
        let cure = format!("start {missing}.socket, or {missing}@NAME.socket of instance NAME");
        assert!(said.contains(&cure), "{said}");
    }
}

/// What comes on a socket for figures.
fn scrape(mut socket: impl Read + Write) -> String {
    socket.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn figures_are_served_on_sockets_of_either_family_and_of_the_configuration_only_without_systemd() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = tcp.local_addr().unwrap();
    let required =
        || [("stream", unix(dir, CAPTURE_SOCKET)), ("control", unix(dir, CONTROL_SOCKET))];
    let sockets: Vec<_> = required()
        .into_iter()
        .chain([("metrics", unix(dir, "figures.sock")), ("metrics", tcp.into())])
        .collect();
    let inherited: Vec<_> = sockets.iter().map(|(_, fd)| fd.as_fd()).collect();
    let proxy = Running::with(&mut activated(PROXY, dir, &sockets), dir, &inherited);
    for answer in [
        scrape(UnixStream::connect(dir.join("figures.sock")).unwrap()),
        scrape(TcpStream::connect(address).unwrap()),
    ] {
        assert!(answer.ends_with("# EOF\n"), "{answer}");
    }
    drop((proxy, sockets));

    for name in [CAPTURE_SOCKET, CONTROL_SOCKET] {
        fs::remove_file(dir.join(name)).unwrap();
    }
    let listen = dir.join("other.sock");
    let settings = format!("pages.listen = \"\"\nmetrics.listen = \"{}\"\n", listen.display());
    fs::write(dir.join("config.toml"), settings).unwrap();
    let sockets = required();
    let inherited = sockets.each_ref().map(|(_, fd)| fd.as_fd());
    let mut command = activated(PROXY, dir, &sockets);
    let _proxy = Running::with(command.args(["--log-file", "log"]), dir, &inherited);
    let log = || fs::read_to_string(dir.join("log")).unwrap_or_default();
    assert!(eventually(|| log().contains(" serves")));
    let log = log();
    assert!(log.contains("criu-image-proxy-metrics.socket is not started"), "{log}");
    assert!(!listen.exists());
}
