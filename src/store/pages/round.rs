//! The pages of one snapshot while they come.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt::Display;
use std::os::fd::{AsFd, BorrowedFd};
use std::rc::Rc;

use super::flat::Flat;
use super::index::Index;
use super::layer::{Layer, Run};
use crate::criu::pages::PageRange;
use crate::store::quota::Charge;

/// A snapshot has at most this many page spaces, more than any dump: they cost memory that is not charged
/// for.
const SPACES_MAX: usize = 1 << 16;

/// Why pages, or a snapshot of them, are not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The same address came twice. CRIU sends the addresses of a space in order, each once.
    #[error("address {address:#x} of page space {space} came twice in one snapshot")]
    Twice {
        /// The page space.
        space: String,
        /// The first such address, in bytes.
        address: u64,
    },
    /// The parent has no such page. CRIU's own page server refuses it, too
    /// (`check_pagehole_in_parent` in `criu/page-xfer.c`).
    #[error(
        "address {address:#x} of page space {space} is said to be in the parent, which does not have it"
    )]
    NotInParent {
        /// The page space.
        space: String,
        /// The first such address, in bytes.
        address: u64,
    },
    /// There is no parent at all.
    #[error(
        "address {address:#x} of page space {space} is said to be in the parent, and there is none"
    )]
    NoParent {
        /// The page space.
        space: String,
        /// The address, in bytes.
        address: u64,
    },
    /// It ended before all pages that were announced had come.
    #[error("the snapshot is cut short: {0} pages were announced and did not come")]
    CutShort(u64),
    /// It has more page spaces than a snapshot may have.
    #[error("page space {0} is one too many: a snapshot has at most {SPACES_MAX}")]
    TooMany(String),
    /// One layer holds more than a file can.
    #[error("page space {0} has too many pages")]
    TooLong(String),
    /// No memfd could be made, for want of memory or of a descriptor.
    #[error("the pages of page space {space} cannot be held: {cause}")]
    NoMemfd {
        /// The page space.
        space: String,
        /// What the kernel said.
        cause: rustix::io::Errno,
    },
}

/// A snapshot that is coming: for each of its page spaces what the round brings, and what it inherits from
/// the parent.
///
/// Its indexes are the new flat pagemaps from the beginning: they take over the parent's parts as they are
/// named, and share them. So a commit has nothing left to merge, and a round that is dropped gives back
/// what it brought and nothing else.
#[derive(Debug)]
pub struct Round<K> {
    parent: Option<Flat<K>>,
    spaces: BTreeMap<K, Coming>,
    /// Pages that have a place and have not come.
    missing: u64,
    /// What it was refused first.
    refused: Option<Refused>,
}

/// One page space of a round.
#[derive(Debug, Default)]
struct Coming {
    /// Made with the first page: a space that changed nothing costs no descriptor.
    layer: Option<Rc<Layer>>,
    index: Index,
}

/// Where pages go that are coming: to be written from `offset` on, and then given to
/// [`Round::filled`]. What is written stays charged as long as there is somebody who may write it.
#[derive(Debug)]
#[must_use]
pub struct Place(Run);

impl Place {
    /// Where they begin in the file, in bytes.
    pub fn offset(&self) -> u64 {
        self.0.offset()
    }

    /// How many bytes are to come.
    pub fn bytes(&self) -> u64 {
        self.0.range().bytes()
    }

    /// The layer whose file it is.
    pub fn layer(&self) -> &Rc<Layer> {
        self.0.layer()
    }
}

impl AsFd for Place {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.layer().as_fd()
    }
}

impl<K: Ord + Clone + Display> Round<K> {
    /// A snapshot begins to come. While it does, its parent's pages stay.
    pub fn new(parent: Option<Flat<K>>) -> Round<K> {
        Round { parent, spaces: BTreeMap::new(), missing: 0, refused: None }
    }

    /// Names a page space. One that is named, and has no pages, is a part of the snapshot; one that is
    /// not is none: its process has exited.
    pub fn open(&mut self, space: &K) -> Result<(), Refused> {
        let opened = self.coming(space).map(drop);
        opened.map_err(|refused| self.refuse(refused))
    }

    /// Gives coming pages a place. `charge` is for as many bytes as they have. `flags` are CRIU's, kept as
    /// they are.
    pub fn accept(
        &mut self,
        space: &K,
        range: PageRange,
        flags: u32,
        charge: Charge,
    ) -> Result<Place, Refused> {
        debug_assert_eq!(charge.bytes(), range.bytes());
        let coming = self.coming(space);
        let place = coming.and_then(|coming| coming.accept(space, range, flags, charge));
        let place = place.map_err(|refused| self.refuse(refused))?;
        self.missing += range.pages();
        Ok(place)
    }

