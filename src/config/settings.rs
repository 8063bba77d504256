//! The settings, their defaults and which syntax each has.
//!
//! Every struct here is one table of the file; its field names in kebab case are the keys.

use super::syntax::{As, Count, Memory, Size, Span};
use super::words::{CacheAddress, Endpoint, FilePath, Flag, HostPort, Listen, Name, SocketDir};
use super::{LINK_PORT, physical_memory, uids};
use serde::{Deserialize, Serialize};
use std::{path::PathBuf, time::Duration};
use tracing::Level;

/// What a pipe may be grown to: at least a page; `F_SETPIPE_SZ` takes an int.
type PipeSize = Size<{ 4 << 10 }, { 1 << 30 }>;

/// The payload of one frame.
type ChunkSize = Size<{ 64 << 10 }, { 16 << 20 }>;

/// What the proxy may hold: at least one large pipe.
type HeldSize = Size<{ 1 << 20 }, { 1 << 50 }>;

/// The settings of `criu-image-proxy`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct ProxySettings {
    /// The cache that snapshots go to, as `HOST:PORT`; the port is [`LINK_PORT`] if the file names
    /// none. An IPv6 address stands in brackets. Or the absolute path of a unix socket.
    #[serde(with = "As::<CacheAddress>")]
    pub cache: String,
    /// Whether plaintext may leave the machine. If not, a cache that is not on a loopback address
    /// is refused.
    #[serde(with = "As::<Flag>")]
    pub insecure: bool,
    /// Where the daemon binds its sockets when systemd does not hand them over.
    #[serde(with = "As::<SocketDir>")]
    pub work_dir: PathBuf,
    /// Whether it goes to the background once it serves.
    #[serde(with = "As::<Flag>")]
    pub daemon: bool,
    /// Where it writes its pid.
    #[serde(with = "As::<FilePath>")]
    pub pidfile: Option<PathBuf>,
    /// The name it gives itself to the cache; empty means the host's name.
    #[serde(with = "As::<Name>")]
    pub name: String,
    /// Who may use the unix sockets besides root and the daemon's own user.
    #[serde(with = "uids")]
    pub allow_uids: Vec<u32>,
    /// The link to the cache.
    pub link: LinkSettings,
    /// The CRIU runs that are connected.
    pub sessions: SessionSettings,
    /// The memory for pages that wait to be sent.
    pub memory: MemorySettings,
    /// The clients of the remote protocol.
    pub remote: ProxyRemoteSettings,
    /// CRIU's page server protocol.
    pub pages: ProxyPagesSettings,
    /// The figures for Prometheus.
    pub metrics: MetricsSettings,
    /// What is logged.
    pub log: LogSettings,
}

impl Default for ProxySettings {
    fn default() -> Self {
        Self {
            cache: format!("127.0.0.1:{LINK_PORT}"),
            insecure: false,
            work_dir: "/run/criu-image/proxy".into(),
            daemon: false,
            pidfile: None,
            name: String::new(),
            allow_uids: Vec::new(),
            link: LinkSettings::default(),
            sessions: SessionSettings::default(),
            memory: MemorySettings::default(),
            remote: ProxyRemoteSettings::default(),
            pages: ProxyPagesSettings::default(),
            metrics: MetricsSettings::default(),
            log: LogSettings::default(),
        }
    }
}

/// `[link]` of the proxy: the connection it makes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct LinkSettings {
    /// How long one attempt to connect may take.
    #[serde(with = "As::<Span>")]
    pub connect_timeout: Duration,
    /// How long a dump waits for the cache before it fails, the process running on at the source.
    #[serde(with = "As::<Span>")]
    pub give_up_after: Duration,
    /// How often a sign of life is sent. A peer silent for three times as long
    /// is gone.
    #[serde(with = "As::<Span>")]
    pub keep_alive: Duration,
    /// How long the proxy waits for the acknowledgement after the end of a snapshot.
    #[serde(with = "As::<Span>")]
    pub ack_timeout: Duration,
    /// The payload of one frame at most, in bytes: 64 KiB to 16 MiB.
    #[serde(with = "As::<ChunkSize>")]
    pub max_chunk: u64,
}

impl Default for LinkSettings {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(5),
            give_up_after: Duration::from_secs(30),
            keep_alive: Duration::from_secs(10),
            ack_timeout: Duration::from_secs(60),
            max_chunk: 1 << 20,
        }
    }
}

