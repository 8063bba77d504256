//! The control socket: a Varlink interface, `org.criu.ImageRelay`, and its client.

pub mod model;
