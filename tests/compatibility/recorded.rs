//! Recordings: what both sides said, in the order in which it passed.

use std::fmt::Write as _;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::{fs, thread};

use criu_image_relay::wire::frame::{PREFACE_LEN, preface};

use crate::daemons::Daemon;
use crate::frame::{Frame, Side};
use crate::scenario;

/// A link from its handshake on, without the prefaces.
#[derive(Debug, Clone, Default)]
pub(crate) struct Recording(pub(crate) Vec<(Side, Frame)>);

impl Recording {
    /// That of a release.
    #[track_caller]
    pub(crate) fn of(version: &str) -> Recording {
        let path = path(version);
        let text =
            fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        Recording(lines.map(line).collect())
    }

    /// Keeps it as that of a release, of which there must be none yet.
    pub(crate) fn keep(&self, version: &str) {
        let mut text = format!("# What a proxy and a cache of {version} say on the link.\n");
        for (side, frame) in &self.0 {
            let side = if *side == Side::Proxy { '>' } else { '<' };
            writeln!(text, "{side} {}", frame.to_line()).unwrap();
        }
        let mut file = fs::File::create_new(path(version)).unwrap();
        file.write_all(text.as_bytes()).unwrap();
    }

    fn push(&mut self, side: Side, frame: Frame) {
        if frame.is_in_passing() {
            return;
        }
        match self.0.last_mut() {
            Some((before, last))
                if *before == side && last.kind == frame.kind && frame.may_be_in_parts() =>
            {
                last.payload.extend(frame.payload);
            }
            _ => self.0.push((side, frame)),
        }
    }
}

/// Where what is kept of a release is.
pub(crate) fn dir(version: &str) -> PathBuf {
    crate::in_tree("tests/compatibility/recordings").join(version)
}

fn path(version: &str) -> PathBuf {
    dir(version).join("link.txt")
}

fn line(line: &str) -> (Side, Frame) {
    match line.split_at(2) {
        ("> ", frame) => (Side::Proxy, Frame::from_line(frame)),
        ("< ", frame) => (Side::Cache, Frame::from_line(frame)),
        _ => panic!("neither side says {line}"),
    }
}

/// Has today's daemons go through the scenario, and listens.
pub(crate) fn record() -> Recording {
    let (cache, address) = Daemon::cache(&[]);
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let proxy = Daemon::proxy(listener.local_addr().unwrap(), &[]);
    let recording = Arc::new(Mutex::new(Recording::default()));
    let shared = recording.clone();
    thread::spawn(move || {
        let ours = listener.accept().unwrap().0;
        pass(&ours, &TcpStream::connect(address).unwrap(), &shared);
    });
    scenario::drive(&proxy);
    scenario::assert_holds(&cache);
    let recording = recording.lock().unwrap();
    recording.clone()
}

/// Passes a link on in both directions, frame by frame.
fn pass(proxy: &TcpStream, cache: &TcpStream, recording: &Arc<Mutex<Recording>>) {
    for (from, to, side) in [(proxy, cache, Side::Proxy), (cache, proxy, Side::Cache)] {
        let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
        to.set_nodelay(true).unwrap();
        let recording = recording.clone();
        thread::spawn(move || {
            let mut first = [0; PREFACE_LEN];
            from.read_exact(&mut first).unwrap();
            assert_eq!(first, preface());
            to.write_all(&first).unwrap();
            while let Some(frame) = Frame::read_from(&mut from) {
                let bytes = frame.encode();
                recording.lock().unwrap().push(side, frame);
                if to.write_all(&bytes).is_err() {
                    break;
                }
            }
            let _ = to.shutdown(Shutdown::Both);
        });
    }
}
