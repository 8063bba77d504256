//! Images as files: for clients that know only directories, each image has to be one file.

use std::fs::File;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use super::image::{Image, Place};
use super::quota::Exhausted;
use super::snapshot::{Images, Snapshot, State};
use super::turns::Turns;
use super::{Key, Store};
use crate::sys::pipe::{Pipe, transfer_from_file, transfer_to_file};

/// What is copied before others have their turn, in bytes: a fraction of a millisecond.
const PIECE: usize = 1 << 20;

/// Why the images of a snapshot cannot be had as files.
#[derive(Debug, thiserror::Error)]
pub enum NoFiles {
    /// It has no images yet, or none any more.
    #[error("it is not whole")]
    NotWhole,
    /// There is no room for the pages of an image next to each other.
    #[error("the pages of image {name} cannot be brought together: {cause}")]
    NoRoom {
        /// The image.
        name: String,
        /// Why not.
        cause: Exhausted,
    },
    /// The kernel refused.
    #[error("the pages of image {name} cannot be brought together: {cause}")]
    Failed {
        /// The image.
        name: String,
        /// What it said.
        cause: io::Error,
    },
}

impl Store {
    /// The images of a whole or taken snapshot, each [in one file](Image::as_file).
    ///
    /// Pages that came in several rounds are copied together for it, once: from then on the snapshot has
    /// them there, and what nobody else sees in their layers is given back. While they are copied, both are
    /// held and charged for. Other tasks have their turn all the while; one that asks for the same waits.
    pub async fn files(&self, key: Key) -> Result<Rc<Images>, NoFiles> {
        let patience = self.settings.borrow().quota_wait;
        self.bring_together(key, patience).await
    }

    /// Brings pages together before anybody asks, if a restore from a view is to come: so it need not wait for it. Without room for
    /// it nothing is done; whoever asks will wait for room.
    pub async fn prepare_view(&self, key: Key) {
        let awaited = |snapshot: &Snapshot| snapshot.needs_view.is_some() || snapshot.view_awaited;
        if self.look(key, awaited) == Some(true) {
            let _ = self.bring_together(key, Duration::ZERO).await;
        }
    }

    async fn bring_together(&self, key: Key, patience: Duration) -> Result<Rc<Images>, NoFiles> {
        let turn = self.look(key, |snapshot| snapshot.view_turn.clone());
        let turn = turn.ok_or(NoFiles::NotWhole)?;
        let _turn = turn.lock().await;
        let held = self.held_images(key)?;
        self.set_apart(&held, patience).await?;
        let apart = held.values().filter(|image| image.as_file().is_none());
        let apart: Vec<Rc<Image>> = apart.cloned().collect();
        // Each is let go as soon as there is another in its place.
        drop(held);
        for image in apart {
            let together = self.brought_together(&image, patience).await?;
            self.update(key, |snapshot| snapshot.replace(&image, together));
        }
        self.held_images(key)
    }

    fn held_images(&self, key: Key) -> Result<Rc<Images>, NoFiles> {
        let images = self.look(key, |snapshot| match &snapshot.state {
            State::Whole(images) | State::Taken(images) => Some(images.clone()),
            _ => None,
        });
        images.flatten().ok_or(NoFiles::NotWhole)
    }

    /// Small images are in one file together: each gets one of its own, beside that.
    async fn set_apart(&self, images: &Images, patience: Duration) -> Result<(), NoFiles> {
        let mut turns = Turns::new();
        let small = |image: &&Rc<Image>| {
            matches!(image.place(), Place::Record(..)) && image.as_file().is_none()
        };
        for image in images.values().filter(small) {
            let name = || image.name().to_owned();
            let charge =
                self.quota.charge(Image::needs(image.len()), || image.len(), patience).await;
            let charge = charge.map_err(|cause| NoFiles::NoRoom { name: name(), cause })?;
            image.set_apart(charge).map_err(|cause| NoFiles::Failed { name: name(), cause })?;
            turns.pass_after_much().await;
        }
        Ok(())
    }

