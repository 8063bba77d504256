//! Memory in pages, as the page server protocol and the pagemap images both describe it: whose memory
//! it is, which pages, and where their bytes are.

mod range;

pub use range::{BadRange, PAGE_SIZE, PageRange};

/// `PE_PARENT` (`criu/include/pagemap.h`): the pages are in the parent snapshot.
const PE_PARENT: u32 = 1;
/// `PE_LAZY`: the pages may be restored lazily.
const PE_LAZY: u32 = 2;
/// `PE_PRESENT`: the pages are in the pages image, or follow on the wire.
const PE_PRESENT: u32 = 4;

/// Whose memory it is: what one pagemap image describes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Space {
    /// A task's, by its pid as the task itself sees it.
    Task(u32),
    /// A shared mapping, by CRIU's id for it. Addresses count from its beginning.
    Shmem(u64),
}

impl Space {
    /// The name of the image that describes it.
    pub fn pagemap(self) -> String {
        match self {
            Space::Task(pid) => format!("pagemap-{pid}.img"),
            Space::Shmem(id) => format!("pagemap-shmem-{id}.img"),
        }
    }

    /// What an image describes, by its name; `None` if it is no pagemap image.
    pub fn of_pagemap(name: &str) -> Option<Space> {
        let stem = name.strip_prefix("pagemap-")?.strip_suffix(".img")?;
        match stem.strip_prefix("shmem-") {
            Some(id) => number(id).map(Space::Shmem),
            None => number(stem)?.try_into().ok().map(Space::Task),
        }
    }
}

impl std::fmt::Display for Space {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Space::Task(pid) => write!(f, "task {pid}"),
            Space::Shmem(id) => write!(f, "shared memory {id}"),
        }
    }
}

/// The name of the image that holds the pages.
pub fn pages_image(pages_id: u32) -> String {
    format!("pages-{pages_id}.img")
}

/// Whether an image holds pages, by its name.
pub fn is_pages_image(name: &str) -> bool {
    pages_id(name).is_some()
}

/// The `pages_id` of an image, by its name; `None` if it holds no pages.
pub fn pages_id(name: &str) -> Option<u32> {
    number(name.strip_prefix("pages-")?.strip_suffix(".img")?)?.try_into().ok()
}

/// A number as CRIU writes it into a name: every image has one name.
fn number(digits: &str) -> Option<u64> {
    let canonical = digits.bytes().all(|digit| digit.is_ascii_digit())
        && (digits == "0" || !digits.starts_with('0'));
    if canonical { digits.parse().ok() } else { None }
}

/// Where the bytes of pages are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Contents {
    /// In the pages image, or next on the wire.
    Present {
        /// Whether they may be restored lazily.
        lazy: bool,
    },
    /// In the parent snapshot: they have not changed since.
    Parent,
    /// Still at the source, to be fetched lazily.
    Lazy,
}

impl Contents {
    /// Takes CRIU's flags (`PE_*`) for what they mean. What CRIU never says is refused: its reader
    /// takes pages without any flag for present, and `PE_PARENT` for stronger than `PE_PRESENT`, but
    /// who wrote that meant something that is not known here.
    pub fn from_flags(flags: u32) -> Result<Contents, BadFlags> {
        let unknown = flags & !(PE_PARENT | PE_LAZY | PE_PRESENT);
        if unknown != 0 {
            return Err(BadFlags::Unknown(unknown));
        }
        match (flags & PE_PRESENT != 0, flags & PE_PARENT != 0, flags & PE_LAZY != 0) {
            (true, true, _) => Err(BadFlags::PresentAndParent),
            (true, false, lazy) => Ok(Contents::Present { lazy }),
            (false, true, false) => Ok(Contents::Parent),
            (false, false, true) => Ok(Contents::Lazy),
            (false, true, true) => Err(BadFlags::ParentAndLazy),
            (false, false, false) => Err(BadFlags::None),
        }
    }

    /// CRIU's flags for it.
    pub fn flags(self) -> u32 {
        match self {
            Contents::Present { lazy: false } => PE_PRESENT,
            Contents::Present { lazy: true } => PE_PRESENT | PE_LAZY,
            Contents::Parent => PE_PARENT,
            Contents::Lazy => PE_LAZY,
        }
    }
}

/// Flags of pages that do not say where the pages are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadFlags {
    /// Flags that are not known here.
    #[error("unknown flags {0:#x} (known are 1 PE_PARENT, 2 PE_LAZY and 4 PE_PRESENT)")]
    Unknown(u32),
    /// Both here and in the parent.
    #[error("the flags PE_PRESENT and PE_PARENT together")]
    PresentAndParent,
    /// Both in the parent and at the source.
    #[error("the flags PE_PARENT and PE_LAZY together")]
    ParentAndLazy,
    /// Nowhere.
    #[error("no flag at all")]
    None,
}

