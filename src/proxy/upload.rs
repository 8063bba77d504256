//! One snapshot on its way to the cache, over a link that others share.

use std::cell::Cell;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};

use super::connection::Connection;
use super::failure::Failure;
use super::outgoing::Command;
use crate::sys::ends::Source;

/// What becomes of a snapshot at the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fate {
    /// It is under way.
    Open,
    /// The cache has it.
    Acknowledged {
        /// Images that the cache has.
        images: u64,
        /// Bytes that the cache has.
        bytes: u64,
    },
    /// It never will have it, and why.
    Lost(String),
}

/// What came of a look at what has come of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Chunk {
    /// So many bytes were sent.
    Moved(u64),
    /// Nothing was there yet.
    NotYet,
    /// The image has ended.
    End,
}

/// What the cache says of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Told {
    /// It may come.
    Ready,
    /// The cache holds all of it.
    Acknowledged,
}

/// One snapshot on its way to the cache. What is told to a connection that has broken goes nowhere:
/// the [fate](Upload::fate) tells.
#[derive(Debug)]
pub struct Upload {
    pub(super) connection: Rc<Connection>,
    pub(super) snapshot: u32,
    next_image: Cell<u32>,
    fate: watch::Receiver<Fate>,
    ready: watch::Receiver<u64>,
    /// How often the cache has to be ready until it has heard all that it was told.
    asked: Cell<u64>,
    /// What the cache has to acknowledge: images that have ended, or page spaces of a round.
    parts: Cell<u64>,
    /// And bytes.
    bytes: Cell<u64>,
}

impl Upload {
    /// A snapshot that has begun.
    pub(super) fn new(
        connection: Rc<Connection>,
        snapshot: u32,
        fate: watch::Receiver<Fate>,
        ready: watch::Receiver<u64>,
    ) -> Upload {
        let (next_image, asked) = (Cell::new(0), Cell::new(1));
        let (parts, bytes) = (Cell::new(0), Cell::new(0));
        Upload { connection, snapshot, next_image, fate, ready, asked, parts, bytes }
    }

    /// Appends the snapshot's id to a list.
    pub async fn list(&self, list: &str) {
        self.asked.set(self.asked.get() + 1);
        let (snapshot, list) = (self.snapshot, list.to_owned());
        self.connection.tell(Command::List { snapshot, list }).await;
    }

    /// Waits until the cache has accepted the snapshot and its entries in lists.
    pub(super) async fn ready(&self, limit: Duration) -> Result<(), Failure> {
        let accepted = self.connection.within(limit, self.accepted()).await;
        accepted.unwrap_or_else(|_| Err(Failure::unanswered(limit)))
    }

    async fn accepted(&self) -> Result<(), Failure> {
        let asked = self.asked.get();
        let mut ready = self.ready.clone();
        tokio::select! {
            fate = self.lost() => Err(lost(fate)),
            told = ready.wait_for(|times| *times >= asked) => match told {
                Ok(_) => Ok(()),
                Err(_) => Err(lost(self.fate().await)),
            },
        }
    }

    /// Begins an image, or goes on at its end; the number is for the calls that follow.
    pub async fn begin_image(&self, name: &str, append: bool) -> u32 {
        self.begin_image_with(name, append, |_| ()).await.0
    }

    /// The same, for a writer that wants to hear what the cache says of it.
    pub async fn begin_watched_image(
        &self,
        name: &str,
        append: bool,
    ) -> (u32, mpsc::UnboundedReceiver<Told>) {
        let watch = |image| self.connection.watch_image(self.snapshot, image);
        self.begin_image_with(name, append, watch).await
    }

    /// Does something with the number of an image before the cache can hear of it.
    async fn begin_image_with<T>(
        &self,
        name: &str,
        append: bool,
        prepare: impl FnOnce(u32) -> T,
    ) -> (u32, T) {
        let place = self.connection.place().await;
        let image = self.next_image.replace(self.next_image.get().wrapping_add(1));
        let prepared = prepare(image);
        if let Some(place) = place {
            let (snapshot, name) = (self.snapshot, name.to_owned());
            place.send(Command::BeginImage { snapshot, image, name, append });
        }
        (image, prepared)
    }

