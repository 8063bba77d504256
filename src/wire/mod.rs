//! The link between a proxy and a cache: a preface, then frames over one TCP connection.
//!
//! ```text
//!  proxy                                   cache
//!    │ preface, Hello ───────────────────▶  │
//!    │ ◀─────────────────── preface, Welcome│
//!    │ SnapshotBegin 1 "web" ────────────▶  │
//!    │ ImageBegin 1/1 "core-7.img" ──────▶  │
//!    │ ImageBegin 1/2 "pages-1.img" ─────▶  │   images interleave
//!    │ ImageData 1/2 @0 + payload ───────▶  │
//!    │ ImageData 1/1 @0 + payload ───────▶  │
//!    │ ImageEnd 1/1, ImageEnd 1/2 ───────▶  │
//!    │ SnapshotEnd 1 complete, counts ───▶  │
//!    │ ◀──────────────── SnapshotAck 1      │   whole, and kept
//!    │ ◀─ SnapshotAbort, KeepAlive ──────▶  │   either side, any time
//! ```
//!
//! A frame is a [fixed header](frame), one protobuf [message], and raw payload. The header is what
//! a reader needs to allocate and to splice; bulk bytes are never part of a message.
//!
//! Versions: the preface's number changes when an old peer could misunderstand a new one. What an
//! old peer can do without is negotiated by name in Hello and Welcome, or is a new field.

pub mod frame;
pub mod message;
pub mod receiver;
pub mod sender;
pub mod spaces;

pub mod lane;

mod narrow;

#[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic)]
#[rustfmt::skip]
mod generated;
