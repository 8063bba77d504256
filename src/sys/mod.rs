//! The system calls: pipes and splice, memfds, connected sockets, descriptors that come over unix sockets or
//! from the parent, the clock, and whose the other end of a TCP connection is.
//!
//! Everything here goes through rustix's safe wrappers but one thing, which no safe call can do: to
//! take a descriptor that is named by its number (`inherited`). These functions decide nothing; the
//! modules that use them do.

pub mod clock;
pub mod connected;
pub mod ends;
pub mod held;
pub(crate) mod inherited;
pub mod memfd;
pub mod pipe;
pub mod pump;
pub mod scm;
pub mod sock_diag;
pub mod unix;
