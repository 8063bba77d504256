//! The flat pagemaps of pages that came as images: of a dump into a directory, or of `--stream`.
//!
//! It is the inverse of [`flat_images`](super::flat_images), and lets such a dump be a parent, or have
//! one, as a round can. No page is copied: its image is a layer from then on.

use std::rc::Rc;
use std::time::{Duration, Instant};

use super::image::Image;
use super::pages::{Flat, Round};
use super::snapshot::{Images, Snapshot, State};
use super::turns::Turns;
use super::{Key, Refused, Store};
use crate::criu::pagemap::{Entries, Placed};
use crate::criu::pages::{Contents, PAGE_SIZE, Space, pages_id, pages_image};

/// A pagemap image that is larger, in bytes, is not looked into: the index that comes of it takes several times the
/// memory, which nobody is charged for. This is enough for six million runs.
const PAGEMAP_MAX: u64 = 64 << 20;

/// How many pages of an image are looked for at once.
const PIECE: u64 = 256;

/// The flat pagemaps of images are kept so long after they were last asked for: they take memory that nobody
/// is charged for, and to make them again takes a moment.
const UNUSED: Duration = Duration::from_secs(60);

/// Makes the flat pagemaps of a snapshot from its own pagemap and pages images. What those say to be in the
/// parent is taken from there.
///
/// The images stay as they are, but what is charged for their pages is charged for in layers, so that
/// it is given back for the pages that nobody sees any more.
///
/// The error says why there are none: pages that the parent does not have, or that are still at the source,
/// or images that are not understood. Those of a later CRIU may be whole, and can be restored by it; but
/// nobody here knows which bytes are which page.
///
/// Others have their turn all the while.
pub(super) async fn flatten(
    images: &Images,
    parent: Option<&Flat<Space>>,
) -> Result<Flat<Space>, String> {
    let (mut round, mut turns) = (Round::new(parent.cloned()), Turns::new());
    for (name, image) in images {
        let Some(space) = Space::of_pagemap(name) else { continue };
        let wrong = |why: &dyn std::fmt::Display| format!("image {name}: {why}");
        round.open(&space).map_err(|refused| refused.to_string())?;
        let len = image.len();
        if len > PAGEMAP_MAX {
            let more = format!("{len} bytes, more than {PAGEMAP_MAX} are not looked into");
            return Err(wrong(&more));
        }
        // Entry by entry: all of them at once would take several times the memory of the image.
        let mut entries = Entries::begin(image.reader(), len).map_err(|error| wrong(&error))?;
        let pages_id = entries.pages_id;
        let source = images.get(&pages_image(pages_id)).map(|image| &**image);
        while let Some(placed) = entries.next_placed().map_err(|error| wrong(&error))? {
            check_len(source, entries.pages_len, pages_id, false).map_err(|why| wrong(&why))?;
            place(&mut round, space, &placed, source, &mut turns)
                .await
                .map_err(|why| wrong(&why))?;
        }
        check_len(source, entries.pages_len, pages_id, true).map_err(|why| wrong(&why))?;
    }
    round.commit().map_err(|refused| refused.to_string())
}

impl Store {
    /// The pages of a snapshot, however they came: in its rounds so far, or in its images once it is whole. The
    /// error is why there are none, or why they cannot be told apart.
    ///
    /// Others have their turn while the pages of images are looked for.
    pub async fn flat_of(&self, key: Key) -> Result<Flat<Space>, String> {
        let images = match self.snapshots.borrow_mut().get_mut(&key) {
            Some(snapshot) => match snapshot.pages_by_address()? {
                Known::Pages(flat) => return Ok(flat),
                Known::Images(images) => images,
            },
            None => return Err(Refused::Dropped.to_string()),
        };
        let said = flatten(&images, None).await;
        if let Some(snapshot) = self.snapshots.borrow_mut().get_mut(&key) {
            snapshot.remember_pages_of(&images, said.clone());
        }
        said
    }
}

/// What the images of a snapshot say of its pages, or why that is not known; and when it was asked for.
#[derive(Debug)]
pub(super) struct Flattened {
    said: Result<Flat<Space>, String>,
    used: Instant,
}

