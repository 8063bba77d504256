//! `get`: images of a snapshot, by name, to stdout or into a directory; or a list of ids.

use std::fs::File;
use std::io::{self, IsTerminal};
use std::os::fd::AsFd;
use std::path::Path;

use serde_json::json;

use super::cli::{Daemon, Get};
use super::exit::{Exit, Failure};
use super::extract::accept_memory;
use super::print::{Output, clean, progress, size};
use super::reach;
use super::written::Written;
use crate::client::{Client, Error};
use crate::control::model::{Role, SnapshotState};
use crate::criu::names::check_name;
use crate::sys::pump;

/// Gets what is asked for.
pub(super) async fn run(daemon: &Daemon, output: Output, get: &Get) -> Result<(), Failure> {
    // What is not said is the cache; a socket that is named tells by what lies beside it.
    let role = if daemon.socket.is_some() {
        reach::remote_role(daemon)?
    } else if daemon.proxy {
        Role::Proxy
    } else {
        Role::Cache
    };
    let client = reach::remote(daemon, role);
    if let Some(list) = &get.ids {
        return ids(&client, output, list);
    }
    let id = get.snapshot.as_deref().unwrap_or_default();
    reach::must_be_id(id)?;
    if get.accept_changed_memory {
        // It waits until the snapshot is whole, as what follows does.
        let mut cache = reach::only(daemon, Role::Cache, "get --accept-changed-memory").await?;
        let path = cache.path().to_owned();
        let mut watch = cache.watch(id, false).await?;
        while let Some(snapshot) = watch.next().await? {
            if matches!(snapshot.state, SnapshotState::Whole | SnapshotState::Taken) {
                accept_memory(&path, &snapshot, true).await?;
            }
        }
    }
    let got = match (&get.to, &get.images[..]) {
        (Some(dir), images) => to_directory(&client, output, id, images, dir, get.force),
        (None, [image]) => to_stdout(&client, output, id, image),
        (None, _) => Err(Failure::usage("only one image goes to stdout")
            .cure("write them into a directory: --to DIR")),
    };
    match got {
        Err(failure) if failure.exit == Exit::Damaged && role == Role::Cache => {
            Err(changed_memory(daemon, id).await.unwrap_or(failure))
        }
        got => got,
    }
}

/// Why the cache does not give images of a snapshot that is whole. The remote protocol has one number for that and for one that
/// is damaged.
async fn changed_memory(daemon: &Daemon, id: &str) -> Option<Failure> {
    let mut cache = reach::only(daemon, Role::Cache, "get").await.ok()?;
    let (snapshot, _) = cache.show(id).await.ok()?;
    let is_held = matches!(snapshot.state, SnapshotState::Whole | SnapshotState::Taken);
    if is_held { accept_memory(cache.path(), &snapshot, false).await.err() } else { None }
}

fn ids(client: &Client, output: Output, list: &str) -> Result<(), Failure> {
    let ids = client.ids(list)?;
    output.print(&ids, || ids.join("\n"))
}

fn to_stdout(client: &Client, output: Output, id: &str, image: &str) -> Result<(), Failure> {
    let stdout = io::stdout();
    if output.json {
        return Err(Failure::usage("an image is no JSON")
            .cure("leave --json out, or write the image into a directory: --to DIR"));
    }
    if stdout.is_terminal() {
        return Err(Failure::usage("an image is nothing for a terminal")
            .cure("redirect stdout, or write the image into a directory: --to DIR"));
    }
    let failed = |error: io::Error| Failure::failed(format!("stdout cannot be written: {error}"));
    let mut stdout = File::from(stdout.as_fd().try_clone_to_owned().map_err(failed)?);
    let mut reader = client.open_read(id, image).map_err(|error| told(error, id))?;
    let bar = progress(clean(id), Some(reader.size()));
    let copied = pump::copy(&mut reader, &mut stdout, &mut |moved| bar.inc(moved));
    match copied.map_err(Error::from) {
        // `| head` has read enough.
        Err(Error::Io(error)) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        Err(Error::Io(error)) => Err(failed(error)),
        copied => copied.map(drop).map_err(|error| told(error, id)),
    }
}

fn to_directory(
    client: &Client,
    output: Output,
    id: &str,
    images: &[String],
    dir: &Path,
    force: bool,
) -> Result<(), Failure> {
    for image in images {
        check_name(image).map_err(|bad| Failure::usage(bad.to_string()))?;
    }
    let mut written = Written::prepare(dir, images.iter().map(String::as_str), force)?;
    let bar = progress(clean(id), None);
    let mut bytes = 0;
    for image in images {
        bar.set_message(clean(image));
        let reader = client.open_read(id, image).map_err(|error| told(error, id))?;
        let (path, file) = written.create(image)?;
        bytes += match reader.copy_to(&file, &mut |moved| bar.inc(moved)) {
            Err(Error::Io(error)) => {
                return Err(Failure::failed(format!("{}: {error}", path.display())));
            }
            copied => copied.map_err(|error| told(error, id))?,
        };
    }
    drop(bar);
    written.keep();

    let count = images.len();
    let result = json!({ "snapshot": id, "dir": dir, "images": count, "bytes": bytes });
    output.print(&result, || {
        format!("{}: {count} images, {} in {}", clean(id), size(bytes), dir.display())
    })
}

/// What the daemon said.
fn told(error: Error, id: &str) -> Failure {
    let failure = Failure::from(error);
    match failure.exit {
        Exit::NoSuchSnapshot => failure.cure(format!("what it has: criu-imagectl show {id}")),
        Exit::Damaged => failure.cure(format!("its story: journalctl CRIU_SNAPSHOT={id}")),
        _ => failure,
    }
}
