use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread::JoinHandle;

use rustix::io::Errno;
use tempfile::TempDir;

use super::*;
use crate::criu::remote::{HEADER_MAX, Reply, encode_ids};
use crate::sys::{scm, unix};

/// A daemon that a test makes up, in a directory of its own.
struct Peer {
    dir: TempDir,
    listener: UnixListener,
}

impl Peer {
    fn at(socket: &str) -> Peer {
        let dir = tempfile::tempdir().unwrap();
        let listener = unix::bind(dir.path(), socket).unwrap();
        Peer { dir, listener }
    }

    /// Serves one connection.
    fn serve<T: Send + 'static>(
        self,
        serve: impl FnOnce(Session) -> T + Send + 'static,
    ) -> (Client, JoinHandle<T>) {
        let client = Client::at(self.dir.path());
        let served = std::thread::spawn(move || {
            let Peer { dir, listener } = self;
            let served = serve(Session(listener.accept().unwrap().0));
            drop(dir);
            served
        });
        (client, served)
    }
}

struct Session(UnixStream);

impl Session {
    fn request(&mut self) -> Request {
        let mut length = [0; LENGTH_LEN];
        self.0.read_exact(&mut length).unwrap();
        let mut message = vec![0; message_len(length, HEADER_MAX).unwrap()];
        self.0.read_exact(&mut message).unwrap();
        Request::decode(&message, false).unwrap()
    }

    fn reply(&mut self, reply: &Reply) {
        self.0.write_all(&reply.encode()).unwrap();
    }

