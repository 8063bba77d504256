//! Clients for the figures that break the rules: each costs its own connection. Images move on, and the next
//! scrape is served.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use criu_image_relay::control::model::SnapshotState;
use tempfile::TempDir;

use crate::criu::Criu;
use crate::daemons::{SOON, eventually, unused_address};
use crate::hosts::Hosts;

/// The bytes of a request head are bounded.
const HEAD_MAX: usize = 8 << 10;
/// Three times as many clients as are served at once.
const SILENT: usize = 48;
/// How long one of them may be silent.
const PATIENCE: Duration = Duration::from_secs(5);

const SCRAPE: &[u8] = b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n";

/// Both daemons, and where each serves its figures.
fn hosts() -> (Hosts, [SocketAddr; 2]) {
    let addresses = [unused_address(), unused_address()];
    let listen = addresses.map(|address| format!("{:?}", address.to_string()));
    let [proxy, cache] = listen.each_ref().map(|listen| [("metrics.listen", listen.as_str())]);
    (Hosts::with(&proxy, &cache), addresses)
}

/// The same with the proxy's on a unix socket: over TCP nobody is known who has closed one direction.
fn on_unix_socket() -> (Hosts, TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("figures.sock");
    let listen = format!("{:?}", path.to_str().unwrap());
    (Hosts::with(&[("metrics.listen", &listen)], &[]), dir, path)
}

fn connect_to(path: &Path) -> UnixStream {
    let stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream
}

fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream.set_write_timeout(Some(SOON)).unwrap();
    stream
}

/// What is answered up to the end of the connection.
fn answer(mut stream: impl Read) -> String {
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        Ok(_) => {}
        // What is said into a closed connection.
        Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
        Err(error) => panic!("{error}"),
    }
    String::from_utf8(answer).unwrap()
}

fn ask(address: SocketAddr, request: &[u8]) -> String {
    let mut stream = connect(address);
    // It may be answered before it has said all.
    let _ = stream.write_all(request);
    answer(stream)
}

#[track_caller]
fn assert_served(address: SocketAddr) {
    let answer = ask(address, SCRAPE);
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    assert!(answer.ends_with("# EOF\n"), "{answer}");
}

/// How many refusals the figures count for a reason.
fn refusals(mut stream: impl Read + Write, reason: &str) -> u64 {
    stream.write_all(SCRAPE).unwrap();
    let answer = answer(stream);
    let label = format!("reason=\"{reason}\"}} ");
    let line = answer.lines().find_map(|line| line.split_once(label.as_str()));
    line.unwrap_or_else(|| panic!("{answer}")).1.parse().unwrap()
}

