//! A snapshot: its state, and what of it exists in that state.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::rc::Rc;
use std::time::Instant;

use super::image::Image;
use crate::sys::clock::now_ms;

/// The images of a snapshot by name.
pub type Images = BTreeMap<String, Rc<Image>>;

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
    /// Images are coming.
    Receiving(Rc<Images>),
    /// All have come, and passed the checks.
    Whole(Rc<Images>),
    /// A restore has read it.
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
    /// How many restores are bound to it now.
    pub restores: usize,
    /// Whether it is kept for restores that ask for it by name.
    pub reserved: bool,
}

impl Snapshot {
    pub(super) fn new(id: &str, sender: &Sender, state: State) -> Snapshot {
        Snapshot {
            id: id.to_owned(),
            sender: sender.clone(),
            state,
            since: Instant::now(),
            begun_ms: now_ms(),
            ended_ms: 0,
            restores: 0,
            reserved: false,
        }
    }

    /// Begins to come, or to come again.
    pub(super) fn begin(&mut self, sender: &Sender) {
        let (restores, reserved) = (self.restores, self.reserved);
        let begun = Snapshot::new(&self.id, sender, State::Receiving(Rc::default()));
        *self = Snapshot { restores, reserved, ..begun };
    }

    /// Becomes whole or damaged.
    pub(super) fn end(&mut self, state: State) {
        self.state = state;
        self.since = Instant::now();
        self.ended_ms = now_ms();
    }

    /// Becomes taken; the time it is kept begins anew.
    pub(super) fn take(&mut self, images: Rc<Images>) {
        self.state = State::Taken(images);
        self.since = Instant::now();
    }

    /// Its images, where there are any.
    pub fn images(&self) -> Option<&Images> {
        match &self.state {
            State::Receiving(images) | State::Whole(images) | State::Taken(images) => Some(images),
            State::Awaited | State::Damaged { .. } => None,
        }
    }

    /// How many images and bytes have come.
    pub fn counts(&self) -> Counts {
        match &self.state {
            State::Damaged { counts, .. } => *counts,
            _ => self.images().map_or_else(Counts::default, |images| Counts {
                images: images.len() as u64,
                bytes: images.values().map(|image| image.len()).sum(),
            }),
        }
    }
}
