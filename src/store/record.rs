//! The record of a snapshot: one memfd with the bytes of its small images, of which a dump has thousands, and what is
//! [said of it](super::kept) for whoever keeps it while there is no cache.

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::rc::Rc;

use super::closing::close;
use super::image::{Image, PAGE, Place};
use super::quota::{Charge, Exhausted, Quota};
use super::snapshot::State;
use super::turns::Turns;
use super::{Key, Store, dropped};
use crate::sys::memfd;

/// Length of what a record begins with, in bytes: which kind it is, and the text's place.
pub(super) const HEAD: usize = 16;
/// Images below this length, in bytes, are in the record. Most of a dump's images are, and few of its bytes: each
/// other one is a descriptor, and systemd keeps some thousand files for a service.
pub(super) const SMALL: u64 = 64 * 1024;
/// So many bytes of text are written at once.
const PIECE: usize = 1 << 20;

/// A record. What is in it stays where it is: its pages may sit in pipes, on their way to a restore.
#[derive(Debug)]
pub struct Record {
    file: Rc<File>,
    quota: Quota,
    /// For all that the file has.
    charge: RefCell<Charge>,
    /// How long it is.
    len: Cell<u64>,
    /// Where its images end.
    images: Cell<u64>,
}

impl Record {
    pub(super) fn create(id: &str, quota: &Quota) -> io::Result<Rc<Record>> {
        let file = Rc::new(memfd::create(&format!("{id} (record)"))?.into());
        let (charge, len) = (RefCell::new(quota.nothing()), HEAD as u64);
        let (len, images) = (Cell::new(len), Cell::new(len));
        Ok(Rc::new(Record { file, quota: quota.clone(), charge, len, images }))
    }

    /// One that was kept while there was no cache, and whose images end at `images`.
    pub(super) fn kept(file: &Rc<File>, images: u64, quota: &Quota) -> io::Result<Rc<Record>> {
        let (charge, len) = (RefCell::new(quota.nothing()), file.metadata()?.len());
        let (len, images) = (Cell::new(len), Cell::new(images));
        let record = Record { file: file.clone(), quota: quota.clone(), charge, len, images };
        record.charge_exactly()?;
        Ok(Rc::new(record))
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.file
    }

    #[cfg(test)]
    pub(super) fn shared_file(&self) -> &Rc<File> {
        &self.file
    }

    /// How long it is, in bytes.
    pub(super) fn len(&self) -> u64 {
        self.len.get()
    }

    /// How many bytes it is charged for.
    pub fn charged(&self) -> u64 {
        self.charge.borrow().bytes()
    }

    /// A charge of nothing.
    pub(super) fn nothing(&self) -> Charge {
        self.quota.nothing()
    }

    /// Charges for what is beside the record, if there is room now.
    pub(super) fn charge_now(&self, bytes: u64) -> Result<Charge, Exhausted> {
        self.quota.charge_now(bytes)
    }

    /// Takes a small image in: its bytes, and the charge for them. What is returned is in its place. Somebody who has the other one
    /// still holds it twice for as long as that takes.
    fn take_in(self: &Rc<Record>, image: &Rc<Image>) -> io::Result<Image> {
        let begin = self.len.get();
        self.file.write_all_at(&image.bytes()?, begin)?;
        self.len.set(begin + image.len());
        self.images.set(self.len.get());
        let is_held = Rc::strong_count(image) > 1;
        let charge =
            if is_held { self.quota.charge_held(image.charged()) } else { image.take_charge() };
        self.charge.borrow_mut().join(charge);
        Ok(Image::in_record(image.name(), self, begin, image.len()))
    }

    /// Has another text: `magic` says of which kind. It is in force when all of it is there, and not before.
    ///
    /// It is charged for even beyond the limit, by some hundred bytes for each image: what is whole within the limit is not to be lost
    /// for that.
    pub(super) async fn write(&self, magic: [u8; 8], text: &[u8]) -> io::Result<()> {
        let (begin, mut turns) = (self.len.get(), Turns::new());
        let end = begin + text.len() as u64;
        let more = end.next_multiple_of(PAGE) - begin / PAGE * PAGE;
        self.charge.borrow_mut().join(self.quota.charge_held(more));
        for (piece, at) in text.chunks(PIECE).zip((begin..).step_by(PIECE)) {
            self.file.write_all_at(piece, at)?;
            turns.pass_after_much().await;
        }
        self.file.write_all_at(&[magic, begin.to_le_bytes()].concat(), 0)?;
        self.len.set(end);
        // What was said before goes as far as it has pages of its own.
        let before = self.images.get().next_multiple_of(PAGE);
        if let Some(unused @ 1..) = (begin / PAGE * PAGE).checked_sub(before) {
            memfd::punch(&self.file, before, unused)?;
        }
        self.charge_exactly()
    }

    /// What the kernel says that it takes is what it is charged for.
    fn charge_exactly(&self) -> io::Result<()> {
        let takes = (self.file.metadata()?.blocks() * 512).max(PAGE);
        let mut charge = self.charge.borrow_mut();
        let charged = charge.bytes();
        charge.give_back(charged.saturating_sub(takes));
        charge.join(self.quota.charge_held(takes.saturating_sub(charged)));
        Ok(())
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        close(&self.file, Some(self.charge.get_mut().take()));
    }
}

impl Store {
    /// Takes the small images of a snapshot, all of which have come, into one file: each goes with its charge, so that there is
    /// room for it. Others have their turn between them. Where no file is to be had they stay where they are.
    pub(super) async fn take_in_small(&self, key: Key) -> Result<Option<Rc<Record>>, String> {
        let mut turns = Turns::new();
        let made = self.look(key, |snapshot| Record::create(&snapshot.id, &self.quota));
        let Some(Ok(record)) = made else { return Ok(None) };
        let small = |image: &Image| {
            let is_alone = image.charged() > 0 && matches!(image.place(), Place::Memfd(_));
            image.len() < SMALL && image.is_whole() && is_alone
        };
        let names: Vec<String> = {
            let snapshots = self.snapshots.borrow();
            let images = snapshots.get(&key).and_then(|snapshot| snapshot.images());
            let small = images.into_iter().flatten().filter(|(_, image)| small(image));
            small.map(|(name, _)| name.clone()).collect()
        };
        for name in names {
            self.take_in_one(key, &name, &record)?;
            turns.pass_after_much().await;
        }
        record.charge_exactly().map_err(|error| error.to_string())?;
        Ok(Some(record))
    }

    fn take_in_one(&self, key: Key, name: &str, record: &Rc<Record>) -> Result<(), String> {
        let mut snapshots = self.snapshots.borrow_mut();
        let state = snapshots.get_mut(&key).map(|snapshot| &mut snapshot.state);
        let Some(State::Receiving(images)) = state else { return dropped() };
        if let Some(image) = Rc::make_mut(images).get_mut(name) {
            let taken = record.take_in(image);
            let taken = taken.map_err(|error| format!("image {name} cannot be held: {error}"))?;
            *image = Rc::new(taken);
        }
        Ok(())
    }
}
