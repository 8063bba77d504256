//! The pagemap images (`images/pagemap.proto`, `criu/pagemap.c`): which pages a space has, and which
//! bytes of the pages image are theirs.
//!
//! Two magic numbers, then records: a head, then an entry for each run of pages. Two things are kept
//! apart: what an image *says* ([`Pagemap::decode`], [`Pagemap::encode`], which lose nothing of it), and
//! what it *means* ([`Pagemap::layout`]). An image that says something unknown here can still be given another
//! pages image and be passed on; its pages cannot be picked out.
//!
//! The messages are decoded here and not by prost, which drops what it does not know. Five numbers in
//! one message and one in the other are all there is to decode; keeping the rest next to prost
//! would take the same walk over the fields, and its types besides.

mod entry;

use std::io::{self, Read};

use prost::bytes::{Buf, BufMut};

use self::entry::Entry;
use super::pages::{BadFlags, BadRange, Run};
use crate::criu::fields::{Fields, Unknown, put_field};

/// `IMG_COMMON_MAGIC` and `PAGEMAP_MAGIC` of `criu/include/magic.h`.
const MAGICS: [u32; 2] = [0x5456_4319, 0x5608_4025];

/// What is wrong with an image: it was cut, or is something else.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadPagemap {
    /// It does not begin with the magic numbers.
    #[error("it does not begin like a pagemap image")]
    Magic,
    /// There is nothing after them.
    #[error("it has no head")]
    NoHead,
    /// A record ends beyond the image, or its length does.
    #[error("the record at byte {0} is cut short")]
    Cut(usize),
    /// A record is no protobuf message.
    #[error("the record at byte {0} is not protobuf")]
    NotProtobuf(usize),
    /// A record lacks what each has, or has it in another form.
    #[error("the record at byte {at} has no {field}")]
    Missing {
        /// Where the record begins.
        at: usize,
        /// The field.
        field: &'static str,
    },
}

/// Why the pages of an image cannot be picked out of its pages image. It is served as it came.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotUnderstood {
    /// The head has a field of a later CRIU.
    #[error("the head has the field {0}, which is not known here")]
    Head(u32),
    /// An entry has a field of a later CRIU. That may say that the pages are stored in another way:
    /// compressed, for one.
    #[error("the entry for {address:#x} has the field {field}, which is not known here")]
    Entry {
        /// The entry's address.
        address: u64,
        /// The field.
        field: u32,
    },
    /// See [`BadFlags`].
    #[error("the entry for {address:#x}: {flags}")]
    Flags {
        /// The entry's address.
        address: u64,
        /// What is wrong.
        flags: BadFlags,
    },
    /// See [`BadRange`].
    #[error("an entry: {0}")]
    Range(#[from] BadRange),
    /// It has two counts of its pages, and they differ.
    #[error("the entry for {address:#x} has both {old} pages and {new}")]
    TwoCounts {
        /// The entry's address.
        address: u64,
        /// The old field.
        old: u64,
        /// The one since 4.2.
        new: u64,
    },
    /// The entries are not in the order of their addresses.
    #[error("the entry for {address:#x} begins below {end:#x}, where the one before ends")]
    Backwards {
        /// The entry's address.
        address: u64,
        /// Where the entry before ends.
        end: u64,
    },
    /// More pages than a file can hold.
    #[error("the entries have more than 2^64 bytes")]
    TooLong,
}

