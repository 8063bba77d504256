//! One end of a link as a test drives it: frames by the library's codec, or any bytes at all.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

use criu_image_relay::wire::frame::{self, HEADER_LEN, Header, PREFACE_LEN};
use criu_image_relay::wire::message::Message;

use crate::daemons::{SOON, is_end};

/// A TCP connection to a daemon.
pub(crate) struct Link {
    stream: TcpStream,
}

impl Link {
    pub(crate) fn new(stream: TcpStream) -> Link {
        stream.set_read_timeout(Some(SOON)).unwrap();
        stream.set_write_timeout(Some(SOON)).unwrap();
        Link { stream }
    }

    /// This end, as the daemon names it.
    pub(crate) fn address(&self) -> String {
        self.stream.local_addr().unwrap().to_string()
    }

    /// Says any bytes.
    pub(crate) fn say(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    /// Sends a message without payload.
    pub(crate) fn send(&mut self, message: &Message) {
        self.say(&message.encode(0));
    }

    /// Sends a message with its payload.
    pub(crate) fn send_payload(&mut self, message: &Message, payload: &[u8]) {
        self.say(&[&message.encode(payload.len()), payload].concat());
    }

    /// Sends a message, if the daemon takes it.
    pub(crate) fn try_send(&mut self, message: &Message) -> bool {
        self.try_say(&message.encode(0))
    }

    /// Says any bytes, if the daemon takes them.
    pub(crate) fn try_say(&mut self, bytes: &[u8]) -> bool {
        self.stream.write_all(bytes).is_ok()
    }

    /// Closes one direction.
    pub(crate) fn shut(&mut self, direction: Shutdown) {
        self.stream.shutdown(direction).unwrap();
    }

    /// Receives the preface.
    #[track_caller]
    pub(crate) fn receive_preface(&mut self) {
        assert!(self.is_answered(), "the daemon closes the link");
    }

    /// Receives the preface, if the daemon does not close the link instead.
    pub(crate) fn is_answered(&mut self) -> bool {
        let mut bytes = [0; PREFACE_LEN];
        match self.stream.read_exact(&mut bytes) {
            Ok(()) => assert_eq!(bytes, frame::preface()),
            Err(error) if is_end(error.kind()) => return false,
            Err(error) => panic!("{error}"),
        }
        true
    }

    /// The next message that is not said in passing, with its payload; `None` at the end of the link.
    pub(crate) fn receive(&mut self) -> Option<(Message, Vec<u8>)> {
        loop {
            let received = self.receive_any()?;
            if !in_passing(&received.0) {
                return Some(received);
            }
        }
    }

    fn receive_any(&mut self) -> Option<(Message, Vec<u8>)> {
        let mut header = [0; HEADER_LEN];
        match self.stream.read(&mut header[..1]) {
            Ok(1) => {}
            Ok(_) => return None,
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return None,
            Err(error) => panic!("{error}"),
        }
        self.stream.read_exact(&mut header[1..]).unwrap();
        let header = Header::decode(header).unwrap();
        let mut message = vec![0; header.message_len];
        self.stream.read_exact(&mut message).unwrap();
        let mut payload = vec![0; header.payload_len];
        self.stream.read_exact(&mut payload).unwrap();
        Some((Message::decode(header, &message).unwrap(), payload))
    }

    /// The daemon has ended the link, or does so now. Gives the reason, if it said goodbye.
    #[track_caller]
    pub(crate) fn assert_closed(&mut self) -> Option<String> {
        let mut goodbye = None;
        while let Some((message, _)) = self.receive() {
            assert_eq!(goodbye, None, "{message:?} after the goodbye");
            if let Message::Goodbye(said) = message {
                goodbye = Some(said.reason);
            }
        }
        goodbye
    }

    /// The link is up, and nothing but what is said in passing comes on it for now.
    #[track_caller]
    pub(crate) fn assert_quiet(&mut self) {
        let a_while = Duration::from_millis(150);
        loop {
            self.stream.set_read_timeout(Some(a_while)).unwrap();
            let looked = self.stream.peek(&mut [0]);
            self.stream.set_read_timeout(Some(SOON)).unwrap();
            match looked {
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) => panic!("{error}"),
                Ok(_) => {
                    let (said, _) = self.receive_any().expect("a link that is up");
                    assert!(in_passing(&said), "{said:?}");
                }
            }
        }
    }
}

/// Whether a message says only that all goes well so far.
fn in_passing(message: &Message) -> bool {
    matches!(
        message,
        Message::KeepAlive(_)
            | Message::SnapshotReady(_)
            | Message::Spaces(_)
            | Message::ImageReady(_)
            | Message::ImageAck(_)
    )
}
