//! The values that are no quantities: flags, addresses, names, paths, log levels.

use super::{LINK_PORT, Reads, syntax::Syntax};
use serde::Serializer;
use std::{
    fmt,
    net::SocketAddrV6,
    path::{Path, PathBuf},
};
use tracing::Level;

/// Yes or no.
pub(super) struct Flag;

impl Syntax for Flag {
    type Value = bool;

    fn expected(f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("true or false, without quotes")
    }

    fn from_bool(flag: bool) -> Option<bool> {
        Some(flag)
    }

    fn write<S: Serializer>(flag: &bool, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_bool(*flag)
    }
}

/// `HOST[:PORT]`; once read, always with its port.
pub(super) struct HostPort;

impl HostPort {
    pub(super) fn parse(text: &str) -> Option<String> {
        if text.starts_with('[') {
            let full =
                if text.ends_with(']') { format!("{text}:{LINK_PORT}") } else { text.into() };
            return full.parse::<SocketAddrV6>().ok().filter(|a| a.port() != 0).map(|_| full);
        }
        let (host, port) = match text.split_once(':') {
            Some((host, port)) => (host, port.parse::<u16>().ok().filter(|p| *p != 0)?),
            None => (text, LINK_PORT),
        };
        let fits = host.len() <= 253 && host.starts_with(|c: char| c.is_ascii_alphanumeric());
        (fits && is_name(host)).then(|| format!("{host}:{port}"))
    }
}

/// An address to listen on, with its port, or none.
pub(super) struct Listen;

impl Syntax for Listen {
    type Value = Option<String>;

    fn expected(f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(r#"HOST:PORT, such as "127.0.0.1:9995" or "[::1]:9995", or "" for none"#)
    }

    fn from_text(text: &str) -> Option<Option<String>> {
        // What has no port is completed with the link's.
        let right = text.is_empty() || HostPort::parse(text).is_some_and(|full| full == text);
        right.then(|| Some(text.to_owned()).filter(|text| !text.is_empty()))
    }

    fn write<S: Serializer>(address: &Option<String>, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(address.as_deref().unwrap_or(""))
    }
}

/// Where a daemon listens that may be on a unix socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Endpoint {
    /// A unix socket at this path.
    Unix(PathBuf),
    /// A TCP socket at `HOST:PORT`.
    Tcp(String),
}

impl Endpoint {
    /// The longest path that a client can connect to by name (unix(7), `sun_path`).
    const MAX: usize = 107;

    fn parse(text: &str) -> Option<Endpoint> {
        let path = Path::new(text);
        if !path.is_absolute() {
            let full = HostPort::parse(text).filter(|full| full == text);
            return full.map(Endpoint::Tcp);
        }
        let right = path.file_name().is_some()
            && !text.ends_with('/')
            && text.len() <= Self::MAX
            && !text.contains('\0');
        right.then(|| Endpoint::Unix(path.into()))
    }
}

impl Syntax for Endpoint {
    type Value = Option<Self>;

    fn expected(f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            r#"HOST:PORT, such as "127.0.0.1:9998", an absolute path of at most {} bytes, such as "/run/metrics.sock", or "" for none"#,
            Self::MAX
        )
    }

    fn from_text(text: &str) -> Option<Option<Self>> {
        let endpoint = Self::parse(text);
        (text.is_empty() || endpoint.is_some()).then_some(endpoint)
    }

    fn write<S: Serializer>(endpoint: &Option<Self>, s: S) -> Result<S::Ok, S::Error> {
        match endpoint {
            Some(Endpoint::Unix(path)) => s.serialize_str(&path.to_string_lossy()),
            Some(Endpoint::Tcp(address)) => s.serialize_str(address),
            None => s.serialize_str(""),
        }
    }
}

/// The host of `HOST:PORT`, as an option names it: IPv6 with or without brackets. Returned with them.
pub(super) fn host(text: &str) -> Option<String> {
    let bracketed = format!("[{text}]");
    let name = if text.contains(':') && !text.starts_with('[') { &bracketed } else { text };
    // What has a port of its own is no host.
    let alone = name.starts_with('[') == name.ends_with(']');
    let right = alone && HostPort::parse(&format!("{name}:{LINK_PORT}")).is_some();
    right.then(|| name.to_owned())
}

