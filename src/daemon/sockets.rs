//! The sockets: from systemd by name, or bound by the daemon itself. The link's may be a connection
//! that somebody else made.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use listenfd::ListenFd;

use super::fd_store;
use crate::config::Endpoint;
use crate::sys::connected::Connected;
use crate::sys::{inherited, unix};

/// Names of the sockets, as `FileDescriptorName=` has them.
const STREAM: &str = "stream";
const REMOTE: &str = "remote";
const CONTROL: &str = "control";
const LINK: &str = "link";
const PAGES: &str = "pages";
const METRICS: &str = "metrics";
/// What systemd names the one connection of a service whose socket has `Accept=yes`.
const CONNECTION: &str = "connection";

/// The control socket in the work-dir.
pub const CONTROL_SOCKET: &str = "control.sock";

/// A socket that listens for peers which may be elsewhere: TCP, or a unix socket that a tunnel leads to, as
/// with the units of instances, which have no port of their own.
#[derive(Debug)]
pub enum Bound {
    /// TCP.
    Tcp(TcpListener),
    /// A unix socket.
    Unix(UnixListener),
}

/// What a daemon listens on. Several of a name are all served.
#[derive(Debug, Default)]
pub struct Sockets {
    /// CRIU's stream protocol.
    pub stream: Vec<UnixListener>,
    /// The remote protocol.
    pub remote: Vec<UnixListener>,
    /// CRIU's page server protocol.
    pub pages: Vec<Bound>,
    /// Varlink.
    pub control: Vec<UnixListener>,
    /// The figures.
    pub metrics: Vec<Bound>,
    /// The link (cache only).
    pub link: Vec<Bound>,
    /// The link itself, where somebody else made it: nothing listens for another then.
    pub connected: Option<Connected>,
    /// Files that systemd kept since the cache ran before, by the names they were [kept](super::fd_store) under.
    pub kept: Vec<(String, File)>,
}

/// Why there are no sockets to serve.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The environment that systemd set does not fit its descriptors.
    #[error("systemd's descriptors cannot be taken: {0}")]
    Environment(io::Error),
    /// A descriptor is not what its name promises.
    #[error("the descriptor that systemd named {name:?} cannot be used: {cause}")]
    Descriptor {
        /// Its `FileDescriptorName=`.
        name: String,
        /// Why.
        cause: io::Error,
    },
    /// A name that this daemon has no use for.
    #[error("systemd handed over a socket named {0:?}; this daemon knows {1}")]
    Unknown(String, String),
    /// The one link that there can be, and another or a socket for more.
    #[error("a connected socket is the only link; {0} cannot be used as well")]
    OneLink(&'static str),
    /// Not all were handed over.
    #[error(
        "systemd handed over no socket named {name:?}; start {unit}.socket, or {unit}@NAME.socket of \
         instance NAME"
    )]
    Missing {
        /// The name.
        name: &'static str,
        /// The unit that has it, without instance and suffix.
        unit: String,
    },
    /// A path cannot be bound.
    #[error("cannot listen on {}: {cause}", path.display())]
    Bind {
        /// The path.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// The address of the link, of the page server, or of the figures, cannot be bound.
    #[error("cannot listen on {address} ({key}): {cause}")]
    Listen {
        /// What of the configuration says it.
        key: &'static str,
        /// The address.
        address: String,
        /// Why.
        cause: io::Error,
    },
}

/// What a daemon needs to bind for itself where systemd hands nothing over.
#[derive(Debug, Clone, Copy)]
pub struct Wanted<'a> {
    /// The daemon, as its units are named.
    pub daemon: &'static str,
    /// The directory of the unix sockets.
    pub work_dir: &'a Path,
    /// The stream socket's name in it.
    pub stream: &'static str,
    /// The remote protocol's socket in it.
    pub remote: &'static str,
    /// The page server's address, if it is to listen.
    pub pages: Option<&'a str>,
    /// Where the figures are served, if they are.
    pub metrics: Option<&'a Endpoint>,
    /// The link's address, where the daemon listens for one.
    pub link: Option<&'a str>,
}

impl Sockets {
    /// Takes the sockets from systemd, or binds them. `given` is a link that is connected. To be
    /// called while there is one thread.
    pub fn acquire(wanted: Wanted<'_>, given: Option<Connected>) -> Result<Sockets, SocketError> {
        // The names have to be read before listenfd clears the environment.
        let names: Vec<String> = sd_notify::listen_fds_with_names()
            .map_err(SocketError::Environment)?
            .map(|(_, name)| name)
            .collect();
        let by_itself = names.iter().all(|name| name == CONNECTION || fd_store::is_ours(name));
        let mut sockets = Sockets { connected: given, ..Sockets::default() };
        sockets.inherit(wanted, names)?;
        // With Accept=yes systemd has nothing else to hand over.
        if by_itself {
            sockets.bind(wanted)?;
        } else {
            sockets.check(wanted)?;
        }
        Ok(sockets)
    }

