//! `push`: a directory of CRIU's images goes through the proxy as if it were a dump.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;
use tokio::sync::oneshot;
use tokio::time::sleep;

use super::cli::{Daemon, Push};
use super::exit::{Exit, Failure};
use super::print::{Output, clean, progress, size, span};
use super::reach;
use super::stream::Session;
use crate::control::model::{Role, Snapshot, SnapshotState};
use crate::control::{Client, ClientError, Reading};
use crate::criu::images::INVENTORY;
use crate::criu::names::check_name;
use crate::criu::pages::Space;
use crate::sys::unix::is_close;

/// What runc and crun write beside the images: where the container's standard streams lead.
const DESCRIPTORS: &str = "descriptors.json";
/// So many files that are left behind are named.
const NAMED: usize = 8;

/// How long the proxy has to tell what became of a session.
const TOLD_WITHIN: Duration = Duration::from_secs(5);
const LOOK: Duration = Duration::from_millis(50);

/// Pushes, and waits for the cache's acknowledgement.
pub(super) async fn run(daemon: &Daemon, output: Output, push: &Push) -> Result<(), Failure> {
    attempt(daemon, output, push, 0).await.map_err(|failure| match failure.exit {
        Exit::Damaged => failure.cure(
            "what was sent is lost, and the directory as it was: mend the cause, and push it again. A snapshot of that id that the \
             cache held before is untouched: drop it on its host (criu-imagectl --cache list), or push under another id (--snapshot)",
        ),
        _ => failure,
    })
}

/// The same for the images of an attempt to move a process, unless it is 0. It can be cancelled.
pub(super) async fn attempt(
    daemon: &Daemon,
    output: Output,
    push: &Push,
    attempt: u64,
) -> Result<(), Failure> {
    let id = reach::snapshot_id(push.snapshot.as_deref(), &push.dir)?;
    let mut client = reach::only(daemon, Role::Proxy, "push").await?;
    let before = client.show(&id).await.ok().map(|(snapshot, _)| snapshot);
    let set = Set::read(&push.dir, push.parent.is_some())?;
    if push.verbose {
        for name in &set.skipped {
            let _ = writeln!(io::stderr(), "{}: left out, no image of the stream", clean(name));
        }
    }
    if let Some(line) = left_behind(&set.skipped) {
        let _ = writeln!(io::stderr(), "{line}");
    }
    let begun = Instant::now();
    let (session, theirs) = Session::new()
        .map_err(|error| Failure::failed(format!("a socket cannot be made: {error}")))?;
    let to = push.to.as_deref();
    match &push.parent {
        Some(parent) => client.open_child(&id, parent, to, theirs).await?,
        None if attempt != 0 => client.open_attempt(&id, attempt, to, theirs).await?,
        None => client.open(&id, to, Reading::Take, theirs).await?,
    }
    let (set, outcome) = in_a_thread(session, set, &id).await?;
    // The daemon does not keep an idle connection, and a big push takes its time.
    let mut client = Client::connect(client.path()).await?;
    let bytes = match outcome {
        Ok(bytes) => bytes,
        Err(Sending::Ended(name)) => {
            return Err(why_ended(&mut client, &id, before.as_ref(), &name).await);
        }
        Err(Sending::Failed(failure)) => return Err(failure),
    };
    let snapshot = acknowledged(&mut client, &id, before.as_ref()).await?;

    let count = set.images.len();
    if (snapshot.images, snapshot.bytes) != (count as u64, bytes) {
        return Err(Failure::failed(format!(
            "snapshot {id} became {} images of {} bytes, {count} images of {bytes} bytes were sent",
            snapshot.images, snapshot.bytes
        )));
    }
    let ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
    let result = json!({
        "snapshot": id, "peer": snapshot.peer, "images": count, "bytes": bytes,
        "milliseconds": ms, "skipped": set.skipped,
    });
    let peer = clean(&snapshot.peer);
    output.print(&result, || {
        format!("{id}: {count} images, {} at {peer} in {}", size(bytes), span(ms))
    })
}

/// What is in a directory of images.
#[derive(Debug)]
struct Set {
    dir: PathBuf,
    /// The images with their sizes, in the order in which they go.
    images: Vec<(String, u64)>,
    skipped: Vec<String>,
}

