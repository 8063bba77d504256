//! A restore's hold on its snapshot: what the cache is told of it.
//!
//! To the cache it is a restore like any other, on a socket of its own. It has the snapshot from the beginning, so that no
//! other restore gets it, and as long as it lasts, what CRIU reads stays. CRIU reads the images elsewhere, on
//! connections that only look, or from a view. So the snapshot is taken when the restore has succeeded, and
//! not before.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use indicatif::ProgressBar;
use tokio::time::sleep;

use super::args::Restore;
use crate::control::model::{Snapshot, SnapshotState};
use crate::control::{Client, ClientError};
use crate::criu::images::INVENTORY;
use crate::criu::stream::{HELD_BY_RESTORE, RESTORE_FAILED};
use crate::ctl::exit::{Exit, Failure};
use crate::ctl::extract::session_ended;
use crate::ctl::stream::Session;
use crate::sys::unix::is_close;

/// So long a cache that is being restarted is tried to be told that the process runs.
const TELL: Duration = Duration::from_secs(15);
/// How long to wait before a cache that is not there is tried again.
pub(super) const RETRY: Duration = Duration::from_millis(200);
/// How often a cache may go before a restore has begun.
pub(super) const TRIES: usize = 10;

/// A hold on a snapshot.
pub(super) struct Held {
    cache: PathBuf,
    id: String,
    again: bool,
    copy: bool,
    view: bool,
    session: Session,
}

impl Held {
    /// Gets a snapshot for this restore, which need not have come yet.
    pub(super) async fn claim(cache: &Path, args: &Restore) -> Result<Held, Failure> {
        let mut client = Client::connect(cache).await?;
        if args.again {
            match client.show(&args.snapshot).await {
                Ok(_) => {}
                Err(ClientError::NoSuchSnapshot(id)) => return Err(gone(&id)),
                Err(error) => return Err(error.into()),
            }
        }
        let Restore { again, copy, view, .. } = *args;
        let session = claim(&mut client, &args.snapshot, again, copy, view).await?;
        let (cache, id) = (cache.to_owned(), args.snapshot.clone());
        Ok(Held { cache, id, again, copy, view, session })
    }

    /// Has the cache keep all of the snapshot, which is whole, until this ends, also if it is dropped.
    pub(super) async fn hold(&mut self, snapshot: &Snapshot) -> Result<(), Failure> {
        let id = &self.id;
        match self.session.ask(HELD_BY_RESTORE) {
            Ok(false) => {}
            Ok(true) => {
                let what = format!("snapshot {id} has an image {HELD_BY_RESTORE}");
                return Err(Failure::failed(what));
            }
            Err(error) if is_close(&error) => return Err(self.ended(snapshot, &error).await),
            Err(error) => return Err(self.lost(&error)),
        }
        let mut client = Client::connect(&self.cache).await?;
        let (now, _) = client.show(id).await?;
        if now.ended_ms != snapshot.ended_ms {
            let what = format!("snapshot {id} was sent anew in this moment");
            return Err(Failure::failed(what));
        }
        Ok(())
    }

    /// Why the cache has ended the session before anything was read: it was restarted, and has the snapshot as before, or does not
    /// have it any more.
    async fn ended(&self, snapshot: &Snapshot, error: &io::Error) -> Failure {
        let shown = async { Client::connect(&self.cache).await?.show(&self.id).await };
        match shown.await {
            Ok((now, _)) if now.state == snapshot.state && now.ended_ms == snapshot.ended_ms => {
                self.lost(error).of_a_daemon_gone()
            }
            Ok(_) => self.lost(error),
            Err(error) => error.into(),
        }
    }

    /// Tells the cache that nothing runs of the snapshot: it is not taken. A cache that has gone meanwhile knows no better.
    pub(super) fn failed(mut self) {
        if self.session.ask(RESTORE_FAILED).is_ok() {
            let _ = self.session.end();
        }
    }

    /// Has the cache mark the snapshot as taken: the process runs.
    pub(super) async fn succeeded(mut self, snapshot: &Snapshot) -> Result<(), Failure> {
        let limit = Instant::now() + TELL;
        loop {
            let told = self.take();
            match told {
                Err(ref error) if is_close(error) && Instant::now() < limit => {}
                told => return told.map_err(|error| self.lost(&error)),
            }
            // A cache that was restarted has the snapshot again, and knows of no restore.
            let is_taken = self.hold_again(snapshot).await;
            match is_taken {
                Ok(true) => return Ok(()),
                Err(failure) if !failure.is_daemon_gone() || Instant::now() >= limit => {
                    return Err(failure);
                }
                Ok(false) | Err(_) => sleep(RETRY).await,
            }
        }
    }

    fn take(&mut self) -> io::Result<()> {
        let nowhere = File::create("/dev/null")?;
        let read = self.session.receive(INVENTORY, &nowhere, &ProgressBar::hidden())?;
        if read.is_none() {
            return Err(io::Error::other(format!("it has no {INVENTORY}")));
        }
        self.session.finish()
    }

    /// Holds the same snapshot in a cache that was restarted. Returns whether that has it as taken already.
    async fn hold_again(&mut self, snapshot: &Snapshot) -> Result<bool, Failure> {
        let mut client = Client::connect(&self.cache).await?;
        let (now, _) = client.show(&self.id).await?;
        if now.ended_ms != snapshot.ended_ms {
            return Err(Failure::failed(format!("it holds another snapshot {}", self.id)));
        }
        if now.state == SnapshotState::Taken && !self.again && !self.copy {
            return Ok(true);
        }
        self.session = claim(&mut client, &self.id, self.again, self.copy, self.view).await?;
        self.session.ask(HELD_BY_RESTORE).map_err(|error| self.lost(&error))?;
        Ok(false)
    }

    fn lost(&self, error: &io::Error) -> Failure {
        let what = format!("snapshot {}", self.id);
        if is_close(error) {
            session_ended(&what)
        } else {
            Failure::failed(format!("{what}: {error}"))
        }
    }
}

async fn claim(
    client: &mut Client,
    id: &str,
    again: bool,
    copy: bool,
    view: bool,
) -> Result<Session, Failure> {
    let (session, theirs) = Session::new()
        .map_err(|error| Failure::failed(format!("a socket cannot be made: {error}")))?;
    match client.hold(id, again, copy, view, theirs).await {
        Ok(()) => Ok(session),
        Err(ClientError::NoSuchSnapshot(id)) => Err(gone(&id)),
        Err(error) => Err(error.into()),
    }
}

fn gone(id: &str) -> Failure {
    let what = format!("snapshot {id} is not held any more, it cannot be restored again");
    Failure::new(Exit::NoSuchSnapshot, what)
        .cure("it was dropped, or its time to be kept (store.keep) is over")
}