/// `[sessions]`: the CRIU runs connected to a daemon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct SessionSettings {
    /// How many CRIU runs may be connected at once.
    #[serde(with = "As::<Count>")]
    pub max: u64,
    /// How long a peer has between a request and the descriptor that belongs to it.
    #[serde(with = "As::<Span>")]
    pub request_timeout: Duration,
    /// How long images may stand still: at the proxy CRIU neither writes to nor closes any, or makes
    /// no first request; at the cache CRIU has closed its socket and reads none.
    #[serde(with = "As::<Span>")]
    pub stall_timeout: Duration,
    /// What the pipe of a large image is grown to, in bytes: 4 KiB to 1 GiB. The kernel rounds up
    /// to a power of two and may grant less (pipe(7)).
    #[serde(with = "As::<PipeSize>")]
    pub pipe_size: u64,
}

impl Default for SessionSettings {
    fn default() -> Self {
        Self {
            max: 1024,
            request_timeout: Duration::from_secs(10),
            stall_timeout: Duration::from_secs(120),
            pipe_size: 1 << 20,
        }
    }
}

/// `[memory]` of the proxy: what it copies of processes before it is sent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct MemorySettings {
    /// How many bytes of pages may wait to be sent, copied, while CRIU writes on: 1 MiB or more. At the limit CRIU waits.
    #[serde(with = "As::<HeldSize>")]
    pub max_bytes: u64,
}

impl Default for MemorySettings {
    fn default() -> Self {
        Self { max_bytes: 1 << 30 }
    }
}

/// The settings of `criu-image-cache`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct CacheSettings {
    /// Where the daemon listens for links, as `HOST:PORT`, when systemd does not hand it a socket;
    /// the port is [`LINK_PORT`] if the file names none.
    #[serde(with = "As::<HostPort>")]
    pub listen: String,
    /// Whether plaintext may come from other machines. If not, a peer that is not on a loopback
    /// address is refused.
    #[serde(with = "As::<Flag>")]
    pub insecure: bool,
    /// Where the daemon binds its unix sockets when systemd does not hand them over.
    #[serde(with = "As::<SocketDir>")]
    pub work_dir: PathBuf,
    /// Whether it goes to the background once it serves.
    #[serde(with = "As::<Flag>")]
    pub daemon: bool,
    /// Where it writes its pid.
    #[serde(with = "As::<FilePath>")]
    pub pidfile: Option<PathBuf>,
    /// Who may use the unix sockets besides root and the daemon's own user.
    #[serde(with = "uids")]
    pub allow_uids: Vec<u32>,
    /// What is kept, how much of it and how long.
    pub store: StoreSettings,
    /// The links from proxies.
    pub link: CacheLinkSettings,
    /// The CRIU runs that are connected.
    pub sessions: SessionSettings,
    /// The clients of the remote protocol.
    pub remote: CacheRemoteSettings,
    /// CRIU's page server protocol.
    pub pages: CachePagesSettings,
    /// The figures for Prometheus.
    pub metrics: MetricsSettings,
    /// What is logged.
    pub log: LogSettings,
}

impl Default for CacheSettings {
    fn default() -> Self {
        Self {
            listen: format!("127.0.0.1:{LINK_PORT}"),
            insecure: false,
            work_dir: "/run/criu-image/cache".into(),
            daemon: false,
            pidfile: None,
            allow_uids: Vec::new(),
            store: StoreSettings::default(),
            link: CacheLinkSettings::default(),
            sessions: SessionSettings::default(),
            remote: CacheRemoteSettings::default(),
            pages: CachePagesSettings::default(),
            metrics: MetricsSettings::default(),
            log: LogSettings::default(),
        }
    }
}

/// `[store]`: the snapshots in memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct StoreSettings {
    /// How many bytes all images together may take. The file may give a percentage of
    /// [`physical_memory`].
    #[serde(with = "As::<Memory>")]
    pub max_bytes: u64,
    /// How long a whole snapshot is kept.
    #[serde(with = "As::<Keep>")]
    pub keep: Keep,
    /// How long a damaged snapshot stays listed; its bytes are freed at once.
    #[serde(with = "As::<Span>")]
    pub keep_damaged: Duration,
    /// How long a sender is stopped at the limit before its snapshot is given up as damaged.
    #[serde(with = "As::<Span>")]
    pub quota_wait: Duration,
    /// How long a restore waits for a snapshot of which nothing comes, before it is ended.
    #[serde(with = "As::<Span>")]
    pub restore_wait: Duration,
    /// How many images a snapshot may have.
    #[serde(with = "As::<Count>")]
    pub max_images: u64,
    /// How many snapshots may be listed.
    #[serde(with = "As::<Count>")]
    pub max_snapshots: u64,
}