/// Why an image cannot be [read](Entries).
#[derive(Debug, thiserror::Error)]
pub enum Unreadable {
    /// It is wrong.
    #[error("{0}")]
    Bad(#[from] BadPagemap),
    /// It says what is not known here.
    #[error("not understood: {0}")]
    NotUnderstood(#[from] NotUnderstood),
    /// No record that CRIU writes has a hundredth of this.
    #[error("the record at byte {at} has {len} bytes, more than {RECORD_MAX} are not looked into")]
    RecordTooLarge {
        /// Where the record begins.
        at: usize,
        /// Its length.
        len: usize,
    },
    /// It could not be read.
    #[error("it cannot be read: {0}")]
    Io(#[from] io::Error),
}

/// A record that is longer, in bytes, is not read into memory.
const RECORD_MAX: usize = 64 << 10;

/// An image that is read entry by entry: what it says may take many times the memory that it has itself.
#[derive(Debug)]
pub struct Entries<R> {
    image: R,
    len: u64,
    /// Where the next record begins.
    at: u64,
    record: Vec<u8>,
    /// The number of the pages image.
    pub pages_id: u32,
    /// Where the pages of the last entry end.
    end: u64,
    /// The size of the pages image, in bytes, as far as the entries have been read.
    pub pages_len: u64,
}

impl<R: Read> Entries<R> {
    /// Begins to read an image of `len` bytes.
    pub fn begin(image: R, len: u64) -> Result<Entries<R>, Unreadable> {
        let (record, at) = (Vec::new(), 0);
        let mut entries = Entries { image, len, at, record, pages_id: 0, end: 0, pages_len: 0 };
        for magic in MAGICS {
            if len < 8 || entries.read_u32()? != magic {
                return Err(BadPagemap::Magic.into());
            }
        }
        let at = entries.read_record()?.ok_or(BadPagemap::NoHead)?;
        let head = Pagemap::decode_head(&entries.record, at)?;
        if let Some(field) = head.unknown.first {
            return Err(NotUnderstood::Head(field).into());
        }
        entries.pages_id = head.pages_id;
        Ok(entries)
    }

    /// The next pages, in the order of their addresses; `None` at the image's end.
    pub fn next_placed(&mut self) -> Result<Option<Placed>, Unreadable> {
        let Some(at) = self.read_record()? else { return Ok(None) };
        let run = Entry::decode(&self.record, at)?.run()?;
        let (address, offset) = (run.address(), self.pages_len);
        if address < self.end {
            return Err(NotUnderstood::Backwards { address, end: self.end }.into());
        }
        self.end = run.end();
        let len = offset.checked_add(run.payload_len());
        self.pages_len = len.ok_or(NotUnderstood::TooLong)?;
        Ok(Some(Placed { run, offset }))
    }

    /// Reads a record, and returns where it begins; `None` at the image's end.
    fn read_record(&mut self) -> Result<Option<usize>, Unreadable> {
        let at = usize::try_from(self.at).unwrap_or(usize::MAX);
        let left = self.len - self.at;
        if left == 0 {
            return Ok(None);
        }
        if left < 4 {
            return Err(BadPagemap::Cut(at).into());
        }
        let len = self.read_u32()?;
        if u64::from(len) > left - 4 {
            return Err(BadPagemap::Cut(at).into());
        }
        let len = len as usize;
        if len > RECORD_MAX {
            return Err(Unreadable::RecordTooLarge { at, len });
        }
        self.record.resize(len, 0);
        self.image.read_exact(&mut self.record)?;
        self.at += len as u64;
        Ok(Some(at))
    }

    fn read_u32(&mut self) -> io::Result<u32> {
        let mut bytes = [0; 4];
        self.image.read_exact(&mut bytes)?;
        self.at += 4;
        Ok(u32::from_le_bytes(bytes))
    }
}

/// Appends to an image of which some has been written, [its head](Pagemap::encode) first: an entry.
pub fn put_entry(image: &mut Vec<u8>, run: Run) {
    put_record(image, &Entry::new(run).encode());
}

/// A pagemap image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pagemap {
    /// The number of the pages image.
    pub pages_id: u32,
    /// What else the head says, as it came.
    unknown: Unknown,
    entries: Vec<Entry>,
}

/// Where the pages of an image are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// The pages, in the order of their addresses.
    pub runs: Vec<Placed>,
    /// The size of the pages image, in bytes. One with another size is stored in another way.
    pub pages_len: u64,
}

/// Pages, and where they begin in the pages image. They have
/// [`payload_len`](Run::payload_len) bytes there, which is none for those that are elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placed {
    /// The pages.
    pub run: Run,
    /// In bytes from the start of the pages image.
    pub offset: u64,
}

impl Pagemap {
    /// An image that says nothing yet about any pages.
    pub fn new(pages_id: u32) -> Pagemap {
        Pagemap { pages_id, unknown: Unknown::default(), entries: Vec::new() }
    }

    /// Appends pages. They have to begin where the last ones ended, or above: CRIU seeks forward only.
    pub fn push(&mut self, run: Run) {
        self.entries.push(Entry::new(run));
    }

