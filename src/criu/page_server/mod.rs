//! CRIU's page server protocol (`criu/page-xfer.c`): how `criu dump --page-server` sends pages, and how
//! `criu lazy-pages --page-server` asks for them.
//!
//! Headers of 24 or 32 bytes, little-endian; the two dialects do not announce themselves
//! ([`header`]). A header is a command ([`command`], [`kind`]), and pages may follow it. Some are answered
//! ([`answer`]). [`session`] checks the order of what a dump sends.

pub mod header;

pub mod kind;

pub mod command;

pub mod answer;

pub mod session;
