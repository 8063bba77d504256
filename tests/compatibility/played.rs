//! One side of a recording, played to the other side as it is today.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;

use criu_image_relay::wire::frame::{PREFACE_LEN, preface};

use crate::daemons::{Daemon, SOON};
use crate::frame::{Frame, Side};
use crate::recorded::Recording;
use crate::scenario;

/// The recorded proxy, to a cache: it is answered as it was, and the cache holds what it held.
pub(crate) fn proxy(recording: &Recording) {
    let (cache, address) = Daemon::cache(&[]);
    let link = TcpStream::connect(address).unwrap();
    play(recording, Side::Proxy, &link);
    scenario::assert_holds(&cache);
}

/// The recorded cache, to a proxy, which does what it did and hears what it heard.
pub(crate) fn cache(recording: &Recording) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let proxy = Daemon::proxy(listener.local_addr().unwrap(), &[]);
    thread::scope(|threads| {
        let played = threads.spawn(|| {
            let link = listener.accept().unwrap().0;
            play(recording, Side::Cache, &link);
            // The link stays up until the other side has heard all.
            link
        });
        scenario::drive(&proxy);
        played.join().unwrap();
    });
}

/// Says what `side` said, when the other has said what comes before it.
fn play(recording: &Recording, side: Side, mut link: &TcpStream) {
    link.set_read_timeout(Some(SOON)).unwrap();
    link.set_nodelay(true).unwrap();
    link.write_all(&preface()).unwrap();
    let mut theirs = [0; PREFACE_LEN];
    link.read_exact(&mut theirs).unwrap();
    assert_eq!(theirs, preface());
    for (who, frame) in &recording.0 {
        if *who == side {
            link.write_all(&frame.encode()).unwrap();
        } else {
            hear(&mut link, frame.payload.len()).assert_means(frame);
        }
    }
}

/// The next frame, with all of a payload that may come in parts.
fn hear(link: &mut impl Read, payload_len: usize) -> Frame {
    let mut frame = next(link);
    while frame.may_be_in_parts() && frame.payload.len() < payload_len {
        let more = next(link);
        assert_eq!(more.kind, frame.kind, "{more:?} within a payload");
        frame.payload.extend(more.payload);
    }
    frame
}

fn next(link: &mut impl Read) -> Frame {
    loop {
        let frame = Frame::read_from(link).expect("the link goes on");
        if !frame.is_in_passing() {
            return frame;
        }
    }
}
