use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use super::*;
use crate::config::StoreSettings;
use crate::criu::pages::Space;
use crate::store::flat_images::flat_images;
use crate::store::pages::Round;
use crate::store::{Permission, Refused};
use crate::sys::memfd;

/// An image with one empty record, as CRIU begins them all.
const RECORDS: &[u8] = b"\x19\x43\x56\x54\x16\x31\x31\x58\x00\x00\x00\x00";
const TASK: Space = Space::Task(7);

fn store() -> Rc<Store> {
    Store::new(StoreSettings { max_bytes: 1 << 30, ..StoreSettings::default() })
}

fn sender() -> Sender {
    Sender { name: "host-a".to_owned(), host: Some([192, 0, 2, 7].into()), attempt: 7 }
}

async fn add(store: &Store, key: Key, name: &str, bytes: &[u8]) {
    let image = store.begin_image(key, name, false).unwrap();
    store.charge(key, &image, bytes.len() as u64).await.unwrap();
    image.file().write_all_at(bytes, 0).unwrap();
    image.grown_to(bytes.len() as u64);
    image.end();
}

/// Bytes that are like no others, nor like themselves elsewhere.
fn bytes(len: u64, seed: u64) -> Vec<u8> {
    (0..len.div_ceil(8))
        .flat_map(|word| (word * 0x9e37_79b9 + seed).to_le_bytes())
        .take(usize::try_from(len).unwrap())
        .collect()
}

async fn whole(store: &Rc<Store>, id: &str, images: &[(&str, Vec<u8>)]) -> Key {
    let key = store.begin(id, &sender()).unwrap();
    add(store, key, "inventory.img", RECORDS).await;
    for (name, bytes) in images {
        add(store, key, name, bytes).await;
    }
    store.complete(key, false).await.unwrap();
    key
}

/// Pages that came in two rounds: of 64 every third came again.
fn two_rounds(store: &Store) -> Images {
    let add = |round: &mut Round<Space>, page: u64, count: u64, seed: u64| {
        let range = PageRange::new(page * PAGE, count).unwrap();
        let charge = store.quota().charge_now(range.bytes()).unwrap();
        let place = round.accept(&TASK, range, 4, charge).unwrap();
        place.layer().file().write_all_at(&bytes(range.bytes(), seed), place.offset()).unwrap();
        round.filled(place);
    };
    let mut round = Round::new(None);
    add(&mut round, 0, 64, 1);
    let mut next = Round::new(Some(round.commit().unwrap()));
    for page in (0..63).step_by(3) {
        add(&mut next, page, 1, page + 100);
        next.inherit(&TASK, PageRange::new((page + 1) * PAGE, 2).unwrap()).unwrap();
    }
    next.inherit(&TASK, PageRange::new(63 * PAGE, 1).unwrap()).unwrap();
    let mut images = Images::new();
    at_once(flat_images(&next.commit().unwrap(), &mut images, store.quota())).unwrap();
    images
}

fn content(image: &Image) -> Vec<u8> {
    let mut content = Vec::new();
    while let Some(part) = image.part(content.len() as u64, u64::MAX) {
        let mut bytes = vec![0; usize::try_from(part.len).unwrap()];
        part.file.read_exact_at(&mut bytes, part.offset).unwrap();
        content.extend(bytes);
    }
    content
}

fn contents(store: &Store, id: &str) -> BTreeMap<String, Vec<u8>> {
    let images = store.find(id, |snapshot| snapshot.images().unwrap().clone()).unwrap();
    images.iter().map(|(name, image)| (name.clone(), content(image))).collect()
}

/// What somebody keeps of snapshots: their records, and their files by names of its own.
#[derive(Default)]
struct Keeper {
    records: Vec<Rc<File>>,
    files: Files,
}

impl Keeper {
    async fn keep(&mut self, store: &Store, key: Key) {
        let files = &mut self.files;
        let kept = store.keep(key, |file| {
            let known = files.iter().find(|(_, known)| Rc::ptr_eq(known, file));
            let name =
                known.map_or_else(|| format!("image-{}", files.len()), |(name, _)| name.clone());
            files.insert(name.clone(), file.clone());
            name
        });
        let kept = kept.await.unwrap().unwrap();
        kept.write().await.unwrap();
        self.records.push(kept.record.shared_file().clone());
    }

