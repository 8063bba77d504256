//! The messages of CRIU's `--remote` (`images/remote-image.proto` and `img-remote.c` of its
//! development branch until 2020), with what the relay adds: a 32-bit little-endian length and a
//! protobuf message.

use prost::Message;
use rustix::io::Errno;

use super::generated::remote::{LocalImageEntry, LocalImageReplyEntry, SnapshotIdEntry};
use super::historical::{self, Side};
use super::names::{BadName, check_id, check_image, check_list, cut};
use super::with_len;

/// The socket in the work-dir that a dump connects to.
pub const PROXY_SOCKET: &str = "img-proxy.sock";
/// The socket in the work-dir that a restore connects to.
pub const CACHE_SOCKET: &str = "img-cache.sock";

/// The length before each message, in bytes.
pub const LENGTH_LEN: usize = 4;
/// No header and no reply is longer than this, in bytes.
pub const HEADER_MAX: usize = 16384;
/// No entry of a list is longer than this, in bytes.
pub const ENTRY_MAX: usize = 8192;

/// The image that is a list of snapshot ids.
pub const PARENT: &str = "parent";

/// `open_mode`: `O_RDONLY`, `O_WRONLY` and `O_APPEND` of Linux on x86.
const READ: u32 = 0;
const WRITE: u32 = 1;
const APPEND: u32 = 0o2000;

/// The fields that a header cannot do without: decoding it takes one that is absent for an empty one,
/// and an absent mode for a read. The mode is as wide as it may come: decoding it as 32 bits drops the others.
#[derive(Clone, PartialEq, Message)]
struct Required {
    #[prost(string, optional, tag = "1")]
    name: Option<String>,
    #[prost(string, optional, tag = "2")]
    snapshot_id: Option<String>,
    #[prost(uint64, optional, tag = "3")]
    open_mode: Option<u64>,
}

/// What a client asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// To read an image.
    Read {
        /// The snapshot's id.
        snapshot: String,
        /// The image's name.
        name: String,
        /// Whether through a pipe; `None` if it does not say.
        pipe: Option<bool>,
    },
    /// To write an image.
    Write {
        /// The snapshot's id.
        snapshot: String,
        /// The image's name.
        name: String,
        /// Whether to go on at its end.
        append: bool,
        /// Whether the client waits for the cache.
        acknowledge: bool,
    },
    /// To read a list of ids.
    ReadList {
        /// Its name.
        list: String,
        /// Whether through a pipe.
        pipe: bool,
    },
    /// To append ids to a list.
    AppendToList {
        /// Its name.
        list: String,
        /// Whether the client waits for the cache.
        acknowledge: bool,
    },
    /// A dump has ended.
    EndOfDump {
        /// The snapshot's id.
        snapshot: String,
        /// How many images the client opened, if it says so.
        images: Option<u64>,
        /// Whether the client waits for the cache.
        acknowledge: bool,
    },
    /// A restore has ended.
    EndOfRestore {
        /// The snapshot's id.
        snapshot: String,
    },
    /// The dump of an old client has ended, whatever it was.
    HistoricalEndOfDump,
    /// The restore of an old client has ended, whatever it was.
    HistoricalEndOfRestore,
}

/// What is wrong with a header, or an entry of a list. The session ends; nothing else does.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadHeader {
    /// The announced length is over the limit. Nothing was allocated for it.
    #[error("a message of {0} bytes; at most {1} are accepted")]
    TooLong(usize, usize),
    /// It does not decode.
    #[error("a message that is not a protobuf {0}: {1}")]
    NotThat(&'static str, String),
    /// See [`BadName`].
    #[error("{0}")]
    Name(#[from] BadName),
    /// No such mode.
    #[error("open mode {0} is none of 0 (read), 1 (write) and 1024 (append)")]
    Mode(u64),
    /// It is none of this protocol.
    #[error(
        "a bad image name \"\": it is empty, as in the endings of CRIU's old --remote clients, which are \
         understood with remote.historical-endings = true"
    )]
    HistoricalEnding,
    /// The list can only grow.
    #[error("a list of ids can be appended to, not written")]
    WrittenList,
    /// It is not the mode for that end.
    #[error("the end of a dump has open mode 1, that of a restore 0; this one has {0}")]
    EndMode(u32),
}

/// Decodes the length that precedes a message of at most `limit` bytes.
pub fn message_len(length: [u8; LENGTH_LEN], limit: usize) -> Result<usize, BadHeader> {
    let len = u32::from_le_bytes(length) as usize;
    if len > limit { Err(BadHeader::TooLong(len, limit)) } else { Ok(len) }
}

