//! The system calls: pipes and splice, memfds, descriptors over unix sockets, the clock.
//!
//! Everything here goes through rustix's safe wrappers, so that the crate has no `unsafe` at all.
//! These functions decide nothing; the modules that use them do.

pub mod clock;
pub mod ends;
pub mod memfd;
pub mod pipe;
pub mod scm;
pub mod unix;