    /// As it gets them after the cache: other descriptors of the same files.
    fn passed_on(&self) -> Files {
        let again = |file: &Rc<File>| Rc::new(file.try_clone().unwrap());
        self.files.iter().map(|(name, file)| (name.clone(), again(file))).collect()
    }

    fn again(&self, store: &Store) -> Vec<Result<Again, Lost>> {
        let again = |file: &Rc<File>| Rc::new(file.try_clone().unwrap());
        let records: Vec<_> = self.records.iter().map(again).collect();
        store.hold_again(&records, &self.passed_on())
    }
}

/// A copy of a record that says something else.
fn with_text(record: &File, change: impl FnOnce(&mut Text)) -> Rc<File> {
    let mut text = read_text(record).unwrap();
    change(&mut text);
    let mut head = [0; HEAD];
    record.read_exact_at(&mut head, 0).unwrap();
    let begin = u64::from_le_bytes(head[8..].try_into().unwrap());
    let mut bytes = vec![0; usize::try_from(begin).unwrap()];
    record.read_exact_at(&mut bytes, 0).unwrap();
    let copy: File = memfd::create("record").unwrap().into();
    let text = serde_json::to_vec(&text).unwrap();
    copy.write_all_at(&[bytes, text].concat(), 0).unwrap();
    Rc::new(copy)
}

#[tokio::test]
async fn what_is_held_again_is_what_was_kept() {
    let before = store();
    let images = [
        ("core-7.img", RECORDS.to_vec()),
        ("empty.img-not", Vec::new()),
        ("pages-1.img", bytes(100 * PAGE, 5)),
        ("pages-2.img", bytes(2 * PAGE, 6)),
        ("ghost-file-1.img", [RECORDS, &bytes(200_001, 7)].concat()),
    ];
    // Not what CRIU writes: its length is looked at all the same.
    let images: Vec<_> =
        images.into_iter().filter(|(name, _)| !name.starts_with("ghost")).collect();
    let web = whole(&before, "web", &images).await;
    let db = whole(&before, "db", &[]).await;
    before.append_to_list(web, "rack").unwrap();
    before.append_to_list(db, "rack").unwrap();
    before.reserve(db);
    let mut keeper = Keeper::default();
    // In an order of its own.
    keeper.keep(&before, db).await;
    keeper.keep(&before, web).await;
    assert_eq!(keeper.files.len(), 1, "all but one image are small");

    let after = store();
    let ids: Vec<_> = keeper.again(&after).into_iter().map(|again| again.unwrap().id).collect();
    assert_eq!(ids, ["db", "web"]);
    for id in ["web", "db"] {
        assert!(contents(&after, id) == contents(&before, id));
        let told = |store: &Store| {
            let told = |known: &Snapshot| {
                (known.sender.clone(), known.begun_ms, known.ended_ms, known.reserved)
            };
            store.find(id, told).unwrap()
        };
        assert_eq!(told(&after), told(&before), "{id}");
    }
    assert_eq!(after.list_ids("rack"), ["web", "db"]);
    // The oldest comes first again.
    assert_eq!(after.claim_oldest().unwrap().id().unwrap(), "web");
}

#[tokio::test]
async fn pages_of_several_rounds_are_held_where_they_are_and_shared() {
    let before = store();
    let key = before.begin("web", &sender()).unwrap();
    add(&before, key, "inventory.img", RECORDS).await;
    let pages = two_rounds(&before);
    before.update(key, |snapshot| {
        let State::Receiving(images) = &mut snapshot.state else { panic!() };
        Rc::make_mut(images).extend(pages);
    });
    before.complete(key, false).await.unwrap();
    let mut keeper = Keeper::default();
    keeper.keep(&before, key).await;
    assert_eq!(keeper.files.len(), 2, "the layers of two rounds");
    let expected = contents(&before, "web");
    let held: u64 = before.quota().used();

    // The same files for two: what one gives back the other still has.
    let after = store();
    let files = keeper.passed_on();
    let mut again = after.hold_again(&keeper.records, &files);
    again.pop().unwrap().unwrap();
    assert!(contents(&after, "web") == expected);
    assert_eq!(after.quota().used(), held, "each page is charged for once");
    assert!(after.files(after.key_of("web").unwrap()).await.is_ok());
    assert!(contents(&after, "web") == expected);
    after.drop_snapshot("web");
    assert_eq!(after.quota().used(), 0);
}