impl Request {
    /// Decodes a header, without its length. With `historical` the endings of the old clients are
    /// understood.
    pub fn decode(message: &[u8], historical: bool) -> Result<Request, BadHeader> {
        let not_that = |why| BadHeader::NotThat("local_image_entry", why);
        let header =
            LocalImageEntry::decode(message).map_err(|error| not_that(error.to_string()))?;
        let mode = required(message).map_err(|field| not_that(format!("it has no {field}")))?;
        if mode != u64::from(header.open_mode) {
            return Err(BadHeader::Mode(mode));
        }
        if historical {
            match historical::ending(&header.name, &header.snapshot_id, header.open_mode) {
                Some(Side::Dump) => return Ok(Request::HistoricalEndOfDump),
                Some(Side::Restore) => return Ok(Request::HistoricalEndOfRestore),
                None => {}
            }
        }
        if !matches!(header.open_mode, READ | WRITE | APPEND) {
            return Err(BadHeader::Mode(mode));
        }
        if header.finish() {
            return Request::end(header);
        }
        if header.name == PARENT {
            return Request::list(header);
        }
        if historical::can_only_be_an_ending(&header.name, &header.snapshot_id, header.open_mode) {
            return Err(BadHeader::HistoricalEnding);
        }
        check_image(&header.name)?;
        check_id(&header.snapshot_id)?;
        let acknowledge = header.acknowledge();
        let LocalImageEntry { name, snapshot_id: snapshot, open_mode, pipe, .. } = header;
        Ok(match open_mode {
            READ => Request::Read { snapshot, name, pipe },
            mode => Request::Write { snapshot, name, append: mode == APPEND, acknowledge },
        })
    }

    fn end(header: LocalImageEntry) -> Result<Request, BadHeader> {
        check_id(&header.snapshot_id)?;
        let acknowledge = header.acknowledge();
        let LocalImageEntry { snapshot_id: snapshot, open_mode, images, .. } = header;
        match open_mode {
            WRITE => Ok(Request::EndOfDump { snapshot, images, acknowledge }),
            READ => Ok(Request::EndOfRestore { snapshot }),
            mode => Err(BadHeader::EndMode(mode)),
        }
    }

    fn list(header: LocalImageEntry) -> Result<Request, BadHeader> {
        check_list(&header.snapshot_id)?;
        let (pipe, acknowledge) = (header.pipe(), header.acknowledge());
        let list = header.snapshot_id;
        match header.open_mode {
            READ => Ok(Request::ReadList { list, pipe }),
            APPEND => Ok(Request::AppendToList { list, acknowledge }),
            _ => Err(BadHeader::WrittenList),
        }
    }

    /// Encodes a header with its length, as a client sends it.
    pub fn encode(&self) -> Vec<u8> {
        let mut header = LocalImageEntry::default();
        match self.clone() {
            Request::Read { snapshot, name, pipe } => {
                (header.name, header.snapshot_id, header.pipe) = (name, snapshot, pipe);
            }
            Request::Write { snapshot, name, append, acknowledge } => {
                (header.name, header.snapshot_id) = (name, snapshot);
                header.open_mode = if append { APPEND } else { WRITE };
                header.acknowledge = acknowledge.then_some(true);
            }
            Request::ReadList { list, pipe } => {
                (header.name, header.snapshot_id) = (PARENT.to_owned(), list);
                header.pipe = pipe.then_some(true);
            }
            Request::AppendToList { list, acknowledge } => {
                (header.name, header.snapshot_id) = (PARENT.to_owned(), list);
                header.open_mode = APPEND;
                header.acknowledge = acknowledge.then_some(true);
            }
            Request::EndOfDump { snapshot, images, acknowledge } => {
                (header.snapshot_id, header.images) = (snapshot, images);
                (header.open_mode, header.finish) = (WRITE, Some(true));
                header.acknowledge = acknowledge.then_some(true);
            }
            Request::EndOfRestore { snapshot } => {
                (header.snapshot_id, header.finish) = (snapshot, Some(true));
            }
            Request::HistoricalEndOfDump => header.open_mode = WRITE,
            Request::HistoricalEndOfRestore => {}
        }
        with_len(&header)
    }
}

/// What a daemon answers.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Reply {
    /// 0, or an errno.
    pub error: u32,
    /// Why, for people; empty without an error.
    pub reason: String,
    /// How many bytes follow, for a read.
    pub size: Option<u64>,
}

