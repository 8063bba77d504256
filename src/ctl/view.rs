//! `view`: a directory of CRIU's images, in which the pages are links into the cache's memory.

use std::fs::File;
use std::path::Path;

use serde_json::json;

use super::cli::{Daemon, View};
use super::exit::Failure;
use super::extract::{accept_memory, can_be_read, receive};
use super::print::{Output, clean, progress, size};
use super::reach;
use super::stream::Session;
use super::written::Written;
use crate::control::model::{ImageFile, Role};
use crate::control::{Client, Reading};
use crate::criu::names::check_name;
use crate::criu::pages::pages_id;

/// What a view consists of.
pub(super) struct Made {
    files: usize,
    /// In files.
    bytes: u64,
    links: usize,
    /// In what is linked to.
    linked: u64,
}

/// Makes a view, and tells what is in it.
pub(super) async fn run(daemon: &Daemon, output: Output, view: &View) -> Result<(), Failure> {
    let id = reach::snapshot_id(view.snapshot.as_deref(), &view.dir)?;
    let mut client = reach::only(daemon, Role::Cache, "view").await?;
    let (snapshot, _) = client.show(&id).await?;
    accept_memory(client.path(), &snapshot, view.accept_changed_memory).await?;
    let Made { files, bytes, links, linked } =
        make(&mut client, &id, &view.dir, view.force).await?;
    let dir = view.dir.display();
    let result = json!({
        "snapshot": id, "dir": view.dir, "images": files, "bytes": bytes, "links": links, "linked-bytes": linked
    });
    output.print(&result, || {
        let (bytes, linked) = (size(bytes), size(linked));
        format!("{id}: {files} images, {bytes}, and {links} links to {linked} of pages in {dir}")
    })
}

/// Makes the directory, or leaves nothing behind.
pub(super) async fn make(
    client: &mut Client,
    id: &str,
    dir: &Path,
    force: bool,
) -> Result<Made, Failure> {
    let (snapshot, _) = client.show(id).await?;
    can_be_read(&snapshot)?;
    let images = client.view(id).await?;
    for image in &images {
        check_name(&image.name).map_err(|bad| Failure::failed(format!("snapshot {id}: {bad}")))?;
    }
    let names = images.iter().map(|image| image.name.as_str());
    let mut written = Written::prepare(dir, names, force)?;

    let (mut session, theirs) = Session::new()
        .map_err(|error| Failure::failed(format!("a socket cannot be made: {error}")))?;
    client.open(id, None, Reading::Look, theirs).await?;
    let (links, files): (Vec<_>, Vec<_>) =
        images.iter().partition(|image| pages_id(&image.name).is_some());
    let bytes = |images: &[&ImageFile]| images.iter().map(|image| image.bytes).sum::<u64>();
    let bar = progress(clean(id), Some(bytes(&files)));
    for image in &files {
        receive(&mut session, &mut written, &image.name, image.bytes, &bar)?;
    }
    for image in &links {
        link(&mut written, image)?;
    }
    drop(bar);
    written.keep();
    let (bytes, linked) = (bytes(&files), bytes(&links));
    Ok(Made { files: files.len(), bytes, links: links.len(), linked })
}

fn link(written: &mut Written, image: &ImageFile) -> Result<(), Failure> {
    File::open(&image.path).map_err(|error| {
        Failure::failed(format!("{}: {} cannot be opened: {error}", image.name, image.path))
            .cure("only root may open what the cache has open; criu restore needs root as well")
    })?;
    written.link(&image.name, &image.path)
}
