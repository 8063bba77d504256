//! A snapshot: its state, and what of it exists in that state.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::rc::Rc;
use std::time::Instant;

use tokio::sync::Mutex;

use super::flatten::Flattened;
use super::image::Image;
use super::pages::{Flat, PAGE};
use super::record::Record;
use super::{Key, Refused};
use crate::criu::pages::Space;
use crate::sys::clock::now_ms;
use crate::timeline::{PhaseName, Timeline};

/// The images of a snapshot by name.
pub type Images = BTreeMap<String, Rc<Image>>;

/// What has come of a snapshot: its images, the pages of its parent, and those of its rounds.
pub(super) type Came = (Rc<Images>, Option<Flat<Space>>, Option<Flat<Space>>);

/// How many images, and how many bytes in them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Images that have begun.
    pub images: u64,
    /// Bytes that have come.
    pub bytes: u64,
}

/// The state of a snapshot, with what exists in it.
#[derive(Debug)]
pub enum State {
    /// A restore asks for it by name; nothing has come.
    Awaited,
    /// Its pages are coming or held, and its images are to come.
    Paged,
    /// Images are coming.
    Receiving(Rc<Images>),
    /// All have come, and passed the checks.
    Whole(Rc<Images>),
    /// A restore of it has succeeded, or has read all of it and said nothing.
    Taken(Rc<Images>),
    /// It can never be restored; its bytes have been given back.
    Damaged {
        /// What happened.
        reason: String,
        /// What had come by then.
        counts: Counts,
    },
}

/// Who sends snapshots: a peer on a link.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sender {
    /// As it is shown.
    pub name: String,
    /// Its host; `None` for a unix socket. Only the host that sent a snapshot may read it back.
    pub host: Option<IpAddr>,
    /// The attempt to move a process that what it sends belongs to, 0 for none.
    pub attempt: u64,
}

impl Sender {
    /// Its address, as it stands in its name: "host-a (192.0.2.7:41442)".
    pub fn address(&self) -> &str {
        let within = self.name.rsplit_once(" (").and_then(|(_, rest)| rest.strip_suffix(')'));
        within.unwrap_or(&self.name)
    }
}

/// The pages of a snapshot that came apart from its images, in rounds.
#[derive(Debug, Default)]
pub(super) struct Pages {
    /// What the rounds so far brought; `None` before the first.
    pub(super) flat: Option<Flat<Space>>,
    /// A round has failed: CRIU takes what it brought for sent, so the next one has to bring everything.
    pub(super) broken: bool,
    /// The number of the round that is coming.
    pub(super) coming: Option<u64>,
    /// The snapshot that it is based on, if that is another one.
    pub(super) parent: Option<Key>,
    /// Those of its images once it is whole, if somebody has asked for them.
    pub(super) of_images: Option<Flattened>,
    /// Those of the snapshot in which the images that are coming have pages.
    pub(super) of_parent: Option<Flat<Space>>,
    /// Whether the images that are coming were begun after pages had come.
    joined: bool,
    /// Whether the images have all come, and only their end is to be made.
    pub(super) ending: bool,
}

/// What is known of the memory in a snapshot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Memory {
    /// It is as it was when the process was frozen.
    #[default]
    AsFrozen,
    /// It was copied too late: the kernel, or the process, may have written into it before. No restore gets it.
    MayHaveChanged,
    /// It may have changed, and somebody wants it all the same.
    Accepted,
}

/// A snapshot in the store.
#[derive(Debug)]
pub struct Snapshot {
    /// Its id.
    pub id: String,
    /// Who sends it.
    pub sender: Sender,
    /// Its state.
    pub state: State,
    /// When its state last changed.
    pub since: Instant,
    /// When it began to come, or to be awaited: milliseconds since the epoch.
    pub begun_ms: u64,
    /// When it became whole or damaged: milliseconds since the epoch, 0 before.
    pub ended_ms: u64,
    /// Why it has to be restored from a view, once it is whole; `None` if the stream will do.
    pub needs_view: Option<String>,
    /// Whether a restore from a view waits for it.
    pub view_awaited: bool,
    /// Held by who brings its pages together for a view.
    pub(super) view_turn: Rc<Mutex<()>>,
    /// How many restores are bound to it now.
    pub restores: usize,
    /// How many directories are open for restores of it.
    pub(super) directories: usize,
    /// Whether it is kept for restores that ask for it by name.
    pub reserved: bool,
    /// Whether its source has withdrawn it: the process runs on there.
    pub withdrawn: bool,
    /// When what happened.
    pub timeline: Timeline,
    /// What is known of its memory.
    pub memory: Memory,
    pub(super) pages: Pages,
    /// Where its small images are, once it is whole.
    pub(super) record: Option<Rc<Record>>,
}