/// No reason is longer than this, in bytes.
const REASON_MAX: usize = 1024;

impl Reply {
    /// All is well.
    pub fn done() -> Reply {
        Reply::default()
    }

    /// An image of `size` bytes follows.
    pub fn found(size: u64) -> Reply {
        Reply { size: Some(size), ..Reply::default() }
    }

    /// It cannot be done.
    pub fn refused(error: Errno, reason: &str) -> Reply {
        let error = error.raw_os_error().unsigned_abs();
        Reply { error, reason: cut(reason, REASON_MAX).to_owned(), size: None }
    }

    /// Encodes a reply with its length.
    pub fn encode(&self) -> Vec<u8> {
        let reason = (!self.reason.is_empty()).then(|| self.reason.clone());
        with_len(&LocalImageReplyEntry { error: self.error, reason, size: self.size })
    }

    /// Decodes a reply, without its length.
    pub fn decode(message: &[u8]) -> Result<Reply, BadHeader> {
        let reply = LocalImageReplyEntry::decode(message)
            .map_err(|error| BadHeader::NotThat("local_image_reply_entry", error.to_string()))?;
        let LocalImageReplyEntry { error, reason, size } = reply;
        Ok(Reply { error, reason: reason.unwrap_or_default(), size })
    }
}

/// The errno that a peer names. Linux has none beyond 4095, and rustix panics on what is none.
pub fn errno_of(error: u32) -> Errno {
    match i32::try_from(error) {
        Ok(known @ 1..=4095) => Errno::from_raw_os_error(known),
        _ => Errno::IO,
    }
}

/// Encodes an entry of a list with its length.
pub fn encode_id(id: &str) -> Vec<u8> {
    with_len(&SnapshotIdEntry { snapshot_id: id.to_owned() })
}

/// Decodes an entry of a list, without its length.
pub fn decode_id(message: &[u8]) -> Result<String, BadHeader> {
    let entry = SnapshotIdEntry::decode(message)
        .map_err(|error| BadHeader::NotThat("snapshot_id_entry", error.to_string()))?;
    check_id(&entry.snapshot_id)?;
    Ok(entry.snapshot_id)
}

/// The content of a list.
pub fn encode_ids(ids: &[String]) -> Vec<u8> {
    ids.iter().flat_map(|id| encode_id(id)).collect()
}

