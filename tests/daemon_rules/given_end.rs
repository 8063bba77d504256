//! What becomes of a daemon whose only link is closed.

use std::io::Write;
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use criu_image_relay::wire::message::Message;
use rustix::process::Signal;

use crate::given::on;
use crate::run::{CACHE, PROXY, command, ctl, eventually, images, output, status};
use crate::speak::{Link, dump, pairs, restore};

#[test]
fn a_peer_that_leaves_without_a_word() {
    for binary in [PROXY, CACHE] {
        for (ours, theirs) in pairs() {
            let dir = tempfile::tempdir().unwrap();
            let daemon = on(&theirs, binary, dir.path());
            drop((ours, theirs));
            assert_eq!(daemon.status().code(), Some(0), "{binary}");
        }
    }
}

#[test]
fn an_idle_link_that_is_closed() {
    for stopped_first in [PROXY, CACHE] {
        for (ours, theirs) in pairs() {
            let (source, destination) =
                (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
            let proxy = on(&ours, PROXY, source.path());
            let cache = on(&theirs, CACHE, destination.path());
            drop((ours, theirs));
            // What is not read yet when a link is closed resets it.
            for dir in [&source, &destination] {
                assert!(eventually(|| status(dir.path()).contains(" up: ")));
            }
            let (first, then) =
                if stopped_first == PROXY { (proxy, cache) } else { (cache, proxy) };
            first.signal(Signal::TERM);
            assert_eq!(first.status().code(), Some(0));
            assert_eq!(then.status().code(), Some(0));
        }
    }
}

#[test]
fn a_snapshot_that_is_cut_at_the_cache() {
    for (ours, theirs) in pairs() {
        let dir = tempfile::tempdir().unwrap();
        let cache = on(&theirs, CACHE, dir.path());
        drop(theirs);
        let mut link = Link::new(ours);
        link.hello();
        link.begin("web");
        assert!(eventually(|| ctl(dir.path(), &["show", "web"]).0 == 0));
        drop(link);
        assert_eq!(cache.status().code(), Some(1));
    }
}

#[test]
fn a_dump_that_is_cut_at_the_proxy() {
    for (ours, theirs) in pairs() {
        let dir = tempfile::tempdir().unwrap();
        let proxy = on(&theirs, PROXY, dir.path());
        drop(theirs);
        let mut link = Link::new(ours);
        link.welcome();
        let (_criu, mut image) = dump(dir.path(), "pages-1.img");
        image.write_all(b"pages").unwrap();
        while !matches!(link.receive(), Message::ImageData(_)) {}
        drop(link);
        // The source hears of it: nobody reads the image any more.
        assert!(eventually(|| image.write_all(b"more").is_err()));
        assert_eq!(proxy.status().code(), Some(1));
    }
}

#[test]
fn a_dump_that_waits_for_a_welcome_which_never_comes() {
    for (ours, theirs) in pairs() {
        let dir = tempfile::tempdir().unwrap();
        let proxy = on(&theirs, PROXY, dir.path());
        drop(theirs);
        let (_criu, mut image) = dump(dir.path(), "pages-1.img");
        assert!(eventually(|| status(dir.path()).contains("1 receiving")));
        drop(ours);
        assert!(eventually(|| image.write_all(b"more").is_err()));
        assert_eq!(proxy.status().code(), Some(1));
    }
}

#[test]
fn strangers_on_the_link() {
    for (ours, theirs) in pairs() {
        let dir = tempfile::tempdir().unwrap();
        let cache = on(&theirs, CACHE, dir.path());
        drop(theirs);
        let mut link = Link::new(ours);
        link.say(b"GET / HTTP/1.1\r\n\r\n");
        // Nothing was lost, but nothing can come either: whoever joined the two is to know.
        assert_eq!(cache.status().code(), Some(1));
    }
}

#[test]
fn what_is_whole_is_served_though_another_was_cut() {
    for (ours, theirs) in pairs() {
        let (source, destination) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (source, destination) = (source.path(), destination.path());
        let proxy = on(&ours, PROXY, source);
        let mut cache = on(&theirs, CACHE, destination);
        drop((ours, theirs));
        let images = images(source, b"pages");
        assert_eq!(ctl(source, &["push", images.to_str().unwrap()]).0, 0);
        let (_criu, mut image) = dump(source, "pages-1.img");
        image.write_all(b"more").unwrap();
        assert!(eventually(|| status(destination).contains("1 receiving, 1 whole")));

        proxy.signal(Signal::KILL);
        assert!(eventually(|| status(destination).contains("1 whole, 0 taken, 1 damaged")));
        assert!(cache.is_alive());
        assert_eq!(restore(destination, "pages-1.img"), b"pages");
        assert_eq!(cache.status().code(), Some(1));
    }
}

/// A connection by an address of this machine that is not a loopback one: it needs a network.
fn by_own_address() -> (OwnedFd, OwnedFd) {
    let probe = UdpSocket::bind("0.0.0.0:0").unwrap();
    probe.connect("192.0.2.1:9").expect("a route to other machines");
    let own = probe.local_addr().unwrap().ip();
    assert!(!own.is_loopback(), "no address but {own}");
    let listener = TcpListener::bind((own, 0)).unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (client.into(), listener.accept().unwrap().0.into())
}

#[test]
fn plaintext_to_another_address_is_refused_on_a_given_socket_and_a_peer_of_this_machine_known_by_its_uid()
 {
    let (ours, _theirs) = by_own_address();
    let dir = tempfile::tempdir().unwrap();
    let number = ours.as_raw_fd().to_string();
    let mut proxy = command(PROXY, dir.path());
    let (code, said) = output(proxy.args(["--ps-socket", &number]), &[ours.as_fd()]);
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("the link is plaintext"), "{said}");

    let (ours, theirs) = by_own_address();
    let dir = tempfile::tempdir().unwrap();
    let cache = on(&theirs, CACHE, dir.path());
    drop(theirs);
    let mut link = Link::new(ours);
    assert!(matches!(link.introduce(), Message::Welcome(_)), "it is the cache's own user");
    drop((link, cache));
}
