//! The cache's side of the link, without I/O: takes messages in, checks their order and counts, and
//! says what to do about each.

mod action;
mod incoming;
mod violation;

use std::collections::BTreeMap;

use super::message::{
    self, ImageBegin, ImageData, ImageEnd, Message, PageData, Pages, SnapshotBegin, SnapshotEnd,
    SnapshotList,
};
use super::spaces::announced;
use crate::criu::names::{check_id, check_image, check_list};
use crate::criu::pages::{Contents, Run};

pub use action::Action;
pub use violation::Violation;

use incoming::{Counts, Incoming, OpenImage, Round};

/// The limits that a peer has to keep.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Images of one snapshot.
    pub images: u64,
    /// Snapshots under way at once on one link.
    pub snapshots: usize,
}

/// The snapshots under way on one link.
#[derive(Debug)]
pub struct Receiver {
    limits: Limits,
    snapshots: BTreeMap<u32, Incoming>,
    /// Numbers only grow, so that a late message can never be taken for another snapshot's.
    next: u64,
}

impl Receiver {
    /// A receiver for a link on which nothing has come yet.
    pub fn new(limits: Limits) -> Receiver {
        Receiver { limits, snapshots: BTreeMap::new(), next: 0 }
    }

    /// Takes a message in. `payload_len` is what its header announced, in bytes.
    pub fn receive(&mut self, message: Message, payload_len: usize) -> Result<Action, Violation> {
        match message {
            Message::KeepAlive(_) => Ok(Action::Nothing),
            Message::Goodbye(goodbye) => Ok(Action::Goodbye(goodbye.reason)),
            Message::SnapshotBegin(begin) => self.begin(begin),
            Message::SnapshotList(list) => self.list(list),
            Message::ImageBegin(begin) => self.begin_image(begin),
            Message::ImageData(data) => self.append(&data, payload_len as u64),
            Message::ImageEnd(end) => self.end_image(&end),
            Message::Space(space) => self.space(&space),
            Message::Pages(pages) => self.pages(&pages),
            Message::PagesForget(forget) => Ok(Action::Forget { id: forget.id }),
            Message::SnapshotWithdraw(withdraw) => Ok(Action::Withdraw(withdraw)),
            Message::PageData(data) => self.page_data(data, payload_len as u64),
            Message::SnapshotEnd(end) => self.end(&end),
            Message::SnapshotAbort(abort) => {
                match self.remove("SNAPSHOT_ABORT", abort.snapshot)? {
                    Incoming::GivenUp => Ok(Action::Nothing),
                    Incoming::Receiving(_) | Incoming::Round(_) => Ok(Action::Damaged {
                        snapshot: abort.snapshot,
                        reason: abort.reason,
                        by_peer: true,
                    }),
                }
            }
            Message::RegionRequest(request) => Ok(Action::Region(request)),
            Message::PagesRequest(request) => Ok(Action::RequestedPages(request)),
            // This side asks for nothing yet.
            Message::Region(region) => Err(Violation::NotAsked(region.request)),
            Message::Hello(_)
            | Message::Welcome(_)
            | Message::SnapshotReady(_)
            | Message::SnapshotAck(_)
            | Message::ImageReady(_)
            | Message::ImageAck(_)
            | Message::Spaces(_)
            | Message::SnapshotWithdrawn(_) => {
                Err(Violation::OutOfOrder(message.kind().as_str_name()))
            }
        }
    }

    /// This side gives a snapshot up; what still comes of it is discarded.
    pub fn give_up(&mut self, snapshot: u32) {
        if let Some(incoming) = self.snapshots.get_mut(&snapshot) {
            *incoming = Incoming::GivenUp;
        }
    }

