use std::cell::{Cell, RefCell};
use std::io::{IoSlice, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream as StdStream;
use std::path::PathBuf;
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::LocalSet;
use tokio::time::{sleep, timeout};

use super::model::{LinkStatus, Role, SnapshotState};
use super::*;
use crate::timeline::{Phase, PhaseName};

/// A daemon with whatever snapshots a test gives it.
#[derive(Default)]
struct Fake {
    snapshots: RefCell<Vec<Snapshot>>,
    opened: RefCell<Vec<Open>>,
    paged: RefCell<Vec<OpenPages>>,
    looks: Cell<usize>,
}

impl Fake {
    fn set(&self, id: &str, state: SnapshotState, bytes: u64) {
        let mut snapshots = self.snapshots.borrow_mut();
        snapshots.retain(|snapshot| snapshot.id != id);
        snapshots.push(Snapshot {
            id: id.to_owned(),
            state,
            reason: String::new(),
            peer: "a".to_owned(),
            images: 1,
            bytes,
            begun_ms: 1,
            ended_ms: 0,
            needs_view: String::new(),
            memory_may_have_changed: None,
        });
    }
}

impl Backend for Fake {
    fn status(&self) -> Status {
        Status {
            role: Role::Cache,
            version: "1".to_owned(),
            started_ms: 1,
            sessions: 0,
            receiving: 0,
            whole: 0,
            taken: 0,
            damaged: 0,
            held_bytes: 1,
            max_bytes: 2,
            total_bytes: 3,
            rate: 4,
            links: vec![LinkStatus { peer: "b".to_owned(), up: false, why: "idle".to_owned() }],
        }
    }

    fn list(&self) -> Vec<Snapshot> {
        self.snapshots.borrow().clone()
    }

    fn show(&self, id: &str) -> Option<(Snapshot, Vec<Image>)> {
        self.looks.set(self.looks.get() + 1);
        let snapshot = self.list().into_iter().find(|snapshot| snapshot.id == id)?;
        Some((snapshot, vec![Image { name: "core-7.img".to_owned(), bytes: 5, whole: true }]))
    }

    fn timeline(&self, id: &str) -> Option<Vec<Phase>> {
        self.list().iter().any(|snapshot| snapshot.id == id).then(|| {
            let (name, failed) = (PhaseName::Dump, false);
            vec![Phase { name, begun_ms: 3, ended_ms: 5, bytes: 7, failed }]
        })
    }

    async fn drop_snapshot(&self, id: &str, _peer: Peer) -> Result<(), Refusal> {
        if id == "busy" {
            return Err(Refusal::Refused("a restore reads it".to_owned()));
        }
        let before = self.snapshots.borrow().len();
        self.snapshots.borrow_mut().retain(|snapshot| snapshot.id != id);
        if self.snapshots.borrow().len() < before { Ok(()) } else { Err(Refusal::NoSuchSnapshot) }
    }

    fn open(&self, request: Open, _socket: OwnedFd) -> Result<(), Refusal> {
        self.opened.borrow_mut().push(request);
        Ok(())
    }

    fn open_pages(&self, request: OpenPages, _socket: OwnedFd) -> Result<(), Refusal> {
        self.paged.borrow_mut().push(request);
        Ok(())
    }

    fn view(&self, id: &str) -> Result<Vec<ImageFile>, Refusal> {
        let (_, images) = self.show(id).ok_or(Refusal::NoSuchSnapshot)?;
        let file = |image: Image| ImageFile {
            path: format!("/proc/1/fd/{}", image.bytes),
            name: image.name,
            bytes: image.bytes,
        };
        Ok(images.into_iter().map(file).collect())
    }
}

/// Runs a test against a served socket.
fn with_daemon<F: Future<Output = ()>>(
    allowed: fn(u32) -> bool,
    test: impl FnOnce(PathBuf, Rc<Fake>) -> F,
) {
    let admit = move |socket: &UnixStream| {
        let uid = socket.peer_cred().unwrap().uid();
        allowed(uid).then_some(Peer { uid, pid: 0 })
    };
    with_daemon_that(admit, test);
}

/// The same where the socket is not asked who comes: the test says whose uid that is.
fn with_comers<F: Future<Output = ()>>(test: impl FnOnce(PathBuf, Rc<Fake>, Rc<Cell<u32>>) -> F) {
    let uid = Rc::new(Cell::new(0));
    let comes = uid.clone();
    let admit = move |_: &UnixStream| Some(Peer { uid: comes.get(), pid: 0 });
    with_daemon_that(admit, |path, fake| test(path, fake, uid));
}

fn with_daemon_that<F: Future<Output = ()>>(
    admit: impl Fn(&UnixStream) -> Option<Peer> + 'static,
    test: impl FnOnce(PathBuf, Rc<Fake>) -> F,
) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("control.sock");
    LocalSet::new().block_on(&runtime, async {
        let listener = UnixListener::bind(&path).unwrap();
        let fake = Rc::new(Fake::default());
        let daemon = tokio::task::spawn_local(serve(listener, admit, Rc::clone(&fake)));
        timeout(Duration::from_secs(30), test(path.clone(), fake)).await.unwrap();
        assert!(!daemon.is_finished());
    });
}

