//! The messages of the link: the generated types of `proto/link.proto`, joined into one enum.

use std::ops::RangeInclusive;

use prost::Message as _;

pub use super::generated::{
    Goodbye, Hello, ImageAck, ImageBegin, ImageData, ImageEnd, ImageReady, KeepAlive, Kind,
    Outcome, PageData, Pages, PagesForget, PagesRequest, Region, RegionRequest, SnapshotAbort,
    SnapshotAck, SnapshotBegin, SnapshotEnd, SnapshotList, SnapshotReady, SnapshotWithdraw,
    SnapshotWithdrawn, Space, Spaces, Welcome,
};

use super::frame::{Header, PAYLOAD_MAX};
use super::narrow::too_wide;
use crate::criu::names::{cut, is_unprintable};

/// No region that is asked for is longer than this, in bytes: who asks holds it in memory.
pub const REGION_MAX: usize = 256 << 10;

/// Either side ends a link on which it owes more regions than this at once.
pub const REGIONS_MAX: usize = 1024;

/// What a cache names in its WELCOME that understands when it is told that memory may have changed.
pub const MEMORY_MAY_HAVE_CHANGED: &str = "memory-may-have-changed";
/// The feature of a side that knows `SNAPSHOT_WITHDRAW` and its answer.
pub const WITHDRAW: &str = "withdraw";
/// The features that this version names in its HELLO and WELCOME.
pub const FEATURES: [&str; 2] = [MEMORY_MAY_HAVE_CHANGED, WITHDRAW];

/// No reason in an abort or a goodbye is longer than this, in bytes.
const REASON_MAX: usize = 1024;

/// What one frame says, without its payload.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)] // each variant is its type
pub enum Message {
    Hello(Hello),
    Welcome(Welcome),
    Goodbye(Goodbye),
    KeepAlive(KeepAlive),
    SnapshotBegin(SnapshotBegin),
    SnapshotEnd(SnapshotEnd),
    SnapshotAck(SnapshotAck),
    SnapshotAbort(SnapshotAbort),
    ImageBegin(ImageBegin),
    ImageData(ImageData),
    ImageEnd(ImageEnd),
    SnapshotReady(SnapshotReady),
    SnapshotList(SnapshotList),
    ImageReady(ImageReady),
    ImageAck(ImageAck),
    RegionRequest(RegionRequest),
    Region(Region),
    Spaces(Spaces),
    Space(Space),
    Pages(Pages),
    PageData(PageData),
    PagesForget(PagesForget),
    PagesRequest(PagesRequest),
    SnapshotWithdraw(SnapshotWithdraw),
    SnapshotWithdrawn(SnapshotWithdrawn),
}

