//! Whole and taken snapshots as files that somebody keeps while there is no cache: systemd, in its file descriptor store.
//!
//! A *record* is a memfd that says what a snapshot is, and has the bytes of its small images, which are served from there
//! ([`Record`]). The bytes of all others stay in the files in which they are, which the record names; snapshots may share them.
//!
//! ```text
//! record:  magic │ where the text begins │ small images … │ text (JSON): id, sender, images, where their bytes are
//!          8      8                                         to the end
//! ```
//!
//! When something else is to be said, another text follows, and the head is written again. Until then the one of before is in
//! force: whatever is behind it is not read.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::FileExt;
use std::rc::Rc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::task::spawn_blocking;

use super::check::check;
use super::image::{self, Image};
use super::pages::{Index, Layer, PAGE, PageRange, Run};
use super::quota::Quota;
use super::record::{HEAD, Record, SMALL};
use super::snapshot::{Images, Memory, Sender, Snapshot, State};
use super::turns::{Turns, at_once};
use super::{Key, Store, needs_view};
use crate::criu::names::{check_id, check_image, check_list};
use crate::criu::pages::is_pages_image;
use crate::sys::clock::now_ms;

/// What a record begins with. The last is the version of the format: a cache that does not know it does
/// not hold what is kept.
const MAGIC: [u8; 8] = *b"criukp\0\x01";
/// What the record of a snapshot that was taken begins with. A cache of before knows whole ones only, and would let them
/// be restored once more in silence.
const MAGIC_OF_TAKEN: [u8; 8] = *b"criukp\0\x02";
/// A snapshot that can be restored, to be kept.
#[derive(Debug)]
pub struct Kept {
    /// What names the files, and has the small images.
    pub record: Rc<Record>,
    /// The images that it is to say.
    pub images: Rc<Images>,
    /// Whether it is to say that a restore has taken them.
    pub taken: bool,
    text: Vec<u8>,
}

impl Kept {
    /// Writes it into the record: all files that it names have to be kept by then.
    pub async fn write(&self) -> io::Result<()> {
        self.record.write(if self.taken { MAGIC_OF_TAKEN } else { MAGIC }, &self.text).await
    }
}

/// What is said of so many images and runs of pages, in a microsecond each, no thread is started for: there may be some
/// hundred thousand.
const FEW: usize = 4096;

/// Files that were kept, by their names.
pub type Files = BTreeMap<String, Rc<File>>;

/// What a record says.
#[derive(Debug, Serialize, Deserialize)]
struct Text {
    id: String,
    sender: String,
    host: Option<IpAddr>,
    /// Not in records of 0.1.0.
    #[serde(default)]
    attempt: u64,
    begun_ms: u64,
    ended_ms: u64,
    reserved: bool,
    /// Whether its memory may have changed before it was copied. A record of 0.1.0 does not say.
    #[serde(default)]
    memory_may_have_changed: bool,
    /// The lists of the sender's host that the id stands in.
    lists: Vec<String>,
    /// Smaller than that of snapshots which began later.
    age: u64,
    /// When it was taken: milliseconds since the epoch; `None` if it was not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    taken_ms: Option<u64>,
    images: Vec<KeptImage>,
}

#[derive(Debug, Serialize, Deserialize)]
struct KeptImage {
    name: String,
    /// In bytes.
    len: u64,
    bytes: Place,
}

/// Where the bytes of an image are.
#[derive(Debug, Serialize, Deserialize)]
enum Place {
    /// In the record, from this offset on.
    Record(u64),
    /// In a file of this name, from its beginning on.
    File(String),
    /// In pages of files: the name, the number of the first page there, and how many they are.
    Pages(Vec<(String, u64, u64)>),
}

impl Store {
    /// The snapshots that can be restored, oldest first, with their images, and whether they were taken.
    pub fn restorable(&self) -> Vec<(Key, Rc<Images>, bool)> {
        let snapshots = self.snapshots.borrow();
        let restorable = |(key, snapshot): (&Key, &Snapshot)| match &snapshot.state {
            State::Whole(images) => Some((*key, images.clone(), false)),
            State::Taken(images) => Some((*key, images.clone(), true)),
            _ => None,
        };
        snapshots.iter().filter_map(restorable).collect()
    }

