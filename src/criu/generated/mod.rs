//! What `proto/*.proto` gives; `tests/proto.rs` compares.

pub(super) mod remote;
pub(super) mod stream;