    /// Reads a whole image.
    pub fn decode(image: &[u8]) -> Result<Pagemap, BadPagemap> {
        let mut rest = image;
        for magic in MAGICS {
            if rest.try_get_u32_le() != Ok(magic) {
                return Err(BadPagemap::Magic);
            }
        }
        let mut pagemap: Option<Pagemap> = None;
        while !rest.is_empty() {
            let at = image.len() - rest.len();
            let len = rest.try_get_u32_le().map_err(|_| BadPagemap::Cut(at))? as usize;
            let (record, after) = rest.split_at_checked(len).ok_or(BadPagemap::Cut(at))?;
            rest = after;
            match &mut pagemap {
                None => pagemap = Some(Pagemap::decode_head(record, at)?),
                Some(pagemap) => pagemap.entries.push(Entry::decode(record, at)?),
            }
        }
        pagemap.ok_or(BadPagemap::NoHead)
    }

    /// Writes the image, with all that came in one that was read.
    pub fn encode(&self) -> Vec<u8> {
        let mut image = Vec::new();
        for magic in MAGICS {
            image.put_u32_le(magic);
        }
        let mut head = Vec::new();
        put_field(&mut head, 1, self.pages_id.into());
        head.extend_from_slice(&self.unknown.bytes);
        put_record(&mut image, &head);
        for entry in &self.entries {
            put_record(&mut image, &entry.encode());
        }
        image
    }

    /// What the image means.
    pub fn layout(&self) -> Result<Layout, NotUnderstood> {
        if let Some(field) = self.unknown.first {
            return Err(NotUnderstood::Head(field));
        }
        let mut runs = Vec::with_capacity(self.entries.len());
        let (mut pages_len, mut end) = (0u64, 0);
        for entry in &self.entries {
            let run = entry.run()?;
            if run.address() < end {
                return Err(NotUnderstood::Backwards { address: run.address(), end });
            }
            end = run.end();
            runs.push(Placed { run, offset: pages_len });
            pages_len = pages_len.checked_add(run.payload_len()).ok_or(NotUnderstood::TooLong)?;
        }
        Ok(Layout { runs, pages_len })
    }

    fn decode_head(record: &[u8], at: usize) -> Result<Pagemap, BadPagemap> {
        let (mut pages_id, mut unknown) = (None, Unknown::default());
        for field in Fields(record) {
            let field = field.ok_or(BadPagemap::NotProtobuf(at))?;
            match field.known() {
                Some((1, Ok(id))) => pages_id = Some(id),
                _ => unknown.push(&field),
            }
        }
        let pages_id = pages_id.ok_or(BadPagemap::Missing { at, field: "pages_id" })?;
        Ok(Pagemap { pages_id, unknown, entries: Vec::new() })
    }
}

