//! TOML in, settings out: `/etc/criu-image-relay/proxy.toml` and `cache.toml`.
//!
//! A setting that is read is right: ranges and syntax are checked while parsing, and every error
//! names file, line, column, cause and cure ([`ConfigError`]). All keys are optional; `settings.rs`
//! holds the defaults, the files in `config/` explain them to operators.

use serde::{Serialize, de::DeserializeOwned};
use std::{fs, io, path::Path};

mod settings;
mod shared;

mod error;
mod keys;
mod syntax;
mod uids;
mod units;
mod words;

#[cfg(test)]
mod round_trip;
#[cfg(test)]
mod tests;

pub use error::{ConfigError, Problem};
pub use settings::{
    CacheLinkSettings, CachePagesSettings, CacheRemoteSettings, CacheSettings, Keep, LinkSettings,
    LogSettings, MemorySettings, MetricsSettings, ProxyPagesSettings, ProxyRemoteSettings,
    ProxySettings, Reads, SessionSettings, StoreSettings,
};
pub use shared::Shared;
pub use words::Endpoint;

/// The port of the link, where an address names none.
pub const LINK_PORT: u16 = 9996;

/// The settings of one daemon: how they are read and printed.
pub trait Settings: Default + Serialize + DeserializeOwned {
    /// Where they are read from when no file is named.
    const DEFAULT_PATH: &'static str;

    /// What both daemons have, and options replace.
    fn shared(&mut self) -> Shared<'_>;

    /// Reads the settings from `path`; without one, from [`Self::DEFAULT_PATH`] if that exists.
    ///
    /// # Errors
    /// The file cannot be read, or is wrong. A file that was named has to exist.
    fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        let file = path.unwrap_or(Path::new(Self::DEFAULT_PATH));
        let bytes = match (fs::read(file), path) {
            (Ok(bytes), _) => bytes,
            (Err(e), None) if e.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            (Err(e), Some(_)) if e.kind() == io::ErrorKind::NotFound => {
                return Err(ConfigError::Missing { path: file.into() });
            }
            (Err(cause), _) => return Err(ConfigError::Unreadable { path: file.into(), cause }),
        };
        match std::str::from_utf8(&bytes) {
            Ok(text) => Self::parse(text, file),
            Err(e) => {
                let text = String::from_utf8_lossy(&bytes[..e.valid_up_to()]);
                Err(ConfigError::at(file, &text, text.len(), Problem::NotUtf8))
            }
        }
    }

    /// Reads the settings from `text`; `path` is only named in errors.
    ///
    /// # Errors
    /// The first thing that is wrong with it: first with its TOML, then with its keys, then with
    /// its values.
    fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let wrong = |offset, problem| ConfigError::at(path, text, offset, problem);
        let offset = |e: &toml::de::Error| e.span().map_or(0, |span| span.start);

        let document = toml::de::DeTable::parse(text)
            .map_err(|e| wrong(offset(&e), Problem::NotToml(e.message().into())))?;
        if let Some((offset, problem)) = keys::first_unknown(document.get_ref(), &known::<Self>()) {
            return Err(wrong(offset, problem));
        }
        Self::deserialize(toml::de::Deserializer::from(document.clone())).map_err(|e| {
            let key = keys::key_at(document.get_ref(), offset(&e)).unwrap_or_default();
            wrong(offset(&e), Problem::Value { key, cause: e.message().into() })
        })
    }

    /// The settings as a TOML document that reads back as these settings, every key named.
    fn to_toml(&self) -> String {
        toml::to_string(self).expect("settings are tables of texts, numbers and booleans")
    }
}

impl Settings for ProxySettings {
    const DEFAULT_PATH: &'static str = "/etc/criu-image-relay/proxy.toml";

    fn shared(&mut self) -> Shared<'_> {
        Shared {
            address: &mut self.cache,
            work_dir: &mut self.work_dir,
            daemon: &mut self.daemon,
            pidfile: &mut self.pidfile,
            log: &mut self.log,
        }
    }
}

impl Settings for CacheSettings {
    const DEFAULT_PATH: &'static str = "/etc/criu-image-relay/cache.toml";

    fn shared(&mut self) -> Shared<'_> {
        Shared {
            address: &mut self.listen,
            work_dir: &mut self.work_dir,
            daemon: &mut self.daemon,
            pidfile: &mut self.pidfile,
            log: &mut self.log,
        }
    }
}

/// Every key there is, as the table of the defaults.
fn known<T: Settings>() -> toml::Table {
    toml::Table::try_from(T::default()).expect("settings are a table")
}

/// A cache's address with its port, [`LINK_PORT`] where `text` names none; the path of a unix socket as it is. The error
/// says what an address looks like.
pub fn full_address(text: &str) -> Result<String, String> {
    words::CacheAddress::parse(text).ok_or_else(|| {
        format!(
            "{text:?} is no address of a cache: HOST, HOST:PORT, [IPV6]:PORT or the absolute path of a unix socket is expected"
        )
    })
}

/// The host alone, as `--address` takes it. The error says what it looks like.
pub fn host(text: &str) -> Result<String, String> {
    words::host(text)
        .ok_or_else(|| "a host name or an IP address without a port is expected".into())
}

/// The machine's memory in bytes, as the kernel counts it: what percentages are a share of. A
/// limit set for a control group does not lower it.
pub fn physical_memory() -> u64 {
    let info = rustix::system::sysinfo();
    info.totalram.saturating_mul(info.mem_unit.into())
}