    /// All bytes of a place have been written.
    pub fn filled(&mut self, place: Place) {
        let Place(run) = place;
        self.missing = self.missing.saturating_sub(run.range().pages());
    }

    /// Pages are there already, in the layer of an image that came: those of `held`, in any place of it. There
    /// are as many as the range has.
    pub(in crate::store) fn share(
        &mut self,
        space: &K,
        range: PageRange,
        flags: u32,
        held: &Run,
    ) -> Result<(), Refused> {
        debug_assert_eq!(held.range().pages(), range.pages());
        let pages = Index::of(held.moved(range, flags));
        let put = self.coming(space).and_then(|coming| coming.put(space, range, pages));
        put.map_err(|refused| self.refuse(refused))
    }

    /// Pages are as in the parent (`PE_PARENT`): the newest that its chain has.
    pub fn inherit(&mut self, space: &K, range: PageRange) -> Result<(), Refused> {
        let inherited = self.inherited(space, range);
        let put = inherited.and_then(|pages| self.coming(space)?.put(space, range, pages));
        put.map_err(|refused| self.refuse(refused))
    }

    /// Everything has come: the round becomes a snapshot. What it did not name is no part of that, and what
    /// nobody sees once the parent is dropped goes back to the kernel with it.
    ///
    /// A round that was refused anything fails with the first of it, in case that was not heeded.
    pub fn commit(self) -> Result<Flat<K>, Refused> {
        match (self.refused, self.missing) {
            (Some(refused), _) => Err(refused),
            (None, 0) => {
                let spaces = self.spaces.into_iter().map(|(space, coming)| (space, coming.index));
                Ok(Flat::new(spaces.collect()))
            }
            (None, missing) => Err(Refused::CutShort(missing)),
        }
    }

    /// How many bytes have been charged to it: what it brought, and not what it inherited.
    pub fn charged(&self) -> u64 {
        let layers = self.spaces.values().filter_map(|coming| coming.layer.as_ref());
        layers.map(|layer| layer.charged()).sum()
    }

    fn coming(&mut self, space: &K) -> Result<&mut Coming, Refused> {
        let full = self.spaces.len() >= SPACES_MAX;
        match self.spaces.entry(space.clone()) {
            Entry::Occupied(known) => Ok(known.into_mut()),
            Entry::Vacant(_) if full => Err(Refused::TooMany(space.to_string())),
            Entry::Vacant(free) => Ok(free.insert(Coming::default())),
        }
    }

    fn inherited(&self, space: &K, range: PageRange) -> Result<Index, Refused> {
        let missing = |address| Refused::NotInParent { space: space.to_string(), address };
        match &self.parent {
            None => Err(Refused::NoParent { space: space.to_string(), address: range.address() }),
            Some(parent) => match parent.space(space) {
                None => Err(missing(range.address())),
                Some(pages) => pages.slice(range).map_err(missing),
            },
        }
    }

    fn refuse(&mut self, refused: Refused) -> Refused {
        self.refused.get_or_insert_with(|| refused.clone());
        refused
    }
}

impl Coming {
    fn accept(
        &mut self,
        space: &impl Display,
        range: PageRange,
        flags: u32,
        charge: Charge,
    ) -> Result<Place, Refused> {
        self.free(space, range)?;
        if self.layer.is_none() {
            let made = Layer::create(&format!("pages of {space}"));
            let refused = |cause| Refused::NoMemfd { space: space.to_string(), cause };
            self.layer = Some(Rc::new(made.map_err(refused)?));
        }
        let run = self.layer.as_ref().and_then(|layer| layer.append(range, flags, charge));
        let run = run.ok_or_else(|| Refused::TooLong(space.to_string()))?;
        let place = Place(run.clone());
        self.index.put(range, Index::of(run));
        Ok(place)
    }

    fn put(&mut self, space: &impl Display, range: PageRange, pages: Index) -> Result<(), Refused> {
        self.free(space, range)?;
        self.index.put(range, pages);
        Ok(())
    }

    fn free(&self, space: &impl Display, range: PageRange) -> Result<(), Refused> {
        let twice = |address| Refused::Twice { space: space.to_string(), address };
        self.index.free(range).map_err(twice)
    }
}
