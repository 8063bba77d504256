//! What CRIU says: one module per protocol, codecs and session state machines without sockets.

pub mod capture;
mod fields;
pub mod historical;
pub mod images;
pub mod names;
pub mod page_server;
pub mod pagemap;
pub mod pages;
pub mod pipes;
pub mod remote;
pub mod stats;
pub mod stream;

#[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic)]
#[rustfmt::skip]
mod generated;

/// A message as CRIU sends and expects it: after its 32-bit little-endian length.
fn with_len(message: &impl prost::Message) -> Vec<u8> {
    let len = u32::try_from(message.encoded_len()).unwrap_or(u32::MAX);
    let mut bytes = len.to_le_bytes().to_vec();
    bytes.extend_from_slice(&message.encode_to_vec());
    bytes
}