/// What is known of the pages of a snapshot without looking into its images.
enum Known {
    Pages(Flat<Space>),
    /// They are what these say.
    Images(Rc<Images>),
}

impl Snapshot {
    fn pages_by_address(&mut self) -> Result<Known, String> {
        let images = match (self.flat(), &self.state) {
            (Some(flat), _) => return Ok(Known::Pages(flat.clone())),
            (None, State::Whole(images) | State::Taken(images)) => images.clone(),
            (None, State::Damaged { reason, .. }) => {
                return Err(format!("it is damaged: {reason}"));
            }
            (None, State::Awaited | State::Paged | State::Receiving(_)) => {
                return Err("its pages have not come yet".to_owned());
            }
        };
        let Some(known) = &mut self.pages.of_images else { return Ok(Known::Images(images)) };
        known.used = Instant::now();
        known.said.clone().map(Known::Pages)
    }

    /// Images have been looked into, which may not be the snapshot's any more.
    fn remember_pages_of(&mut self, images: &Rc<Images>, said: Result<Flat<Space>, String>) {
        if let State::Whole(now) | State::Taken(now) = &self.state {
            if Rc::ptr_eq(now, images) {
                self.pages.of_images = Some(Flattened { said, used: Instant::now() });
            }
        }
    }

    /// What nobody has asked for in a while is not kept.
    pub(super) fn forget_unused(&mut self, now: Instant) {
        let unused = |known: &mut Flattened| now.saturating_duration_since(known.used) >= UNUSED;
        self.pages.of_images.take_if(unused);
    }
}

/// Takes the pagemap and pages images of a snapshot out of its images, so that others can take their place.
pub(super) fn take_out_pages(images: &mut Images) {
    images.retain(|name, _| Space::of_pagemap(name).is_none() && pages_id(name).is_none());
}

/// Pages that are stored in another way, compressed for one, have another size. Before the last entry they may
/// have more than has been named.
fn check_len(source: Option<&Image>, len: u64, pages_id: u32, last: bool) -> Result<(), String> {
    match source {
        Some(source) if source.len() == len || (source.len() > len && !last) => Ok(()),
        Some(source) => Err(format!(
            "not understood: its pages have {len} bytes, and image {} has {}",
            source.name(),
            source.len()
        )),
        None if len == 0 => Ok(()),
        None => Err(format!("there is no image {}, which has its pages", pages_image(pages_id))),
    }
}