fn anybody(_: u32) -> bool {
    true
}

/// Sends one call as text and gives the reply as text.
async fn raw(path: &PathBuf, call: &[u8]) -> String {
    let mut stream = UnixStream::connect(path).await.unwrap();
    // The daemon may close the connection while this is still being written.
    let _ = stream.write_all(call).await;
    let mut reply = Vec::new();
    while !reply.ends_with(b"\0") {
        match stream.read_buf(&mut reply).await {
            Ok(0) | Err(_) => break,
            Ok(_) => {}
        }
    }
    String::from_utf8(reply).unwrap().trim_end_matches('\0').to_owned()
}

#[test]
fn calls_are_answered() {
    with_daemon(anybody, |path, fake| async move {
        fake.set("web", SnapshotState::Whole, 5);
        let mut client = Client::connect(&path).await.unwrap();
        assert_eq!(client.status().await.unwrap(), fake.status());
        assert_eq!(client.list().await.unwrap(), fake.list());
        assert_eq!(client.show("web").await.unwrap(), fake.show("web").unwrap());
        let missing = client.show("db").await.unwrap_err();
        assert_eq!(missing.to_string(), "no snapshot is called \"db\"");
        let busy = client.drop_snapshot("busy").await.unwrap_err();
        assert_eq!(busy.to_string(), "a restore reads it");
        client.drop_snapshot("web").await.unwrap();
        assert_eq!(client.list().await.unwrap(), []);
    });
}

#[test]
fn a_socket_is_handed_over() {
    with_daemon(anybody, |path, fake| async move {
        let mut client = Client::connect(&path).await.unwrap();
        let (ours, _theirs) = StdStream::pair().unwrap();
        client.open("web", Some("b:1"), Reading::Look, ours.into()).await.unwrap();
        let dir = tempfile::tempdir().unwrap();
        let listener =
            std::os::unix::net::UnixListener::bind(dir.path().join("streamer-serve.sock")).unwrap();
        client.open("db", None, Reading::Take, listener.into()).await.unwrap();
        let (ours, _theirs) = StdStream::pair().unwrap();
        client.hold("kv", true, true, true, ours.into()).await.unwrap();
        let open = |id: &str, to: Option<&str>, reading, listening| Open {
            id: id.to_owned(),
            parent: None,
            attempt: 0,
            to: to.map(str::to_owned),
            reading,
            copy: false,
            view: false,
            listening,
        };
        let expected = [
            open("web", Some("b:1"), Reading::Look, false),
            open("db", None, Reading::Take, true),
            Open { copy: true, view: true, ..open("kv", None, Reading::TakeAgain, false) },
        ];
        assert_eq!(*fake.opened.borrow(), expected);
    });
}

#[test]
fn what_is_no_socket_or_no_name_is_refused() {
    with_daemon(anybody, |path, fake| async move {
        let mut client = Client::connect(&path).await.unwrap();
        let (pipe, _end) = rustix::pipe::pipe().unwrap();
        let refused = client.open("web", None, Reading::Take, pipe).await.unwrap_err();
        assert_eq!(refused.to_string(), "what was passed is not a stream socket of the right kind");
        let datagram = std::os::unix::net::UnixDatagram::unbound().unwrap();
        client.open("web", None, Reading::Take, datagram.into()).await.unwrap_err();
        let (ours, _theirs) = StdStream::pair().unwrap();
        let refused = client.open("web\n", None, Reading::Take, ours.into()).await.unwrap_err();
        assert!(refused.to_string().contains("control character"), "{refused}");
        let call = br#"{"method":"org.criu.ImageRelay.Open","parameters":{"id":"web"}}"#;
        let reply = raw(&path, &[call, &b"\0"[..]].concat()).await;
        assert!(reply.contains("org.criu.ImageRelay.NoDescriptor"), "{reply}");
        assert_eq!(*fake.opened.borrow(), []);
    });
}

