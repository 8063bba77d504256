//! The library's codecs on plain sockets: what a test says in place of a proxy, a cache or CRIU.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use criu_image_relay::criu::stream::{
    CAPTURE_SOCKET, HEADER_LEN, SERVE_SOCKET, decode_reply, encode_request,
};
use criu_image_relay::sys::scm::send_descriptor;
use criu_image_relay::wire::frame::{self, HEADER_LEN as FRAME_LEN, Header, PREFACE_LEN};
use criu_image_relay::wire::message::{
    Hello, ImageBegin, ImageData, Message, SnapshotBegin, Welcome,
};

use crate::run::{SOON, pipe};

/// Two ends of a connection, of each kind that a link may run on.
pub(crate) fn pairs() -> [(OwnedFd, OwnedFd); 2] {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (accepted, _) = listener.accept().unwrap();
    let (one, other) = UnixStream::pair().unwrap();
    [(client.into(), accepted.into()), (one.into(), other.into())]
}

/// One end of a link. A file reads and writes a socket of any kind.
pub(crate) struct Link(File);

impl Link {
    pub(crate) fn new(socket: OwnedFd) -> Link {
        let timeout = Some(SOON);
        let kind = rustix::net::sockopt::Timeout::Recv;
        rustix::net::sockopt::set_socket_timeout(&socket, kind, timeout).unwrap();
        Link(socket.into())
    }

    pub(crate) fn say(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).unwrap();
    }

    pub(crate) fn receive(&mut self) -> Message {
        let mut header = [0; FRAME_LEN];
        self.0.read_exact(&mut header).unwrap();
        let header = Header::decode(header).unwrap();
        let mut bytes = vec![0; header.message_len + header.payload_len];
        self.0.read_exact(&mut bytes).unwrap();
        Message::decode(header, &bytes[..header.message_len]).unwrap()
    }

    fn receive_preface(&mut self) {
        let mut preface = [0; PREFACE_LEN];
        self.0.read_exact(&mut preface).unwrap();
        assert_eq!(preface, frame::preface());
    }

    /// Introduces itself as a proxy, and is welcome.
    pub(crate) fn hello(&mut self) {
        assert!(matches!(self.introduce(), Message::Welcome(_)));
    }

    /// Introduces itself as a proxy. Returns the answer.
    pub(crate) fn introduce(&mut self) -> Message {
        self.say(&frame::preface());
        self.say(&Message::Hello(Hello { name: "test".into(), features: Vec::new() }).encode(0));
        self.receive_preface();
        self.receive()
    }

    /// Answers as a cache.
    pub(crate) fn welcome(&mut self) {
        self.receive_preface();
        assert!(matches!(self.receive(), Message::Hello(_)));
        self.say(&frame::preface());
        let welcome = Welcome { name: "test".into(), features: Vec::new() };
        self.say(&Message::Welcome(welcome).encode(0));
    }

    /// Begins a snapshot, and in it an image of which not all comes.
    pub(crate) fn begin(&mut self, id: &str) {
        let begin = SnapshotBegin { snapshot: 7, id: id.to_owned(), ..SnapshotBegin::default() };
        self.say(&Message::SnapshotBegin(begin).encode(0));
        let name = "pages-1.img".to_owned();
        let image = ImageBegin { snapshot: 7, image: 1, name, append: false };
        self.say(&Message::ImageBegin(image).encode(0));
        let data = Message::ImageData(ImageData { snapshot: 7, image: 1, offset: 0 });
        self.say(&[&data.encode(5), &b"pages"[..]].concat());
    }
}

/// A restore on the shared socket of the cache in `dir`, of one image.
pub(crate) fn restore(dir: &Path, name: &str) -> Vec<u8> {
    let mut criu = UnixStream::connect(dir.join(SERVE_SOCKET)).unwrap();
    criu.write_all(&encode_request(name)).unwrap();
    let mut header = [0; HEADER_LEN];
    criu.read_exact(&mut header).unwrap();
    let mut reply = vec![0; u32::from_le_bytes(header) as usize];
    criu.read_exact(&mut reply).unwrap();
    assert!(decode_reply(&reply).unwrap());
    let (ours, theirs) = pipe();
    send_descriptor(&criu, theirs.as_fd()).unwrap();
    drop(theirs);
    let mut bytes = Vec::new();
    File::from(ours).read_to_end(&mut bytes).unwrap();
    bytes
}

/// A dump on the shared socket of the proxy in `dir`, with one image open.
pub(crate) fn dump(dir: &Path, name: &str) -> (UnixStream, File) {
    let mut criu = UnixStream::connect(dir.join(CAPTURE_SOCKET)).unwrap();
    criu.write_all(&encode_request(name)).unwrap();
    let (theirs, ours) = pipe();
    send_descriptor(&criu, theirs.as_fd()).unwrap();
    (criu, ours.into())
}
