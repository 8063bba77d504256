//! Frames as they stand on the link, and as lines of a recording.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{ErrorKind, Read};

use criu_image_relay::wire::frame::{HEADER_LEN, Header};
use criu_image_relay::wire::message::Kind;

/// Who says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Proxy,
    Cache,
}

/// A frame, without a look at what it means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Frame {
    pub(crate) kind: u16,
    pub(crate) message: Vec<u8>,
    pub(crate) payload: Vec<u8>,
}

/// The fields of a message, by number: each with its values as they are encoded.
type Fields = BTreeMap<u64, Vec<Vec<u8>>>;

impl Frame {
    /// The next frame; `None` at the end of the link.
    pub(crate) fn read_from(link: &mut impl Read) -> Option<Frame> {
        let mut header = [0; HEADER_LEN];
        match link.read_exact(&mut header) {
            Ok(()) => {}
            Err(error)
                if [ErrorKind::UnexpectedEof, ErrorKind::ConnectionReset]
                    .contains(&error.kind()) =>
            {
                return None;
            }
            Err(error) => panic!("{error} instead of a frame"),
        }
        let header = Header::decode(header).unwrap();
        let (mut message, mut payload) = (vec![0; header.message_len], vec![0; header.payload_len]);
        link.read_exact(&mut message).unwrap();
        link.read_exact(&mut payload).unwrap();
        Some(Frame { kind: header.kind, message, payload })
    }

    /// The bytes on the link.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let (message_len, payload_len) = (self.message.len(), self.payload.len());
        let header = Header { kind: self.kind, message_len, payload_len };
        [&header.encode(), &self.message[..], &self.payload].concat()
    }

    /// Whether it comes at any time.
    pub(crate) fn is_in_passing(&self) -> bool {
        self.is(Kind::KeepAlive)
    }

    fn is(&self, kind: Kind) -> bool {
        i32::from(self.kind) == kind as i32
    }

    /// Whether more of its payload may follow in frames of the same kind: how much goes into one is a matter of what
    /// was there when the sender looked.
    pub(crate) fn may_be_in_parts(&self) -> bool {
        self.is(Kind::ImageData) || self.is(Kind::PageData)
    }

    /// Fields whose values are anybody's own affair: names of hosts, and reasons in words.
    fn is_free(&self, field: u64) -> bool {
        match field {
            1 => self.is(Kind::Hello) || self.is(Kind::Welcome) || self.is(Kind::Goodbye),
            2 => self.is(Kind::SnapshotAbort),
            3 => self.is(Kind::Region),
            _ => false,
        }
    }

    /// Who knows only what is in `recorded` takes this for it: there may be fields that it does not know.
    #[track_caller]
    pub(crate) fn assert_means(&self, recorded: &Frame) {
        assert_eq!(self.kind, recorded.kind, "{self:?} instead of {recorded:?}");
        let said = fields(&self.message);
        for (field, values) in fields(&recorded.message) {
            if !self.is_free(field) {
                assert_eq!(said.get(&field), Some(&values), "field {field} of {recorded:?}");
            }
        }
        assert!(self.payload == recorded.payload, "the payload of {recorded:?}");
    }

    /// The line of a recording: kind, message, and payload as runs of equal bytes.
    pub(crate) fn to_line(&self) -> String {
        let mut line = format!("{} ", self.kind);
        self.message.iter().for_each(|byte| write!(line, "{byte:02x}").unwrap());
        for run in self.payload.chunk_by(|a, b| a == b) {
            write!(line, " {:02x}x{}", run[0], run.len()).unwrap();
        }
        line
    }

    /// The inverse.
    pub(crate) fn from_line(line: &str) -> Frame {
        let byte = |hex: &str| u8::from_str_radix(hex, 16).unwrap();
        let mut words = line.split(' ');
        let kind = words.next().unwrap().parse().unwrap();
        let message = words.next().unwrap();
        let message = (0..message.len()).step_by(2).map(|at| byte(&message[at..at + 2])).collect();
        let payload = words.flat_map(|run| {
            let (of, times) = run.split_once('x').unwrap();
            std::iter::repeat_n(byte(of), times.parse().unwrap())
        });
        Frame { kind, message, payload: payload.collect() }
    }
}

/// Takes a protobuf message apart without its schema.
fn fields(mut message: &[u8]) -> Fields {
    let mut fields = Fields::new();
    while !message.is_empty() {
        let key = varint(&mut message);
        let len = match key & 7 {
            0 => {
                let before = message;
                varint(&mut message);
                let len = before.len() - message.len();
                message = before;
                len
            }
            1 => 8,
            2 => usize::try_from(varint(&mut message)).unwrap(),
            5 => 4,
            other => panic!("a field of wire type {other}"),
        };
        let (value, rest) = message.split_at(len);
        fields.entry(key >> 3).or_default().push(value.to_vec());
        message = rest;
    }
    fields
}

fn varint(bytes: &mut &[u8]) -> u64 {
    let mut value = 0;
    for shift in (0..).step_by(7) {
        let (first, rest) = bytes.split_first().unwrap();
        *bytes = rest;
        value |= u64::from(first & 0x7f) << shift;
        if first & 0x80 == 0 {
            break;
        }
    }
    value
}
