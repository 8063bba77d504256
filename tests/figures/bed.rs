//! A proxy and a cache that serve figures.

use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use tempfile::TempDir;

use crate::daemons::{SOON, unused_address};
use crate::hosts::Hosts;
use crate::scrape::{Scrape, text};

/// Both daemons, linked: the proxy serves its figures on TCP, the cache on a unix socket.
pub(crate) struct Bed {
    pub(crate) hosts: Hosts,
    proxy: SocketAddr,
    cache: PathBuf,
    _dir: TempDir,
}

impl Bed {
    pub(crate) fn start() -> Bed {
        Bed::with(&[])
    }

    /// With other settings of the cache than the defaults.
    pub(crate) fn with(settings: &[(&str, &str)]) -> Bed {
        let dir = tempfile::tempdir().unwrap();
        let (proxy, cache) = (unused_address(), dir.path().join("figures.sock"));
        let listen = [format!("{:?}", proxy.to_string()), format!("{:?}", cache.to_str().unwrap())];
        let cache_settings = [&[("metrics.listen", listen[1].as_str())], settings].concat();
        let hosts = Hosts::with(&[("metrics.listen", &listen[0])], &cache_settings);
        Bed { hosts, proxy, cache, _dir: dir }
    }

    /// The proxy's figures.
    pub(crate) fn proxy(&self) -> Scrape {
        Scrape::parse(&self.proxy_text())
    }

    /// The cache's figures.
    pub(crate) fn cache(&self) -> Scrape {
        let stream = UnixStream::connect(&self.cache).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        Scrape::parse(&text(stream))
    }

    /// The proxy's figures as they come.
    pub(crate) fn proxy_text(&self) -> String {
        let stream = TcpStream::connect(self.proxy).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        text(stream)
    }
}
