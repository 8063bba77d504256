//! What a proxy finds in a cache's place.

use std::net::{SocketAddr, TcpListener};
use std::time::Instant;

use criu_image_relay::wire::frame;
use criu_image_relay::wire::message::{Message, SnapshotAck, Welcome};

use crate::daemons::SOON;
use crate::link::Link;

/// A cache that waits for links.
pub(crate) struct CacheStandin {
    listener: TcpListener,
}

impl CacheStandin {
    pub(crate) fn listen() -> CacheStandin {
        CacheStandin::listen_at(([127, 0, 0, 1], 0).into())
    }

    /// The same at an address.
    pub(crate) fn listen_at(address: SocketAddr) -> CacheStandin {
        CacheStandin { listener: TcpListener::bind(address).unwrap() }
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> SocketAddr {
        self.listener.local_addr().unwrap()
    }

    /// The next link; nothing is said on it yet.
    pub(crate) fn accept(&self) -> Link {
        self.listener.set_nonblocking(true).unwrap();
        let deadline = Instant::now() + SOON;
        loop {
            match self.listener.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(false).unwrap();
                    return Link::new(stream);
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    assert!(Instant::now() < deadline, "the proxy does not connect");
                    std::thread::sleep(std::time::Duration::from_millis(5));
                }
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// The next link, up.
    pub(crate) fn welcome(&self) -> Link {
        self.welcome_with(&[])
    }

    /// The same of a cache that can do more than the base.
    pub(crate) fn welcome_with(&self, features: &[&str]) -> Link {
        let mut link = self.accept();
        link.receive_preface();
        let (hello, _) = link.receive().expect("a hello");
        assert!(matches!(hello, Message::Hello(_)), "{hello:?}");
        link.say(&frame::preface());
        let features = features.iter().map(|&feature| feature.to_owned()).collect();
        link.send(&Message::Welcome(Welcome { name: "standin".to_owned(), features }));
        link
    }
}

/// Receives until that much of a snapshot has come, as a cache does; gives its number.
pub(crate) fn receive_until(link: &mut Link, last: impl Fn(&Message) -> bool) -> u32 {
    let mut number = None;
    loop {
        let (message, _) = link.receive().expect("the snapshot goes on");
        if let Message::SnapshotBegin(begin) = &message {
            number = Some(begin.snapshot);
        }
        if last(&message) {
            return number.expect("a snapshot has begun");
        }
    }
}

/// Receives one snapshot and acknowledges it.
pub(crate) fn receive_whole(link: &mut Link) {
    let (mut images, mut bytes) = (0, 0);
    loop {
        let (message, _) = link.receive().expect("the snapshot goes on");
        match message {
            Message::ImageEnd(end) => {
                images += 1;
                bytes += end.size;
            }
            Message::SnapshotEnd(end) => {
                assert!(end.complete && (end.images, end.bytes) == (images, bytes), "{end:?}");
                let ack = SnapshotAck { snapshot: end.snapshot, images, bytes };
                link.send(&Message::SnapshotAck(ack));
                return;
            }
            _ => {}
        }
    }
}