    fn pipe(&self) -> File {
        loop {
            match scm::receive_descriptor(&self.0) {
                Ok(end) => return end.unwrap().into(),
                Err(error) if error.kind() == ErrorKind::WouldBlock => std::thread::yield_now(),
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// What still comes on the socket.
    fn rest(&mut self) -> Vec<u8> {
        all(&mut self.0)
    }
}

fn all(from: &mut impl Read) -> Vec<u8> {
    let mut bytes = Vec::new();
    from.read_to_end(&mut bytes).unwrap();
    bytes
}

fn write_of(append: bool, acknowledge: bool) -> Request {
    let (snapshot, name) = ("web".to_owned(), "pages-1.img".to_owned());
    Request::Write { snapshot, name, append, acknowledge }
}

#[test]
fn an_acknowledged_image_ends_with_a_byte_after_its_pipe() {
    let (client, served) = Peer::at(PROXY_SOCKET).serve(|mut session| {
        assert_eq!(session.request(), write_of(true, true));
        session.reply(&Reply::done());
        let bytes = all(&mut session.pipe());
        let mut end = [7];
        session.0.read_exact(&mut end).unwrap();
        session.reply(&Reply::done());
        (bytes, end, session.rest())
    });
    let mut image = client.open_append("web", "pages-1.img").unwrap();
    image.write_all(b"pages").unwrap();
    image.finish().unwrap();
    assert_eq!(served.join().unwrap(), (b"pages".to_vec(), [0], Vec::new()));
}

#[test]
fn an_acknowledged_image_on_the_socket_ends_with_its_sending_direction() {
    let (client, served) = Peer::at(PROXY_SOCKET).serve(|mut session| {
        assert_eq!(session.request(), write_of(false, true));
        session.reply(&Reply::done());
        let bytes = session.rest();
        session.reply(&Reply::done());
        bytes
    });
    let mut image = client.on_socket().open_write("web", "pages-1.img").unwrap();
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"pages").unwrap();
    // A file goes from its start.
    io::Seek::rewind(&mut file).unwrap();
    assert_eq!(image.copy_from(&file, &mut |_| {}).unwrap(), 5);
    image.finish().unwrap();
    assert_eq!(served.join().unwrap(), b"pages");
}

#[test]
fn a_writer_that_is_dropped_says_no_end() {
    let (client, served) = Peer::at(PROXY_SOCKET).serve(|mut session| {
        session.request();
        session.reply(&Reply::done());
        (all(&mut session.pipe()), session.rest())
    });
    client.open_write("web", "pages-1.img").unwrap().write_all(b"pag").unwrap();
    assert_eq!(served.join().unwrap(), (b"pag".to_vec(), Vec::new()));
}

#[test]
fn a_writer_that_waits_for_nobody_ends_with_its_pipe() {
    let (client, served) = Peer::at(PROXY_SOCKET).serve(|mut session| {
        assert_eq!(session.request(), write_of(false, false));
        (all(&mut session.pipe()), session.rest())
    });
    let mut image = client.acknowledged(false).open_write("web", "pages-1.img").unwrap();
    image.write_all(b"pages").unwrap();
    image.finish().unwrap();
    assert_eq!(served.join().unwrap(), (b"pages".to_vec(), Vec::new()));
}

#[test]
fn a_writer_hears_why_the_proxy_gives_up() {
    for on_socket in [false, true] {
        let (client, served) = Peer::at(PROXY_SOCKET).serve(move |mut session| {
            session.request();
            session.reply(&Reply::done());
            let pipe = (!on_socket).then(|| session.pipe());
            session.reply(&Reply::refused(Errno::IO, "snapshot web is damaged: the link broke"));
            drop(pipe);
        });
        let client = if on_socket { client.on_socket() } else { client };
        let mut image = client.open_write("web", "pages-1.img").unwrap();
        served.join().unwrap();
        let error = image.write_all(&vec![0; 1 << 20]).unwrap_err();
        assert!(error.to_string().contains("the link broke"), "{error}");
        let Error::Damaged(why) = Error::from(error) else { panic!("not damaged") };
        assert_eq!(why, "snapshot web is damaged: the link broke");
    }
}

#[test]
fn an_image_is_read_to_its_size_and_no_less() {
    for (on_socket, size) in [(false, 5), (true, 5), (false, 6), (true, 6)] {
        let (client, _served) = Peer::at(CACHE_SOCKET).serve(move |mut session| {
            let Request::Read { pipe, .. } = session.request() else { panic!() };
            assert_eq!(pipe, Some(!on_socket));
            session.reply(&Reply::found(size));
            if on_socket {
                session.0.write_all(b"pages").unwrap();
            } else {
                session.pipe().write_all(b"pages").unwrap();
            }
        });
        let client = if on_socket { client.on_socket() } else { client };
        let mut image = client.open_read("web", "pages-1.img").unwrap();
        assert_eq!(image.size(), size);
        let mut bytes = Vec::new();
        let read = image.read_to_end(&mut bytes);
        assert_eq!(bytes, b"pages");
        match read {
            Ok(_) => assert_eq!(size, 5),
            Err(error) => {
                assert_eq!((size, error.kind()), (6, ErrorKind::UnexpectedEof));
                assert!(error.to_string().ends_with("has 6 bytes, 5 have come"), "{error}");
            }
        }
    }
}

#[test]
fn an_image_becomes_a_file_or_an_error() {
    for size in [5, 6, 4] {
        let (client, _served) = Peer::at(CACHE_SOCKET).serve(move |mut session| {
            session.request();
            session.reply(&Reply::found(size));
            session.pipe().write_all(b"pages").unwrap();
        });
        let mut file = tempfile::tempfile().unwrap();
        let read = client.open_read("web", "pages-1.img").unwrap().copy_to(&file, &mut |_| {});
        if size == 5 {
            assert_eq!(read.unwrap(), 5);
            io::Seek::rewind(&mut file).unwrap();
            assert_eq!(all(&mut file), b"pages");
        } else {
            assert!(matches!(read, Err(Error::Broken { .. })));
        }
    }
}

#[test]
fn what_is_not_there_is_not_what_cannot_be_reached() {
    let refused = |errno, reason: &'static str| {
        let (client, _served) = Peer::at(CACHE_SOCKET).serve(move |mut session| {
            session.request();
            session.reply(&Reply::refused(errno, reason));
        });
        client.open_read("web", "core-7.img").unwrap_err()
    };
    let missing = refused(Errno::NOENT, "snapshot web has no image core-7.img");
    assert!(matches!(&missing, Error::NotFound(why) if why.ends_with("core-7.img")));
    let taken = refused(Errno::STALE, "");
    assert!(matches!(&taken, Error::Refused { errno: Errno::STALE, reason } if !reason.is_empty()));
    let nowhere = Client::at("/nonexistent").open_read("web", "core-7.img").unwrap_err();
    assert!(matches!(&nowhere, Error::Unreachable { .. }));
    assert_eq!(nowhere.errno(), Some(Errno::NOENT));
    let (client, _served) = Peer::at(CACHE_SOCKET).serve(drop);
    let closed = client.finish_restore("web").unwrap_err();
    assert!(closed.to_string().contains("closed the connection"), "{closed}");
    let list = client.open_write("web", PARENT).unwrap_err();
    assert_eq!(list.errno(), Some(Errno::INVAL));
}

#[test]
fn what_is_no_errno_of_linux_is_eio() {
    let told = Reply { error: 5000, reason: "odd".to_owned(), size: None };
    assert_eq!(Error::told(told).errno(), Some(Errno::IO));
}

#[test]
fn a_list_is_appended_to_and_read() {
    let (client, served) = Peer::at(PROXY_SOCKET).serve(|mut session| {
        assert_eq!(
            session.request(),
            Request::AppendToList { list: "a".into(), acknowledge: true }
        );
        session.reply(&Reply::done());
        let entries = session.rest();
        session.reply(&Reply::done());
        entries
    });
    client.push_id("a", "web").unwrap();
    assert_eq!(served.join().unwrap(), encode_ids(&["web".to_owned()]));

    let ids = ["web".to_owned(), "/tmp/2".to_owned()];
    let bytes = encode_ids(&ids);
    for (bytes, whole) in [(bytes.clone(), true), (bytes[..bytes.len() - 1].to_vec(), false)] {
        let (client, _served) = Peer::at(CACHE_SOCKET).serve(move |mut session| {
            session.request();
            session.reply(&Reply::found(bytes.len() as u64));
            session.0.write_all(&bytes).unwrap();
        });
        match client.ids("a") {
            Ok(read) => assert_eq!((&read[..], whole), (&ids[..], true)),
            Err(error) => assert!(!whole && error.to_string().contains("within an id"), "{error}"),
        }
    }
    let (client, _served) = Peer::at(PROXY_SOCKET).serve(|mut session| {
        session.request();
        session.reply(&Reply::refused(Errno::NOENT, "the list is empty"));
    });
    assert_eq!(client.ids("").unwrap(), Vec::<String>::new());
}