/// Consecutive pages of the same kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Run {
    range: PageRange,
    contents: Contents,
}

impl Run {
    /// Pages from `address` on, if there can be such.
    pub fn new(address: u64, pages: u64, contents: Contents) -> Result<Run, BadRange> {
        Ok(Run { range: PageRange::new(address, pages)?, contents })
    }

    /// Which they are.
    pub fn range(&self) -> PageRange {
        self.range
    }

    /// Where the first begins.
    pub fn address(&self) -> u64 {
        self.range.address()
    }

    /// How many there are.
    pub fn pages(&self) -> u64 {
        self.range.pages()
    }

    /// Where they are.
    pub fn contents(&self) -> Contents {
        self.contents
    }

    /// Where the last ends.
    pub fn end(&self) -> u64 {
        self.range.end_address()
    }

    /// How many bytes of them are in the pages image, or follow on the wire.
    pub fn payload_len(&self) -> u64 {
        match self.contents {
            Contents::Present { .. } => self.range.bytes(),
            Contents::Parent | Contents::Lazy => 0,
        }
    }

    /// The first of them, at most so many, and the rest; `None` of none.
    pub fn split(&self, pages: u64) -> (Option<Run>, Option<Run>) {
        let Run { range, contents } = *self;
        let (first, rest) = range.split(pages);
        (first.map(|range| Run { range, contents }), rest.map(|range| Run { range, contents }))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    pub(in crate::criu) fn contents() -> impl Strategy<Value = Contents> {
        proptest::sample::select(vec![
            Contents::Present { lazy: false },
            Contents::Present { lazy: true },
            Contents::Parent,
            Contents::Lazy,
        ])
    }

    /// Runs in ascending order, with gaps and without.
    pub(in crate::criu) fn runs() -> impl Strategy<Value = Vec<Run>> {
        let steps = proptest::collection::vec((0u64..4, 1u64..600, contents()), 0..20);
        steps.prop_map(|steps| {
            let mut at = 0x10000;
            let place = |(gap, pages, contents)| {
                let run = Run::new(at + gap * PAGE_SIZE, pages, contents).unwrap();
                at = run.end();
                run
            };
            steps.into_iter().map(place).collect()
        })
    }

    #[test]
    fn the_names_are_crius() {
        assert_eq!(Space::Task(7).pagemap(), "pagemap-7.img");
        assert_eq!(Space::Shmem(1 << 40).pagemap(), "pagemap-shmem-1099511627776.img");
        assert_eq!(pages_image(3), "pages-3.img");
        assert_eq!(pages_id("pages-4294967295.img"), Some(u32::MAX));
        for other in [
            "pagemap-.img",
            "pagemap-shmem-.img",
            "pagemap-07.img",
            "pagemap-+7.img",
            "pagemap-7",
            "pagemap-4294967296.img",
            "pagemap-shmem-18446744073709551616.img",
            "pages-7.img",
        ] {
            assert_eq!(Space::of_pagemap(other), None, "{other}");
        }
        for other in ["pages-shmem-1.img", "pages-.img", "pages-4294967296.img", "pages-01.img"] {
            assert_eq!(pages_id(other), None, "{other}");
        }
    }

    #[test]
    fn flags_that_criu_never_sends_are_refused() {
        let refused: Vec<_> =
            (0..9).filter_map(|flags| Contents::from_flags(flags).err()).collect();
        assert_eq!(
            refused,
            [
                BadFlags::None,
                BadFlags::ParentAndLazy,
                BadFlags::PresentAndParent,
                BadFlags::PresentAndParent,
                BadFlags::Unknown(8)
            ]
        );
        assert_eq!(
            BadFlags::Unknown(8).to_string(),
            "unknown flags 0x8 (known are 1 PE_PARENT, 2 PE_LAZY and 4 PE_PRESENT)"
        );
    }

    proptest! {
        #[test]
        fn names_and_flags_survive_the_way(id: u64, contents in contents()) {
            prop_assert_eq!(Space::of_pagemap(&Space::Shmem(id).pagemap()), Some(Space::Shmem(id)));
            let id = u32::try_from(id >> 32).unwrap();
            prop_assert_eq!(Space::of_pagemap(&Space::Task(id).pagemap()), Some(Space::Task(id)));
            prop_assert_eq!(pages_id(&pages_image(id)), Some(id));
            prop_assert_eq!(Contents::from_flags(contents.flags()), Ok(contents));
        }

        #[test]
        fn no_name_makes_the_parser_panic(name: String) {
            let _ = (Space::of_pagemap(&name), pages_id(&name));
        }
    }
}
