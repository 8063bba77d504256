//! `show --timeline`: where the time of a snapshot went, as the daemons of one host or of both saw it.

mod drawn;
mod told;

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::cli::{Daemon, Show};
use super::exit::{Exit, Failure};
use super::look;
use super::print::Output;
use crate::control::ClientError;
use crate::control::model::Role;
use crate::timeline::{Phase, PhaseName};

/// What `show --help` ends with.
pub(super) const HELP: &str = "Examples:\n  \
criu-imagectl show web\n  \
criu-imagectl show web --timeline\n\n\
Where the time of a migration went, seen from both hosts:\n  \
host-a# criu-imagectl --json show web --timeline > web.json\n  \
host-b# criu-imagectl show web --timeline --with web.json --svg web.svg\n\n\
The phases: round (pages come while the process runs), dump (from CRIU's first image to its last; the process stands \
still from a little before on), acknowledgement (until the cache has said that it holds all of it), arrival (the same \
images at the cache), wait (nobody restores yet), restore. Each host's clock is its own: what two hosts say is as exact as \
their clocks are alike.";

/// What is known of one snapshot.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Told {
    snapshot: String,
    phases: Vec<Part>,
}

/// A phase, and whose.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Part {
    daemon: Role,
    phase: Name,
    begun_ms: u64,
    /// 0 while it goes on.
    ended_ms: u64,
    bytes: u64,
    failed: bool,
}

/// The phases by the names that they are shown by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Name {
    Round,
    Dump,
    Acknowledgement,
    Arrival,
    /// Between the arrival and the restore.
    Wait,
    Restore,
}

impl Name {
    fn word(self) -> &'static str {
        match self {
            Name::Round => "round",
            Name::Dump => "dump",
            Name::Acknowledgement => "acknowledgement",
            Name::Arrival => "arrival",
            Name::Wait => "wait",
            Name::Restore => "restore",
        }
    }
}

impl From<PhaseName> for Name {
    fn from(name: PhaseName) -> Name {
        match name {
            PhaseName::Round => Name::Round,
            PhaseName::Dump => Name::Dump,
            PhaseName::Acknowledgement => Name::Acknowledgement,
            PhaseName::Arrival => Name::Arrival,
            PhaseName::Restore => Name::Restore,
        }
    }
}

/// Shows it as text or JSON, and draws it where that is asked for.
pub(super) async fn run(daemon: &Daemon, output: Output, show: &Show) -> Result<(), Failure> {
    let id = &show.snapshot;
    let ask = async |client: &mut crate::control::Client| {
        let role = client.status().await?.role;
        match client.timeline(id).await {
            Ok(phases) => Ok(Some((role, phases))),
            // The other one may know it.
            Err(ClientError::NoSuchSnapshot(_)) => Ok(None),
            Err(error) => Err(error.into()),
        }
    };
    let (answers, failure) = look::each(daemon, ask).await?;
    let known: Vec<_> = answers.into_iter().flatten().collect();
    if known.is_empty() && show.with.is_none() {
        return Err(failure.unwrap_or_else(|| ClientError::NoSuchSnapshot(id.clone()).into()));
    }
    let mut parts: Vec<_> = known.into_iter().flat_map(|(role, phases)| of(role, phases)).collect();
    if let Some(path) = &show.with {
        parts.extend(from_file(path, id)?);
    }
    let told = Told { snapshot: id.clone(), phases: in_order(parts) };
    if let Some(path) = &show.svg {
        let cannot = |error| Failure::failed(format!("{}: {error}", path.display()));
        fs::write(path, drawn::svg(&told)).map_err(cannot)?;
    }
    output.print(&told, || told::text(&told))?;
    failure.map_or(Ok(()), Err)
}

fn of(daemon: Role, phases: Vec<Phase>) -> impl Iterator<Item = Part> {
    phases.into_iter().map(move |Phase { name, begun_ms, ended_ms, bytes, failed }| Part {
        daemon,
        phase: name.into(),
        begun_ms,
        ended_ms,
        bytes,
        failed,
    })
}

