//! What speaks to a cache in a proxy's place.

use std::net::{Ipv4Addr, SocketAddr, TcpStream};

use criu_image_relay::criu::images::INVENTORY;
use criu_image_relay::criu::pages::Space;
use criu_image_relay::wire::frame;
use criu_image_relay::wire::message::{
    Hello, ImageBegin, ImageData, ImageEnd, Message, PageData, Pages, SnapshotBegin, SnapshotEnd,
};
use criu_image_relay::wire::spaces::space;
use rustix::net::{AddressFamily, SocketType, bind, connect, socket};

use crate::criu::RECORDS;
use crate::daemons::eventually;
use crate::link::Link;

/// A proxy, linked to a cache.
pub(crate) struct ProxyStandin {
    /// Its link.
    pub(crate) link: Link,
}

impl ProxyStandin {
    /// Connects and shakes hands.
    pub(crate) fn connect(cache: SocketAddr) -> ProxyStandin {
        ProxyStandin::on(TcpStream::connect(cache).unwrap())
    }

    /// The same from another address of this machine: to the cache it is another host.
    pub(crate) fn connect_from(host: Ipv4Addr, cache: SocketAddr) -> ProxyStandin {
        let socket = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
        bind(&socket, &SocketAddr::from((host, 0))).unwrap();
        connect(&socket, &cache).unwrap();
        ProxyStandin::on(socket.into())
    }

    /// Connects again and again, until the cache has a descriptor for what admits a link, too.
    pub(crate) fn connect_when_there_is_room(cache: SocketAddr) -> ProxyStandin {
        let mut welcome = None;
        assert!(eventually(|| {
            welcome = ProxyStandin::try_on(TcpStream::connect(cache).unwrap());
            welcome.is_some()
        }));
        welcome.unwrap()
    }

    fn on(stream: TcpStream) -> ProxyStandin {
        ProxyStandin::try_on(stream).expect("a welcome")
    }

    /// Shakes hands, if the cache does not close the link instead.
    fn try_on(stream: TcpStream) -> Option<ProxyStandin> {
        let mut link = Link::new(stream);
        let hello = Message::Hello(Hello { name: "standin".to_owned(), features: Vec::new() });
        let is_said = link.try_say(&frame::preface()) && link.try_send(&hello);
        if !is_said || !link.is_answered() {
            return None;
        }
        let (answer, _) = link.receive()?;
        assert!(matches!(answer, Message::Welcome(_)), "{answer:?}");
        Some(ProxyStandin { link })
    }

    pub(crate) fn begin(&mut self, snapshot: u32, id: &str) {
        self.link.send(&Message::SnapshotBegin(SnapshotBegin {
            snapshot,
            id: id.to_owned(),
            ..SnapshotBegin::default()
        }));
    }

    pub(crate) fn begin_image(&mut self, snapshot: u32, image: u32, name: &str) {
        let name = name.to_owned();
        self.link.send(&Message::ImageBegin(ImageBegin { snapshot, image, name, append: false }));
    }

    pub(crate) fn data(&mut self, snapshot: u32, image: u32, offset: u64, payload: &[u8]) {
        let data = Message::ImageData(ImageData { snapshot, image, offset });
        self.link.send_payload(&data, payload);
    }

    pub(crate) fn end_image(&mut self, snapshot: u32, image: u32, size: usize) {
        self.link.send(&Message::ImageEnd(ImageEnd { snapshot, image, size: size as u64 }));
    }

    pub(crate) fn end(&mut self, snapshot: u32, images: u64, bytes: usize) {
        let end = SnapshotEnd {
            snapshot,
            complete: true,
            images,
            bytes: bytes as u64,
            ..SnapshotEnd::default()
        };
        self.link.send(&Message::SnapshotEnd(end));
    }

    /// A round of pages that goes on from those before it.
    pub(crate) fn begin_round(&mut self, snapshot: u32, id: &str) {
        let (id, parent) = (id.to_owned(), id.to_owned());
        let begin = SnapshotBegin { snapshot, id, named: true, round: true, parent, attempt: 0 };
        self.link.send(&Message::SnapshotBegin(begin));
    }

    pub(crate) fn space(&mut self, snapshot: u32, of: Space) {
        self.link.send(&Message::Space(space(snapshot, of)));
    }

    pub(crate) fn pages(&mut self, snapshot: u32, address: u64, pages: u64, flags: u32) {
        self.link.send(&Message::Pages(Pages { snapshot, address, pages, flags }));
    }

    pub(crate) fn page_data(&mut self, snapshot: u32, bytes: &[u8]) {
        self.link.send_payload(&Message::PageData(PageData { snapshot }), bytes);
    }

    /// A whole image.
    pub(crate) fn image(&mut self, snapshot: u32, image: u32, name: &str, bytes: &[u8]) {
        self.begin_image(snapshot, image, name);
        self.data(snapshot, image, 0, bytes);
        self.end_image(snapshot, image, bytes.len());
    }

    /// A whole snapshot of one image and the inventory, up to the acknowledgement.
    pub(crate) fn whole(&mut self, snapshot: u32, id: &str, name: &str, bytes: &[u8]) {
        self.begin(snapshot, id);
        self.image(snapshot, 0, name, bytes);
        self.complete(snapshot, 1, 1, bytes.len());
    }

    /// Completes a snapshot of which `images` with `bytes` were sent: the inventory as image number
    /// `inventory`, the end, the acknowledgement.
    #[track_caller]
    pub(crate) fn complete(&mut self, snapshot: u32, inventory: u32, images: u64, bytes: usize) {
        self.image(snapshot, inventory, INVENTORY, RECORDS);
        self.end(snapshot, images + 1, bytes + RECORDS.len());
        self.assert_acknowledged(snapshot);
    }

    /// The cache has acknowledged that snapshot, or does so now.
    #[track_caller]
    pub(crate) fn assert_acknowledged(&mut self, snapshot: u32) {
        match self.link.receive() {
            Some((Message::SnapshotAck(ack), _)) if ack.snapshot == snapshot => {}
            other => panic!("{other:?} instead of an acknowledgement"),
        }
    }

    /// The cache gives that snapshot up, and says why.
    #[track_caller]
    pub(crate) fn assert_aborted(&mut self, snapshot: u32, reason: &str) {
        match self.link.receive() {
            Some((Message::SnapshotAbort(abort), _)) if abort.snapshot == snapshot => {
                assert!(abort.reason.contains(reason), "{}", abort.reason);
            }
            other => panic!("{other:?} instead of an abort"),
        }
    }
}