#[tokio::test]
async fn a_pages_image_stays_while_another_snapshot_shows_pages_of_it() {
    let before = store();
    let parent = whole(&before, "parent", &[("pages-1.img", bytes(32 * PAGE, 1))]).await;
    let child = whole(&before, "child", &[]).await;
    // As an incremental dump has them that was flattened.
    let shown =
        before.find("parent", |known| known.images().unwrap()["pages-1.img"].clone()).unwrap();
    let mut index = Index::default();
    shown.pages(8, 20).unwrap().into_iter().for_each(|run| index.append(run));
    let image = Image::of_pages("pages-1.img", &index, before.quota().nothing()).unwrap();
    let expected = content(&image);
    drop((shown, index));
    before.update(child, |snapshot| {
        let State::Whole(images) = &mut snapshot.state else { panic!() };
        Rc::make_mut(images).insert("pages-1.img".to_owned(), Rc::new(image));
    });
    let mut keeper = Keeper::default();
    keeper.keep(&before, parent).await;
    keeper.keep(&before, child).await;
    assert_eq!(keeper.files.len(), 1);

    // The parent is lost, and that is no loss for the child.
    let after = store();
    let good = keeper.records[0].clone();
    keeper.records[0] = with_text(&good, |text| {
        text.images[0].len += 9;
        text.images.reverse();
    });
    let again = keeper.again(&after);
    assert!(again[0].is_err() && again[1].is_ok());
    assert!(contents(&after, "child")["pages-1.img"] == expected);
    std::mem::forget(after);
    keeper.records[0] = good;

    let after = store();
    drop(keeper.again(&after));
    after.drop_snapshot("parent");
    assert!(contents(&after, "child")["pages-1.img"] == expected);
    after.drop_snapshot("child");
    assert_eq!(after.quota().used(), 0);
}

#[tokio::test]
async fn what_is_not_as_it_was_is_lost_with_a_reason_and_nothing_else() {
    let before = store();
    let key = whole(&before, "web", &[("pages-1.img", bytes(32 * PAGE, 1))]).await;
    let good = whole(&before, "db", &[]).await;
    let (mut kept, mut other) = (Keeper::default(), Keeper::default());
    kept.keep(&before, key).await;
    other.keep(&before, good).await;
    let text = |change: fn(&mut Text)| Keeper {
        records: vec![with_text(&kept.records[0], change)],
        files: kept.files.clone(),
    };
    let raw = |at: u64, bytes: &[u8]| {
        let keeper = text(|_| ());
        keeper.records[0].write_all_at(bytes, at).unwrap();
        keeper
    };
    let cut = |keeper: Keeper, len: u64| {
        keeper.records[0].set_len(len).unwrap();
        keeper
    };
    let nothing = |mut keeper: Keeper| {
        keeper.files.clear();
        keeper
    };
    let short = |keeper: Keeper| {
        let file = keeper.files.values().next().unwrap().try_clone().unwrap();
        let copy: File = memfd::create("short").unwrap().into();
        let mut all = vec![0; usize::try_from(31 * PAGE).unwrap()];
        file.read_exact_at(&mut all, 0).unwrap();
        copy.write_all_at(&all, 0).unwrap();
        let name = keeper.files.keys().next().unwrap().clone();
        Keeper { files: [(name, Rc::new(copy))].into(), ..keeper }
    };
    for (keeper, why) in [
        (raw(7, &[3]), "another version of this program wrote it"),
        (raw(8, &u64::MAX.to_le_bytes()), "it is cut short"),
        (raw(8, &[0; 8]), "its record cannot be read"),
        (cut(raw(0, b""), 5), "its record cannot be read"),
        (cut(raw(0, b""), 16), "its record cannot be read"),
        (nothing(raw(0, b"")), "image pages-1.img cannot be held again: image-0 was not kept"),
        (short(raw(0, b"")), "image pages-1.img cannot be held again: its bytes are not all there"),
        (text(|text| text.id = "a\0b".to_owned()), "its record is wrong: a bad snapshot id"),
        (
            text(|text| text.images[0].name = "../x".to_owned()),
            "its record is wrong: a bad image name",
        ),
        (text(|text| text.images[0].len += 9), "image inventory.img"),
        (text(|text| text.images[0].len = u64::MAX), "image inventory.img cannot be held again"),
        (
            text(|text| text.images[0].bytes = Place::Record(u64::MAX)),
            "image inventory.img cannot be held",
        ),
        (text(|text| text.images[1].len = u64::MAX), "its bytes are not all there"),
        (
            text(|text| text.images[1].bytes = Place::Pages(vec![("image-0".to_owned(), 1, 32)])),
            "its bytes are not all there",
        ),
        (
            text(|text| {
                text.images[1].bytes = Place::Pages(vec![("image-0".to_owned(), u64::MAX, 32)]);
            }),
            "its bytes are not all there",
        ),
        (
            text(|text| text.images[1].bytes = Place::Pages(vec![("image-0".to_owned(), 0, 0)])),
            "its bytes are not all there",
        ),
        (
            text(|text| (text.id, text.age) = ("db".to_owned(), u64::MAX)),
            "there is another of that id",
        ),
    ] {
        let mut keeper = keeper;
        keeper.records.insert(0, with_text(&other.records[0], |_| ()));
        let after = store();
        let mut again = keeper.again(&after);
        let lost = again.pop().unwrap().unwrap_err();
        assert!(lost.why.contains(why), "{why}: {lost:?}");
        assert!(again.pop().unwrap().is_ok(), "{why}");
        assert!(contents(&after, "db") == contents(&before, "db"));
        assert_eq!(after.restorable().len(), 1);
        after.drop_snapshot("db");
        assert_eq!(after.quota().used(), 0, "{why}");
    }
}