impl Snapshot {
    pub(super) fn new(id: &str, sender: &Sender, state: State) -> Snapshot {
        let mut timeline = Timeline::default();
        if matches!(state, State::Receiving(_)) {
            timeline.begin(PhaseName::Arrival);
        }
        Snapshot {
            id: id.to_owned(),
            sender: sender.clone(),
            state,
            since: Instant::now(),
            begun_ms: now_ms(),
            ended_ms: 0,
            needs_view: None,
            view_awaited: false,
            view_turn: Rc::default(),
            restores: 0,
            directories: 0,
            reserved: false,
            withdrawn: false,
            timeline,
            memory: Memory::default(),
            pages: Pages::default(),
            record: None,
        }
    }

    /// Begins to come, or to come again: as `state` says, which is [`State::Receiving`] or
    /// [`State::Paged`]. Its pages stay if they were to be joined by images.
    pub(super) fn begin(&mut self, sender: &Sender, state: State) {
        let Snapshot { view_awaited, restores, directories, reserved, .. } = *self;
        let receives = matches!(state, State::Receiving(_));
        let mut begun = Snapshot::new(&self.id, sender, state);
        if matches!(self.state, State::Paged) {
            begun.pages = std::mem::take(&mut self.pages);
            begun.pages.joined = receives;
            begun.timeline = std::mem::take(&mut self.timeline);
            if receives {
                begun.timeline.begin(PhaseName::Arrival);
            }
        }
        *self = Snapshot { view_awaited, restores, directories, reserved, ..begun };
    }

    /// Cannot be completed: becomes damaged, and gives its bytes back. What pages it had before its images
    /// began stay: their process may be gone, and the images may be sent again.
    pub(super) fn fail(&mut self, reason: &str) {
        if self.pages.joined && self.pages.flat.is_some() {
            self.state = State::Paged;
            self.pages.ending = false;
            self.pages.of_parent = None;
            self.timeline.end(PhaseName::Arrival, 0, true);
            self.since = Instant::now();
            return;
        }
        let counts = self.counts();
        self.end(State::Damaged { reason: reason.to_owned(), counts });
    }

    /// Becomes whole or damaged.
    pub(super) fn end(&mut self, state: State) {
        let damaged = matches!(state, State::Damaged { .. });
        self.state = state;
        self.timeline.end(PhaseName::Arrival, self.counts().bytes, damaged);
        if !damaged && self.restores > 0 {
            self.timeline.begin(PhaseName::Restore);
        }
        // Images hold the pages that they show.
        self.pages = Pages::default();
        self.record = None;
        self.since = Instant::now();
        self.ended_ms = now_ms();
    }

    /// Becomes taken; the time it is kept begins anew.
    pub(super) fn take(&mut self, images: Rc<Images>) {
        self.timeline.end(PhaseName::Restore, self.counts().bytes, false);
        self.state = State::Taken(images);
        self.since = Instant::now();
    }

    /// If it was taken, the time it is kept begins anew.
    pub(super) fn keep_on(&mut self) {
        if matches!(self.state, State::Taken(_)) {
            self.since = Instant::now();
        }
    }

    /// A restore is bound to it.
    pub(super) fn bind(&mut self) {
        self.restores += 1;
        let whole = matches!(self.state, State::Whole(_) | State::Taken(_));
        if whole && !self.timeline.is_in(PhaseName::Restore) {
            self.timeline.begin(PhaseName::Restore);
        }
    }

    /// A restore of it has ended.
    pub(super) fn unbind(&mut self) {
        self.restores -= 1;
        if self.restores == 0 {
            self.timeline.end(PhaseName::Restore, 0, true);
        }
    }

    /// Whether nothing of it has come, and nobody waits for it any more.
    pub(super) fn is_forsaken(&self) -> bool {
        matches!(self.state, State::Awaited) && self.restores == 0 && self.directories == 0
    }

    /// Its images, where there are any.
    pub fn images(&self) -> Option<&Images> {
        match &self.state {
            State::Receiving(images) | State::Whole(images) | State::Taken(images) => Some(images),
            State::Awaited | State::Paged | State::Damaged { .. } => None,
        }
    }

    /// How many images and bytes have come.
    pub fn counts(&self) -> Counts {
        match &self.state {
            State::Damaged { counts, .. } => *counts,
            State::Paged => Counts { images: 0, bytes: self.paged() },
            _ => self.images().map_or_else(Counts::default, |images| Counts {
                images: images.len() as u64,
                bytes: images.values().map(|image| image.len()).sum(),
            }),
        }
    }

    /// Its pages that came in rounds, until it is whole; `None` if no round has come yet.
    pub fn flat(&self) -> Option<&Flat<Space>> {
        self.pages.flat.as_ref()
    }

    /// What has come of it: its images, the pages of its parent, and those of its rounds. The error is why that is not
    /// all of it.
    pub(super) fn all_that_came(&self) -> Result<Came, String> {
        let State::Receiving(images) = &self.state else {
            return Err(Refused::Dropped.to_string());
        };
        if self.pages.coming.is_some() {
            return Err("its end came while a round of its pages was still coming".to_owned());
        }
        Ok((images.clone(), self.pages.of_parent.clone(), self.pages.flat.clone()))
    }

    /// How many bytes of pages came in rounds and are held.
    pub(super) fn paged(&self) -> u64 {
        self.flat().map_or(0, |flat| flat.pages() * PAGE)
    }
}
