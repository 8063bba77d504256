//! `restore --view`: a directory in which the pages are links into the cache's memory.
//!
//! To the cache it is a restore like any other: a session on the socket that was opened for the snapshot. It is bound to
//! the snapshot, and as long as it lasts, what the links lead to stays. It reads no image before CRIU has succeeded: so the
//! snapshot is taken only then.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use indicatif::ProgressBar;

use crate::control::Client;
use crate::control::model::Snapshot;
use crate::criu::images::INVENTORY;
use crate::criu::stream::SERVE_SOCKET;
use crate::ctl::exit::Failure;
use crate::ctl::extract::session_ended;
use crate::ctl::stream::Session;
use crate::ctl::view;
use crate::sys::unix::is_close;

/// The view, in the work directory.
pub(super) const VIEW: &str = "view";

/// No image is called so. It is asked for because a session is bound to its snapshot by its first request.
const NO_IMAGE: &str = "criu-imagectl";

/// A view, and the session that holds what it shows.
pub(super) struct Viewed {
    id: String,
    dir: PathBuf,
    session: Session,
}

impl Viewed {
    /// Makes the view of a snapshot that was whole just now, and for which a socket in `work_dir` was opened.
    pub(super) async fn make(
        cache: &Path,
        snapshot: &Snapshot,
        work_dir: &Path,
    ) -> Result<Viewed, Failure> {
        let (id, dir) = (snapshot.id.clone(), work_dir.join(VIEW));
        // A connection of before has been idle, perhaps for too long.
        let mut client = Client::connect(cache).await?;
        view::make(&mut client, &id, &dir, false).await?;
        // Not before: the cache may have brought pages together for the view, and would hold them twice.
        let path = work_dir.join(SERVE_SOCKET);
        let session = Session::connect(&path)
            .map_err(|error| Failure::failed(format!("{}: {error}", path.display())))?;
        let mut viewed = Viewed { id, dir, session };
        viewed.hold()?;
        let (now, _) = client.show(&viewed.id).await?;
        if now.ended_ms != snapshot.ended_ms {
            let id = &viewed.id;
            return Err(Failure::failed(format!("snapshot {id} was sent anew in this moment")));
        }
        Ok(viewed)
    }

    /// Binds the session to the snapshot.
    fn hold(&mut self) -> Result<(), Failure> {
        match self.session.ask(NO_IMAGE) {
            Ok(false) => Ok(()),
            Ok(true) => {
                let id = &self.id;
                Err(Failure::failed(format!("snapshot {id} has an image {NO_IMAGE}")))
            }
            Err(error) => Err(self.lost(&error)),
        }
    }

    /// Has the cache mark the snapshot as taken: the process runs.
    pub(super) fn taken(mut self) -> Result<(), Failure> {
        let read = File::create(self.dir.join(INVENTORY))
            .and_then(|file| self.session.receive(INVENTORY, &file, &ProgressBar::hidden()));
        let id = &self.id;
        if read.map_err(|error| self.lost(&error))?.is_none() {
            return Err(Failure::failed(format!("snapshot {id} has no {INVENTORY}")));
        }
        self.session.end().map_err(|error| Failure::failed(format!("snapshot {id}: {error}")))
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