impl Set {
    /// Looks what is there. A dump with a parent is no checkpoint by itself. Its pages came over the page
    /// server, which the cache knows, or some of them are here: then it has to be known where the rest is.
    fn read(dir: &Path, parent_is_known: bool) -> Result<Set, Failure> {
        let failed = |error: io::Error| Failure::failed(format!("{}: {error}", dir.display()));
        let (mut images, mut skipped) = (Vec::new(), Vec::new());
        for entry in fs::read_dir(dir).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if !is_image(&name) {
                skipped.push(name);
                continue;
            }
            // Links are followed: a view of a snapshot has them, and without them is no checkpoint.
            let metadata = fs::metadata(entry.path())
                .map_err(|error| Failure::failed(format!("{}: {error}", entry.path().display())))?;
            if metadata.is_file() {
                check_name(&name).map_err(|bad| Failure::failed(bad.to_string()))?;
                images.push((name, metadata.len()));
            } else {
                skipped.push(name);
            }
        }
        if !images.iter().any(|(name, _)| name == INVENTORY) {
            let what = format!("{} has no {INVENTORY}: it is no checkpoint", dir.display());
            return Err(Failure::failed(what).cure("give the directory that criu dump -D wrote to"));
        }
        let has_pages = images.iter().any(|(name, _)| Space::of_pagemap(name).is_some());
        let has_parent = fs::symlink_metadata(dir.join("parent")).is_ok();
        if has_pages && has_parent && !parent_is_known {
            let what = format!("{} has a parent: it is an incremental dump", dir.display());
            return Err(Failure::failed(what)
                .cure("name the snapshot that the parent was pushed as: --parent ID"));
        }
        images.sort_by(|(a, _), (b, _)| (a == INVENTORY, a).cmp(&(b == INVENTORY, b)));
        skipped.sort();
        Ok(Set { dir: dir.to_owned(), images, skipped })
    }
}

/// Whether a file is one that `criu dump --stream` would have sent.
fn is_image(name: &str) -> bool {
    name.strip_suffix(".img").is_some()
        && !name.starts_with("stats-")
        && !name.starts_with("irmap-cache")
}