    /// What is to be said of a snapshot in its record. `name` is asked for the name of each file that is to be kept with it.
    /// `None` if it cannot be restored.
    ///
    /// Others have their turn all the while.
    pub async fn keep(
        &self,
        key: Key,
        name: impl FnMut(&Rc<File>) -> String,
    ) -> Option<io::Result<Kept>> {
        let (text, images, record) = {
            let mut snapshots = self.snapshots.borrow_mut();
            let snapshot = snapshots.get_mut(&key)?;
            let (State::Whole(images) | State::Taken(images)) = &snapshot.state else {
                return None;
            };
            let lists = self.lists.borrow().names_of(&snapshot.id, snapshot.sender.host);
            let (text, images) = (Text::of(snapshot, key, lists), images.clone());
            if snapshot.record.is_none() {
                // There was no descriptor for it when it became whole.
                match Record::create(&snapshot.id, &self.quota) {
                    Ok(record) => snapshot.record = Some(record),
                    Err(error) => return Some(Err(error)),
                }
            }
            (text, images, snapshot.record.clone()?)
        };
        Some(describe(text, images, record, name).await)
    }

    /// Holds the snapshots of some records again, even beyond the limits. For each its id and the
    /// files that it needs, or why it cannot be held.
    pub fn hold_again(&self, records: &[Rc<File>], files: &Files) -> Vec<Result<Again, Lost>> {
        let mut layers =
            Layers { files, quota: &self.quota, known: BTreeMap::new(), held: Vec::new() };
        let mut told: Vec<_> = records.iter().map(|record| read(record)).collect();
        // As they came.
        // One that was just taken may have the record of before as well.
        let age = |told: &Result<Text, Lost>| {
            told.as_ref().map_or((0, false), |text| (text.age, text.taken_ms.is_none()))
        };
        let mut order: Vec<usize> = (0..records.len()).collect();
        order.sort_by_key(|index| age(&told[*index]));
        let mut listed = Vec::new();
        let mut outcome: Vec<Option<Result<Again, Lost>>> = records.iter().map(|_| None).collect();
        for index in order {
            let text = std::mem::replace(&mut told[index], Err(Lost::default()));
            outcome[index] = Some(text.and_then(|text| {
                let lost = |why| Lost { id: Some(text.id.clone()), why };
                let record = Record::kept(&records[index], text.images_end(), &self.quota);
                let record = record.map_err(|error| lost(error.to_string()))?;
                let images = Rc::new(images(&text, &record, &mut layers).map_err(lost)?);
                let key = self.list_again(&text, images.clone(), &record).map_err(lost)?;
                listed.push((text.ended_ms, key, text.host, text.lists.clone()));
                let files = text.images.iter().flat_map(|image| image.bytes.files());
                let files = files.map(ToOwned::to_owned).collect();
                let taken = text.taken_ms.is_some();
                Ok(Again { key, id: text.id, images, taken, files, record })
            }));
        }
        // A parent was whole before what is based on it.
        listed.sort();
        for (_, key, host, lists) in listed {
            let Some(id) = self.id(key) else { continue };
            for list in lists {
                self.lists.borrow_mut().append(&list, host, &id);
            }
        }
        self.changed.send_replace(());
        outcome.into_iter().flatten().collect()
    }

    fn list_again(
        &self,
        text: &Text,
        images: Rc<Images>,
        record: &Rc<Record>,
    ) -> Result<Key, String> {
        if self.key_of(&text.id).is_some() {
            return Err("there is another of that id".to_owned());
        }
        let sender = Sender { name: text.sender.clone(), host: text.host, attempt: text.attempt };
        let needs_view = needs_view::why(&images);
        let state = match text.taken_ms {
            None => State::Whole(images),
            Some(_) => State::Taken(images),
        };
        let mut snapshot = Snapshot::new(&text.id, &sender, state);
        if let Some(taken_ms) = text.taken_ms {
            let age = Duration::from_millis(now_ms().saturating_sub(taken_ms));
            // Older than the machine it cannot be, unless its clock was changed.
            snapshot.since = Instant::now().checked_sub(age).unwrap_or_else(Instant::now);
        }
        snapshot.begun_ms = text.begun_ms;
        snapshot.ended_ms = text.ended_ms;
        snapshot.reserved = text.reserved;
        snapshot.needs_view = needs_view;
        snapshot.record = Some(record.clone());
        if text.memory_may_have_changed {
            snapshot.memory = Memory::MayHaveChanged;
        }
        Ok(self.list_beyond(snapshot))
    }
}

