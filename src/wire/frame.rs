//! The preface and the fixed header. Numbers are little-endian.
//!
//! ```text
//! preface   0        8         10        12
//!           ┌────────┬─────────┬─────────┐
//!           │CRIURLAY│ version │ zero    │        each side sends it once, first
//!           └────────┴─────────┴─────────┘
//! header    0      2             4             8
//!           ┌──────┬─────────────┬─────────────┬─────────────┬─────────────┐
//!           │ kind │ message_len │ payload_len │ message …   │ payload …   │
//!           └──────┴─────────────┴─────────────┴─────────────┴─────────────┘
//! ```

use std::fmt;

/// The version of the link that this crate speaks.
pub const VERSION: u16 = 1;
const MAGIC: [u8; 8] = *b"CRIURLAY";

/// The preface's length in bytes.
pub const PREFACE_LEN: usize = 12;
/// The header's length in bytes.
pub const HEADER_LEN: usize = 8;
/// No message is longer than this, in bytes.
pub const MESSAGE_MAX: usize = 16384;
/// No payload is longer than this, in bytes.
pub const PAYLOAD_MAX: usize = 16 << 20;

/// Why a preface or a header is refused. The link ends.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadFrame {
    /// The peer is no relay.
    #[error("the peer does not speak the relay's protocol: its first bytes are {0}")]
    Preface(Bytes),
    /// The peer is a relay of another time.
    #[error("the peer speaks version {0} of the link, this side speaks version {VERSION}")]
    Version(u16),
    /// The announced message is over the limit.
    #[error("a message of {0} bytes; at most {MESSAGE_MAX} are accepted")]
    MessageTooLong(usize),
    /// The announced payload is over the limit.
    #[error("a payload of {0} bytes; at most {PAYLOAD_MAX} are accepted")]
    PayloadTooLong(usize),
}

/// Bytes as a log line shows them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bytes(Vec<u8>);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", self.0.escape_ascii())
    }
}

/// What each side sends first.
pub fn preface() -> [u8; PREFACE_LEN] {
    let mut bytes = [0; PREFACE_LEN];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..10].copy_from_slice(&VERSION.to_le_bytes());
    bytes
}

/// Checks what the peer sent first.
pub fn check_preface(bytes: [u8; PREFACE_LEN]) -> Result<(), BadFrame> {
    if bytes[..8] != MAGIC {
        return Err(BadFrame::Preface(Bytes(bytes.to_vec())));
    }
    match u16::from_le_bytes([bytes[8], bytes[9]]) {
        VERSION => Ok(()),
        other => Err(BadFrame::Version(other)),
    }
}

/// The fixed header before each message. Its lengths have been checked against the limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// The number of the message's kind; see [`Kind`](super::message::Kind).
    pub kind: u16,
    /// The message's length in bytes.
    pub message_len: usize,
    /// The payload's length in bytes.
    pub payload_len: usize,
}

impl Header {
    /// Decodes a header and checks its lengths, before anything is allocated for them.
    pub fn decode(bytes: [u8; HEADER_LEN]) -> Result<Header, BadFrame> {
        let [k0, k1, m0, m1, p0, p1, p2, p3] = bytes;
        let header = Header {
            kind: u16::from_le_bytes([k0, k1]),
            message_len: usize::from(u16::from_le_bytes([m0, m1])),
            payload_len: u32::from_le_bytes([p0, p1, p2, p3]) as usize,
        };
        if header.message_len > MESSAGE_MAX {
            return Err(BadFrame::MessageTooLong(header.message_len));
        }
        if header.payload_len > PAYLOAD_MAX {
            return Err(BadFrame::PayloadTooLong(header.payload_len));
        }
        Ok(header)
    }

    /// Encodes a header.
    pub fn encode(self) -> [u8; HEADER_LEN] {
        debug_assert!(self.message_len <= MESSAGE_MAX && self.payload_len <= PAYLOAD_MAX);
        let [k0, k1] = self.kind.to_le_bytes();
        #[allow(clippy::cast_possible_truncation)] // both are bounded far below
        let ([m0, m1], [p0, p1, p2, p3]) =
            ((self.message_len as u16).to_le_bytes(), (self.payload_len as u32).to_le_bytes());
        [k0, k1, m0, m1, p0, p1, p2, p3]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_preface_is_these_bytes() {
        assert_eq!(&preface(), b"CRIURLAY\x01\0\0\0");
        assert_eq!(check_preface(preface()), Ok(()));
    }

    #[test]
    fn another_preface_or_version_is_refused_in_words() {
        let error = check_preface(*b"GET / HTTP/1").unwrap_err().to_string();
        assert!(error.ends_with("its first bytes are \"GET / HTTP/1\""), "{error}");
        let error = check_preface(*b"CRIURLAY\x02\0\0\0").unwrap_err().to_string();
        assert_eq!(error, "the peer speaks version 2 of the link, this side speaks version 1");
    }

    #[test]
    fn a_header_is_these_bytes() {
        let header = Header { kind: 10, message_len: 6, payload_len: 0x10_0000 };
        assert_eq!(header.encode(), *b"\x0a\0\x06\0\0\0\x10\0");
        assert_eq!(Header::decode(header.encode()), Ok(header));
    }

    #[test]
    fn lengths_over_the_limits_are_refused() {
        let longest = Header { kind: 1, message_len: MESSAGE_MAX, payload_len: PAYLOAD_MAX };
        assert!(Header::decode(longest.encode()).is_ok());
        let long = Header::decode(*b"\x01\0\x01\x40\0\0\0\0");
        assert_eq!(long, Err(BadFrame::MessageTooLong(16385)));
        let long = Header::decode(*b"\x01\0\0\0\x01\0\0\x01");
        assert_eq!(long, Err(BadFrame::PayloadTooLong(PAYLOAD_MAX + 1)));
    }
}