/// What is not sent, in one line, and what that means to a container; `None` if nothing is left.
fn left_behind(skipped: &[String]) -> Option<String> {
    let names: Vec<_> = skipped.iter().take(NAMED).map(|name| clean(name)).collect();
    let more = match skipped.len() - names.len() {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    let means = if skipped.iter().any(|name| name == DESCRIPTORS) {
        format!(
            "; it is a container's: runc and crun need {DESCRIPTORS} to restore it, so copy that to the \
             other host yourself (see Containers in the operator's guide)"
        )
    } else {
        String::new()
    };
    let line = format!("left behind, as they are no images: {}{more}{means}", names.join(", "));
    (!skipped.is_empty()).then_some(line)
}

/// Why not all images could be sent.
enum Sending {
    /// The proxy ended the session at this image.
    Ended(String),
    /// It failed here.
    Failed(Failure),
}

/// Sends the images in a thread of its own: a proxy that reads no further must not keep anybody from ending this.
async fn in_a_thread(
    session: Session,
    set: Set,
    id: &str,
) -> Result<(Set, Result<u64, Sending>), Failure> {
    let (sender, outcome_of) = oneshot::channel();
    let id = id.to_owned();
    let thread = thread::Builder::new().spawn(move || {
        let outcome = send(session, &set, &id);
        // Nobody waits any more.
        let _ = sender.send((set, outcome));
    });
    thread.map_err(|error| Failure::failed(format!("a thread cannot be made: {error}")))?;
    outcome_of.await.map_err(|_| Failure::failed("what sends the images has ended early"))
}

/// Sends the images and ends the session.
fn send(mut session: Session, set: &Set, id: &str) -> Result<u64, Sending> {
    let total = set.images.iter().map(|(_, bytes)| bytes).sum();
    let bar = progress(clean(id), Some(total));
    let mut sum = 0;
    for (name, expected) in &set.images {
        let path = set.dir.join(name);
        let failed =
            |what: String| Sending::Failed(Failure::failed(format!("{}: {what}", path.display())));
        let file = File::open(&path).map_err(|error| failed(error.to_string()))?;
        bar.set_message(name.clone());
        let moved = session.send(name, &file, &bar).map_err(|error| {
            if is_close(&error) { Sending::Ended(name.clone()) } else { failed(error.to_string()) }
        })?;
        if moved != *expected {
            return Err(failed(format!("it had {expected} bytes and now has {moved}")));
        }
        sum += moved;
    }
    Ok(sum)
}

/// Waits until the cache has acknowledged the snapshot. `before` is what had this id before, which
/// may still be listed for a moment.
async fn acknowledged(
    client: &mut Client,
    id: &str,
    before: Option<&Snapshot>,
) -> Result<Snapshot, Failure> {
    let bar = progress(clean(id), None).with_message("waiting for the cache");
    let begun = Instant::now();
    loop {
        // It is listed since its socket was opened: if it is not, the proxy is another one, or was told to drop it.
        let mut watch = client.watch_known(id).await?;
        loop {
            let snapshot = match watch.next().await {
                Ok(Some(snapshot)) => snapshot,
                Ok(None) => break,
                Err(ClientError::NoSuchSnapshot(_)) => return Err(vanished(id)),
                Err(error) => return Err(error.into()),
            };
            bar.set_position(snapshot.bytes);
            if is_old(before, &snapshot) {
                continue;
            }
            match snapshot.state {
                SnapshotState::Damaged => {
                    return Err(Failure::damaged(id, &clean(&snapshot.reason)));
                }
                SnapshotState::Whole | SnapshotState::Taken => {
                    return Ok(snapshot);
                }
                SnapshotState::Awaited | SnapshotState::Receiving | SnapshotState::Paged => {}
            }
        }
        if begun.elapsed() > TOLD_WITHIN {
            return Err(vanished(id));
        }
        sleep(LOOK).await;
    }
}

fn is_old(before: Option<&Snapshot>, now: &Snapshot) -> bool {
    before.is_some_and(|before| before == now)
}

/// Finds out why the proxy ended the session.
async fn why_ended(
    client: &mut Client,
    id: &str,
    before: Option<&Snapshot>,
    image: &str,
) -> Failure {
    let begun = Instant::now();
    while begun.elapsed() < TOLD_WITHIN {
        match client.show(id).await {
            Ok((snapshot, _)) if is_old(before, &snapshot) => {}
            Ok((snapshot, _)) if snapshot.state == SnapshotState::Damaged => {
                return Failure::damaged(id, &clean(&snapshot.reason));
            }
            Ok(_) => {}
            Err(ClientError::NoSuchSnapshot(_)) => return vanished(id),
            Err(error) => return error.into(),
        }
        sleep(LOOK).await;
    }
    Failure::failed(format!("{image}: the proxy ended the session and does not say why"))
        .cure(format!("its journal may: journalctl -u criu-image-proxy CRIU_SNAPSHOT={id}"))
}

fn vanished(id: &str) -> Failure {
    let what = format!("the proxy forgot snapshot {id} before it told whether the cache has it");
    Failure::new(Exit::Failed, what).cure("on the cache's host: criu-imagectl --cache show")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory(names: &[&str]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for name in names {
            fs::write(dir.path().join(name), name).unwrap();
        }
        dir
    }

    #[test]
    fn images_go_and_the_inventory_goes_last() {
        let dir = directory(&[
            "inventory.img",
            "pages-1.img",
            "core-7.img",
            "stats-dump.img",
            "stats-dump",
            "dump.log",
            "irmap-cache.img",
        ]);
        let set = Set::read(dir.path(), false).unwrap();
        let names: Vec<_> = set.images.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["core-7.img", "pages-1.img", "inventory.img"]);
        assert_eq!(set.skipped, ["dump.log", "irmap-cache.img", "stats-dump", "stats-dump.img"]);
    }

    #[test]
    fn what_is_left_behind_is_told_in_one_line() {
        let left = |names: &[&str]| {
            left_behind(&names.iter().map(ToString::to_string).collect::<Vec<_>>())
        };
        assert_eq!(left(&[]), None);
        assert_eq!(
            left(&["dump.log", "stats-dump"]).unwrap(),
            "left behind, as they are no images: dump.log, stats-dump"
        );
        let many: Vec<_> = (0..20).map(|n| format!("{n}\n")).collect();
        let line = left_behind(&many).unwrap();
        assert!(line.ends_with(" 7  and 12 more") && !line.contains('\n'), "{line:?}");
        let container = left(&["descriptors.json"]).unwrap();
        assert!(
            container.contains("runc and crun need descriptors.json to restore it"),
            "{container}"
        );
    }

    #[test]
    fn what_is_no_full_checkpoint_is_refused() {
        let dir = directory(&["core-7.img"]);
        assert!(Set::read(dir.path(), false).unwrap_err().to_string().contains("no inventory.img"));
        let dir = directory(&["inventory.img"]);
        std::os::unix::fs::symlink("../1", dir.path().join("parent")).unwrap();
        assert!(Set::read(dir.path(), false).is_ok(), "its pages came over the page server");
        fs::write(dir.path().join("pagemap-7.img"), "").unwrap();
        assert!(Set::read(dir.path(), false).unwrap_err().to_string().contains("incremental"));
        assert!(Set::read(dir.path(), true).is_ok());
        assert!(Set::read(Path::new("/nonexistent"), false).is_err());
    }
}