/// What was printed on the other host.
fn from_file(path: &Path, id: &str) -> Result<Vec<Part>, Failure> {
    let wrong = |what: String| {
        Failure::new(Exit::Usage, format!("{}: {what}", path.display()))
            .cure(format!("on the other host: criu-imagectl --json show {id} --timeline > FILE"))
    };
    let text = fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
    let told: Told = serde_json::from_str(&text).map_err(|error| wrong(error.to_string()))?;
    if told.snapshot != id {
        return Err(wrong(format!("that is the timeline of snapshot {}", told.snapshot)));
    }
    Ok(told.phases)
}

/// By the time at which they began, with the wait between arrival and restore; none twice.
fn in_order(mut parts: Vec<Part>) -> Vec<Part> {
    parts.retain(|part| part.phase != Name::Wait);
    let restored = |part: &&Part| part.phase == Name::Restore;
    if let Some(restore) = parts.iter().find(restored) {
        let arrived = |part: &&Part| {
            part.phase == Name::Arrival && !part.failed && part.ended_ms < restore.begun_ms
        };
        if let Some(arrival) = parts.iter().rev().find(arrived).filter(|part| part.ended_ms > 0) {
            let (begun_ms, ended_ms) = (arrival.ended_ms, restore.begun_ms);
            let wait = Part { phase: Name::Wait, begun_ms, ended_ms, bytes: 0, ..restore.clone() };
            parts.push(Part { failed: false, ..wait });
        }
    }
    parts.sort_by_key(|part| (part.begun_ms, part.ended_ms, part.phase as u8));
    parts.dedup();
    parts
}

/// When the first phase began and the last one ended, or the latest time that is known of.
fn extent(parts: &[Part]) -> (u64, u64) {
    let begun = parts.iter().map(|part| part.begun_ms).min().unwrap_or(0);
    let ended = parts.iter().map(|part| part.ended_ms.max(part.begun_ms)).max().unwrap_or(0);
    (begun, ended)
}

/// How long something took: `840 ms`, `1.24 s`, `5 min`.
fn took(ms: u64) -> String {
    match ms {
        1000..120_000 => format!("{}.{:02} s", ms / 1000, ms % 1000 / 10),
        _ => super::print::span(ms),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn part(daemon: Role, phase: Name, begun_ms: u64, ended_ms: u64) -> Part {
        Part { daemon, phase, begun_ms, ended_ms, bytes: 4096, failed: false }
    }

    /// A round, a dump, a wait, a restore that goes on.
    pub(super) fn told() -> Told {
        let phases = in_order(vec![
            part(Role::Cache, Name::Restore, 4500, 0),
            part(Role::Proxy, Name::Round, 1000, 2000),
            part(Role::Proxy, Name::Dump, 2500, 3000),
            part(Role::Proxy, Name::Acknowledgement, 3000, 3010),
            part(Role::Cache, Name::Arrival, 2510, 3005),
        ]);
        Told { snapshot: "web".to_owned(), phases }
    }

    #[test]
    fn phases_are_in_order_and_the_wait_is_one() {
        let phases = told().phases;
        let words: Vec<_> = phases.iter().map(|part| part.phase.word()).collect();
        assert_eq!(words, ["round", "dump", "arrival", "acknowledgement", "wait", "restore"]);
        assert_eq!((phases[4].begun_ms, phases[4].ended_ms), (3005, 4500));
        // What is told again, and from another host, is there once.
        assert_eq!(in_order([phases.clone(), phases.clone()].concat()), phases);
    }

    #[test]
    fn there_is_no_wait_where_the_restore_came_first_or_nothing_arrived() {
        let parts =
            vec![part(Role::Cache, Name::Arrival, 10, 0), part(Role::Cache, Name::Restore, 20, 30)];
        assert_eq!(in_order(parts.clone()), parts);
    }

    #[test]
    fn a_file_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("web.json");
        fs::write(&path, serde_json::to_string(&told()).unwrap()).unwrap();
        assert_eq!(from_file(&path, "web").unwrap(), told().phases);
        assert_eq!(from_file(&path, "db").unwrap_err().exit, Exit::Usage);
        fs::write(&path, "[]").unwrap();
        assert_eq!(from_file(&path, "web").unwrap_err().exit, Exit::Usage);
        assert_eq!(from_file(dir.path(), "web").unwrap_err().exit, Exit::Usage);
    }
}
