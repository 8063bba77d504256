//! Reading back at the source: a dump looks at its parents, which the cache has.

use std::io;
use std::rc::Rc;
use std::time::Duration;

use rustix::io::Errno;
use tokio::time::timeout;

use super::Refusal;
use crate::criu::remote::{Reply, errno_of};
use crate::daemon::remote::{BadClient, Client};
use crate::proxy::Proxy;
use crate::proxy::connection::Connection;
use crate::proxy::failure::Failure;
use crate::sys::pipe::DEFAULT_CAPACITY;
use crate::wire::message::REGION_MAX;

/// What is read in one piece, in bytes.
#[allow(clippy::cast_possible_truncation)] // a quarter of a MiB
const PIECE: u32 = REGION_MAX as u32;

/// An image at the cache, of which the first piece has come.
pub(super) struct Found {
    connection: Rc<Connection>,
    snapshot: String,
    name: String,
    size: u64,
    first: Vec<u8>,
    /// How long the cache may take to answer.
    limit: Duration,
}

/// Finds an image, or a list.
pub(super) async fn find(proxy: &Proxy, snapshot: &str, name: &str) -> Result<Found, Refusal> {
    let settings = proxy.settings();
    let cache = proxy.links.destination(&settings);
    let connection = proxy.links.connect(&cache, &settings).await.map_err(no_link)?;
    let limit = settings.link.ack_timeout;
    let (size, first) = piece(&connection, snapshot, name, 0, limit).await?;
    let (snapshot, name) = (snapshot.to_owned(), name.to_owned());
    Ok(Found { connection, snapshot, name, size, first, limit })
}

impl Found {
    /// Sends it to the client, which may take `patience` for each part.
    pub(super) async fn send(
        self,
        client: &Client,
        through_pipe: bool,
        patience: Duration,
    ) -> Result<(), BadClient> {
        client.reply(&Reply::found(self.size)).await?;
        let sink = client.sink(&self.name, through_pipe).await?;
        let mut bytes = self.first;
        let mut sent = 0;
        loop {
            for part in bytes.chunks(DEFAULT_CAPACITY) {
                match timeout(patience, sink.write_all(part)).await {
                    Err(_) => {
                        let why = format!("images {} were not read for {patience:?}", self.name);
                        return Err(io::Error::other(why).into());
                    }
                    Ok(Err(error)) => {
                        tracing::debug!("image {} was not read to its end: {error}", self.name);
                        return Ok(());
                    }
                    Ok(Ok(())) => {}
                }
            }
            sent += bytes.len() as u64;
            if sent >= self.size || bytes.is_empty() {
                return Ok(());
            }
            let next = piece(&self.connection, &self.snapshot, &self.name, sent, self.limit).await;
            let (size, next) = next.map_err(|refusal| io::Error::other(refusal.reason))?;
            if size != self.size {
                let why = format!("image {} was replaced while it was read", self.name);
                return Err(io::Error::other(why).into());
            }
            bytes = next;
        }
    }
}

/// One piece, and the size of the whole image.
async fn piece(
    connection: &Connection,
    snapshot: &str,
    name: &str,
    offset: u64,
    limit: Duration,
) -> Result<(u64, Vec<u8>), Refusal> {
    let answer = connection.region(snapshot, name, offset, PIECE);
    let answer = connection.within(limit, answer).await;
    let answer = answer.map_err(|_| no_link(Failure::unanswered(limit).to_string()))?;
    let (region, bytes) = answer.ok_or_else(|| no_link("the link to the cache broke"))?;
    match region.error {
        0 if bytes.len() as u64 > region.size.saturating_sub(offset) => {
            Err(Refusal::failed(format!("the cache sent more of image {name} than there is")))
        }
        0 => Ok((region.size, bytes)),
        error => Err(Refusal::new(errno_of(error), region.reason)),
    }
}

fn no_link(why: impl Into<String>) -> Refusal {
    Refusal::new(Errno::NOLINK, why)
}
