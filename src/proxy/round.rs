//! A round of a snapshot's pages on its way to the cache.

use std::collections::HashSet;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use tokio::sync::oneshot;

use super::connection::Connection;
use super::failure::Failure;
use super::outgoing::Command;
use super::upload::{Chunk, Upload, lost, lost_fate};
use crate::criu::pages::{Run, Space};
use crate::sys::ends::Source;

/// A round for which the cache is ready.
#[derive(Debug)]
pub(super) struct Round {
    upload: Upload,
    /// The page spaces that its parent has.
    parents: HashSet<Space>,
}

impl Round {
    /// Begins a round. It is based on the pages of `parent`, which may be the snapshot itself.
    pub(super) async fn begin(
        connection: &Rc<Connection>,
        id: &str,
        parent: Option<&str>,
        attempt: u64,
        limit: Duration,
    ) -> Result<Round, Failure> {
        let upload = connection.begin_round(id, parent, attempt).await;
        upload.ready(limit).await?;
        let parents = connection.take_spaces(upload.snapshot);
        Ok(Round { upload, parents })
    }

    /// Whether the round's parent has a page space.
    pub(super) fn has_parent(&self, space: Space) -> bool {
        self.parents.contains(&space)
    }

    /// Whether no page space has begun.
    pub(super) fn is_empty(&self) -> bool {
        self.counts().0 == 0
    }

    /// How many page spaces have begun, and how many bytes of pages were sent.
    pub(super) fn counts(&self) -> (u64, u64) {
        self.upload.counts()
    }

    /// A page space begins.
    pub(super) async fn space(&self, space: Space) {
        self.upload.count_part();
        self.tell(|snapshot| Command::Space { snapshot, space }).await;
    }

    /// Pages of it are as in the parent, or follow.
    pub(super) async fn pages(&self, run: Run) {
        self.tell(|snapshot| Command::Pages { snapshot, run }).await;
    }

    /// Sends what has come of the pages, at most `len` bytes.
    pub(super) async fn chunk(&self, source: &Rc<Source>, len: usize) -> io::Result<Chunk> {
        let (moved, outcome) = oneshot::channel();
        let source = source.clone();
        self.tell(|snapshot| Command::PageData { snapshot, source, len, moved }).await;
        self.upload.outcome(outcome).await
    }

    /// Resolves with the reason when the cache can no longer acknowledge it.
    pub(super) fn lost(&self) -> impl Future<Output = Failure> + use<> {
        let fate = self.upload.watch_fate();
        async move { lost(lost_fate(fate).await) }
    }

    /// Ends the round, and waits until the cache holds all of it.
    pub(super) async fn finish(&self, limit: Duration) -> Result<(), Failure> {
        self.upload.finish(true, limit).await
    }

    /// Gives it up. The cache keeps what it held before.
    pub(super) async fn abort(&self, reason: &str) {
        self.upload.abort(reason).await;
    }

    async fn tell(&self, command: impl FnOnce(u32) -> Command) {
        self.upload.connection.tell(command(self.upload.snapshot)).await;
    }
}