    /// What is served and where, for people. What was bound here is in `work_dir`.
    pub fn describe(&self, work_dir: &Path) -> String {
        let unix = |socket: &UnixListener| match socket.local_addr() {
            Ok(address) => match address.as_pathname() {
                Some(path) => told(path, work_dir).display().to_string(),
                None => "a unix socket".to_owned(),
            },
            Err(error) => format!("a unix socket ({error})"),
        };
        let either = |socket: &Bound| match socket {
            Bound::Unix(socket) => unix(socket),
            Bound::Tcp(socket) => match socket.local_addr() {
                Ok(address) => address.to_string(),
                Err(error) => format!("a TCP socket ({error})"),
            },
        };
        let on = |name: &str, places: Vec<String>| -> Vec<String> {
            places.into_iter().map(|place| format!("{name} on {place}")).collect()
        };
        let connected = self.connected.iter().map(|link| format!("{LINK} to {}", link.peer()));
        let all = [
            on(STREAM, self.stream.iter().map(unix).collect()),
            on(REMOTE, self.remote.iter().map(unix).collect()),
            on(PAGES, self.pages.iter().map(either).collect()),
            on(CONTROL, self.control.iter().map(unix).collect()),
            on(LINK, self.link.iter().map(either).collect()),
            connected.collect(),
        ];
        all.concat().join(", ")
    }

    fn inherit(&mut self, wanted: Wanted<'_>, names: Vec<String>) -> Result<(), SocketError> {
        let mut descriptors = ListenFd::from_env();
        for (index, name) in names.into_iter().enumerate() {
            let taken = match name.as_str() {
                STREAM => take_unix(&mut descriptors, index, &mut self.stream),
                REMOTE => take_unix(&mut descriptors, index, &mut self.remote),
                PAGES => take_bound(&mut descriptors, index, &mut self.pages),
                METRICS => take_bound(&mut descriptors, index, &mut self.metrics),
                CONTROL => take_unix(&mut descriptors, index, &mut self.control),
                LINK | CONNECTION if wanted.link.is_some() && self.connected.is_some() => {
                    return Err(SocketError::OneLink("what systemd handed over for it"));
                }
                LINK if wanted.link.is_some() => {
                    take_bound(&mut descriptors, index, &mut self.link)
                }
                CONNECTION if wanted.link.is_some() => take_connected(&mut descriptors, index)
                    .map(|connected| self.connected = Some(connected)),
                kept if wanted.link.is_some() && fd_store::is_ours(kept) => {
                    inherited::take_file(&mut descriptors, index)
                        .map(|file| self.kept.push((name.clone(), file.into())))
                }
                _ => {
                    let known = if wanted.link.is_some() {
                        "stream, remote, pages, metrics, control, link, connection"
                    } else {
                        "stream, remote, pages, metrics, control"
                    };
                    return Err(SocketError::Unknown(name, known.to_owned()));
                }
            };
            taken.map_err(|cause| SocketError::Descriptor { name, cause })?;
        }
        if self.connected.is_some() && !self.link.is_empty() {
            return Err(SocketError::OneLink("the socket that systemd named \"link\""));
        }
        Ok(())
    }

    /// Whether all that is needed was handed over.
    fn check(&self, wanted: Wanted<'_>) -> Result<(), SocketError> {
        let needs_link = wanted.link.is_some() && self.connected.is_none();
        // A site without clients for the remote or the page server protocol masks its socket.
        for (name, missing) in [
            (STREAM, self.stream.is_empty()),
            (CONTROL, self.control.is_empty()),
            (LINK, needs_link && self.link.is_empty()),
        ] {
            if missing {
                let unit = format!("{}-{name}", wanted.daemon);
                return Err(SocketError::Missing { name, unit });
            }
        }
        if wanted.metrics.is_some() && self.metrics.is_empty() {
            tracing::info!(
                "metrics.listen is not used, as systemd makes the sockets, and figures are not served: \
                 {}-{METRICS}.socket is not started",
                wanted.daemon
            );
        }
        Ok(())
    }

