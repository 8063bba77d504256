//! Processes whose memory changes between rounds, and what CRIU says of them: which pages it sends,
//! and which it says to be as in the parent.

use std::collections::BTreeMap;
use std::io;
use std::sync::LazyLock;

use criu_image_relay::criu::page_server::header::Dialect;
use criu_image_relay::criu::pagemap::Pagemap;
use criu_image_relay::criu::pages::{Contents, PAGE_SIZE, Space, pages_image};
use proptest::prelude::*;

use crate::page_client::PageClient;

/// Every page space that a test has.
pub(crate) const SPACES: [Space; 5] = [
    Space::Task(1),
    Space::Task(7),
    Space::Task(4_194_303),
    Space::Shmem(3),
    Space::Shmem((1 << 56) - 1),
];

/// Where memory is, in pages: two mappings of each space.
const MAPPINGS: [u64; 2] = [0x400, 0x7_ffff_0000];

/// What an image is to show of a page: what it is filled with, and whether it may be restored lazily.
pub(crate) type Shown = (u64, bool);

/// What the images are to show: the pages of each space by their numbers.
pub(crate) type Contained = BTreeMap<Space, BTreeMap<u64, Shown>>;

/// The memory of all processes.
#[derive(Debug, Clone)]
pub(crate) struct Memory {
    spaces: BTreeMap<Space, BTreeMap<u64, Page>>,
    written: u64,
}

#[derive(Debug, Clone, Copy)]
struct Page {
    /// What it is filled with.
    number: u64,
    lazy: bool,
    /// The kernel's note that it was written to since the last round.
    dirty: bool,
}

/// What the processes do between two rounds.
#[derive(Debug, Clone)]
pub(crate) enum Act {
    /// Write to some pages, of a space that may be new.
    Write {
        space: Space,
        page: u64,
        pages: u64,
        lazy: bool,
    },
    Unmap {
        space: Space,
        page: u64,
        pages: u64,
    },
    /// Mapped elsewhere, with what they hold: to the kernel they are as good as written to.
    Remap {
        space: Space,
        page: u64,
        pages: u64,
        to: u64,
    },
    Exit {
        space: Space,
    },
}

/// How a round is sent.
#[derive(Debug, Clone)]
pub(crate) struct Way {
    /// Whether it is asked for parents before anything is opened, as pre-dumps do.
    pub(crate) asks: bool,
    /// CRIU cuts runs where its pipes do.
    pub(crate) longest: u64,
}

/// What a run of a round is.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Planned {
    page: u64,
    pages: u64,
    contents: Contents,
}

pub(crate) fn act() -> impl Strategy<Value = Act> {
    let space = || proptest::sample::select(&SPACES[..]);
    let page = || (0..2usize, 0..900u64).prop_map(|(mapping, page)| MAPPINGS[mapping] + page);
    let pages = || prop_oneof![8 => 1..20u64, 1 => 200..700u64];
    prop_oneof![
        8 => (space(), page(), pages(), proptest::bool::weighted(0.2))
            .prop_map(|(space, page, pages, lazy)| Act::Write { space, page, pages, lazy }),
        2 => (space(), page(), pages())
            .prop_map(|(space, page, pages)| Act::Unmap { space, page, pages }),
        2 => (space(), page(), pages(), page())
            .prop_map(|(space, page, pages, to)| Act::Remap { space, page, pages, to }),
        1 => proptest::sample::select(&SPACES[1..]).prop_map(|space| Act::Exit { space }),
    ]
}

pub(crate) fn acts() -> impl Strategy<Value = Vec<Act>> {
    proptest::collection::vec(act(), 0..7)
}

pub(crate) fn way() -> impl Strategy<Value = Way> {
    let longest = proptest::sample::select(vec![3, 64, 256, u64::MAX]);
    (any::<bool>(), longest).prop_map(|(asks, longest)| Way { asks, longest })
}

pub(crate) fn dialect() -> impl Strategy<Value = Dialect> {
    proptest::sample::select(vec![Dialect::Short, Dialect::Long])
}

impl Memory {
    /// One process that has no memory yet; it never exits.
    pub(crate) fn new() -> Memory {
        Memory { spaces: BTreeMap::from([(SPACES[0], BTreeMap::new())]), written: 0 }
    }

    pub(crate) fn act(&mut self, act: &Act) {
        match *act {
            Act::Write { space, page, pages, lazy } => {
                for page in page..page + pages {
                    self.written += 1;
                    let written = Page { number: self.written, lazy, dirty: true };
                    self.spaces.entry(space).or_default().insert(page, written);
                }
            }
            Act::Unmap { space, page, pages } => drop(self.unmap(space, page, pages)),
            Act::Remap { space, page, pages, to } => {
                let moved = self.unmap(space, page, pages);
                let Some(mapped) = self.spaces.get_mut(&space) else { return };
                for (number, was) in moved {
                    mapped.insert(to + number - page, Page { dirty: true, ..was });
                }
            }
            Act::Exit { space } => drop(self.spaces.remove(&space)),
        }
    }

    fn unmap(&mut self, space: Space, page: u64, pages: u64) -> BTreeMap<u64, Page> {
        let Some(mapped) = self.spaces.get_mut(&space) else { return BTreeMap::new() };
        let mut unmapped = mapped.split_off(&page);
        mapped.append(&mut unmapped.split_off(&(page + pages)));
        unmapped
    }