/// Why a message is refused. The link ends.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadMessage {
    /// A kind that this version does not have.
    #[error("a message of the unknown kind {0}")]
    UnknownKind(u16),
    /// The bytes are not that message.
    #[error("a {0} that does not decode: {1}")]
    Torn(&'static str, String),
    /// A number that has no place in its field.
    #[error("a {0} whose field {1} has more than 32 bits")]
    TooWide(&'static str, u32),
    /// The payload is not one that this kind may have.
    #[error("a {0} with a payload of {1} bytes")]
    Payload(&'static str, usize),
}

/// Applies `$do` to the message inside, whatever its type.
macro_rules! with_inner {
    ($message:expr, $inner:ident => $do:expr) => {
        match $message {
            Message::Hello($inner) => $do,
            Message::Welcome($inner) => $do,
            Message::Goodbye($inner) => $do,
            Message::KeepAlive($inner) => $do,
            Message::SnapshotBegin($inner) => $do,
            Message::SnapshotEnd($inner) => $do,
            Message::SnapshotAck($inner) => $do,
            Message::SnapshotAbort($inner) => $do,
            Message::ImageBegin($inner) => $do,
            Message::ImageData($inner) => $do,
            Message::ImageEnd($inner) => $do,
            Message::SnapshotReady($inner) => $do,
            Message::SnapshotList($inner) => $do,
            Message::ImageReady($inner) => $do,
            Message::ImageAck($inner) => $do,
            Message::RegionRequest($inner) => $do,
            Message::Region($inner) => $do,
            Message::Spaces($inner) => $do,
            Message::Space($inner) => $do,
            Message::Pages($inner) => $do,
            Message::PageData($inner) => $do,
            Message::PagesForget($inner) => $do,
            Message::PagesRequest($inner) => $do,
            Message::SnapshotWithdraw($inner) => $do,
            Message::SnapshotWithdrawn($inner) => $do,
        }
    };
}

impl Message {
    /// Its kind, as the header gives it.
    pub fn kind(&self) -> Kind {
        match self {
            Message::Hello(_) => Kind::Hello,
            Message::Welcome(_) => Kind::Welcome,
            Message::Goodbye(_) => Kind::Goodbye,
            Message::KeepAlive(_) => Kind::KeepAlive,
            Message::SnapshotBegin(_) => Kind::SnapshotBegin,
            Message::SnapshotEnd(_) => Kind::SnapshotEnd,
            Message::SnapshotAck(_) => Kind::SnapshotAck,
            Message::SnapshotAbort(_) => Kind::SnapshotAbort,
            Message::ImageBegin(_) => Kind::ImageBegin,
            Message::ImageData(_) => Kind::ImageData,
            Message::ImageEnd(_) => Kind::ImageEnd,
            Message::SnapshotReady(_) => Kind::SnapshotReady,
            Message::SnapshotList(_) => Kind::SnapshotList,
            Message::ImageReady(_) => Kind::ImageReady,
            Message::ImageAck(_) => Kind::ImageAck,
            Message::RegionRequest(_) => Kind::RegionRequest,
            Message::Region(_) => Kind::Region,
            Message::Spaces(_) => Kind::Spaces,
            Message::Space(_) => Kind::Space,
            Message::Pages(_) => Kind::Pages,
            Message::PageData(_) => Kind::PageData,
            Message::PagesForget(_) => Kind::PagesForget,
            Message::PagesRequest(_) => Kind::PagesRequest,
            Message::SnapshotWithdraw(_) => Kind::SnapshotWithdraw,
            Message::SnapshotWithdrawn(_) => Kind::SnapshotWithdrawn,
        }
    }

    /// An abort, its reason cut to what a message may hold.
    pub fn abort(snapshot: u32, reason: &str) -> Message {
        Message::SnapshotAbort(SnapshotAbort { snapshot, reason: short(reason) })
    }

    /// The answer to a region that cannot be had, its reason cut to what a message may hold.
    pub fn no_region(request: u32, error: u32, reason: &str) -> Message {
        Message::Region(Region { request, error, reason: short(reason), size: 0 })
    }

    /// A withdrawal, its reason cut to what a message may hold.
    pub fn withdraw(request: u32, id: &str, attempt: u64, reason: &str) -> Message {
        let (id, reason) = (id.to_owned(), short(reason));
        Message::SnapshotWithdraw(SnapshotWithdraw { request, id, attempt, reason })
    }

    /// A goodbye, its reason cut to what a message may hold.
    pub fn goodbye(reason: &str) -> Message {
        Message::Goodbye(Goodbye { reason: short(reason) })
    }

    /// Encodes the header and the message; `payload_len` bytes of payload are to follow.
    pub fn encode(&self, payload_len: usize) -> Vec<u8> {
        let message_len = with_inner!(self, inner => inner.encoded_len());
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // a small enum
        let header = Header { kind: self.kind() as i32 as u16, message_len, payload_len };
        let mut bytes = header.encode().to_vec();
        bytes.reserve_exact(message_len);
        // Encoding into a Vec only fails for want of room, and a Vec makes room.
        with_inner!(self, inner => inner.encode_raw(&mut bytes));
        bytes
    }

    /// Decodes the message that a header announced.
    pub fn decode(header: Header, bytes: &[u8]) -> Result<Message, BadMessage> {
        let kind = Kind::try_from(i32::from(header.kind))
            .ok()
            .filter(|kind| *kind != Kind::Unspecified)
            .ok_or(BadMessage::UnknownKind(header.kind))?;
        if !payload_range(kind).contains(&header.payload_len) {
            return Err(BadMessage::Payload(kind.as_str_name(), header.payload_len));
        }
        if let Some(field) = too_wide(kind, bytes) {
            return Err(BadMessage::TooWide(kind.as_str_name(), field));
        }
        let decoded = match kind {
            Kind::Unspecified => return Err(BadMessage::UnknownKind(header.kind)),
            Kind::Hello => Hello::decode(bytes).map(Message::Hello),
            Kind::Welcome => Welcome::decode(bytes).map(Message::Welcome),
            Kind::Goodbye => Goodbye::decode(bytes)
                .map(|goodbye| Message::Goodbye(Goodbye { reason: printable(&goodbye.reason) })),
            Kind::KeepAlive => KeepAlive::decode(bytes).map(Message::KeepAlive),
            Kind::SnapshotBegin => SnapshotBegin::decode(bytes).map(Message::SnapshotBegin),
            Kind::SnapshotEnd => SnapshotEnd::decode(bytes).map(Message::SnapshotEnd),
            Kind::SnapshotAck => SnapshotAck::decode(bytes).map(Message::SnapshotAck),
            Kind::SnapshotAbort => SnapshotAbort::decode(bytes).map(|abort| {
                let reason = printable(&abort.reason);
                Message::SnapshotAbort(SnapshotAbort { reason, ..abort })
            }),
            Kind::ImageBegin => ImageBegin::decode(bytes).map(Message::ImageBegin),
            Kind::ImageData => ImageData::decode(bytes).map(Message::ImageData),
            Kind::ImageEnd => ImageEnd::decode(bytes).map(Message::ImageEnd),
            Kind::SnapshotReady => SnapshotReady::decode(bytes).map(Message::SnapshotReady),
            Kind::SnapshotList => SnapshotList::decode(bytes).map(Message::SnapshotList),
            Kind::ImageReady => ImageReady::decode(bytes).map(Message::ImageReady),
            Kind::ImageAck => ImageAck::decode(bytes).map(Message::ImageAck),
            Kind::RegionRequest => RegionRequest::decode(bytes).map(Message::RegionRequest),
            Kind::Region => Region::decode(bytes).map(|region| {
                let reason = printable(&region.reason);
                Message::Region(Region { reason, ..region })
            }),
            Kind::Spaces => Spaces::decode(bytes).map(Message::Spaces),
            Kind::Space => Space::decode(bytes).map(Message::Space),
            Kind::Pages => Pages::decode(bytes).map(Message::Pages),
            Kind::PageData => PageData::decode(bytes).map(Message::PageData),
            Kind::PagesForget => PagesForget::decode(bytes).map(Message::PagesForget),
            Kind::PagesRequest => PagesRequest::decode(bytes).map(Message::PagesRequest),
            Kind::SnapshotWithdraw => SnapshotWithdraw::decode(bytes).map(|withdraw| {
                let reason = printable(&withdraw.reason);
                Message::SnapshotWithdraw(SnapshotWithdraw { reason, ..withdraw })
            }),
            Kind::SnapshotWithdrawn => {
                SnapshotWithdrawn::decode(bytes).map(Message::SnapshotWithdrawn)
            }
        };
        decoded.map_err(|error| BadMessage::Torn(kind.as_str_name(), error.to_string()))
    }
}

/// Only the bytes of images and pages are payload, which is never empty; and those of a region, which may be.
fn payload_range(kind: Kind) -> RangeInclusive<usize> {
    match kind {
        Kind::ImageData | Kind::PageData => 1..=PAYLOAD_MAX,
        Kind::Region => 0..=REGION_MAX,
        _ => 0..=0,
    }
}

/// As much of a reason as a message may hold.
pub fn short(reason: &str) -> String {
    cut(reason, REASON_MAX).to_owned()
}

/// What a peer says goes into logs and onto terminals: without what moves a cursor there.
fn printable(reason: &str) -> String {
    cut(reason, REASON_MAX).replace(is_unprintable, "?")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::frame::HEADER_LEN;
    use proptest::prelude::*;

    fn decode(bytes: &[u8]) -> Result<Message, BadMessage> {
        let header = Header::decode(bytes[..HEADER_LEN].try_into().unwrap()).unwrap();
        Message::decode(header, &bytes[HEADER_LEN..HEADER_LEN + header.message_len])
    }

    /// One message of each kind, the payload announced with it, and its bytes on the wire.
    #[allow(clippy::too_many_lines)] // a table
    fn golden() -> Vec<(Message, usize, &'static [u8])> {
        vec![
            (
                Message::Hello(Hello { name: "a".into(), features: vec!["x".into()] }),
                0,
                b"\x01\0\x06\0\0\0\0\0\x0a\x01a\x12\x01x",
            ),
            (
                Message::Welcome(Welcome { name: "b".into(), features: vec![] }),
                0,
                b"\x02\0\x03\0\0\0\0\0\x0a\x01b",
            ),
            (Message::goodbye("no"), 0, b"\x03\0\x04\0\0\0\0\0\x0a\x02no"),
            (Message::KeepAlive(KeepAlive {}), 0, b"\x04\0\0\0\0\0\0\0"),
            (
                Message::SnapshotBegin(SnapshotBegin {
                    snapshot: 1,
                    id: "web".into(),
                    named: true,
                    round: true,
                    parent: "w".into(),
                    attempt: 300,
                }),
                0,
                b"\x05\0\x11\0\0\0\0\0\x08\x01\x12\x03web\x18\x01\x20\x01\x2a\x01w\x30\xac\x02",
            ),
            (
                Message::SnapshotEnd(SnapshotEnd {
                    snapshot: 1,
                    complete: true,
                    images: 2,
                    bytes: 300,
                    partial: true,
                    memory_may_have_changed: true,
                }),
                0,
                b"\x06\0\x0d\0\0\0\0\0\x08\x01\x10\x01\x18\x02\x20\xac\x02\x28\x01\x30\x01",
            ),
            (
                Message::SnapshotAck(SnapshotAck { snapshot: 1, images: 2, bytes: 300 }),
                0,
                b"\x07\0\x07\0\0\0\0\0\x08\x01\x10\x02\x18\xac\x02",
            ),
            (Message::abort(1, "no"), 0, b"\x08\0\x06\0\0\0\0\0\x08\x01\x12\x02no"),
            (
                Message::ImageBegin(ImageBegin {
                    snapshot: 1,
                    image: 2,
                    name: "fs-7.img".into(),
                    append: true,
                }),
                0,
                b"\x09\0\x10\0\0\0\0\0\x08\x01\x10\x02\x1a\x08fs-7.img\x20\x01",
            ),
            (
                Message::ImageData(ImageData { snapshot: 1, image: 2, offset: 300 }),
                4096,
                b"\x0a\0\x07\0\0\x10\0\0\x08\x01\x10\x02\x18\xac\x02",
            ),
            (
                Message::ImageEnd(ImageEnd { snapshot: 1, image: 2, size: 300 }),
                0,
                b"\x0b\0\x07\0\0\0\0\0\x08\x01\x10\x02\x18\xac\x02",
            ),
            (
                Message::SnapshotReady(SnapshotReady { snapshot: 1 }),
                0,
                b"\x0c\0\x02\0\0\0\0\0\x08\x01",
            ),
            (
                Message::SnapshotList(SnapshotList { snapshot: 1, list: "chain".into() }),
                0,
                b"\x0d\0\x09\0\0\0\0\0\x08\x01\x12\x05chain",
            ),
            (
                Message::ImageReady(ImageReady { snapshot: 1, image: 2 }),
                0,
                b"\x0e\0\x04\0\0\0\0\0\x08\x01\x10\x02",
            ),
            (
                Message::ImageAck(ImageAck { snapshot: 1, image: 2, size: 300 }),
                0,
                b"\x0f\0\x07\0\0\0\0\0\x08\x01\x10\x02\x18\xac\x02",
            ),
            (
                Message::RegionRequest(RegionRequest {
                    request: 1,
                    snapshot_id: "web".into(),
                    name: "fs-7.img".into(),
                    offset: 0,
                    len: 300,
                }),
                0,
                b"\x10\0\x14\0\0\0\0\0\x08\x01\x12\x03web\x1a\x08fs-7.img\x28\xac\x02",
            ),
            (
                Message::Region(Region { request: 1, error: 0, reason: String::new(), size: 300 }),
                300,
                b"\x11\0\x05\0\x2c\x01\0\0\x08\x01\x20\xac\x02",
            ),
            (
                Message::Spaces(Spaces { snapshot: 1, tasks: vec![7, 300], shmems: vec![9] }),
                0,
                b"\x12\0\x0a\0\0\0\0\0\x08\x01\x12\x03\x07\xac\x02\x1a\x01\x09",
            ),
            (
                Message::Space(Space { snapshot: 1, shmem: true, id: 300 }),
                0,
                b"\x13\0\x07\0\0\0\0\0\x08\x01\x10\x01\x18\xac\x02",
            ),
            (
                Message::Pages(Pages { snapshot: 1, address: 4096, pages: 2, flags: 4 }),
                0,
                b"\x14\0\x09\0\0\0\0\0\x08\x01\x10\x80\x20\x18\x02\x20\x04",
            ),
            (
                Message::PagesForget(PagesForget { id: "web".into() }),
                0,
                b"\x16\0\x05\0\0\0\0\0\x0a\x03web",
            ),
            (
                Message::PagesRequest(PagesRequest {
                    request: 1,
                    snapshot_id: "web".into(),
                    shmem: true,
                    id: 300,
                    address: 4096,
                    pages: 2,
                }),
                0,
                b"\x17\0\x11\0\0\0\0\0\x08\x01\x12\x03web\x18\x01\x20\xac\x02\x28\x80\x20\x30\x02",
            ),
            (
                Message::withdraw(1, "web", 300, "no"),
                0,
                b"\x18\0\x0e\0\0\0\0\0\x08\x01\x12\x03web\x18\xac\x02\x22\x02no",
            ),
            (
                Message::SnapshotWithdrawn(SnapshotWithdrawn {
                    request: 1,
                    outcome: Outcome::Taken as i32,
                }),
                0,
                b"\x19\0\x04\0\0\0\0\0\x08\x01\x10\x02",
            ),
            (Message::PageData(PageData { snapshot: 1 }), 8192, b"\x15\0\x02\0\0\x20\0\0\x08\x01"),
            (Message::no_region(1, 2, "no"), 0, b"\x11\0\x08\0\0\0\0\0\x08\x01\x10\x02\x1a\x02no"),
        ]
    }

    #[test]
    fn every_message_is_these_bytes() {
        for (message, payload, bytes) in golden() {
            assert_eq!(message.encode(payload), bytes, "{message:?}");
            assert_eq!(decode(bytes).unwrap(), message);
        }
    }

    #[test]
    fn unknown_fields_are_passed_over() {
        let bytes = b"\x0b\0\x09\0\0\0\0\0\x08\x01\x10\x02\x18\xac\x02\x48\x01";
        let Message::ImageEnd(end) = decode(bytes).unwrap() else { panic!() };
        assert_eq!(end.size, 300);
    }

    #[test]
    fn unknown_kinds_wrong_payloads_and_torn_messages_are_refused_in_words() {
        let refused = |bytes: &[u8]| decode(bytes).unwrap_err().to_string();
        assert_eq!(refused(b"\x1a\0\0\0\0\0\0\0"), "a message of the unknown kind 26");
        assert_eq!(refused(b"\0\0\0\0\0\0\0\0"), "a message of the unknown kind 0");
        assert_eq!(refused(b"\x04\0\0\0\x01\0\0\0"), "a KEEP_ALIVE with a payload of 1 bytes");
        assert_eq!(refused(b"\x0a\0\0\0\0\0\0\0"), "a IMAGE_DATA with a payload of 0 bytes");
        let torn = refused(b"\x05\0\x02\0\0\0\0\0\x12\x09");
        assert!(torn.starts_with("a SNAPSHOT_BEGIN that does not decode"), "{torn}");
    }

    #[test]
    fn a_reason_from_a_peer_moves_no_cursor() {
        let said = Message::abort(1, "a\x1b[2Jb\nc").encode(0);
        assert_eq!(decode(&said).unwrap(), Message::abort(1, "a?[2Jb?c"));
    }

    #[test]
    fn a_long_reason_is_cut_to_fit() {
        let bytes = Message::abort(1, &"ö".repeat(5000)).encode(0);
        let Message::SnapshotAbort(abort) = decode(&bytes).unwrap() else { panic!() };
        assert_eq!(abort.reason.len(), REASON_MAX);
    }

    proptest! {
        #[test]
        fn names_and_numbers_survive_the_way(
            snapshot: u32, image: u32, offset: u64, name in ".{0,200}", payload in 1..=PAYLOAD_MAX,
        ) {
            let begin = Message::ImageBegin(ImageBegin { snapshot, image, name, append: false });
            prop_assert_eq!(decode(&begin.encode(0)).unwrap(), begin);
            let data = Message::ImageData(ImageData { snapshot, image, offset });
            prop_assert_eq!(decode(&data.encode(payload)).unwrap(), data);
        }

        #[test]
        fn no_bytes_make_the_decoder_panic(
            kind in 0u16..27, payload_len in 0usize..10, bytes: Vec<u8>,
        ) {
            let header = Header { kind, message_len: bytes.len(), payload_len };
            let _ = Message::decode(header, &bytes);
        }
    }
}