#[tokio::test]
async fn only_what_can_be_restored_is_kept() {
    let store = store();
    let key = store.begin("web", &sender()).unwrap();
    assert!(store.keep(key, |_| unreachable!()).await.is_none());
    assert!(store.restorable().is_empty());
    add(&store, key, "inventory.img", RECORDS).await;
    store.complete(key, false).await.unwrap();
    assert!(store.keep(key, |_| unreachable!()).await.unwrap().is_ok());
    store.claim(key, Permission::default()).unwrap().taken();
    assert!(store.keep(key, |_| unreachable!()).await.unwrap().is_ok());
    store.expire(std::time::Instant::now() + Duration::from_secs(3600));
    assert!(store.restorable().is_empty());
}

#[tokio::test]
async fn what_was_taken_is_held_again_as_that_for_the_rest_of_its_time() {
    let before = store();
    let key = before.begin("web", &sender()).unwrap();
    add(&before, key, "inventory.img", RECORDS).await;
    at_once(before.complete(key, false)).unwrap();
    let mut keeper = Keeper::default();
    keeper.keep(&before, key).await;
    before.claim(key, Permission::default()).unwrap().taken();
    keeper.keep(&before, key).await;
    assert!(Rc::ptr_eq(&keeper.records[0], &keeper.records[1]), "it says something else now");
    let mut head = [0; 8];
    keeper.records[0].read_exact_at(&mut head, 0).unwrap();
    assert_ne!(head, MAGIC, "a cache that does not know it must not hold it as whole");
    // As if it had been taken nine minutes ago.
    let record = with_text(&keeper.records[0], |text| *text.taken_ms.as_mut().unwrap() -= 540_000);

    let after = store();
    let again = after.hold_again(std::slice::from_ref(&record), &Files::new()).pop();
    assert!(again.unwrap().unwrap().taken);
    let refused = after.expect("web", Permission::default());
    assert_eq!(refused, Err(Refused::Taken("web".into())));
    assert!(after.claim_oldest().is_none());
    let again = Permission { again: true, copy: false };
    assert!(after.expect("web", again).is_ok());
    let later = |seconds| std::time::Instant::now() + Duration::from_secs(seconds);
    assert!(after.expire(later(50)).is_empty());
    assert_eq!(after.expire(later(61)).len(), 1, "store.keep goes on where it was");
}

