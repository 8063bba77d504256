//! The messages of `criu --stream`: a 32-bit little-endian length and a protobuf message, as CRIU's
//! `img-streamer.c` sends and expects them.

use prost::Message;

use super::generated::stream as generated;
use super::names::{BadName, check_name};
use super::with_len;

/// The socket in the work-dir that a dump connects to.
pub const CAPTURE_SOCKET: &str = "streamer-capture.sock";
/// The socket in the work-dir that a restore connects to.
pub const SERVE_SOCKET: &str = "streamer-serve.sock";

/// Asked for first on a connection by a restore that says what becomes of it, and lets somebody else read the images.
/// No image is called so: the answer is that there is none, and the snapshot is bound to that restore.
pub const HELD_BY_RESTORE: &str = "criu-imagectl-restore";
/// Asked for last by such a restore, if it has failed. One that has succeeded reads an image instead.
pub const RESTORE_FAILED: &str = "criu-imagectl-restore-failed";

/// The length before each message, in bytes.
pub const HEADER_LEN: usize = 4;
/// No request is longer than this, in bytes.
pub const REQUEST_MAX: usize = 4096;

/// What is wrong with a request. The session ends; nothing else does.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadRequest {
    /// The announced length is over the limit. Nothing was allocated for it.
    #[error("a request of {0} bytes; at most {REQUEST_MAX} are accepted")]
    TooLong(usize),
    /// It does not decode.
    #[error("a request that is not a protobuf img_streamer_request_entry: {0}")]
    NotARequest(String),
    /// The image name cannot be a file's name.
    #[error("{0}")]
    BadName(#[from] BadName),
}

/// Decodes the length that precedes a request.
pub fn request_len(header: [u8; HEADER_LEN]) -> Result<usize, BadRequest> {
    let len = u32::from_le_bytes(header) as usize;
    if len > REQUEST_MAX { Err(BadRequest::TooLong(len)) } else { Ok(len) }
}

/// Decodes a request, without its length: the name of the image that CRIU opens.
pub fn decode_request(message: &[u8]) -> Result<String, BadRequest> {
    let request = generated::Request::decode(message)
        .map_err(|error| BadRequest::NotARequest(error.to_string()))?;
    check_name(&request.filename)?;
    Ok(request.filename)
}

/// Encodes a request with its length, as CRIU does.
pub fn encode_request(filename: &str) -> Vec<u8> {
    with_len(&generated::Request { filename: filename.to_owned() })
}

/// Encodes the answer to a restore's request, with its length.
pub fn encode_reply(exists: bool) -> Vec<u8> {
    with_len(&generated::Reply { exists })
}

/// Decodes a reply, without its length.
pub fn decode_reply(message: &[u8]) -> Result<bool, prost::DecodeError> {
    Ok(generated::Reply::decode(message)?.exists)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_bytes_are_what_criu_sends_and_expects() {
        assert_eq!(encode_request("core-7.img"), b"\x0c\0\0\0\x0a\x0acore-7.img");
        assert_eq!(encode_reply(true), b"\x02\0\0\0\x08\x01");
        assert_eq!(encode_reply(false), b"\x02\0\0\0\x08\0");
        assert_eq!(decode_request(b"\x0a\x0acore-7.img").unwrap(), "core-7.img");
        assert!(decode_reply(b"\x08\x01").unwrap());
    }

    #[test]
    fn the_longest_request_is_4_kib() {
        assert_eq!(request_len(4096u32.to_le_bytes()), Ok(4096));
        assert_eq!(request_len(4097u32.to_le_bytes()), Err(BadRequest::TooLong(4097)));
        assert_eq!(request_len([0xff; 4]), Err(BadRequest::TooLong(u32::MAX as usize)));
    }

    #[test]
    fn a_request_without_a_name_or_with_torn_bytes_is_refused() {
        assert!(matches!(decode_request(b""), Err(BadRequest::BadName(_))));
        assert!(matches!(decode_request(b"\x0a\x0acore"), Err(BadRequest::NotARequest(_))));
        assert!(matches!(decode_request(b"\x0a\x01\xff"), Err(BadRequest::NotARequest(_))));
    }

    proptest! {
        #[test]
        fn a_request_survives_the_way(name in "[a-z0-9][a-z0-9-]{0,60}\\.img") {
            let bytes = encode_request(&name);
            let len = request_len(bytes[..4].try_into().unwrap()).unwrap();
            prop_assert_eq!(len, bytes.len() - 4);
            prop_assert_eq!(decode_request(&bytes[4..]).unwrap(), name);
        }

        #[test]
        fn no_bytes_make_the_decoder_panic(bytes: Vec<u8>) {
            let _ = decode_request(&bytes);
            let _ = decode_reply(&bytes);
        }
    }
}