    /// Sends what has come of an image, at most one chunk.
    pub async fn chunk(&self, image: u32, source: &Rc<Source>) -> io::Result<Chunk> {
        let (moved, outcome) = oneshot::channel();
        let (snapshot, source) = (self.snapshot, source.clone());
        self.connection.tell(Command::Chunk { snapshot, image, source, moved }).await;
        self.outcome(outcome).await
    }

    /// What came of a chunk; it counts.
    pub(super) async fn outcome(
        &self,
        outcome: oneshot::Receiver<io::Result<Chunk>>,
    ) -> io::Result<Chunk> {
        match outcome.await {
            Ok(Ok(Chunk::Moved(bytes))) => {
                self.bytes.set(self.bytes.get() + bytes);
                Ok(Chunk::Moved(bytes))
            }
            Ok(outcome) => outcome,
            // The connection has broken. Whoever waits for the snapshot's fate tells why.
            Err(_) => match self.fate().await {
                Fate::Lost(_) => std::future::pending().await,
                _ => Err(io::ErrorKind::ConnectionAborted.into()),
            },
        }
    }

    /// Ends an image.
    pub async fn end_image(&self, image: u32) {
        self.count_part();
        self.connection.tell(Command::EndImage { snapshot: self.snapshot, image }).await;
    }

    /// One more image, or page space of a round, has to be acknowledged.
    pub(super) fn count_part(&self) {
        self.parts.set(self.parts.get() + 1);
    }

    /// What was sent so far: images that have ended, or page spaces of a round, and bytes.
    pub(super) fn counts(&self) -> (u64, u64) {
        (self.parts.get(), self.bytes.get())
    }

    /// Ends the snapshot: all was sent. What is `partial` need not be a checkpoint by itself.
    pub async fn end(&self, partial: bool) {
        self.end_marked(partial, false).await;
    }

    async fn end_marked(&self, partial: bool, memory_may_have_changed: bool) {
        let (snapshot, marks) = (self.snapshot, self.connection.keeps_marks());
        let memory_may_have_changed = memory_may_have_changed && marks;
        self.connection.tell(Command::End { snapshot, partial, memory_may_have_changed }).await;
    }

    /// Waits until the snapshot can no longer be acknowledged; never when it was.
    pub(super) async fn lost(&self) -> Fate {
        lost_fate(self.watch_fate()).await
    }

    /// What becomes of it, for those who do not keep it.
    pub(super) fn watch_fate(&self) -> watch::Receiver<Fate> {
        self.fate.clone()
    }

    /// Ends the snapshot, and waits until the cache has acknowledged what was sent.
    pub(super) async fn finish(&self, partial: bool, limit: Duration) -> Result<(), Failure> {
        self.finish_as(partial, false, limit).await
    }

    /// The same for a checkpoint of whose memory it is known whether it may have changed before it was copied.
    pub(super) async fn finish_marked(
        &self,
        memory_may_have_changed: bool,
        limit: Duration,
    ) -> Result<(), Failure> {
        self.finish_as(false, memory_may_have_changed, limit).await
    }

    async fn finish_as(
        &self,
        partial: bool,
        memory_may_have_changed: bool,
        limit: Duration,
    ) -> Result<(), Failure> {
        let sent = self.counts();
        let early = self.fate.borrow().clone();
        if matches!(early, Fate::Acknowledged { .. }) {
            return Err(lost(early));
        }
        self.end_marked(partial, memory_may_have_changed).await;
        match self.connection.within(limit, self.fate()).await {
            Err(_) => Err(Failure::Lost(format!("no acknowledgement within {limit:?}"))),
            Ok(Fate::Acknowledged { images, bytes }) if (images, bytes) == sent => Ok(()),
            Ok(Fate::Acknowledged { images, bytes }) => Err(Failure::Lost(format!(
                "the cache acknowledged {images} images with {bytes} bytes, {} with {} were sent",
                sent.0, sent.1
            ))),
            Ok(fate) => Err(lost(fate)),
        }
    }

    /// Gives the snapshot up.
    pub async fn abort(&self, reason: &str) {
        self.connection.settle(self.snapshot, Fate::Lost(reason.to_owned()));
        let reason = reason.to_owned();
        self.connection.tell(Command::Abort { snapshot: self.snapshot, reason }).await;
    }

