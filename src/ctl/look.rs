//! `status`, `list`, `show` and `drop`.

use std::fmt::Write as _;
use std::path::Path;

use serde_json::json;

use super::cli::Daemon;
use super::exit::Failure;
use super::print::{Output, clean, since, size, span, table};
use super::reach;
use crate::control::Client;
use crate::control::model::{Image, Role, Snapshot, SnapshotState, Status};

/// Shows each daemon at a glance.
pub(super) async fn status(daemon: &Daemon, output: Output) -> Result<(), Failure> {
    let (statuses, failure) = statuses(daemon).await?;
    output.print(&statuses, || statuses_text(&statuses))?;
    failure.map_or(Ok(()), Err)
}

/// What the daemons that answer say.
pub(super) type Statuses = Vec<Status>;

/// Asks each daemon for a glance.
pub(super) async fn statuses(daemon: &Daemon) -> Result<(Statuses, Option<Failure>), Failure> {
    each(daemon, async |client| Ok(client.status().await?)).await
}

/// The daemons at a glance, as text.
pub(super) fn statuses_text(statuses: &Statuses) -> String {
    statuses.iter().map(status_text).collect::<Vec<_>>().join("\n")
}

/// Lists the snapshots of each daemon.
pub(super) async fn list(daemon: &Daemon, output: Output) -> Result<(), Failure> {
    let (lists, failure) =
        each(daemon, async |client| Ok((client.status().await?.role, client.list().await?)))
            .await?;
    let mut all = Vec::new();
    for (role, snapshots) in &lists {
        all.extend(snapshots.iter().map(|snapshot| with_role(*role, snapshot)));
    }
    output.print(&all, || {
        let tables = lists.iter().map(|(role, snapshots)| {
            // Only where there are two does a table need a name.
            let title =
                if lists.len() > 1 { format!("{}\n", role_word(*role)) } else { String::new() };
            title + &list_text(snapshots)
        });
        tables.collect::<Vec<_>>().join("\n")
    })?;
    failure.map_or(Ok(()), Err)
}

/// Shows one snapshot.
pub(super) async fn show(daemon: &Daemon, output: Output, id: &str) -> Result<(), Failure> {
    let (snapshot, images) = reach::one(daemon).await?.show(id).await?;
    let shown = json!({ "snapshot": snapshot, "images": images });
    output.print(&shown, || show_text(&snapshot, &images))
}

/// Of a snapshot whose pages were not copied in time.
const MEMORY: &str = "may have changed before it was copied";

/// Drops snapshots; one that cannot be dropped does not keep the others.
pub(super) async fn drop_all(
    daemon: &Daemon,
    output: Output,
    ids: &[String],
) -> Result<(), Failure> {
    let mut client = reach::one(daemon).await?;
    let mut dropped = Vec::new();
    let mut first = None;
    for id in ids {
        match client.drop_snapshot(id).await.map_err(Failure::from) {
            Ok(()) => dropped.push(id),
            Err(failure) if first.is_none() => first = Some(failure),
            Err(failure) => failure.report(),
        }
    }
    output.print(&dropped, String::new)?;
    first.map_or(Ok(()), Err)
}

/// Asks each daemon. One that does not answer does not hide the other: its failure comes with what
/// the others said.
pub(super) async fn each<T>(
    daemon: &Daemon,
    ask: impl AsyncFn(&mut Client) -> Result<T, Failure>,
) -> Result<(Vec<T>, Option<Failure>), Failure> {
    let mut answers = Vec::new();
    let mut first = None;
    for path in reach::all(daemon)? {
        match ask_at(&path, &ask).await {
            Ok(answer) => answers.push(answer),
            Err(failure) => first = first.or(Some(failure)),
        }
    }
    match first {
        Some(failure) if answers.is_empty() => Err(failure),
        first => Ok((answers, first)),
    }
}

async fn ask_at<T>(
    path: &Path,
    ask: impl AsyncFn(&mut Client) -> Result<T, Failure>,
) -> Result<T, Failure> {
    ask(&mut Client::connect(path).await?).await
}