impl Syntax for HostPort {
    type Value = String;

    fn expected(f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            r#"HOST or HOST:PORT, such as "host-b.example", "192.0.2.7:{LINK_PORT}" or "[2001:db8::7]:{LINK_PORT}""#
        )
    }

    fn from_text(text: &str) -> Option<String> {
        Self::parse(text)
    }

    fn write<S: Serializer>(address: &String, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(address)
    }
}

/// Where a cache is: [`HOST[:PORT]`](HostPort), or the absolute path of a unix socket, a tunnel's end.
pub(super) struct CacheAddress;

impl CacheAddress {
    pub(super) fn parse(text: &str) -> Option<String> {
        match Endpoint::parse(text) {
            Some(Endpoint::Unix(_)) => Some(text.to_owned()),
            _ => HostPort::parse(text),
        }
    }
}

impl Syntax for CacheAddress {
    type Value = String;

    fn expected(f: &mut fmt::Formatter<'_>) -> fmt::Result {
        HostPort::expected(f)?;
        f.write_str(", or the absolute path of a unix socket")
    }

    fn from_text(text: &str) -> Option<String> {
        Self::parse(text)
    }

    fn write<S: Serializer>(address: &String, s: S) -> Result<S::Ok, S::Error> {
        HostPort::write(address, s)
    }
}

/// The name a daemon gives itself; empty for the host's.
pub(super) struct Name;

impl Syntax for Name {
    type Value = String;

    fn expected(f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            r#"at most 64 letters, digits, ".", "-" or "_", such as "host-a", or "" for the host's own name"#
        )
    }

    fn from_text(text: &str) -> Option<String> {
        (text.len() <= 64 && is_name(text)).then(|| text.into())
    }

    fn write<S: Serializer>(name: &String, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(name)
    }
}

fn is_name(text: &str) -> bool {
    text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
}

/// A directory to bind sockets in.
pub(super) struct SocketDir;

impl SocketDir {
    /// The path of a unix socket has 107 bytes (unix(7)); this leaves 26 for a name.
    const MAX: usize = 80;
}

impl Syntax for SocketDir {
    type Value = PathBuf;

    fn expected(f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, r#"an absolute path of at most {} bytes, such as "/run/criu-image""#, Self::MAX)
    }

    fn from_text(text: &str) -> Option<PathBuf> {
        let right =
            Path::new(text).is_absolute() && text.len() <= Self::MAX && !text.contains('\0');
        right.then(|| text.into())
    }

    fn write<S: Serializer>(path: &PathBuf, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&path.to_string_lossy())
    }
}

impl Syntax for Reads {
    type Value = Self;

    fn expected(f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(r#""socket" or "pipe""#)
    }

    fn from_text(text: &str) -> Option<Self> {
        match text {
            "socket" => Some(Reads::Socket),
            "pipe" => Some(Reads::Pipe),
            _ => None,
        }
    }

    fn write<S: Serializer>(reads: &Self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(match reads {
            Reads::Socket => "socket",
            Reads::Pipe => "pipe",
        })
    }
}

/// A file that the daemon makes, or none.
pub(super) struct FilePath;

impl Syntax for FilePath {
    type Value = Option<PathBuf>;

    fn expected(f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(r#"an absolute path, such as "/run/criu-image.pid", or "" for none"#)
    }

    fn from_text(text: &str) -> Option<Option<PathBuf>> {
        let file = Some(text).filter(|text| !text.is_empty());
        let right = Path::new(text).is_absolute() && !text.contains('\0');
        (file.is_none() || right).then(|| file.map(Into::into))
    }

    fn write<S: Serializer>(path: &Option<PathBuf>, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&path.as_deref().unwrap_or(Path::new("")).to_string_lossy())
    }
}

impl Syntax for Level {
    type Value = Self;

    fn expected(f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(r#""error", "warn", "info", "debug" or "trace""#)
    }

    fn from_text(text: &str) -> Option<Self> {
        [Self::ERROR, Self::WARN, Self::INFO, Self::DEBUG, Self::TRACE]
            .into_iter()
            .find(|level| level.as_str().to_lowercase() == text)
    }

    fn write<S: Serializer>(level: &Self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&level.as_str().to_lowercase())
    }
}