/// The mode of a header that has all that it needs; else the first field that it lacks.
fn required(message: &[u8]) -> Result<u64, &'static str> {
    let Required { name, snapshot_id, open_mode } = Required::decode(message).unwrap_or_default();
    name.ok_or("name")?;
    snapshot_id.ok_or("snapshot_id")?;
    open_mode.ok_or("open_mode")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn decode(bytes: &[u8]) -> Result<Request, BadHeader> {
        Request::decode(&bytes[LENGTH_LEN..], false)
    }

    #[test]
    fn an_old_clients_header_is_understood() {
        let bytes = b"\x13\0\0\0\x0a\x0acore-7.img\x12\x03web\x18\x00";
        let read = Request::Read { snapshot: "web".into(), name: "core-7.img".into(), pipe: None };
        assert_eq!(decode(bytes).unwrap(), read);
        assert_eq!(read.encode(), bytes);
        let bytes = b"\x0d\0\0\0\x0a\x06parent\x12\0\x18\x80\x08";
        let append = Request::AppendToList { list: String::new(), acknowledge: false };
        assert_eq!(decode(bytes).unwrap(), append);
    }

    #[test]
    fn replies_are_these_bytes() {
        assert_eq!(Reply::done().encode(), b"\x02\0\0\0\x08\0");
        assert_eq!(Reply::found(300).encode(), b"\x06\0\0\0\x08\0\x88\x01\xac\x02");
        let refused = Reply::refused(Errno::NOENT, "no");
        assert_eq!(refused.encode(), b"\x07\0\0\0\x08\x02\x82\x01\x02no");
        assert_eq!(Reply::decode(&refused.encode()[LENGTH_LEN..]).unwrap(), refused);
    }

    #[test]
    fn what_is_no_errno_is_eio() {
        assert_eq!(errno_of(2), Errno::NOENT);
        for none in [0, 4096, 5000, u32::MAX] {
            assert_eq!(errno_of(none), Errno::IO, "{none}");
        }
    }

    #[test]
    fn headers_against_the_rules_are_refused_in_words() {
        let refused = |name: &str, id: &str, mode, finish| {
            let header = LocalImageEntry {
                name: name.into(),
                snapshot_id: id.into(),
                open_mode: mode,
                finish,
                ..LocalImageEntry::default()
            };
            decode(&with_len(&header)).unwrap_err().to_string()
        };
        assert_eq!(
            refused("a.img", "web", 2, None),
            "open mode 2 is none of 0 (read), 1 (write) and 1024 (append)"
        );
        assert_eq!(refused("", "web", 1, None), "a bad image name \"\": it is empty");
        assert_eq!(refused("a.img", "", 1, None), "a bad snapshot id \"\": it is empty");
        assert_eq!(refused("a/b", "web", 0, None), "a bad image name \"a/b\": it contains a slash");
        assert!(refused("parent", "", 1, None).contains("appended to"));
        assert!(refused("", "web", 1024, Some(true)).contains("open mode 1"));
        assert!(decode(b"\0\0\0\0\x0a\x7f").unwrap_err().to_string().contains("local_image_entry"));
        let long = message_len(16385u32.to_le_bytes(), HEADER_MAX).unwrap_err();
        assert_eq!(long.to_string(), "a message of 16385 bytes; at most 16384 are accepted");
    }

    #[test]
    fn a_header_without_a_required_field_is_none() {
        let refused = |bytes: &[u8]| Request::decode(bytes, true).unwrap_err().to_string();
        for (bytes, field) in [
            (&b""[..], "name"),
            (b"\x12\x03web\x18\0", "name"),
            (b"\x0a\x06parent\x18\0", "snapshot_id"),
            (b"\x0a\0\x12\x03web\x80\x01\x01", "open_mode"),
        ] {
            let why = format!("local_image_entry: it has no {field}");
            assert!(refused(bytes).ends_with(&why), "{bytes:?}");
        }
    }

    #[test]
    fn a_mode_of_more_than_32_bits_is_none_of_those_that_its_last_32_bits_would_be() {
        for (mode, bytes) in [
            (1 << 32, &b"\x80\x80\x80\x80\x10"[..]),
            ((1 << 32) + 1, b"\x81\x80\x80\x80\x10"),
            (u64::MAX, b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"),
        ] {
            for historical in [false, true] {
                for name in [&b"\x0a\x05a.img\x12\x03web\x18"[..], b"\x0a\0\x12\0\x18"] {
                    let header = [name, bytes].concat();
                    let refused = Request::decode(&header, historical).unwrap_err().to_string();
                    assert!(
                        refused.starts_with(&format!("open mode {mode} is none of")),
                        "{refused}"
                    );
                }
            }
        }
    }

    #[test]
    fn the_longest_names_fit() {
        let write = Request::Write {
            snapshot: "s".repeat(4096),
            name: "n".repeat(4096),
            append: false,
            acknowledge: true,
        };
        let bytes = write.encode();
        let len = message_len(bytes[..LENGTH_LEN].try_into().unwrap(), HEADER_MAX).unwrap();
        assert_eq!((len, decode(&bytes)), (bytes.len() - LENGTH_LEN, Ok(write)));
    }

    #[test]
    fn a_list_is_a_row_of_entries() {
        let ids = ["web".to_owned(), "/tmp/2".to_owned()];
        assert_eq!(encode_ids(&ids), b"\x05\0\0\0\x0a\x03web\x08\0\0\0\x0a\x06/tmp/2");
        assert_eq!(decode_id(b"\x0a\x03web").unwrap(), "web");
        assert!(decode_id(b"\x0a\0").is_err());
    }

    proptest! {
        #[test]
        fn requests_survive_the_way(
            snapshot in "[a-z/]{1,20}", name in "[a-w]{1,20}", append: bool, acknowledge: bool,
            pipe: Option<bool>, images: Option<u64>,
        ) {
            let list = snapshot.clone();
            for request in [
                Request::Read { snapshot: snapshot.clone(), name: name.clone(), pipe },
                Request::Write { snapshot: snapshot.clone(), name, append, acknowledge },
                Request::ReadList { list: list.clone(), pipe: append },
                Request::AppendToList { list, acknowledge },
                Request::EndOfDump { snapshot: snapshot.clone(), images, acknowledge },
                Request::EndOfRestore { snapshot },
            ] {
                prop_assert_eq!(decode(&request.encode()), Ok(request));
            }
        }

        #[test]
        fn no_bytes_make_the_decoder_panic(bytes: Vec<u8>, historical: bool) {
            let _ = Request::decode(&bytes, historical);
            let _ = Reply::decode(&bytes);
            let _ = decode_id(&bytes);
        }
    }
}
