//! The images of pages that came in rounds, as if they had come in one dump: for each page space a
//! pagemap image and a pages image.

use std::os::unix::fs::FileExt;
use std::rc::Rc;

use super::image::Image;
use super::pages::{Flat, Index, PageRange, Run};
use super::quota::Quota;
use super::snapshot::Images;
use super::turns::Turns;
use crate::criu::pagemap::{Pagemap, put_entry};
use crate::criu::pages::{self, Contents, Space, pages_image};

/// Adds the images of all page spaces to a snapshot's own images; no page is copied, and the images hold
/// what they show. A space without pages has images, too.
///
/// A pages image is charged for in its layers, a pagemap image is charged here. On an error, which says
/// what is wrong, no image has been added: there is one of a space already, no room for a pagemap, or no
/// memfd to be had.
pub(super) async fn flat_images(
    flat: &Flat<Space>,
    images: &mut Images,
    quota: &Quota,
) -> Result<(), String> {
    let mut free = (1..=u32::MAX).filter(|id| !images.contains_key(&pages_image(*id)));
    let (mut made, mut turns) = (Vec::new(), Turns::new());
    for (space, index) in flat.spaces() {
        if images.contains_key(&space.pagemap()) {
            return Err(format!(
                "the pages of {space} came in rounds, and there is an image {} as well",
                space.pagemap()
            ));
        }
        let pages_id = free.next().ok_or("there is no number left for a pages image")?;
        made.push(pagemap_image(*space, index, pages_id, quota, &mut turns).await?);
        made.push(pages_of(index, pages_id, quota)?);
    }
    images.extend(made.into_iter().map(|image| (image.name().to_owned(), Rc::new(image))));
    Ok(())
}

/// How much of a pagemap image is written at once, in bytes.
const PIECE: usize = 64 << 10;

/// An index of a gigabyte may have some hundred thousand runs: it is walked in steps, and written as it is.
async fn pagemap_image(
    space: Space,
    index: &Index,
    pages_id: u32,
    quota: &Quota,
    turns: &mut Turns,
) -> Result<Image, String> {
    let name = space.pagemap();
    let wrong = |reason: &dyn std::fmt::Display| format!("image {name}: {reason}");
    let image = Image::create(&name, quota.nothing());
    let image = image.map_err(|errno| format!("image {name} cannot be held: {errno}"))?;
    let append = |bytes: &mut Vec<u8>| {
        let charge = quota.charge_now(image.growth(bytes.len() as u64));
        image.charge(charge.map_err(|exhausted| wrong(&exhausted))?);
        image.file().write_all_at(bytes, image.len()).map_err(|error| wrong(&error))?;
        image.grown_to(image.len() + bytes.len() as u64);
        bytes.clear();
        Ok::<(), String>(())
    };
    let mut bytes = Pagemap::new(pages_id).encode();
    let mut entry: Option<Entry> = None;
    for run in index.runs() {
        if !entry.as_mut().is_some_and(|entry| entry.goes_on_with(run)) {
            if let Some(entry) = entry.replace(Entry { range: run.range(), flags: run.flags() }) {
                put_entry(&mut bytes, entry.run().map_err(|reason| wrong(&reason))?);
            }
            if bytes.len() >= PIECE {
                append(&mut bytes)?;
            }
        }
        turns.pass().await;
    }
    if let Some(entry) = entry {
        put_entry(&mut bytes, entry.run().map_err(|reason| wrong(&reason))?);
    }
    append(&mut bytes)?;
    image.end();
    Ok(image)
}

fn pages_of(index: &Index, pages_id: u32, quota: &Quota) -> Result<Image, String> {
    let name = pages_image(pages_id);
    let itself = if index.is_empty() { Image::needs(0) } else { 0 };
    let charge = quota.charge_now(itself);
    let charge = charge.map_err(|exhausted| format!("image {name}: {exhausted}"))?;
    Image::of_pages(&name, index, charge)
        .map_err(|errno| format!("image {name} cannot be held: {errno}"))
}

/// Pages as a pagemap says them, which knows nothing of layers: runs that follow each other and have the same
/// flags are one entry.
struct Entry {
    range: PageRange,
    flags: u32,
}

impl Entry {
    /// Takes a run over that follows it; returns whether it does.
    fn goes_on_with(&mut self, next: &Run) -> bool {
        let follows = next.range().start == self.range.end && next.flags() == self.flags;
        if follows {
            self.range.end = next.range().end;
        }
        follows
    }