/// No message that was read from an image is longer than its length can say, and none of ours is.
fn put_record(image: &mut Vec<u8>, message: &[u8]) {
    image.put_u32_le(u32::try_from(message.len()).unwrap_or(u32::MAX));
    image.extend_from_slice(message);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::criu::pages::{Contents, tests::runs};
    use proptest::prelude::*;

    const MAGIC: &[u8] = b"\x19\x43\x56\x54\x25\x40\x08\x56";
    const PRESENT: Contents = Contents::Present { lazy: false };

    fn image(records: &[&[u8]]) -> Vec<u8> {
        let mut image = MAGIC.to_vec();
        for record in records {
            put_record(&mut image, record);
        }
        image
    }

    fn placed(address: u64, pages: u64, contents: Contents, offset: u64) -> Placed {
        Placed { run: Run::new(address, pages, contents).unwrap(), offset }
    }

    fn pagemap(pages_id: u32, runs: &[Run]) -> Pagemap {
        let mut pagemap = Pagemap::new(pages_id);
        for run in runs {
            pagemap.push(*run);
        }
        pagemap
    }

    /// What an entry means, in an image of its own.
    fn layout(entry: &[u8]) -> Result<Layout, NotUnderstood> {
        Pagemap::decode(&image(&[b"\x08\x01", entry])).unwrap().layout()
    }

    /// What an image means that is read entry by entry.
    fn by_entry(image: &[u8]) -> Result<Layout, Unreadable> {
        let mut entries = Entries::begin(image, image.len() as u64)?;
        let mut runs = Vec::new();
        while let Some(placed) = entries.next_placed()? {
            runs.push(placed);
        }
        Ok(Layout { runs, pages_len: entries.pages_len })
    }

    #[test]
    fn a_record_that_is_too_large_is_not_read() {
        let mut large = image(&[b"\x08\x01"]);
        put_record(&mut large, &vec![0; RECORD_MAX + 1]);
        assert_eq!(
            by_entry(&large).unwrap_err().to_string(),
            "the record at byte 14 has 65537 bytes, more than 65536 are not looked into"
        );
    }

    #[test]
    fn the_bytes_are_crius() {
        let mut pagemap = Pagemap::new(1);
        pagemap.push(Run::new(0x40_0000, 2, Contents::Parent).unwrap());
        let bytes = image(&[b"\x08\x01", b"\x08\x80\x80\x80\x02\x10\x02\x20\x01\x28\x02"]);
        assert_eq!(pagemap.encode(), bytes);
        assert_eq!(Pagemap::decode(&bytes), Ok(pagemap));
        // The same from CRIU 4.1, from 4.2, and from one that had no flags.
        for entry in [
            &b"\x08\x80\x80\x80\x02\x10\x02\x20\x01"[..],
            b"\x08\x80\x80\x80\x02\x10\0\x20\x01\x28\x02",
            b"\x08\x80\x80\x80\x02\x10\x02\x18\x01",
        ] {
            let read = Pagemap::decode(&image(&[b"\x08\x01", entry])).unwrap();
            let runs = vec![placed(0x40_0000, 2, Contents::Parent, 0)];
            assert_eq!(read.layout(), Ok(Layout { runs, pages_len: 0 }));
            assert_eq!(read.encode(), image(&[b"\x08\x01", entry]), "as it came");
        }
        let old = layout(b"\x08\x80\x20\x10\x02").unwrap();
        assert_eq!(old.runs, [placed(0x1000, 2, PRESENT, 0)], "no flags: present");
    }

    #[test]
    fn only_present_pages_have_bytes_in_the_pages_image() {
        let mut pagemap = Pagemap::new(7);
        let lazy = Contents::Present { lazy: true };
        let expected = [
            placed(0x1000, 2, PRESENT, 0),
            placed(0x3000, 4, Contents::Parent, 0x2000),
            placed(0x8000, 1, lazy, 0x2000),
            placed(0x9000, 9, Contents::Lazy, 0x3000),
            placed(0x2_0000, 3, PRESENT, 0x3000),
        ];
        for placed in expected {
            pagemap.push(placed.run);
        }
        let Layout { runs, pages_len } = pagemap.layout().unwrap();
        assert_eq!((&runs[..], pages_len), (&expected[..], 0x6000));
    }

    #[test]
    fn what_is_not_known_survives_and_is_not_taken_for_understood() {
        let head = b"\x08\x01\x12\x02hi";
        let entry = b"\x08\x80\x20\x10\x02\x20\x04\x30\x05\x3a\x01x";
        let mut read = Pagemap::decode(&image(&[head, entry])).unwrap();
        assert_eq!(read.encode(), image(&[head, entry]));
        read.pages_id = 5;
        assert_eq!(read.encode(), image(&[b"\x08\x05\x12\x02hi", entry]));
        let error = |result: Result<Layout, NotUnderstood>| result.unwrap_err().to_string();
        assert_eq!(error(read.layout()), "the head has the field 2, which is not known here");
        for (entry, said) in [
            (&entry[..], "the entry for 0x1000 has the field 6, which is not known here"),
            (
                b"\x08\x80\x20\x10\x02\x20\x0c",
                "the entry for 0x1000: unknown flags 0x8 (known are 1 PE_PARENT, 2 PE_LAZY and 4 PE_PRESENT)",
            ),
            (
                b"\x08\x80\x20\x10\x02\x20\x84\x80\x80\x80\x10",
                "the entry for 0x1000 has the field 4, which is not known here",
            ),
            (
                b"\x08\x80\x20\x10\x02\x18\x01\x20\x04",
                "the entry for 0x1000: the flags PE_PRESENT and PE_PARENT together",
            ),
            (b"\x08\x80\x20\x10\x02\x20\0", "the entry for 0x1000: no flag at all"),
            (b"\x08\x80\x20\x10\x02\x28\x03", "the entry for 0x1000 has both 2 pages and 3"),
            (b"\x08\x80\x20\x10\0", "an entry: no pages at 0x1000"),
            (
                b"\x08\x81\x20\x10\x02",
                "an entry: pages at 0x1001, which is not where a page begins",
            ),
        ] {
            assert_eq!(error(layout(entry)), said);
        }
    }

    #[test]
    fn entries_out_of_order_are_not_understood() {
        let mut pagemap = Pagemap::new(1);
        pagemap.push(Run::new(0x4000, 2, PRESENT).unwrap());
        pagemap.push(Run::new(0x5000, 2, PRESENT).unwrap());
        let error = NotUnderstood::Backwards { address: 0x5000, end: 0x6000 };
        assert_eq!(pagemap.layout(), Err(error));
    }

    #[test]
    fn what_is_no_pagemap_is_said_to_be_none() {
        let whole = image(&[b"\x08\x01", b"\x08\x80\x20\x10\x02"]);
        for cut in 0..whole.len() {
            let expected = match cut {
                0..8 => Err(BadPagemap::Magic),
                8 => Err(BadPagemap::NoHead),
                9..14 => Err(BadPagemap::Cut(8)),
                14 => Ok(Pagemap::new(1)),
                _ => Err(BadPagemap::Cut(14)),
            };
            assert_eq!(Pagemap::decode(&whole[..cut]), expected, "cut at {cut}");
        }
        for (record, error) in [
            (&b"\x08"[..], BadPagemap::NotProtobuf(14)),
            (b"\x08\x01", BadPagemap::Missing { at: 14, field: "compat_nr_pages" }),
            (b"\x10\x01", BadPagemap::Missing { at: 14, field: "vaddr" }),
            (b"\x0a\0\x10\x01", BadPagemap::Missing { at: 14, field: "vaddr" }),
        ] {
            assert_eq!(Pagemap::decode(&image(&[b"\x08\x01", record])), Err(error));
        }
        let error = BadPagemap::Missing { at: 8, field: "pages_id" };
        assert_eq!(Pagemap::decode(&image(&[b""])), Err(error));
    }

    proptest! {
        #[test]
        fn an_image_survives_the_way(pages_id: u32, runs in runs()) {
            let pagemap = pagemap(pages_id, &runs);
            let read = Pagemap::decode(&pagemap.encode());
            prop_assert_eq!(read.as_ref(), Ok(&pagemap));
            let layout = pagemap.layout().unwrap();
            let payload: u64 = runs.iter().map(Run::payload_len).sum();
            prop_assert_eq!(layout.pages_len, payload);
            prop_assert_eq!(&layout.runs.iter().map(|placed| placed.run).collect::<Vec<_>>(), &runs);
            let mut written = Pagemap::new(pages_id).encode();
            for run in &runs {
                put_entry(&mut written, *run);
            }
            prop_assert_eq!(written, pagemap.encode());
        }

        #[test]
        fn what_was_decoded_survives_being_written(
            runs in runs(), at: proptest::sample::Index, byte: u8
        ) {
            let mut bytes = pagemap(1, &runs).encode();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            if let Ok(read) = Pagemap::decode(&bytes) {
                let (layout, by_entry) = (read.layout(), by_entry(&bytes));
                prop_assert_eq!(by_entry.as_ref().ok(), layout.as_ref().ok());
                prop_assert_eq!(by_entry.is_err(), layout.is_err());
                prop_assert_eq!(Pagemap::decode(&read.encode()), Ok(read));
            } else {
                prop_assert!(by_entry(&bytes).is_err());
            }
        }

        #[test]
        fn no_bytes_make_the_decoder_panic(bytes: Vec<u8>) {
            let _ = Pagemap::decode(&bytes);
            let _ = by_entry(&[MAGIC, &bytes].concat());
            if let Ok(read) = Pagemap::decode(&[MAGIC, &bytes].concat()) {
                let _ = read.layout();
            }
            let mut image = image(&[b"\x08\x01"]);
            put_record(&mut image, &bytes);
            let _ = Pagemap::decode(&image);
        }
    }
}