#[tokio::test]
async fn small_images_are_held_once_and_kept_even_when_the_quota_is_reached() {
    const IMAGE: u64 = 60 * 1024;
    // Each record has a head, too.
    let quota = 30 * IMAGE + 2 * PAGE;
    let store = Store::new(StoreSettings { max_bytes: quota, ..StoreSettings::default() });
    let mut keeper = Keeper::default();
    let files = || std::fs::read_dir("/proc/self/fd").unwrap().map(|entry| entry.unwrap().path());
    let small = || {
        let names = files().filter_map(|path| std::fs::read_link(path).ok());
        names.filter(|name| name.to_string_lossy().contains("memfd:held-once")).count()
    };
    for snapshot in 0..3 {
        let key = store.begin(&format!("web/{snapshot}"), &Sender::default()).unwrap();
        for image in 0..10 {
            add(&store, key, &format!("held-once-{image}.img"), &bytes(IMAGE, snapshot)).await;
        }
        assert_eq!(small(), 10);
        store.complete(key, true).await.unwrap();
        assert_eq!(small(), 0, "they are in the record");
    }
    assert_eq!(store.quota().used(), quota + PAGE);
    for (key, ..) in store.restorable() {
        keeper.keep(&store, key).await;
    }
    let held: u64 =
        keeper.records.iter().map(|record| record.metadata().unwrap().blocks() * 512).sum();
    assert_eq!(store.quota().used(), held);
    assert!(held <= quota + 3 * PAGE, "what is said of them is little");

    // They are served from there after a restart as well.
    let after = Store::new(StoreSettings { max_bytes: quota, ..StoreSettings::default() });
    assert!(keeper.again(&after).iter().all(Result::is_ok));
    assert_eq!((after.quota().used(), small()), (held, 0));
    for snapshot in 0..3 {
        let id = format!("web/{snapshot}");
        assert!(contents(&after, &id) == contents(&store, &id));
        assert!(contents(&after, &id).values().all(|image| *image == bytes(IMAGE, snapshot)));
        after.drop_snapshot(&id);
    }
    assert_eq!(after.quota().used(), 0);
}

#[tokio::test]
async fn a_view_of_small_images_has_a_file_of_each_and_its_room_is_given_back_with_it() {
    let store = store();
    let images: Vec<_> =
        (1..4).map(|seed| (["a", "b", "c"][seed - 1], bytes(5000, seed as u64))).collect();
    let key = whole(&store, "web", &images).await;
    let used = store.quota().used();
    let files = store.files(key).await.unwrap();
    for (name, expected) in &images {
        let (file, mut seen) = (files[*name].as_file().unwrap(), vec![0; 5000]);
        assert_eq!(file.metadata().unwrap().len(), 5000);
        file.read_exact_at(&mut seen, 0).unwrap();
        assert!(seen == *expected);
    }
    assert_eq!(store.quota().used(), used + 4096 + 3 * 2 * 4096);
    drop(files);
    assert!(store.files(key).await.is_ok());
    assert_eq!(store.quota().used(), used + 4096 + 3 * 2 * 4096, "once");
    store.drop_snapshot("web");
    assert_eq!(store.quota().used(), 0);
}

#[tokio::test]
async fn a_record_that_is_written_again_gives_back_what_it_said_before() {
    let store = store();
    let names: Vec<_> = (0..200).map(|image| format!("sk-queues-{image}.img")).collect();
    let images: Vec<_> = names.iter().map(|name| (name.as_str(), RECORDS.to_vec())).collect();
    let key = whole(&store, "web", &images).await;
    let mut keeper = Keeper::default();
    keeper.keep(&store, key).await;
    let used = store.quota().used();
    for _ in 0..10 {
        keeper.keep(&store, key).await;
        // It begins and ends somewhere in a page.
        assert!(store.quota().used() <= used + 2 * PAGE);
    }
    let after = self::store();
    assert!(keeper.again(&after).remove(0).is_ok());
    assert!(contents(&after, "web") == contents(&store, "web"));
}

#[tokio::test]
async fn a_text_that_is_not_all_there_does_not_spoil_the_one_before_it() {
    let store = store();
    let key = whole(&store, "web", &[("pages-1.img", bytes(32 * PAGE, 1))]).await;
    let mut keeper = Keeper::default();
    keeper.keep(&store, key).await;
    let record = &keeper.records[0];
    record.write_all_at(b"{\"id\":\"we", record.metadata().unwrap().len()).unwrap();
    let after = self::store();
    assert!(keeper.again(&after).remove(0).is_ok());
    assert!(contents(&after, "web") == contents(&store, "web"));
}