async fn place(
    round: &mut Round<Space>,
    space: Space,
    placed: &Placed,
    source: Option<&Image>,
    turns: &mut Turns,
) -> Result<(), String> {
    let Placed { run, offset } = *placed;
    turns.pass().await;
    match (run.contents(), source) {
        (Contents::Present { .. }, Some(source)) => {
            let (mut left, mut start) = (Some(run.range()), offset / PAGE_SIZE);
            while let Some(range) = left {
                // Each of them may be in another layer.
                let held = source.pages(start, range.pages().min(PIECE));
                let apart =
                    |why| format!("the pages of image {} cannot be shared: {why}", source.name());
                for held in held.map_err(apart)? {
                    let pages = held.range().pages();
                    let Some((Some(range), rest)) = left.map(|left| left.split(pages)) else {
                        break;
                    };
                    let shared = round.share(&space, range, run.contents().flags(), &held);
                    shared.map_err(|refused| refused.to_string())?;
                    (left, start) = (rest, start + pages);
                }
                if left == Some(range) {
                    break;
                }
                turns.pass_after_much().await;
            }
            Ok(())
        }
        (Contents::Parent, _) => {
            round.inherit(&space, run.range()).map_err(|refused| refused.to_string())
        }
        (Contents::Lazy, _) | (Contents::Present { .. }, None) => Err(format!(
            "the pages of {space} at {:#x} are not in it but still at the source",
            run.address()
        )),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use proptest::prelude::*;

    use super::*;
    use crate::criu::pagemap::Pagemap;
    use crate::criu::pages::Run;
    use crate::store::flat_images::flat_images;
    use crate::store::quota::Quota;
    use crate::store::turns::at_once;

    const TASK: Space = Space::Task(7);
    const PRESENT: Contents = Contents::Present { lazy: false };
    const LAZY: Contents = Contents::Present { lazy: true };

    /// A page's number, what is said of it, and what it is filled with.
    type Page = (u64, Contents, u64);

    fn add(images: &mut Images, quota: &Quota, name: &str, bytes: &[u8]) {
        let charge = quota.charge_now(Image::needs(bytes.len() as u64)).unwrap();
        let image = Image::made_of(name, bytes, charge).unwrap();
        images.insert(name.to_owned(), Rc::new(image));
    }

    /// The images of one task, as a dump writes them.
    fn dump(quota: &Quota, pages: &[Page]) -> Images {
        let (mut images, mut pagemap, mut bytes) = (Images::new(), Pagemap::new(3), Vec::new());
        for (number, contents, filled) in pages {
            pagemap.push(Run::new(number * PAGE_SIZE, 1, *contents).unwrap());
            if matches!(contents, Contents::Present { .. }) {
                bytes.extend(filled.to_le_bytes().repeat(512));
            }
        }
        add(&mut images, quota, "pagemap-7.img", &pagemap.encode());
        add(&mut images, quota, "pages-3.img", &bytes);
        add(&mut images, quota, "core-7.img", b"core");
        images
    }

    /// Each page of the task: its number, its flags, and what it is filled with.
    fn seen(flat: &Flat<Space>) -> Vec<Page> {
        let mut seen = Vec::new();
        for run in flat.space(&TASK).unwrap().runs() {
            for page in 0..run.range().pages() {
                let mut word = [0; 8];
                let offset = run.offset() + page * PAGE_SIZE;
                run.layer().file().read_exact_at(&mut word, offset).unwrap();
                let number = run.range().address() / PAGE_SIZE + page;
                let contents = Contents::from_flags(run.flags()).unwrap();
                seen.push((number, contents, u64::from_le_bytes(word)));
            }
        }
        seen
    }

    fn refused(images: &Images, parent: Option<&Flat<Space>>) -> String {
        at_once(flatten(images, parent)).unwrap_err()
    }

    #[test]
    fn a_dump_is_a_parent_and_has_one() {
        let quota = Quota::new(1 << 20);
        let first = dump(&quota, &[(1, PRESENT, 10), (2, LAZY, 11), (3, PRESENT, 12)]);
        let used = quota.used();
        let parent = at_once(flatten(&first, None)).unwrap();
        assert_eq!(seen(&parent), [(1, PRESENT, 10), (2, LAZY, 11), (3, PRESENT, 12)]);
        assert_eq!(quota.used(), used, "each byte is charged for once");

        let second = [(2, Contents::Parent, 0), (3, PRESENT, 20), (5, PRESENT, 21)];
        let mut second = dump(&quota, &second);
        let flat = at_once(flatten(&second, Some(&parent))).unwrap();
        let all = [(2, LAZY, 11), (3, PRESENT, 20), (5, PRESENT, 21)];
        assert_eq!(seen(&flat), all);
        drop((first, parent));
        take_out_pages(&mut second);
        assert!(second.keys().eq(["core-7.img"]));
        assert_eq!(quota.used(), 3 * 4096 + 4096, "what is seen, and the image left");

        at_once(flat_images(&flat, &mut second, &quota)).unwrap();
        drop(flat);
        let again = at_once(flatten(&second, None)).unwrap();
        assert_eq!(seen(&again), all, "also from images that are made of pages");
        assert_eq!(quota.used(), 3 * 4096 + 2 * 4096);
        drop((again, second));
        assert_eq!(quota.used(), 0);
    }

    #[test]
    fn what_the_parent_does_not_have_is_told_by_its_address() {
        let quota = Quota::new(1 << 20);
        let child = dump(&quota, &[(1, Contents::Parent, 0), (2, Contents::Parent, 0)]);
        assert_eq!(
            refused(&child, None),
            "image pagemap-7.img: address 0x1000 of page space task 7 is said to be in the parent, and there is none"
        );
        let parent = at_once(flatten(&dump(&quota, &[(1, PRESENT, 1)]), None)).unwrap();
        assert_eq!(
            refused(&child, Some(&parent)),
            "image pagemap-7.img: address 0x2000 of page space task 7 is said to be in the parent, which does not have it"
        );
        let nobody = at_once(flatten(&Images::new(), None)).unwrap();
        assert!(refused(&child, Some(&nobody)).contains("0x1000 of page space task 7"));
    }

    #[test]
    fn what_is_not_understood_is_refused_and_stays_as_it_is() {
        let quota = Quota::new(1 << 20);
        let good = dump(&quota, &[(1, PRESENT, 1)]);
        let with = |name: &str, bytes: &[u8]| {
            let mut images = good.clone();
            add(&mut images, &quota, name, bytes);
            images
        };
        let pagemap = |records: &[u8]| {
            with("pagemap-7.img", &[b"\x19\x43\x56\x54\x25\x40\x08\x56", records].concat())
        };
        let lazy = dump(&quota, &[(1, Contents::Lazy, 1)]);
        let mut no_pages = good.clone();
        no_pages.remove("pages-3.img");
        for (images, said) in [
            (
                with("pages-3.img", b"short"),
                "not understood: its pages have 4096 bytes, and image pages-3.img has 5",
            ),
            (
                pagemap(b"\x02\0\0\0\x08\x03\x08\0\0\0\x08\x80\x20\x10\x01\x30\x01\0"),
                "the record at byte 14 is not protobuf",
            ),
            (
                pagemap(b"\x02\0\0\0\x08\x03\x07\0\0\0\x08\x80\x20\x10\x01\x30\x01"),
                "not understood: the entry for 0x1000 has the field 6, which is not known here",
            ),
            (
                pagemap(b"\x04\0\0\0\x08\x03\x10\x01"),
                "not understood: the head has the field 2, which is not known here",
            ),
            (with("pagemap-7.img", b"else"), "it does not begin like a pagemap image"),
            (lazy, "the pages of task 7 at 0x1000 are not in it but still at the source"),
            (no_pages, "there is no image pages-3.img, which has its pages"),
        ] {
            assert_eq!(refused(&images, None), format!("image pagemap-7.img: {said}"));
        }
        assert_eq!(seen(&at_once(flatten(&good, None)).unwrap()), [(1, PRESENT, 1)]);
    }

    /// For each page, what a dump says of it: nothing, that it is there, lazy or not, or that it is as
    /// in the parent.
    fn dumps() -> impl Strategy<Value = Vec<Vec<Option<Contents>>>> {
        let page = proptest::sample::select(vec![
            None,
            Some(PRESENT),
            Some(LAZY),
            Some(Contents::Parent),
            Some(Contents::Parent),
        ]);
        proptest::collection::vec(proptest::collection::vec(page, 1..20), 1..5)
    }

    proptest! {
        #[test]
        fn a_chain_of_dumps_is_what_they_say(dumps in dumps(), keep: [bool; 5]) {
            let quota = Quota::new(1 << 30);
            let (mut parent, mut model): (Option<Flat<Space>>, Vec<Page>) = (None, Vec::new());
            let (mut kept, mut filled) = (Vec::new(), 100);
            for (said, keep) in dumps.iter().zip(keep) {
                let (mut pages, mut next) = (Vec::new(), Vec::new());
                for (number, contents) in (0..).zip(said) {
                    let had = model.iter().find(|(page, ..)| *page == number);
                    match (contents, had) {
                        (Some(Contents::Parent), Some(had)) => {
                            pages.push((number, Contents::Parent, 0));
                            next.push(*had);
                        }
                        (Some(Contents::Present { lazy }), _) => {
                            filled += 1;
                            pages.push((number, Contents::Present { lazy: *lazy }, filled));
                            next.push((number, Contents::Present { lazy: *lazy }, filled));
                        }
                        _ => {}
                    }
                }
                let images = dump(&quota, &pages);
                let flat = at_once(flatten(&images, parent.as_ref())).unwrap();
                kept.extend(keep.then_some((images, flat.clone(), next.clone())));
                (parent, model) = (Some(flat), next);
            }
            let last = parent.unwrap();
            prop_assert_eq!(&seen(&last), &model);
            for (_, flat, model) in &kept {
                prop_assert_eq!(&seen(flat), model);
            }
            drop(kept);
            prop_assert_eq!(quota.used(), model.len() as u64 * PAGE_SIZE);
            drop(last);
            prop_assert_eq!(quota.used(), 0);
        }
    }
}
