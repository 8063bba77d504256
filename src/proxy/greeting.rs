//! The handshake on a connection to a cache.

use crate::config::ProxySettings;
use crate::sys::connected::Stream;
use crate::wire::lane::{self, DEFAULT_CAPACITY, LaneError, Reader, Writer};
use crate::wire::message::{FEATURES, Hello, Message, Welcome};

/// Why there is no link on a connection.
#[derive(Debug, thiserror::Error)]
pub(super) enum NotGreeted {
    /// The connection has failed or ended.
    #[error("{0}")]
    Lane(#[from] LaneError),
    /// The cache does not want it.
    #[error("{0}")]
    Refused(String),
}

impl NotGreeted {
    /// Whether the cache has simply gone.
    pub(super) fn is_end(&self) -> bool {
        matches!(self, NotGreeted::Lane(error) if error.is_end())
    }
}

/// Shakes hands on a connection. Returns what the cache says of itself.
pub(super) async fn greet(
    stream: Stream,
    name: &str,
    settings: &ProxySettings,
) -> Result<(Reader, Writer, Welcome), NotGreeted> {
    let outgoing = usize::try_from(settings.link.max_chunk).unwrap_or(usize::MAX);
    let (reader, writer) = lane::split(stream, settings.link.keep_alive);
    let mut reader = reader.with_pipe(DEFAULT_CAPACITY).map_err(LaneError::from)?;
    let mut writer = writer.with_pipe(outgoing).map_err(LaneError::from)?;
    let features = FEATURES.map(str::to_owned).to_vec();
    let hello = Message::Hello(Hello { name: name.to_owned(), features });
    writer.send_preface().await.map_err(LaneError::from)?;
    writer.send(&hello).await.map_err(LaneError::from)?;
    reader.receive_preface().await?;
    match reader.receive().await?.0 {
        Message::Welcome(welcome) => Ok((reader, writer, welcome)),
        Message::Goodbye(goodbye) => {
            Err(NotGreeted::Refused(format!("the cache refuses: {}", goodbye.reason)))
        }
        other => {
            let kind = other.kind().as_str_name();
            Err(NotGreeted::Refused(format!("a {kind} instead of a welcome")))
        }
    }
}