    /// Waits until the cache has acknowledged the snapshot or lost it.
    pub async fn fate(&self) -> Fate {
        settled(self.watch_fate()).await
    }
}

async fn settled(mut fate: watch::Receiver<Fate>) -> Fate {
    match fate.wait_for(|fate| *fate != Fate::Open).await {
        Ok(settled) => settled.clone(),
        Err(_) => Fate::Lost("the link has ended".to_owned()),
    }
}

/// Waits until a snapshot can no longer be acknowledged; never when it was.
pub(super) async fn lost_fate(fate: watch::Receiver<Fate>) -> Fate {
    match settled(fate).await {
        Fate::Acknowledged { .. } => std::future::pending().await,
        fate => fate,
    }
}

/// Why a snapshot is lost whose fate is known.
pub(super) fn lost(fate: Fate) -> Failure {
    Failure::Lost(match fate {
        Fate::Lost(reason) => reason,
        Fate::Open | Fate::Acknowledged { .. } => "the cache acknowledged it too early".to_owned(),
    })
}

impl Drop for Upload {
    fn drop(&mut self) {
        // A session that was torn down has told nobody: the cache need not wait for its link's end.
        if *self.fate.borrow() == Fate::Open {
            let reason = "the session at the proxy was torn down".to_owned();
            self.connection.try_tell(Command::Abort { snapshot: self.snapshot, reason });
        }
        self.connection.forget(self.snapshot);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::task::{LocalSet, spawn_local, yield_now};

    /// The queue is full, and somebody waits. They get a place, and before they run, somebody else
    /// comes and finds one, too.
    async fn overtake(
        waits: impl Future<Output = ()> + 'static,
        queue: &mut mpsc::Receiver<Command>,
        overtakes: impl Future<Output = ()>,
    ) -> [Command; 2] {
        let waits = spawn_local(waits);
        yield_now().await;
        assert!(!waits.is_finished());
        while queue.try_recv().is_ok() {}
        overtakes.await;
        waits.await.unwrap();
        [queue.recv().await.unwrap(), queue.recv().await.unwrap()]
    }

    #[tokio::test(flavor = "current_thread")]
    async fn numbers_grow_in_the_order_in_which_the_lane_gets_them() {
        let overtaking = async {
            let (connection, mut queue) = Connection::new(2);
            let upload = Rc::new(connection.begin("web", true).await);
            upload.begin_image("first", false).await;
            let waits = upload.clone();
            let waits = async move { _ = waits.begin_image("waits", false).await };
            let overtakes = async { _ = upload.begin_image("overtakes", false).await };
            let [
                Command::BeginImage { image: one, name, .. },
                Command::BeginImage { image: other, .. },
            ] = overtake(waits, &mut queue, overtakes).await
            else {
                panic!()
            };
            assert_eq!((name.as_str(), one, other), ("overtakes", 1, 2));

            let (connection, mut queue) = Connection::new(2);
            let kept = [connection.begin("1", true).await, connection.begin("2", true).await];
            let waits = connection.clone();
            let waits = async move { std::mem::forget(waits.begin("waits", true).await) };
            let overtakes = async { std::mem::forget(connection.begin("overtakes", true).await) };
            let [Command::Begin { snapshot: one, id, .. }, Command::Begin { snapshot: other, .. }] =
                overtake(waits, &mut queue, overtakes).await
            else {
                panic!()
            };
            assert_eq!((id.as_str(), one, other), ("overtakes", 2, 3));
            drop(kept);
        };
        LocalSet::new().run_until(overtaking).await;
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_snapshot_that_waits_while_the_link_breaks_is_lost() {
        let (connection, queue) = Connection::new(1);
        let kept = connection.begin("web", true).await;
        let (begun, ()) = tokio::join!(connection.begin("waits", true), async {
            drop(queue);
            connection.close("it broke");
        });
        assert!(matches!(begun.fate().await, Fate::Lost(_)));
        assert!(begun.accepted().await.is_err());
        assert_eq!(kept.fate().await, Fate::Lost("it broke".to_owned()));
    }
}
