//! Pages that a client of the page server asks for: the cache has them.

use std::rc::Rc;

use rustix::io::Errno;

use super::Proxy;
use super::pages::Target;
use super::regions::Answered;
use crate::config::ProxySettings;
use crate::criu::pages::{PAGE_SIZE, PageRange, Space};
use crate::daemon::page_server::{self, Asked, Client};

/// The pages of the snapshot that a socket was opened for, as the cache has them at the moment.
pub(super) struct Pages<'a> {
    pub(super) proxy: &'a Proxy,
    pub(super) settings: Rc<ProxySettings>,
    pub(super) target: &'a Target,
}

/// Why a client does not get pages.
#[derive(Debug, thiserror::Error)]
pub(super) enum NotGiven {
    /// The cache does not have them.
    #[error("the cache: {0}")]
    NotThere(String),
    /// The cache or the link to it failed.
    #[error("{0}")]
    Lost(String),
    /// The operator or the end of the daemon stopped it.
    #[error("{0}")]
    Stopped(String),
}

/// Why a session ends before its client ends it.
pub(super) type Failure = page_server::Failure<NotGiven>;

impl From<NotGiven> for Failure {
    fn from(why: NotGiven) -> Failure {
        Failure::NotGiven(why)
    }
}

impl page_server::Pages for Pages<'_> {
    type NotGiven = NotGiven;

    async fn give(&mut self, client: &Client, asked: &Asked) -> Result<u64, Failure> {
        let limit = self.settings.sessions.stall_timeout;
        let mut piece = self.piece(asked.space(), asked.range()).await?;
        let all = piece.there;
        client.write(&asked.header(all)?, limit).await?;
        loop {
            client.write(&piece.bytes, limit).await?;
            self.proxy.served.set(self.proxy.served.get() + piece.bytes.len() as u64);
            let Some(rest) = piece.there.split(piece.pages).1 else { return Ok(all.bytes()) };
            piece = self.piece(asked.space(), rest).await?;
            if piece.there != rest {
                let why = "pages that the cache had a moment ago are no longer there";
                return Err(NotGiven::Lost(why.to_owned()).into());
            }
        }
    }

    fn snapshot(&self) -> Option<&str> {
        Some(&self.target.id)
    }
}

impl Pages<'_> {
    /// The first pages of a range: as many as come at once.
    async fn piece(&self, space: Space, range: PageRange) -> Result<Piece, NotGiven> {
        let connect = self.proxy.links.connect(&self.target.cache, &self.settings);
        let connection = connect.await.map_err(NotGiven::Lost)?;
        let limit = self.settings.link.ack_timeout;
        let answer =
            connection.within(limit, connection.pages(&self.target.id, space, range)).await;
        let answer = answer
            .map_err(|_| NotGiven::Lost(format!("the cache did not answer within {limit:?}")))?
            .ok_or_else(|| NotGiven::Lost("the link to the cache broke".to_owned()))?;
        Piece::of(answer, range)
    }
}

/// Pages that have come.
#[derive(Debug, PartialEq)]
struct Piece {
    /// What the cache has of the range without a gap.
    there: PageRange,
    /// How many pages of that these are.
    pages: u64,
    bytes: Vec<u8>,
}

impl Piece {
    /// What the cache answers when it is asked for a range.
    fn of((region, bytes): Answered, range: PageRange) -> Result<Piece, NotGiven> {
        const MISSING: u32 = Errno::NOENT.raw_os_error().unsigned_abs();
        match region.error {
            0 => {}
            MISSING => return Err(NotGiven::NotThere(region.reason)),
            _ => return Err(NotGiven::Lost(format!("the cache: {}", region.reason))),
        }
        let (len, size) = (bytes.len() as u64, region.size);
        let whole = len % PAGE_SIZE == 0 && size % PAGE_SIZE == 0;
        let fits = (1..=size).contains(&len) && size <= range.bytes();
        match range.split(size / PAGE_SIZE).0 {
            Some(there) if whole && fits => Ok(Piece { there, pages: len / PAGE_SIZE, bytes }),
            _ => Err(NotGiven::Lost(format!(
                "the cache sent {len} bytes of {size} for {} pages",
                range.pages()
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::message::Region;

    fn piece(error: u32, size: u64, len: usize) -> Result<Piece, NotGiven> {
        let region = Region { request: 1, error, reason: "gone".to_owned(), size };
        Piece::of((region, vec![7; len]), PageRange::new(0x1000, 4).unwrap())
    }

    #[test]
    fn only_whole_pages_of_those_that_were_asked_for_are_an_answer() {
        for (pages, len) in [(1, 4096), (4, 4096), (4, 16384), (3, 8192)] {
            let piece = piece(0, pages * PAGE_SIZE, len).unwrap();
            assert_eq!(piece.there, PageRange::new(0x1000, pages).unwrap());
            assert_eq!((piece.pages * PAGE_SIZE, piece.bytes.len()), (len as u64, len));
        }
        for (size, len) in [(0, 0), (4096, 0), (0, 4096), (4096, 8192), (5 * 4096, 4096)] {
            let said = piece(0, size, len).unwrap_err().to_string();
            assert_eq!(said, format!("the cache sent {len} bytes of {size} for 4 pages"));
        }
        for (size, len) in [(4096, 1), (8192, 4097), (8191, 4096), (u64::MAX, 4096)] {
            assert!(matches!(piece(0, size, len), Err(NotGiven::Lost(_))), "{len} of {size}");
        }
        assert!(matches!(piece(2, 0, 0), Err(NotGiven::NotThere(why)) if why == "gone"));
        assert!(matches!(piece(5, 4096, 4096), Err(NotGiven::Lost(why)) if why.contains("gone")));
    }
}