#[test]
fn bad_requests_end_their_connection_and_nothing_else() {
    let (mut hosts, addresses) = hosts();
    let bystander = hosts.bystander();
    let long_target = format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(HEAD_MAX));
    let long_field = format!("GET /metrics HTTP/1.1\r\nA: {}\r\n\r\n", "a".repeat(64 << 10));
    let many_fields = format!("GET /metrics HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(100));
    let endless = vec![b'A'; 1 << 20];
    for (request, status) in [
        (&b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"[..], "404 Not Found"),
        (b"GET /metrics/../../etc/shadow HTTP/1.1\r\n\r\n", "404 Not Found"),
        (b"CONNECT host-b:22 HTTP/1.1\r\n\r\n", "404 Not Found"),
        (b"POST /metrics HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello", "405 Method Not Allowed"),
        (b"DELETE /metrics HTTP/1.1\r\n\r\n", "405 Method Not Allowed"),
        (b"GET /metrics HTTP/3.0\r\n\r\n", "400 Bad Request"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "400 Bad Request"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "400 Bad Request"),
        (b"GET /metrics HTTP/1.1\r\n\0: b\r\n\r\n", "400 Bad Request"),
        (b"\xff\xfe\0\0\0\0", "400 Bad Request"),
        (long_target.as_bytes(), "431 "),
        (long_field.as_bytes(), "431 "),
        (many_fields.as_bytes(), "431 "),
        (&endless, "431 "),
    ] {
        for address in addresses {
            let answer = ask(address, request);
            assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{status}: {answer}");
            assert!(!answer.contains("criu_image_relay"), "{answer}");
        }
    }
    for address in addresses {
        // The 404 and the 405 are no faults.
        assert_eq!(refusals(connect(address), "protocol"), 9);
    }
    for daemon in [&hosts.proxy, &hosts.cache] {
        daemon.assert_log(&["WARN", "a client for figures, 127.0.0.1:", "is refused"]);
    }
    hosts.assert_undisturbed(bystander);
}

#[test]
fn a_request_may_come_in_pieces_and_what_follows_it_is_not_looked_at() {
    let (_hosts, [address, _]) = hosts();
    let mut stream = connect(address);
    for byte in SCRAPE {
        stream.write_all(&[*byte]).unwrap();
    }
    stream.write_all(SCRAPE).unwrap();
    let answer = answer(stream);
    assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{answer}");
    assert!(answer.ends_with("# EOF\n"), "{answer}");
}

#[test]
fn a_client_that_says_it_is_done_is_answered_all_the_same() {
    let (_hosts, _dir, path) = on_unix_socket();
    let mut stream = connect_to(&path);
    stream.write_all(SCRAPE).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert!(answer(stream).ends_with("# EOF\n"));
}

#[test]
fn who_leaves_in_the_middle_is_refused_and_who_says_nothing_is_not() {
    let (mut hosts, _dir, path) = on_unix_socket();
    for len in [1, 5, SCRAPE.len() - 1] {
        let mut stream = connect_to(&path);
        stream.write_all(&SCRAPE[..len]).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        assert_eq!(answer(stream), "");
    }
    for _ in 0..100 {
        drop(connect_to(&path));
    }
    assert_eq!(refusals(connect_to(&path), "protocol"), 3);
    assert_eq!(refusals(connect_to(&path), "unknown"), 0);
    hosts.proxy.assert_alive();
}

#[test]
fn those_who_say_nothing_make_room_for_others() {
    let (mut hosts, [address, _]) = hosts();
    // The link is made once.
    Criu::in_dir_of("first", &hosts.proxy).complete();
    hosts.proxy.assert_state("first", SnapshotState::Whole);
    let descriptors = hosts.proxy.descriptors();
    let mut silent: Vec<_> = (0..SILENT).map(|_| connect(address)).collect();
    // One byte does not help.
    silent[0].write_all(b"G").unwrap();
    let begun = Instant::now();
    assert_served(address);
    assert!(begun.elapsed() < PATIENCE, "it waited until others had had their time");
    let bystander = hosts.bystander();
    hosts.assert_undisturbed(bystander);
    assert!(eventually(|| refusals(connect(address), "stalled") == SILENT as u64));
    drop(silent);
    let closed = || hosts.proxy.descriptors() <= descriptors;
    assert!(eventually(closed), "their descriptors stay");
}

#[test]
fn a_client_that_reads_nothing_and_goes_on_talking_is_left() {
    let (_hosts, [address, _]) = hosts();
    let mut stream = connect(address);
    stream.write_all(SCRAPE).unwrap();
    let begun = Instant::now();
    while stream.write_all(&[b'x'; 1024]).is_ok() {
        assert!(begun.elapsed() < SOON, "it is listened to for ever");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_served(address);
}

#[test]
fn an_address_that_is_taken_is_named_with_its_key() {
    let (hosts, [address, _]) = hosts();
    let listen = format!("{:?}", address.to_string());
    let second =
        crate::daemons::Daemon::proxy_by("exec", hosts.address, &[("metrics.listen", &listen)]);
    let said = second.err().unwrap();
    assert!(said.contains(&format!("cannot listen on {address} (metrics.listen)")), "{said}");
}