#[test]
fn a_watch_waits_follows_and_ends() {
    with_daemon(anybody, |path, fake| async move {
        let mut client = Client::connect(&path).await.unwrap();
        let mut watch = client.watch("web", false).await.unwrap();
        assert!(timeout(Duration::from_millis(120), watch.next()).await.is_err());
        for (state, bytes) in [
            (SnapshotState::Receiving, 1),
            (SnapshotState::Receiving, 2),
            (SnapshotState::Whole, 2),
        ] {
            fake.set("web", state, bytes);
            let seen = watch.next().await.unwrap().unwrap();
            assert_eq!((seen.state, seen.bytes), (state, bytes));
        }
        assert_eq!(watch.next().await.unwrap(), None);

        let mut watch = client.watch("web", true).await.unwrap();
        assert_eq!(watch.next().await.unwrap().unwrap().state, SnapshotState::Whole);
        fake.snapshots.borrow_mut().clear();
        assert!(matches!(watch.next().await, Err(ClientError::NoSuchSnapshot(_))));
        assert_eq!(client.list().await.unwrap(), []);
    });
}

#[test]
fn a_watcher_that_vanishes_is_forgotten() {
    with_daemon(anybody, |path, fake| async move {
        let mut client = Client::connect(&path).await.unwrap();
        client.watch("web", false).await.unwrap();
        while fake.looks.get() == 0 {
            sleep(Duration::from_millis(10)).await;
        }
        drop(client);
        sleep(Duration::from_millis(200)).await;
        let looks = fake.looks.get();
        sleep(Duration::from_millis(200)).await;
        assert_eq!(fake.looks.get(), looks);
    });
}