fn with_role(role: Role, snapshot: &Snapshot) -> serde_json::Value {
    let mut value = json!(snapshot);
    value["daemon"] = json!(role);
    value
}

fn status_text(status: &Status) -> String {
    let role = role_word(status.role);
    let version = clean(&status.version);
    let mut text = format!("criu-image-{role} {version}, up {}\n", span(since(status.started_ms)));
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "  {name:<10} {value}");
    };
    line("sessions", status.sessions.to_string());
    line(
        "snapshots",
        format!(
            "{} receiving, {} whole, {} taken, {} damaged",
            status.receiving, status.whole, status.taken, status.damaged
        ),
    );
    line("held", format!("{} of {}", size(status.held_bytes), size(status.max_bytes)));
    line("traffic", format!("{}/s, {} in all", size(status.rate), size(status.total_bytes)));
    for link in &status.links {
        let state = if link.up { "up" } else { "down" };
        line("link", format!("{} {state}: {}", clean(&link.peer), clean(&link.why)));
    }
    if status.links.is_empty() {
        line("link", "none".to_owned());
    }
    text
}

fn list_text(snapshots: &[Snapshot]) -> String {
    let rows: Vec<_> = snapshots
        .iter()
        .map(|snapshot| {
            let age = match snapshot.begun_ms {
                0 => "-".to_owned(),
                begun => span(since(begun)),
            };
            vec![
                clean(&snapshot.id),
                state_word(snapshot.state).to_owned(),
                snapshot.images.to_string(),
                size(snapshot.bytes),
                age,
                clean(&snapshot.peer),
                remark(snapshot),
            ]
        })
        .collect();
    table(&["ID", "STATE", "IMAGES", "BYTES", "AGE", "PEER", "REASON"], &[2, 3, 4], &rows)
}

/// Why a snapshot is damaged, or what else is to be known of it.
fn remark(snapshot: &Snapshot) -> String {
    match snapshot.memory_may_have_changed {
        Some(true) if snapshot.reason.is_empty() => format!("its memory {MEMORY}"),
        _ => clean(&snapshot.reason),
    }
}

fn show_text(snapshot: &Snapshot, images: &[Image]) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: &str| {
        let _ = writeln!(text, "{name:<8} {}", clean(value));
    };
    line("id", &snapshot.id);
    line("state", state_word(snapshot.state));
    if !snapshot.reason.is_empty() {
        line("reason", &snapshot.reason);
    }
    if !snapshot.needs_view.is_empty() {
        line("view", &format!("needed: {}", snapshot.needs_view));
    }
    if snapshot.memory_may_have_changed == Some(true) {
        line("memory", MEMORY);
    }
    line("peer", &snapshot.peer);
    line("images", &snapshot.images.to_string());
    line("bytes", &format!("{} ({})", size(snapshot.bytes), snapshot.bytes));
    if snapshot.begun_ms > 0 {
        line("begun", &format!("{} ago", span(since(snapshot.begun_ms))));
    }
    if snapshot.ended_ms > 0 {
        line("took", &span(snapshot.ended_ms.saturating_sub(snapshot.begun_ms)));
    }
    if !images.is_empty() {
        let rows: Vec<_> = images
            .iter()
            .map(|image| {
                let end = if image.whole { "whole" } else { "open" };
                vec![clean(&image.name), image.bytes.to_string(), end.to_owned()]
            })
            .collect();
        text.push('\n');
        text.push_str(&table(&["IMAGE", "BYTES", "STATE"], &[1], &rows));
    }
    text
}

pub(super) fn role_word(role: Role) -> &'static str {
    match role {
        Role::Proxy => "proxy",
        Role::Cache => "cache",
    }
}

/// A state as it stands in the interface.
pub(super) fn state_word(state: SnapshotState) -> &'static str {
    match state {
        SnapshotState::Awaited => "awaited",
        SnapshotState::Receiving => "receiving",
        SnapshotState::Paged => "paged",
        SnapshotState::Whole => "whole",
        SnapshotState::Damaged => "damaged",
        SnapshotState::Taken => "taken",
    }
}