    /// What the images of now are to show.
    pub(crate) fn contained(&self) -> Contained {
        let shown = |(number, page): (&u64, &Page)| (*number, (page.number, page.lazy));
        let space = |(space, pages): (&Space, &BTreeMap<u64, Page>)| {
            (*space, pages.iter().map(shown).collect())
        };
        self.spaces.iter().map(space).collect()
    }

    /// CRIU has the kernel note from now on what is written to: whether or not the round succeeds.
    pub(crate) fn forget_dirt(&mut self) {
        self.spaces.values_mut().flat_map(BTreeMap::values_mut).for_each(|page| page.dirty = false);
    }

    /// Sends a round up to its end, which is not said. Returns the spaces that have a parent as the
    /// daemon says.
    pub(crate) fn send(&self, client: &mut PageClient, way: &Way) -> io::Result<Vec<Space>> {
        let mut parents = Vec::new();
        for space in self.spaces.keys().filter(|_| way.asks) {
            parents.extend(client.has_parent(*space)?.then_some(*space));
        }
        for (space, pages) in &self.spaces {
            let has_parent = client.open(*space)?;
            if way.asks {
                assert_eq!(has_parent, parents.contains(space), "{space}");
            } else {
                parents.extend(has_parent.then_some(*space));
            }
            for Planned { page, pages: count, contents } in plan(pages, has_parent, way.longest) {
                let address = page * PAGE_SIZE;
                if let Contents::Present { lazy } = contents {
                    let sent = pages.range(page..page + count);
                    let sent: Vec<_> = sent.map(|(_, page)| filled(page.number)).collect();
                    client.pages(*space, address, lazy, &sent.concat())?;
                } else {
                    client.hole(*space, address, count)?;
                }
            }
        }
        Ok(parents)
    }

    /// How many bytes a client sends for a round, with its end.
    pub(crate) fn sent_len(&self, parents: &[Space], way: &Way, dialect: Dialect) -> u64 {
        let (mut headers, mut bytes) = (1, 0);
        for (space, pages) in &self.spaces {
            headers += if way.asks { 2 } else { 1 };
            for run in plan(pages, parents.contains(space), way.longest) {
                headers += 1;
                if run.contents != Contents::Parent {
                    bytes += run.pages * PAGE_SIZE;
                }
            }
        }
        headers * dialect.header_len() as u64 + bytes
    }
}

/// The runs of a space. What was not written to since the last round is as in the parent, if there
/// is one.
fn plan(pages: &BTreeMap<u64, Page>, has_parent: bool, longest: u64) -> Vec<Planned> {
    let mut plan: Vec<Planned> = Vec::new();
    for (number, page) in pages {
        let contents = match page {
            Page { dirty: false, .. } if has_parent => Contents::Parent,
            Page { lazy, .. } => Contents::Present { lazy: *lazy },
        };
        match plan.last_mut() {
            Some(last)
                if last.page + last.pages == *number
                    && last.contents == contents
                    && last.pages < longest =>
            {
                last.pages += 1;
            }
            _ => plan.push(Planned { page: *number, pages: 1, contents }),
        }
    }
    plan
}

/// The bytes of a page: its number every 256 bytes, and between them what no other place in a page has.
pub(crate) fn filled(number: u64) -> Vec<u8> {
    static BETWEEN: LazyLock<Vec<u8>> = LazyLock::new(|| {
        let word = |at: u64| (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 7).to_le_bytes();
        (0..PAGE_SIZE / 8).flat_map(word).collect()
    });
    let mut page = BETWEEN.clone();
    for part in page.chunks_exact_mut(256) {
        part[..8].copy_from_slice(&number.to_le_bytes());
    }
    page
}

/// Holds the images of pages against what they are to show; `read` gives those that there are.
#[track_caller]
pub(crate) fn assert_shown(wanted: &Contained, mut read: impl FnMut(&str) -> Option<Vec<u8>>) {
    for space in SPACES {
        let name = space.pagemap();
        let (image, pages) = match (read(&name), wanted.get(&space)) {
            (None, None) => continue,
            (Some(image), Some(pages)) => (image, pages),
            (None, Some(_)) => panic!("there is no {name}"),
            (Some(_), None) => panic!("there is {name}, and {space} has exited"),
        };
        let pagemap = Pagemap::decode(&image).unwrap();
        let layout = pagemap.layout().unwrap();
        let bytes = read(&pages_image(pagemap.pages_id)).expect("its pages");
        assert_eq!(layout.pages_len, bytes.len() as u64, "{name}");
        let runs = layout.runs.iter().map(|placed| placed.run);
        let shown = runs.flat_map(|run| {
            let first = run.address() / PAGE_SIZE;
            (first..first + run.pages()).map(move |page| (page, run.contents()))
        });
        let present =
            |(page, (_, lazy)): (&u64, &Shown)| (*page, Contents::Present { lazy: *lazy });
        assert!(shown.eq(pages.iter().map(present)), "{name} is {pagemap:?}, not {pages:?}");
        for ((page, (number, _)), bytes) in pages.iter().zip(bytes.chunks(4096)) {
            assert!(bytes == filled(*number), "page {page:#x} of {space} holds something else");
        }
    }
}