#[test]
fn wrong_calls_get_errors_by_varlinks_names() {
    with_daemon(anybody, |path, _| async move {
        for (call, error) in [
            (r#"{"method":"org.criu.ImageRelay.Fly"}"#, "org.varlink.service.MethodNotFound"),
            (r#"{"method":"org.criu.ImageRelay.Show"}"#, "org.varlink.service.InvalidParameter"),
            (
                r#"{"method":"org.criu.ImageRelay.Show","parameters":{"id":7}}"#,
                "org.varlink.service.InvalidParameter",
            ),
            (
                r#"{"method":"org.criu.ImageRelay.Watch","parameters":{"id":"web"}}"#,
                "org.varlink.service.ExpectedMore",
            ),
            (
                r#"{"method":"org.varlink.service.GetInterfaceDescription","parameters":{"interface":"a.b"}}"#,
                "org.varlink.service.InterfaceNotFound",
            ),
            (r#"{"method":"org.varlink.service.GetInfo"}"#, "criu-image-cache"),
            (r#"{"method":"org.criu.ImageRelay.List","parameters":{}}"#, "snapshots"),
        ] {
            let reply = raw(&path, format!("{call}\0").as_bytes()).await;
            assert!(reply.contains(error), "{call}: {reply}");
        }
    });
}

#[test]
fn a_peer_that_breaks_the_protocol_loses_its_connection_only() {
    with_daemon(anybody, |path, _| async move {
        let mut client = Client::connect(&path).await.unwrap();
        let long = format!("{{\"method\":\"{}\"}}\0", "x".repeat(70_000));
        for garbage in [
            &b"GET / HTTP/1.1\r\n\r\n\0"[..],
            b"\0",
            b"\0\0\0\0",
            b"{}\0",
            b"  \0",
            b"[1]\0",
            b"\"",
            b"{\"method\":\"\xff\xfe\"}\0",
            b"{\"method\":\"x\"}trailing\0",
            long.as_bytes(),
        ] {
            let mut peer = UnixStream::connect(&path).await.unwrap();
            let _ = peer.write_all(garbage).await;
            peer.shutdown().await.unwrap();
            let mut reply = Vec::new();
            let _ = peer.read_to_end(&mut reply).await;
            client.status().await.unwrap();
        }
    });
}

#[test]
fn a_peer_that_neither_reads_nor_finishes_stops_nobody() {
    with_daemon(anybody, |path, fake| async move {
        for n in 0..400 {
            fake.set(&format!("snapshot-{n}"), SnapshotState::Whole, 1);
        }
        let mut deaf = UnixStream::connect(&path).await.unwrap();
        for _ in 0..20 {
            deaf.write_all(b"{\"method\":\"org.criu.ImageRelay.List\"}\0").await.unwrap();
        }
        let mut half = UnixStream::connect(&path).await.unwrap();
        half.write_all(b"{\"method\":").await.unwrap();
        sleep(Duration::from_millis(50)).await;
        let mut client = Client::connect(&path).await.unwrap();
        assert_eq!(client.list().await.unwrap().len(), 400);
    });
}

#[test]
fn descriptors_cannot_be_piled_up() {
    with_daemon(anybody, |path, _| async move {
        let stream = StdStream::connect(&path).unwrap();
        stream.set_nonblocking(true).unwrap();
        let (end, _other) = rustix::pipe::pipe().unwrap();
        let mut sent = Ok(1);
        for _ in 0..50 {
            sent = send_with(&stream, b" ", &[end.as_fd()]);
            sleep(Duration::from_millis(2)).await;
        }
        assert!(sent.is_err(), "still connected");
        let stream = StdStream::connect(&path).unwrap();
        send_with(&stream, b"{}\0", &[end.as_fd(), end.as_fd()]).unwrap();
        sleep(Duration::from_millis(50)).await;
        assert!((&stream).write(b" ").is_err(), "still connected");
        Client::connect(&path).await.unwrap().status().await.unwrap();
    });
}

fn send_with(to: &StdStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> rustix::io::Result<usize> {
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(fds));
    sendmsg(to, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)
}

#[test]
fn a_uid_that_is_not_allowed_is_not_served() {
    with_daemon(
        |_| false,
        |path, _| async move {
            let mut client = Client::connect(&path).await.unwrap();
            assert!(matches!(client.status().await, Err(ClientError::Broken { .. })));
        },
    );
}

#[test]
fn pages_come_over_tcp_as_well() {
    with_daemon(anybody, async |path, fake| {
        let mut client = Client::connect(&path).await.unwrap();
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        client.open_pages("web", Some("web/1"), Some("b"), tcp.into()).await.unwrap();
        let (unix, _theirs) = StdStream::pair().unwrap();
        client.open_pages("db", None, None, unix.into()).await.unwrap();
        let paged = fake.paged.take();
        let [web, db] = &paged[..] else { panic!() };
        assert_eq!((web.parent.as_deref(), web.to.as_deref()), (Some("web/1"), Some("b")));
        assert_eq!((web.listening, db.listening), (true, false));
        let udp = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let refused = client.open_pages("web", None, None, udp.into()).await.unwrap_err();
        assert_eq!(refused.to_string(), "what was passed is not a stream socket of the right kind");
        let (unix, _theirs) = StdStream::pair().unwrap();
        let refused = client.open_pages("web", Some("a\nb"), None, unix.into()).await;
        assert!(matches!(refused, Err(ClientError::Refused(_))));
    });
}

#[test]
fn the_calls_of_one_user_keep_no_other_from_the_socket() {
    with_comers(async |path, fake, uid| {
        fake.set("web", SnapshotState::Receiving, 5);
        let (user, own) = (4711, rustix::process::geteuid().as_raw());
        let call = |method: &str, more: bool| {
            let parameters = r#"{"id":"web"}"#;
            format!(
                "{{\"method\":\"{INTERFACE}.{method}\",\"parameters\":{parameters},\"more\":{more}}}\0"
            )
        };
        let watch = async || {
            let mut stream = UnixStream::connect(&path).await.unwrap();
            stream.write_all(call("Watch", true).as_bytes()).await.unwrap();
            let mut reply = Vec::new();
            while !reply.ends_with(b"\0") && stream.read_buf(&mut reply).await.unwrap() > 0 {}
            (stream, String::from_utf8(reply).unwrap())
        };
        for calls in [user, own] {
            uid.set(calls);
            let mut watching = Vec::new();
            for _ in 0..300 {
                let (stream, reply) = watch().await;
                if reply.contains("receiving") {
                    watching.push(stream);
                } else {
                    assert!(reply.contains("uid 4711 has 128 calls under way already"), "{reply}");
                }
            }
            assert_eq!(watching.len(), if calls == own { 300 } else { 128 });
            for other in [0, own, 4712] {
                uid.set(other);
                let mut client = Client::connect(&path).await.unwrap();
                client.status().await.unwrap();
            }
        }
    });
}

#[test]
fn idle_connections_of_one_user_turn_out_their_own() {
    with_comers(async |path, _, uid| {
        let mut root = Client::connect(&path).await.unwrap();
        root.status().await.unwrap();
        uid.set(4711);
        let mut idle = Vec::new();
        for _ in 0..300 {
            idle.push(UnixStream::connect(&path).await.unwrap());
        }
        assert_eq!(idle[0].read(&mut [0]).await.unwrap(), 0);
        assert_eq!(idle[171].read(&mut [0]).await.unwrap(), 0);
        root.status().await.unwrap();
        let stays = timeout(Duration::from_millis(1), idle[172].read(&mut [0])).await;
        assert!(stays.is_err(), "{stays:?}");
    });
}