/// A snapshot that is held again.
#[derive(Debug)]
pub struct Again {
    /// Its key.
    pub key: Key,
    /// Its id.
    pub id: String,
    /// Its images.
    pub images: Rc<Images>,
    /// Whether a restore had taken it.
    pub taken: bool,
    /// The files that it needs; some may be there several times.
    pub files: Vec<String>,
    /// Its record.
    pub record: Rc<Record>,
}

/// A snapshot that was kept and cannot be held again.
#[derive(Debug, Default)]
pub struct Lost {
    /// Its id, if that is known.
    pub id: Option<String>,
    /// Why.
    pub why: String,
}

impl Place {
    /// How much there is to say.
    fn parts(&self) -> usize {
        match self {
            Place::Record(_) | Place::File(_) => 1,
            Place::Pages(pages) => pages.len(),
        }
    }

    fn files(&self) -> impl Iterator<Item = &str> {
        let (file, pages) = match self {
            Place::Record(_) => (None, &[][..]),
            Place::File(name) => (Some(name.as_str()), &[][..]),
            Place::Pages(pages) => (None, &pages[..]),
        };
        file.into_iter().chain(pages.iter().map(|(name, ..)| name.as_str()))
    }
}

impl Text {
    /// Where the images end that are in the record.
    fn images_end(&self) -> u64 {
        let ends = self.images.iter().filter_map(|image| match image.bytes {
            Place::Record(offset) => offset.checked_add(image.len),
            _ => None,
        });
        ends.fold(HEAD as u64, u64::max)
    }

    /// All but the images.
    fn of(snapshot: &Snapshot, key: Key, lists: Vec<String>) -> Text {
        let age_ms = u64::try_from(snapshot.since.elapsed().as_millis()).unwrap_or(u64::MAX);
        let is_taken = matches!(snapshot.state, State::Taken(_));
        Text {
            id: snapshot.id.clone(),
            sender: snapshot.sender.name.clone(),
            host: snapshot.sender.host,
            attempt: snapshot.sender.attempt,
            begun_ms: snapshot.begun_ms,
            ended_ms: snapshot.ended_ms,
            reserved: snapshot.reserved,
            memory_may_have_changed: snapshot.memory != Memory::AsFrozen,
            lists,
            age: key.0,
            taken_ms: is_taken.then(|| now_ms().saturating_sub(age_ms)),
            images: Vec::new(),
        }
    }
}

async fn describe(
    mut text: Text,
    images: Rc<Images>,
    record: Rc<Record>,
    mut name: impl FnMut(&Rc<File>) -> String,
) -> io::Result<Kept> {
    let mut turns = Turns::new();
    for image in images.values() {
        let bytes = match image.place() {
            image::Place::Record(offset) => Place::Record(offset),
            image::Place::Memfd(file) => Place::File(name(file)),
            image::Place::Pages(index) => {
                Place::Pages(pages_of(index, &mut name, &mut turns).await)
            }
        };
        text.images.push(KeptImage { name: image.name().to_owned(), len: image.len(), bytes });
        turns.pass().await;
    }
    let taken = text.taken_ms.is_some();
    let parts: usize = text.images.iter().map(|image| image.bytes.parts()).sum();
    let text = if parts > FEW {
        // It can fail only by a panic.
        spawn_blocking(move || serde_json::to_vec(&text)).await.map_err(io::Error::other)??
    } else {
        serde_json::to_vec(&text)?
    };
    Ok(Kept { record, images, taken, text })
}

async fn pages_of(
    index: &Index,
    name: &mut impl FnMut(&Rc<File>) -> String,
    turns: &mut Turns,
) -> Vec<(String, u64, u64)> {
    let mut pages = Vec::new();
    for run in index.runs() {
        pages.push((name(run.layer().shared_file()), run.offset() / PAGE, run.range().pages()));
        turns.pass().await;
    }
    pages
}

fn read(record: &File) -> Result<Text, Lost> {
    let text = read_text(record).map_err(|error| format!("its record cannot be read: {error}"));
    let text = text.and_then(|text| match check_text(&text) {
        Ok(()) => Ok(text),
        Err(why) => Err(format!("its record is wrong: {why}")),
    });
    text.map_err(|why| Lost { id: None, why })
}