    fn begin(&mut self, begin: SnapshotBegin) -> Result<Action, Violation> {
        let SnapshotBegin { snapshot, id, named, round, parent, attempt } = begin;
        let parent = Some(parent).filter(|parent| !parent.is_empty());
        if u64::from(snapshot) < self.next {
            return Err(Violation::SnapshotTwice(snapshot));
        }
        // The first ones too many are refused each, until the peer has heard of it.
        if self.snapshots.len() >= 2 * self.limits.snapshots {
            return Err(Violation::TooManySnapshots(self.snapshots.len()));
        }
        self.next = u64::from(snapshot) + 1;
        let full = self.snapshots.len() >= self.limits.snapshots;
        let incoming = if round {
            let id = id.clone();
            Incoming::Round(Round { id, open: false, spaces: 0, bytes: 0, missing: 0 })
        } else {
            Incoming::Receiving(Counts::new(&id))
        };
        self.snapshots.insert(snapshot, incoming);
        if let Err(bad) = check_id(&id).and_then(|()| parent.as_deref().map_or(Ok(()), check_id)) {
            return Ok(self.damaged(snapshot, bad.to_string()));
        }
        if full {
            let limit = self.limits.snapshots;
            let reason = format!("{limit} snapshots beside {id} are under way on this link");
            return Ok(self.damaged(snapshot, reason));
        }
        Ok(if round {
            Action::BeginRound { snapshot, id, parent, attempt }
        } else {
            Action::Begin { snapshot, id, named, parent, attempt }
        })
    }

    fn list(&mut self, list: SnapshotList) -> Result<Action, Violation> {
        let SnapshotList { snapshot, list } = list;
        if self.receiving("SNAPSHOT_LIST", snapshot)?.is_none() {
            return Ok(Action::Nothing);
        }
        if let Err(bad) = check_list(&list) {
            return Ok(self.damaged(snapshot, bad.to_string()));
        }
        Ok(Action::List { snapshot, list })
    }

    fn begin_image(&mut self, begin: ImageBegin) -> Result<Action, Violation> {
        let limit = self.limits.images;
        let ImageBegin { snapshot, image, name, append } = begin;
        let Some(counts) = self.receiving("IMAGE_BEGIN", snapshot)? else {
            return Ok(Action::Nothing);
        };
        if u64::from(image) < counts.next_image {
            return Err(Violation::ImageTwice { id: counts.id.clone(), image });
        }
        counts.next_image = u64::from(image) + 1;
        let wrong = if let Err(bad) = check_image(&name) {
            Some(bad.to_string())
        } else if counts.open.values().any(|open| open.name == name) {
            Some(format!("image {name} is opened for writing twice at once"))
        } else if counts.images + counts.open.len() as u64 >= limit {
            Some(format!("more than {limit} images"))
        } else {
            None
        };
        if let Some(reason) = wrong {
            return Ok(self.damaged(snapshot, reason));
        }
        counts.open.insert(image, OpenImage { name: name.clone(), size: 0 });
        Ok(Action::BeginImage { snapshot, image, name, append })
    }

    fn append(&mut self, data: &ImageData, len: u64) -> Result<Action, Violation> {
        let &ImageData { snapshot, image, offset } = data;
        let Some(counts) = self.receiving("IMAGE_DATA", snapshot)? else {
            return Ok(Action::Discard);
        };
        let Some(open) = counts.open.get_mut(&image) else {
            return Err(counts.no_such_image("IMAGE_DATA", image));
        };
        if open.size != offset {
            let (id, name) = (counts.id.clone(), open.name.clone());
            return Err(Violation::Gap { id, name, offset, expected: open.size });
        }
        open.size += len;
        counts.bytes += len;
        Ok(Action::Append { snapshot, image })
    }

    fn end_image(&mut self, end: &ImageEnd) -> Result<Action, Violation> {
        let &ImageEnd { snapshot, image, size } = end;
        let Some(counts) = self.receiving("IMAGE_END", snapshot)? else {
            return Ok(Action::Nothing);
        };
        let Some(open) = counts.open.remove(&image) else {
            return Err(counts.no_such_image("IMAGE_END", image));
        };
        counts.images += 1;
        if open.size != size {
            let OpenImage { name, size: came } = open;
            let reason =
                format!("image {name} has {size} bytes as announced, but {came} have come");
            return Ok(self.damaged(snapshot, reason));
        }
        Ok(Action::EndImage { snapshot, image, size })
    }

    fn space(&mut self, space: &message::Space) -> Result<Action, Violation> {
        let snapshot = space.snapshot;
        let Some(round) = self.round("SPACE", snapshot)? else { return Ok(Action::Nothing) };
        if round.missing > 0 {
            let reason = round.cut_short();
            return Ok(self.damaged(snapshot, reason));
        }
        let space = match announced(space) {
            Ok(space) => space,
            Err(bad) => return Ok(self.damaged(snapshot, bad.to_string())),
        };
        round.open = true;
        round.spaces += 1;
        Ok(Action::Space { snapshot, space })
    }

