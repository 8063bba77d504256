//! What CRIU says to a page server, read by the codec that has to read it: a stand-in in this test keeps
//! the pages, and a restore shows that they are all there.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Stdio;
use std::thread;

use criu_image_relay::criu::page_server::answer;
use criu_image_relay::criu::page_server::header::{Dialect, Reader};
use criu_image_relay::criu::page_server::session::{Action, Session};
use criu_image_relay::criu::pagemap::Pagemap;
use criu_image_relay::criu::pages::{Contents, Space, pages_image};

use crate::bed::{Bed, Host, finish};

/// What the stand-in has kept of one space.
struct Kept {
    space: Space,
    pagemap: Pagemap,
    pages: Vec<u8>,
}

/// Serves a connection until the client closes it. Returns the rounds, and the dialect that was spoken.
fn serve(mut socket: TcpStream) -> (Vec<Vec<Kept>>, Option<Dialect>) {
    let (mut reader, mut session) = (Reader::new(), Session::new(64));
    let (mut rounds, mut round) = (Vec::new(), Vec::<Kept>::new());
    loop {
        let len = match socket.read(reader.room()) {
            Ok(0) => break,
            Ok(len) => len,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => panic!("{error}"),
        };
        let Some(command) = reader.filled(len).unwrap() else { continue };
        match session.receive(command, |_| false).unwrap() {
            Action::Open { space, answer } => {
                let pages_id = u32::try_from(round.len()).unwrap() + 1;
                round.push(Kept { space, pagemap: Pagemap::new(pages_id), pages: Vec::new() });
                socket.write_all(answer.as_ref().map_or(&[], |answer| answer)).unwrap();
            }
            Action::Answer(answer) => socket.write_all(&answer).unwrap(),
            Action::Pages { run, payload_len, .. } => {
                let kept = round.last_mut().unwrap();
                kept.pagemap.push(run);
                let came = (&socket).take(payload_len).read_to_end(&mut kept.pages).unwrap();
                assert_eq!(came as u64, payload_len);
            }
            Action::RoundEnds { .. } => {
                rounds.push(std::mem::take(&mut round));
                socket.write_all(&answer::status(true)).unwrap();
            }
        }
    }
    assert!(!reader.is_within_header());
    session.disconnected().unwrap();
    (rounds, reader.dialect())
}

/// Writes the images that CRIU's own page server would have written.
fn write(round: &[Kept], dir: &Path) {
    for Kept { space, pagemap, pages } in round {
        assert_eq!(pagemap.layout().unwrap().pages_len, pages.len() as u64);
        fs::write(dir.join(space.pagemap()), pagemap.encode()).unwrap();
        fs::write(dir.join(pages_image(pagemap.pages_id)), pages).unwrap();
    }
}

#[test]
fn pages_that_a_dump_sent_are_restored() {
    let bed = Bed::up();
    let pid = bed.workload(Host::A, "web", 32);
    let before = bed.ask(Host::A, "web", &pid);
    bed.ok(Host::A, &["mkdir", "/tmp/web"]);

    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let criu = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (socket, _) = listener.accept().unwrap();
    let server = thread::spawn(|| serve(socket));
    // The hosts do not reach the machine, but a descriptor goes in.
    let mut dump = bed.command(
        Host::A,
        &["criu", "dump", "-t", &pid, "-D", "/tmp/web", "-o", "dump.log", "--page-server"],
    );
    dump.args(["--ps-socket", "0"]).stdin(Stdio::from(OwnedFd::from(criu)));
    let child = dump.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // It holds the client's end.
    drop(dump);
    finish(child);
    let (rounds, dialect) = server.join().unwrap();
    assert_eq!((rounds.len(), dialect), (1, Some(Dialect::Short)), "CRIU 4.1.1");

    let [round] = &rounds[..] else { panic!() };
    let task = Space::Task(pid.parse().unwrap());
    let kept = round.iter().find(|kept| kept.space == task).unwrap();
    assert!(kept.pages.len() > 32 << 20, "{} bytes", kept.pages.len());
    let images = tempfile::tempdir().unwrap();
    write(round, images.path());
    bed.copy(Host::A, images.path(), "/tmp/web");
    let described = format!("/tmp/web/{}", task.pagemap());
    let decoded = bed.ok(Host::A, &["crit", "decode", "-i", &described]);
    // As CRIU said it: of most processes it flags pages as lazy. It takes all of them for stack where a stack pointer is at the
    // beginning of a page, which is so once in 256 times (contrib/upstream/every-page-is-a-stack.md).
    let lazy = Contents::Present { lazy: true };
    let lazy =
        kept.pagemap.layout().unwrap().runs.iter().any(|placed| placed.run.contents() == lazy);
    assert_eq!(decoded.contains(r#""flags": 6"#), lazy, "crit reads it: {decoded}");
    bed.ok(Host::A, &["criu", "restore", "-d", "-D", "/tmp/web", "-o", "restore.log"]);
    assert_eq!(bed.ask(Host::A, "web", &pid).checksum, before.checksum);
}

#[test]
fn the_pagemaps_of_a_plain_dump_mean_what_their_pages_images_hold() {
    let bed = Bed::up();
    let pid = bed.workload(Host::A, "web", 8);
    bed.ok(Host::A, &["mkdir", "/tmp/web"]);
    bed.ok(Host::A, &["criu", "dump", "-t", &pid, "-D", "/tmp/web", "-o", "dump.log"]);
    let pagemap = Space::Task(pid.parse().unwrap()).pagemap();
    let image = bed.run(Host::A, &["cat", &format!("/tmp/web/{pagemap}")]).stdout;
    let read = Pagemap::decode(&image).unwrap();
    assert_eq!(read.encode(), image);
    let pages = format!("/tmp/web/{}", pages_image(read.pages_id));
    let size: u64 = bed.ok(Host::A, &["stat", "-c", "%s", &pages]).trim().parse().unwrap();
    assert_eq!(read.layout().unwrap().pages_len, size);
}