fn read_text(record: &File) -> io::Result<Text> {
    let len = record.metadata()?.len();
    let mut head = [0; HEAD];
    record.read_exact_at(&mut head, 0)?;
    let (magic, begin) = head.split_at(MAGIC.len());
    if magic != MAGIC && magic != MAGIC_OF_TAKEN {
        return Err(io::Error::other("another version of this program wrote it"));
    }
    let begin = u64::from_le_bytes(begin.try_into().map_err(io::Error::other)?);
    let cut = || io::Error::other("it is cut short");
    let text = len.checked_sub(begin).ok_or_else(cut)?;
    let mut bytes = vec![0; usize::try_from(text).map_err(io::Error::other)?];
    record.read_exact_at(&mut bytes, begin)?;
    // Behind it may be a part of one that was to follow it.
    let text = serde_json::Deserializer::from_slice(&bytes).into_iter().next();
    Ok(text.ok_or_else(cut)??)
}

fn check_text(text: &Text) -> Result<(), String> {
    check_id(&text.id).map_err(|bad| bad.to_string())?;
    text.lists.iter().try_for_each(|list| check_list(list)).map_err(|bad| bad.to_string())?;
    let mut images = text.images.iter();
    images.try_for_each(|image| check_image(&image.name)).map_err(|bad| bad.to_string())
}

fn images(text: &Text, record: &Rc<Record>, layers: &mut Layers<'_>) -> Result<Images, String> {
    let mut images = Images::new();
    for kept in &text.images {
        let image = image(kept, record, layers)
            .map_err(|error| format!("image {} cannot be held again: {error}", kept.name))?;
        images.insert(kept.name.clone(), Rc::new(image));
    }
    // Whether it has an inventory was looked at when it came.
    at_once(check(&images, true))?;
    Ok(images)
}

fn image(kept: &KeptImage, record: &Rc<Record>, layers: &mut Layers<'_>) -> io::Result<Image> {
    let cut = || io::Error::other("its bytes are not all there");
    let KeptImage { name, len, bytes } = kept;
    match bytes {
        Place::Record(offset) => {
            if *len >= SMALL {
                return Err(io::Error::other("it is too large for where it is"));
            }
            if offset.checked_add(*len).is_none_or(|end| end > record.len()) {
                return Err(cut());
            }
            Ok(Image::in_record(name, record, *offset, *len))
        }
        Place::File(file) => {
            let held = layers.file(file)?.clone();
            if held.metadata()?.len() < *len {
                return Err(cut());
            }
            // Another snapshot may show pages of it: then it goes when both have gone.
            let pages = PageRange::between(0, len / PAGE).filter(|_| is_pages_image(name));
            let pages = pages.map(|all| layers.hold(file, all, 0)?.ok_or_else(cut)).transpose()?;
            let apart = pages.as_ref().map_or(0, |pages| pages.range().bytes());
            let charge = layers.quota.charge_held(Image::needs(*len).saturating_sub(apart));
            Ok(Image::kept(name, held, *len, pages, charge))
        }
        Place::Pages(places) => {
            let (mut index, mut pages) = (Index::default(), 0u64);
            for (file, offset, count) in places {
                let end = pages.checked_add(*count).ok_or_else(cut)?;
                let range = PageRange::between(pages, end).ok_or_else(cut)?;
                let run = layers.hold(file, range, *offset)?.ok_or_else(cut)?;
                index.append(run);
                pages = end;
            }
            if pages.checked_mul(PAGE) != Some(*len) {
                return Err(cut());
            }
            Ok(Image::of_pages(name, &index, layers.quota.charge_held(0))?)
        }
    }
}

/// The layers in files that were kept: one for each, whichever snapshots have pages in it.
struct Layers<'a> {
    files: &'a Files,
    quota: &'a Quota,
    known: BTreeMap<String, Rc<Layer>>,
    /// All that was asked for, until everybody has asked: what is given back of a snapshot that is lost may be another's.
    held: Vec<Run>,
}

impl Layers<'_> {
    fn file(&self, name: &str) -> io::Result<&Rc<File>> {
        self.files.get(name).ok_or_else(|| io::Error::other(format!("{name} was not kept")))
    }

    fn hold(&mut self, name: &str, range: PageRange, offset: u64) -> io::Result<Option<Run>> {
        let layer = if let Some(layer) = self.known.get(name) {
            layer.clone()
        } else {
            let layer = Layer::kept(self.file(name)?)?;
            self.known.insert(name.to_owned(), layer.clone());
            layer
        };
        let run = layer.hold(range, offset, self.quota);
        self.held.extend(run.clone());
        Ok(run)
    }
}

#[cfg(test)]
mod tests;