    fn pages(&mut self, pages: &Pages) -> Result<Action, Violation> {
        let &Pages { snapshot, address, pages, flags } = pages;
        let Some(round) = self.round("PAGES", snapshot)? else { return Ok(Action::Nothing) };
        let run = Contents::from_flags(flags)
            .map_err(|bad| format!("pages at {address:#x}: {bad}"))
            .and_then(|contents| Run::new(address, pages, contents).map_err(|bad| bad.to_string()));
        let wrong = match run {
            _ if round.missing > 0 => round.cut_short(),
            _ if !round.open => format!("pages at {address:#x} before any page space"),
            Err(bad) => bad,
            Ok(run) if run.contents() == Contents::Lazy => {
                format!("pages at {address:#x} are still at the source: a lazy dump is not relayed")
            }
            Ok(run) => {
                round.missing = run.payload_len();
                return Ok(Action::Pages { snapshot, run });
            }
        };
        Ok(self.damaged(snapshot, wrong))
    }

    fn page_data(&mut self, data: PageData, len: u64) -> Result<Action, Violation> {
        let snapshot = data.snapshot;
        let Some(round) = self.round("PAGE_DATA", snapshot)? else { return Ok(Action::Discard) };
        let Some(missing) = round.missing.checked_sub(len) else {
            let (id, missing) = (round.id.clone(), round.missing);
            return Err(Violation::TooManyPages { id, len, missing });
        };
        round.missing = missing;
        round.bytes += len;
        Ok(Action::PageData { snapshot })
    }

    fn end(&mut self, end: &SnapshotEnd) -> Result<Action, Violation> {
        let snapshot = end.snapshot;
        let incoming = self.remove("SNAPSHOT_END", snapshot)?;
        let damaged = |reason| Ok(Action::Damaged { snapshot, reason, by_peer: false });
        let (what, count, bytes) = match &incoming {
            Incoming::GivenUp => return Ok(Action::Nothing),
            Incoming::Receiving(counts) => ("images", counts.images, counts.bytes),
            Incoming::Round(round) => ("page spaces", round.spaces, round.bytes),
        };
        if !end.complete {
            return damaged("its end came without the mark of completeness".into());
        }
        if let Some(open) = incoming.unfinished() {
            return damaged(open);
        }
        if (end.images, end.bytes) != (count, bytes) {
            return damaged(format!(
                "{} {what} with {} bytes were announced, {count} with {bytes} have come",
                end.images, end.bytes
            ));
        }
        Ok(match incoming {
            Incoming::Round(_) => Action::CompleteRound { snapshot, spaces: count, bytes },
            _ => Action::Complete {
                snapshot,
                images: count,
                bytes,
                partial: end.partial,
                memory_may_have_changed: end.memory_may_have_changed,
            },
        })
    }

    fn damaged(&mut self, snapshot: u32, reason: String) -> Action {
        self.give_up(snapshot);
        Action::Damaged { snapshot, reason, by_peer: false }
    }

    /// The counts of a snapshot under way; `None` if this side has given it up.
    fn receiving(
        &mut self,
        kind: &'static str,
        snapshot: u32,
    ) -> Result<Option<&mut Counts>, Violation> {
        match self.snapshots.get_mut(&snapshot) {
            Some(Incoming::Receiving(counts)) => Ok(Some(counts)),
            Some(Incoming::Round(_)) => {
                Err(Violation::WrongContents { kind, snapshot, is: "is a round of pages" })
            }
            Some(Incoming::GivenUp) => Ok(None),
            None => Err(Violation::NoSuchSnapshot { kind, snapshot }),
        }
    }

    /// A round under way; `None` if this side has given it up.
    fn round(
        &mut self,
        kind: &'static str,
        snapshot: u32,
    ) -> Result<Option<&mut Round>, Violation> {
        match self.snapshots.get_mut(&snapshot) {
            Some(Incoming::Round(round)) => Ok(Some(round)),
            Some(Incoming::Receiving(_)) => {
                Err(Violation::WrongContents { kind, snapshot, is: "has images" })
            }
            Some(Incoming::GivenUp) => Ok(None),
            None => Err(Violation::NoSuchSnapshot { kind, snapshot }),
        }
    }

    fn remove(&mut self, kind: &'static str, snapshot: u32) -> Result<Incoming, Violation> {
        self.snapshots.remove(&snapshot).ok_or(Violation::NoSuchSnapshot { kind, snapshot })
    }
}
