//! `extract`: a snapshot of the cache becomes a directory of CRIU's images.

use std::path::Path;

use indicatif::ProgressBar;
use serde_json::json;

use super::cli::{Daemon, Extract};
use super::exit::{Exit, Failure};
use super::look::state_word;
use super::print::{Output, clean, progress, size};
use super::reach;
use super::stream::Session;
use super::written::Written;
use crate::control::model::{Role, Snapshot, SnapshotState};
use crate::control::{Client, Reading};
use crate::criu::names::check_name;
use crate::sys::unix::is_close;

/// Extracts, or leaves nothing behind.
pub(super) async fn run(daemon: &Daemon, output: Output, extract: &Extract) -> Result<(), Failure> {
    let id = reach::snapshot_id(extract.snapshot.as_deref(), &extract.dir)?;
    let mut client = reach::only(daemon, Role::Cache, "extract").await?;
    let (snapshot, images) = client.show(&id).await?;
    can_be_read(&snapshot)?;
    accept_memory(client.path(), &snapshot, extract.accept_changed_memory).await?;
    for image in &images {
        check_name(&image.name).map_err(|bad| Failure::failed(format!("snapshot {id}: {bad}")))?;
    }
    let names = images.iter().map(|image| image.name.as_str());
    let mut written = Written::prepare(&extract.dir, names, extract.force)?;

    let (mut session, theirs) = Session::new()
        .map_err(|error| Failure::failed(format!("a socket cannot be made: {error}")))?;
    client.open(&id, None, Reading::Look, theirs).await?;
    let bar = progress(clean(&id), Some(snapshot.bytes));
    for image in &images {
        receive(&mut session, &mut written, &image.name, image.bytes, &bar)?;
    }
    drop(bar);
    written.keep();

    let bytes: u64 = images.iter().map(|image| image.bytes).sum();
    let count = images.len();
    let dir = extract.dir.display();
    let result = json!({ "snapshot": id, "dir": extract.dir, "images": count, "bytes": bytes });
    output.print(&result, || format!("{id}: {count} images, {} in {dir}", size(bytes)))
}

/// Whether the images of a snapshot are there to be read.
pub(super) fn can_be_read(snapshot: &Snapshot) -> Result<(), Failure> {
    let id = &snapshot.id;
    match snapshot.state {
        SnapshotState::Whole | SnapshotState::Taken => Ok(()),
        SnapshotState::Damaged => Err(Failure::damaged(id, &clean(&snapshot.reason))),
        state => Err(Failure::failed(format!("snapshot {id} is not whole: {}", state_word(state)))
            .cure(format!("criu-imagectl --cache wait {id}"))),
    }
}

/// Says to the cache that a snapshot is wanted although its memory may have changed, if it may have and the user has said so.
pub(super) async fn accept_memory(
    cache: &Path,
    snapshot: &Snapshot,
    accepted: bool,
) -> Result<(), Failure> {
    let id = &snapshot.id;
    match snapshot.memory_may_have_changed {
        Some(true) if accepted => {
            Ok(Client::connect(cache).await?.accept_changed_memory(id).await?)
        }
        Some(true) => {
            let what = format!(
                "the memory in snapshot {} may have changed before it was copied",
                clean(id)
            );
            Err(Failure::new(Exit::Damaged, what).cure(
                "dump again, with --action-script criu-imagectl; if the process is gone: \
                 --accept-changed-memory, and look whether all of its threads work",
            ))
        }
        _ => Ok(()),
    }
}

/// Receives an image that should have so many bytes into a file.
pub(super) fn receive(
    session: &mut Session,
    written: &mut Written,
    name: &str,
    expected: u64,
    bar: &ProgressBar,
) -> Result<(), Failure> {
    let (path, file) = written.create(name)?;
    let path = path.display();
    match session.receive(name, &file, bar) {
        Ok(Some(bytes)) if bytes == expected => Ok(()),
        Ok(Some(bytes)) => {
            Err(Failure::failed(format!("{path}: {bytes} bytes came, the cache has {expected}")))
        }
        Ok(None) => Err(Failure::failed(format!("{name}: the cache no longer has it"))),
        Err(error) if is_close(&error) => Err(session_ended(name)),
        Err(error) => Err(Failure::failed(format!("{path}: {error}"))),
    }
}

/// The cache closed a session in which `what` was asked for.
pub(super) fn session_ended(what: &str) -> Failure {
    Failure::failed(format!("{what}: the cache ended the session"))
        .cure("its journal says why: journalctl -u criu-image-cache")
}
