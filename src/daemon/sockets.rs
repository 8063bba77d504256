//! The listening sockets: from systemd by name, or bound by the daemon itself.

use std::io;
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use listenfd::ListenFd;

use crate::sys::unix;

/// Names of the sockets, as `FileDescriptorName=` has them.
const STREAM: &str = "stream";
const REMOTE: &str = "remote";
const CONTROL: &str = "control";
const LINK: &str = "link";

/// The control socket in the work-dir.
pub const CONTROL_SOCKET: &str = "control.sock";

/// What a daemon listens on. Several of a name are all served.
#[derive(Debug, Default)]
pub struct Sockets {
    /// CRIU's stream protocol.
    pub stream: Vec<UnixListener>,
    /// The remote protocol.
    pub remote: Vec<UnixListener>,
    /// Varlink.
    pub control: Vec<UnixListener>,
    /// The link (cache only).
    pub link: Vec<TcpListener>,
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
    /// Not all were handed over.
    #[error("systemd handed over no socket named {name:?}; start {unit}")]
    Missing {
        /// The name.
        name: &'static str,
        /// The unit that has it.
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
    /// The link's address cannot be bound.
    #[error("cannot listen on {address} (listen): {cause}")]
    Listen {
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
    /// The link's address, where the daemon listens for one.
    pub link: Option<&'a str>,
}

impl Sockets {
    /// Takes the sockets from systemd, or binds them. To be called while there is one thread.
    pub fn acquire(wanted: Wanted<'_>) -> Result<Sockets, SocketError> {
        // The names have to be read before listenfd clears the environment.
        let names: Vec<String> = sd_notify::listen_fds_with_names()
            .map_err(SocketError::Environment)?
            .map(|(_, name)| name)
            .collect();
        if names.is_empty() { Sockets::bind(wanted) } else { Sockets::inherit(wanted, names) }
    }

    fn inherit(wanted: Wanted<'_>, names: Vec<String>) -> Result<Sockets, SocketError> {
        let mut sockets = Sockets::default();
        let mut descriptors = ListenFd::from_env();
        for (index, name) in names.into_iter().enumerate() {
            let taken = match name.as_str() {
                STREAM => take_unix(&mut descriptors, index, &mut sockets.stream),
                REMOTE => take_unix(&mut descriptors, index, &mut sockets.remote),
                CONTROL => take_unix(&mut descriptors, index, &mut sockets.control),
                LINK if wanted.link.is_some() => descriptors
                    .take_tcp_listener(index)
                    .map(|listener| sockets.link.extend(listener)),
                _ => {
                    let known = if wanted.link.is_some() {
                        "stream, remote, control, link"
                    } else {
                        "stream, remote, control"
                    };
                    return Err(SocketError::Unknown(name, known.to_owned()));
                }
            };
            taken.map_err(|cause| SocketError::Descriptor { name, cause })?;
        }
        // Only who has clients for it starts the socket of the remote protocol.
        for (name, missing) in [
            (STREAM, sockets.stream.is_empty()),
            (CONTROL, sockets.control.is_empty()),
            (LINK, wanted.link.is_some() && sockets.link.is_empty()),
        ] {
            if missing {
                let unit = format!("{}-{name}.socket", wanted.daemon);
                return Err(SocketError::Missing { name, unit });
            }
        }
        Ok(sockets)
    }

    fn bind(wanted: Wanted<'_>) -> Result<Sockets, SocketError> {
        let bind = |name| {
            unix::bind(wanted.work_dir, name)
                .map_err(|cause| SocketError::Bind { path: wanted.work_dir.join(name), cause })
        };
        std::fs::create_dir_all(wanted.work_dir)
            .map_err(|cause| SocketError::Bind { path: wanted.work_dir.to_owned(), cause })?;
        let mut sockets = Sockets {
            stream: vec![bind(wanted.stream)?],
            remote: vec![bind(wanted.remote)?],
            control: vec![bind(CONTROL_SOCKET)?],
            link: Vec::new(),
        };
        if let Some(address) = wanted.link {
            let listener = TcpListener::bind(address)
                .map_err(|cause| SocketError::Listen { address: address.to_owned(), cause })?;
            sockets.link.push(listener);
        }
        Ok(sockets)
    }
}

fn take_unix(
    descriptors: &mut ListenFd,
    index: usize,
    sockets: &mut Vec<UnixListener>,
) -> io::Result<()> {
    sockets.extend(descriptors.take_unix_listener(index)?);
    Ok(())
}
