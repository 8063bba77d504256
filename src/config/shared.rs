//! The settings that both daemons have, and that options on the command line replace.

use std::path::PathBuf;

use super::{LINK_PORT, LogSettings};

/// They stand in the settings of each daemon; here is where.
#[derive(Debug)]
pub struct Shared<'a> {
    /// `HOST:PORT`: of the cache (proxy), or to listen on (cache). For the proxy it may be the path of a unix socket.
    pub address: &'a mut String,
    /// Where unix sockets are bound.
    pub work_dir: &'a mut PathBuf,
    /// Whether it goes to the background.
    pub daemon: &'a mut bool,
    /// Where it writes its pid.
    pub pidfile: &'a mut Option<PathBuf>,
    /// What is logged, and where to.
    pub log: &'a mut LogSettings,
}

impl Shared<'_> {
    /// Replaces one part of the address, or both. `host` is what [`host`](super::host) returned. The part of a unix socket's
    /// path that is not named is 127.0.0.1, or [`LINK_PORT`].
    pub fn set_address(&mut self, host: Option<&str>, port: Option<u16>) {
        if host.is_none() && port.is_none() {
            return;
        }
        let default = LINK_PORT.to_string();
        // A setting has both parts; the port's colon is the last.
        let parts = self.address.rsplit_once(':').filter(|_| !self.address.starts_with('/'));
        let (old_host, old_port) = parts.unwrap_or(("127.0.0.1", &default));
        let host = host.unwrap_or(old_host);
        let port = port.map_or_else(|| old_port.to_owned(), |port| port.to_string());
        *self.address = format!("{host}:{port}");
    }
}