    async fn brought_together(&self, image: &Image, patience: Duration) -> Result<Image, NoFiles> {
        let name = || image.name().to_owned();
        let charge = self.quota.charge(Image::needs(image.len()), || image.len(), patience).await;
        let charge = charge.map_err(|cause| NoFiles::NoRoom { name: name(), cause })?;
        let failed = |cause| NoFiles::Failed { name: name(), cause };
        let together = Image::create(image.name(), charge).map_err(|errno| failed(errno.into()))?;
        copy(image, together.file()).await.map_err(failed)?;
        together.grown_to(image.len());
        together.end();
        Ok(together)
    }
}

impl Snapshot {
    /// Another image takes the place of one; if that is not there any more, nothing happens.
    fn replace(&mut self, image: &Rc<Image>, by: Image) {
        let (State::Whole(images) | State::Taken(images)) = &mut self.state else { return };
        if images.get(image.name()).is_some_and(|known| Rc::ptr_eq(known, image)) {
            Rc::make_mut(images).insert(by.name().to_owned(), Rc::new(by));
            // It holds the pages in their old places.
            self.pages.of_images = None;
        }
    }
}

async fn copy(image: &Image, file: &File) -> io::Result<()> {
    let pipe = Pipe::new(PIECE)?;
    let (mut copied, mut in_turn) = (0, 0);
    while let Some(part) = image.part(copied, pipe.capacity() as u64) {
        let (mut from, mut to) = (part.offset, copied);
        let len = usize::try_from(part.len).unwrap_or(PIECE);
        let mut staged = transfer_from_file(part.file, &mut from, &pipe.into, len)?;
        if staged == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        copied += staged as u64;
        in_turn += staged;
        while staged > 0 {
            staged -= transfer_to_file(&pipe.out, file, &mut to, staged)?;
        }
        if in_turn >= PIECE {
            in_turn = 0;
            tokio::task::yield_now().await;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;
    use std::time::Instant;

    use super::super::flat_images::flat_images;
    use super::super::pages::{Flat, PAGE, PageRange, Round};
    use super::super::snapshot::Sender;
    use super::super::turns::at_once;
    use super::*;
    use crate::config::StoreSettings;
    use crate::criu::pages::Space;

    const TASK: Space = Space::Task(7);

    /// Pages filled with numbers counted from `first`.
    fn add(store: &Store, round: &mut Round<Space>, page: u64, count: u64, first: u64) {
        let range = PageRange::new(page * PAGE, count).unwrap();
        let charge = store.quota().charge_now(range.bytes()).unwrap();
        let place = round.accept(&TASK, range, 4, charge).unwrap();
        for page in 0..count {
            let bytes = (first + page).to_le_bytes().repeat(512);
            place.layer().file().write_all_at(&bytes, place.offset() + page * PAGE).unwrap();
        }
        round.filled(place);
    }

    /// Of 600 pages every third came again.
    fn two_rounds(store: &Store) -> Flat<Space> {
        let mut round = Round::new(None);
        add(store, &mut round, 0, 600, 0);
        let mut next = Round::new(Some(round.commit().unwrap()));
        for page in (0..600).step_by(3) {
            add(store, &mut next, page, 1, 10_000 + page);
            next.inherit(&TASK, PageRange::new((page + 1) * PAGE, 2).unwrap()).unwrap();
        }
        next.commit().unwrap()
    }

    fn whole(store: &Store, flat: &Flat<Space>) -> Key {
        let mut images = Images::new();
        at_once(flat_images(flat, &mut images, store.quota())).unwrap();
        let key = store.begin("web", &Sender::default()).unwrap();
        store.update(key, |snapshot| snapshot.end(State::Whole(Rc::new(images))));
        key
    }

    fn store(max_bytes: u64) -> Rc<Store> {
        let quota_wait = Duration::from_millis(10);
        Store::new(StoreSettings { max_bytes, quota_wait, ..StoreSettings::default() })
    }

    fn numbers(image: &Image) -> Vec<u64> {
        let mut bytes = vec![0; usize::try_from(image.len()).unwrap()];
        image.as_file().unwrap().read_exact_at(&mut bytes, 0).unwrap();
        bytes.chunks(4096).map(|page| u64::from_le_bytes(page[..8].try_into().unwrap())).collect()
    }

    #[tokio::test]
    async fn pages_of_several_rounds_are_brought_together_once_and_their_layers_given_back() {
        let store = store(64 << 20);
        let flat = two_rounds(&store);
        let key = whole(&store, &flat);
        drop(flat);
        let used = store.quota().used();
        let scattered = store.held_images(key).unwrap()["pages-1.img"].clone();
        assert!(scattered.as_file().is_none());
        // Who asked for pages, and does no more, holds none of them.
        drop(store.flat_of(key).await.unwrap());
        let files = store.files(key).await.unwrap();
        let expected: Vec<u64> =
            (0..600).map(|page| if page % 3 == 0 { 10_000 + page } else { page }).collect();
        assert_eq!(numbers(&files["pages-1.img"]), expected);
        assert_eq!(store.quota().used(), used + 600 * PAGE, "a restore reads the layers still");
        drop(scattered);
        assert_eq!(store.quota().used(), used);
        let again = store.files(key).await.unwrap();
        assert!(Rc::ptr_eq(&again["pages-1.img"], &files["pages-1.img"]));
    }

    #[tokio::test]
    async fn a_view_that_is_to_come_is_prepared_and_whoever_asks_meanwhile_waits_for_it() {
        // Room for one copy, and not for two.
        let store = store((600 + 200 + 600 + 100) * PAGE);
        let key = whole(&store, &two_rounds(&store));
        store.prepare_view(key).await;
        assert!(
            store.held_images(key).unwrap()["pages-1.img"].as_file().is_none(),
            "nobody will ask"
        );
        store.update(key, |snapshot| snapshot.needs_view = Some("rules".to_owned()));
        let ((), files) = tokio::join!(store.prepare_view(key), store.files(key));
        assert!(files.unwrap()["pages-1.img"].as_file().is_some());
    }

    #[tokio::test]
    async fn the_pages_of_images_are_told_once_and_not_kept_for_ever() {
        let store = store(64 << 20);
        let key = whole(&store, &two_rounds(&store));
        let used = store.quota().used();
        let known = || store.look(key, |snapshot| snapshot.pages.of_images.is_some()).unwrap();
        assert!(!known());
        let first = |flat: &Flat<Space>| std::ptr::from_ref(flat.space(&TASK).unwrap());
        let flat = store.flat_of(key).await.unwrap();
        assert_eq!(flat.space(&TASK).unwrap().pages(), 600);
        assert_eq!(first(&store.flat_of(key).await.unwrap()), first(&flat));
        let now = Instant::now();
        store.expire(now + Duration::from_secs(30));
        assert!(known());
        store.expire(now + Duration::from_secs(90));
        assert!(!known());
        assert_eq!(store.quota().used(), used);
        assert_ne!(first(&store.flat_of(key).await.unwrap()), first(&flat));
        drop(flat);
        store.drop_snapshot("web");
        assert_eq!(store.quota().used(), 0);
        assert_eq!(store.flat_of(key).await.unwrap_err(), "it was dropped");
    }

    #[tokio::test]
    async fn pages_that_are_one_file_stay_where_they_are() {
        let store = store(64 << 20);
        let mut round = Round::new(None);
        add(&store, &mut round, 0, 3, 1);
        add(&store, &mut round, 7, 2, 4);
        let key = whole(&store, &round.commit().unwrap());
        let image = store.held_images(key).unwrap()["pages-1.img"].clone();
        let files = store.files(key).await.unwrap();
        assert!(Rc::ptr_eq(&image, &files["pages-1.img"]));
        assert_eq!(numbers(&image), [1, 2, 3, 4, 5]);
    }

    #[tokio::test]
    async fn others_have_their_turn_and_one_that_is_dropped_meanwhile_is_not_there() {
        let store = store(64 << 20);
        let key = whole(&store, &two_rounds(&store));
        let dropping = async {
            store.drop_snapshot("web");
        };
        let (files, ()) = tokio::join!(store.files(key), dropping);
        assert_eq!(files.unwrap_err().to_string(), "it is not whole");
        assert_eq!(store.quota().used(), 0);
    }

    #[tokio::test]
    async fn without_room_for_both_it_is_refused_and_stays_as_it_was() {
        let store = store(1000 * PAGE);
        let key = whole(&store, &two_rounds(&store));
        let used = store.quota().used();
        let refused = store.files(key).await.unwrap_err().to_string();
        let said = "the pages of image pages-1.img cannot be brought together: quota exhausted";
        assert!(refused.starts_with(said), "{refused}");
        assert_eq!(store.quota().used(), used);
    }
}