impl Default for StoreSettings {
    fn default() -> Self {
        Self {
            max_bytes: physical_memory() / 2,
            keep: Keep::For(Duration::from_secs(600)),
            keep_damaged: Duration::from_secs(3600),
            quota_wait: Duration::from_secs(30),
            restore_wait: Duration::from_secs(3600),
            max_images: 100_000,
            max_snapshots: 1024,
        }
    }
}

/// How long a whole snapshot is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// `"taken"`: until a restore has read it.
    Taken,
    /// `"10min"`: that long after it was taken.
    For(Duration),
    /// `"dropped"`: until `criu-imagectl drop`.
    Dropped,
}

/// `[link]` of the cache: the connections it accepts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct CacheLinkSettings {
    /// How often a sign of life is sent. A peer silent for three times as long is
    /// gone.
    #[serde(with = "As::<Span>")]
    pub keep_alive: Duration,
    /// How long a peer that has connected may take to introduce itself.
    #[serde(with = "As::<Span>")]
    pub hello_timeout: Duration,
    /// How many links there may be at once.
    #[serde(with = "As::<Count>")]
    pub max: u64,
}

impl Default for CacheLinkSettings {
    fn default() -> Self {
        Self { keep_alive: Duration::from_secs(10), hello_timeout: Duration::from_secs(5), max: 64 }
    }
}

/// `[remote]` of the proxy: the clients of `img-proxy.sock`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct ProxyRemoteSettings {
    /// How many clients may be connected at once.
    #[serde(with = "As::<Count>")]
    pub max: u64,
    /// How long a snapshot may lack its end while nobody writes to it.
    #[serde(with = "As::<Span>")]
    pub idle_timeout: Duration,
    /// How a client reads that does not say.
    #[serde(with = "As::<Reads>")]
    pub reads: Reads,
    /// Whether the endings of the old clients are understood.
    #[serde(with = "As::<Flag>")]
    pub historical_endings: bool,
}

impl Default for ProxyRemoteSettings {
    fn default() -> Self {
        let CacheRemoteSettings { max, reads, historical_endings } = CacheRemoteSettings::default();
        Self { max, idle_timeout: Duration::from_secs(3600), reads, historical_endings }
    }
}

/// `[remote]` of the cache: the clients of `img-cache.sock`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct CacheRemoteSettings {
    /// How many clients may be connected at once.
    #[serde(with = "As::<Count>")]
    pub max: u64,
    /// How a client reads that does not say.
    #[serde(with = "As::<Reads>")]
    pub reads: Reads,
    /// Whether the endings of the old clients are understood.
    #[serde(with = "As::<Flag>")]
    pub historical_endings: bool,
}

impl Default for CacheRemoteSettings {
    fn default() -> Self {
        Self { max: 4096, reads: Reads::Socket, historical_endings: false }
    }
}

/// `[pages]` of the proxy: CRIU's page server for dumps, on a port of this machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct ProxyPagesSettings {
    /// Where the daemon listens, as `HOST:PORT`, when systemd does not hand it a socket; `None` is
    /// nowhere.
    #[serde(with = "As::<Listen>")]
    pub listen: Option<String>,
}

impl Default for ProxyPagesSettings {
    fn default() -> Self {
        Self { listen: Some("127.0.0.1:9997".to_owned()) }
    }
}

/// `[pages]` of the cache: CRIU's page server for restores, on a port of this machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct CachePagesSettings {
    /// Where the daemon listens, as `HOST:PORT`, when systemd does not hand it a socket; `None` is
    /// nowhere.
    #[serde(with = "As::<Listen>")]
    pub listen: Option<String>,
}

impl Default for CachePagesSettings {
    fn default() -> Self {
        Self { listen: Some("127.0.0.1:9995".to_owned()) }
    }
}

/// How the bytes of an image reach a client that reads it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reads {
    /// `"socket"`: on the socket.
    Socket,
    /// `"pipe"`: through a pipe that the client passes.
    Pipe,
}

/// `[metrics]`: the figures, in OpenMetrics' text format.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct MetricsSettings {
    /// Where they are served when systemd does not hand over a socket for them; `None` is nowhere.
    #[serde(with = "As::<Endpoint>")]
    pub listen: Option<Endpoint>,
    /// Who may read them, besides those who may use the unix sockets.
    #[serde(with = "uids")]
    pub allow_uids: Vec<u32>,
}

/// `[log]`: what is logged, and where to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct LogSettings {
    /// The least important messages that are logged.
    #[serde(with = "As::<Level>")]
    pub level: Level,
    /// The file that logs go to, instead of the journal or stderr.
    #[serde(with = "As::<FilePath>")]
    pub file: Option<PathBuf>,
}

impl Default for LogSettings {
    fn default() -> Self {
        Self { level: Level::INFO, file: None }
    }
}