    fn run(&self) -> Result<pages::Run, String> {
        let address = self.range.address();
        let wrong = |why: String| format!("the pages at {address:#x}: {why}");
        let contents =
            Contents::from_flags(self.flags).map_err(|flags| wrong(flags.to_string()))?;
        if !matches!(contents, Contents::Present { .. }) {
            return Err(wrong(format!("the flags {:#x} say that they are not here", self.flags)));
        }
        let run = pages::Run::new(address, self.range.pages(), contents);
        run.map_err(|range| wrong(range.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use proptest::prelude::*;

    use super::*;
    use crate::criu::pages::PAGE_SIZE;
    use crate::store::pages::{PageRange, Round};
    use crate::store::turns::at_once;

    const PRESENT: u32 = 4;
    const LAZY: u32 = 6;
    const TASK: Space = Space::Task(7);

    fn range(page: u64, count: u64) -> PageRange {
        PageRange::new(page * PAGE_SIZE, count).unwrap()
    }

    /// Adds pages that are filled with their numbers, counted from `first`.
    fn add(round: &mut Round<Space>, quota: &Quota, range: PageRange, flags: u32, first: u64) {
        let charge = quota.charge_now(range.bytes()).unwrap();
        let place = round.accept(&TASK, range, flags, charge).unwrap();
        for page in 0..range.pages() {
            let bytes = (first + page).to_le_bytes().repeat(512);
            let offset = place.offset() + page * PAGE_SIZE;
            place.layer().file().write_all_at(&bytes, offset).unwrap();
        }
        round.filled(place);
    }

    /// What an image has, read in pieces of at most `piece` bytes.
    fn read(image: &Image, piece: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        while let Some(part) = image.part(bytes.len() as u64, piece) {
            let at = bytes.len();
            bytes.resize(at + usize::try_from(part.len).unwrap(), 0);
            part.file.read_exact_at(&mut bytes[at..], part.offset).unwrap();
        }
        assert_eq!(bytes.len() as u64, image.len());
        bytes
    }

    fn pagemap(images: &Images, space: Space) -> Pagemap {
        Pagemap::decode(&read(&images[&space.pagemap()], 1000)).unwrap()
    }

    fn made(flat: &Flat<Space>, quota: &Quota) -> Images {
        let mut images = Images::new();
        at_once(flat_images(flat, &mut images, quota)).unwrap();
        images
    }

    #[test]
    fn rounds_look_like_one_dump() {
        let quota = Quota::new(1 << 20);
        let mut round = Round::new(None);
        add(&mut round, &quota, range(1, 4), PRESENT, 10);
        add(&mut round, &quota, range(5, 2), LAZY, 14);
        add(&mut round, &quota, range(9, 1), PRESENT, 16);
        let parent = round.commit().unwrap();
        let mut round = Round::new(Some(parent.clone()));
        round.inherit(&TASK, range(1, 1)).unwrap();
        add(&mut round, &quota, range(2, 1), PRESENT, 20);
        round.inherit(&TASK, range(3, 4)).unwrap();
        round.open(&Space::Shmem(3)).unwrap();
        let flat = round.commit().unwrap();
        drop(parent);

        let mut images = Images::new();
        let own = Image::made_of("pages-1.img", b"else", quota.nothing()).unwrap();
        images.insert("pages-1.img".into(), Rc::new(own));
        at_once(flat_images(&flat, &mut images, &quota)).unwrap();
        drop(flat);
        let names: Vec<_> = images.keys().map(String::as_str).collect();
        let all =
            ["pagemap-7.img", "pagemap-shmem-3.img", "pages-1.img", "pages-2.img", "pages-3.img"];
        assert_eq!(names, all);

        let task = pagemap(&images, TASK);
        assert_eq!(task.pages_id, 2);
        let layout = task.layout().unwrap();
        let seen: Vec<_> = layout
            .runs
            .iter()
            .map(|at| (at.run.address() / PAGE_SIZE, at.run.pages(), at.run.contents().flags()))
            .collect();
        assert_eq!(seen, [(1, 4, PRESENT), (5, 2, LAZY)], "three layers' runs are one entry");
        assert_eq!(layout.pages_len, images["pages-2.img"].len());
        let pages: Vec<u64> = read(&images["pages-2.img"], 5000)
            .chunks(4096)
            .map(|page| u64::from_le_bytes(page[..8].try_into().unwrap()))
            .collect();
        assert_eq!(pages, [10, 20, 12, 13, 14, 15]);

        let empty = pagemap(&images, Space::Shmem(3));
        assert_eq!((empty.pages_id, empty.layout().unwrap().runs.len()), (3, 0));
        assert!(images["pages-3.img"].is_empty() && images["pages-3.img"].is_whole());
        assert_eq!(quota.used(), 6 * 4096 + 3 * 4096, "pages, two pagemaps, and an empty image");
        drop(images);
        assert_eq!(quota.used(), 0);
    }

    #[test]
    fn a_space_with_a_pagemap_of_its_own_is_refused_and_nothing_is_added() {
        let quota = Quota::new(1 << 20);
        let mut round = Round::new(None);
        round.open(&Space::Task(3)).unwrap();
        add(&mut round, &quota, range(1, 1), PRESENT, 1);
        let flat = round.commit().unwrap();
        let mut images = Images::new();
        let own = Image::made_of("pagemap-7.img", b"", quota.nothing()).unwrap();
        images.insert("pagemap-7.img".into(), Rc::new(own));
        let refused = at_once(flat_images(&flat, &mut images, &quota)).unwrap_err();
        let said =
            "the pages of task 7 came in rounds, and there is an image pagemap-7.img as well";
        assert_eq!(refused, said);
        assert_eq!((images.len(), quota.used()), (1, 4096));
    }

    #[test]
    fn what_there_is_no_room_for_is_refused() {
        let quota = Quota::new(4096);
        let mut round = Round::new(None);
        add(&mut round, &quota, range(1, 1), PRESENT, 1);
        let flat = round.commit().unwrap();
        let refused = at_once(flat_images(&flat, &mut Images::new(), &quota)).unwrap_err();
        let said =
            "image pagemap-7.img: quota exhausted: 4096 of 4096 bytes (store.max-bytes) are held";
        assert_eq!(refused, said);
    }

    #[test]
    fn pages_that_are_said_to_be_elsewhere_are_refused() {
        let quota = Quota::new(1 << 20);
        let mut round = Round::new(None);
        add(&mut round, &quota, range(1, 1), 2, 1);
        let flat = round.commit().unwrap();
        let refused = at_once(flat_images(&flat, &mut Images::new(), &quota)).unwrap_err();
        let said =
            "image pagemap-7.img: the pages at 0x1000: the flags 0x2 say that they are not here";
        assert_eq!(refused, said);
    }

    /// For each page of a space that is named: whether a second round sends it again, and whether it is
    /// lazy.
    fn spaces() -> impl Strategy<Value = Vec<Option<(bool, bool)>>> {
        proptest::collection::vec(
            proptest::option::weighted(0.8, (any::<bool>(), any::<bool>())),
            1..60,
        )
    }

    proptest! {
        #[test]
        fn the_images_show_the_memory(pages in spaces(), piece in 1u64..20000) {
            let quota = Quota::new(1 << 30);
            let flags = |lazy: bool| if lazy { LAZY } else { PRESENT };
            let (mut first, mut model) = (Round::new(None), Vec::new());
            for (number, page) in (0..).zip(&pages) {
                if let Some((_, lazy)) = page {
                    add(&mut first, &quota, range(number, 1), flags(*lazy), number);
                }
            }
            let mut second = Round::new(Some(first.commit().unwrap()));
            second.open(&TASK).unwrap();
            for (number, page) in (0..).zip(&pages) {
                let Some((again, lazy)) = page else { continue };
                if *again {
                    add(&mut second, &quota, range(number, 1), flags(*lazy), number + 1000);
                } else {
                    second.inherit(&TASK, range(number, 1)).unwrap();
                }
                let seen = number + if *again { 1000 } else { 0 };
                model.push((number * PAGE_SIZE, flags(*lazy), seen));
            }
            let images = made(&second.commit().unwrap(), &quota);
            let pagemap = pagemap(&images, TASK);
            let layout = pagemap.layout().unwrap();
            let bytes = read(&images[&pages_image(pagemap.pages_id)], piece);
            prop_assert_eq!(layout.pages_len, bytes.len() as u64);
            let mut shown = Vec::new();
            for at in &layout.runs {
                for page in 0..at.run.pages() {
                    let offset = usize::try_from(at.offset + page * PAGE_SIZE).unwrap();
                    let number = u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap());
                    let address = at.run.address() + page * PAGE_SIZE;
                    shown.push((address, at.run.contents().flags(), number));
                }
            }
            prop_assert_eq!(shown, model);
            for pair in layout.runs.windows(2) {
                let (one, next) = (pair[0].run, pair[1].run);
                let apart = one.end() < next.address() || one.contents() != next.contents();
                prop_assert!(apart, "{one:?} and {next:?} are one entry");
            }
            drop(images);
            prop_assert_eq!(quota.used(), 0);
        }
    }
}