    fn bind(&mut self, wanted: Wanted<'_>) -> Result<(), SocketError> {
        let bind = |name| {
            unix::bind(wanted.work_dir, name)
                .map_err(|cause| SocketError::Bind { path: wanted.work_dir.join(name), cause })
        };
        std::fs::create_dir_all(wanted.work_dir)
            .map_err(|cause| SocketError::Bind { path: wanted.work_dir.to_owned(), cause })?;
        self.stream.push(bind(wanted.stream)?);
        self.remote.push(bind(wanted.remote)?);
        self.control.push(bind(CONTROL_SOCKET)?);
        let listen = |key, address: &str| {
            let failed = |cause| SocketError::Listen { key, address: address.to_owned(), cause };
            listen_on(address).map(Bound::Tcp).map_err(failed)
        };
        if let (Some(address), None) = (wanted.link, &self.connected) {
            self.link.push(listen("listen", address)?);
        }
        if let Some(address) = wanted.pages {
            self.pages.push(listen("pages.listen", address)?);
        }
        match wanted.metrics {
            Some(Endpoint::Tcp(address)) => self.metrics.push(listen("metrics.listen", address)?),
            Some(Endpoint::Unix(path)) => self.metrics.push(bind_path(path)?),
            None => {}
        }
        Ok(())
    }
}

/// Listens on an address. As many connections may wait to be accepted as the kernel lets wait (`net.core.somaxconn`),
/// which is what systemd asks for, too: a further one is not answered, and its peer tries again only after a second.
fn listen_on(address: &str) -> io::Result<TcpListener> {
    // It lets 128 wait.
    let listener = TcpListener::bind(address)?;
    rustix::net::listen(&listener, i32::MAX)?;
    Ok(listener)
}

/// A socket's path as it was given: one that is too long for a socket was bound [another way](unix::bind).
fn told(bound: &Path, work_dir: &Path) -> PathBuf {
    match bound.file_name() {
        Some(name) if bound.starts_with("/proc/self/fd") => work_dir.join(name),
        _ => bound.to_owned(),
    }
}

fn bind_path(path: &Path) -> Result<Bound, SocketError> {
    let failed = |cause| SocketError::Bind { path: path.to_owned(), cause };
    let (Some(dir), Some(name)) = (path.parent(), path.file_name().and_then(OsStr::to_str)) else {
        return Err(failed(io::ErrorKind::InvalidInput.into()));
    };
    unix::bind(dir, name).map(Bound::Unix).map_err(failed)
}

/// listenfd looks at the family of a socket, not at whether it listens.
fn take_connected(descriptors: &mut ListenFd, index: usize) -> io::Result<Connected> {
    let taken = match descriptors.take_unix_listener(index) {
        Ok(socket) => socket.map(OwnedFd::from),
        Err(_) => descriptors.take_tcp_listener(index)?.map(OwnedFd::from),
    };
    let socket = taken.ok_or(io::ErrorKind::NotFound)?;
    Connected::adopt(socket).map_err(io::Error::other)
}

/// listenfd keeps a descriptor that is not of the family that was asked for.
fn take_bound(
    descriptors: &mut ListenFd,
    index: usize,
    sockets: &mut Vec<Bound>,
) -> io::Result<()> {
    match descriptors.take_unix_listener(index) {
        Ok(socket) => sockets.extend(socket.map(Bound::Unix)),
        Err(_) => sockets.extend(descriptors.take_tcp_listener(index)?.map(Bound::Tcp)),
    }
    Ok(())
}

fn take_unix(
    descriptors: &mut ListenFd,
    index: usize,
    sockets: &mut Vec<UnixListener>,
) -> io::Result<()> {
    sockets.extend(descriptors.take_unix_listener(index)?);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn more_than_a_few_hundred_connections_wait_to_be_accepted() {
        let listener = listen_on("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let let_wait = std::fs::read_to_string("/proc/sys/net/core/somaxconn").unwrap();
        let waiting = let_wait.trim().parse().unwrap_or(0).min(400);
        let connect = || std::net::TcpStream::connect_timeout(&address, Duration::from_millis(500));
        let all: Vec<_> = (0..waiting).map(|_| connect().unwrap()).collect();
        drop(all);
    }

    #[test]
    fn a_socket_is_told_by_the_path_that_was_given() {
        let work_dir = Path::new("/run/criu-image/proxy");
        for bound in ["/proc/self/fd/5/control.sock", "/run/criu-image/proxy/control.sock"] {
            assert_eq!(told(Path::new(bound), work_dir), work_dir.join(CONTROL_SOCKET), "{bound}");
        }
        let elsewhere = Path::new("/run/elsewhere.sock");
        assert_eq!(told(elsewhere, work_dir), elsewhere);
    }
}
