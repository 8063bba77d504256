use super::*;

use std::io::Write;

/// An image with one empty record, as CRIU begins them all.
const RECORDS: &[u8] = b"\x19\x43\x56\x54\x16\x31\x31\x58\x00\x00\x00\x00";

const AGAIN: Permission = Permission { again: true, copy: false };
const COPY: Permission = Permission { again: false, copy: true };

fn store(max_bytes: u64) -> Rc<Store> {
    let quota_wait = Duration::from_millis(50);
    Store::new(StoreSettings { max_bytes, quota_wait, ..StoreSettings::default() })
}

fn from(name: &str) -> Sender {
    Sender { name: name.to_owned(), host: None, attempt: 0 }
}

async fn add(store: &Store, key: Key, name: &str, bytes: &[u8]) -> Result<(), Exhausted> {
    let image = store.begin_image(key, name, false).unwrap();
    store.charge(key, &image, bytes.len() as u64).await?;
    image.file().write_all(bytes).unwrap();
    image.grown_to(bytes.len() as u64);
    image.end();
    Ok(())
}

async fn whole(store: &Rc<Store>, id: &str) -> Key {
    let key = store.begin(id, &from("a")).unwrap();
    add(store, key, "inventory.img", RECORDS).await.unwrap();
    store.complete(key, false).await.unwrap();
    key
}

fn state(store: &Store, id: &str) -> &'static str {
    let name = |snapshot: &Snapshot| match snapshot.state {
        State::Awaited => "awaited",
        State::Paged => "paged",
        State::Receiving(_) => "receiving",
        State::Whole(_) => "whole",
        State::Taken(_) => "taken",
        State::Damaged { .. } => "damaged",
    };
    store.find(id, name).unwrap_or("gone")
}

fn reason(store: &Store, id: &str) -> String {
    let reason = |snapshot: &Snapshot| match &snapshot.state {
        State::Damaged { reason, .. } => reason.clone(),
        other => panic!("{other:?}"),
    };
    store.find(id, reason).unwrap()
}

#[tokio::test]
async fn snapshots_that_are_begun_and_given_up_do_not_fill_the_list() {
    let store = store(1 << 20);
    let elsewhere = Sender { host: Some("192.0.2.1".parse().unwrap()), ..from("b") };
    store.fail(store.begin("another host's", &elsewhere).unwrap(), "torn");
    let begun = store.begin("with an image", &from("a")).unwrap();
    add(&store, begun, "core-7.img", RECORDS).await.unwrap();
    store.fail(begun, "torn");
    let awaited = store.begin("awaited", &from("a")).unwrap();
    store.fail(awaited, "torn");
    let _restore = store.claim(awaited, Permission::default()).unwrap();
    for number in 0..5000 {
        store.fail(store.begin(&number.to_string(), &from("a")).unwrap(), "never mind");
    }
    for kept in ["another host's", "with an image", "awaited", "4999", "4984"] {
        assert_eq!(state(&store, kept), "damaged", "{kept}");
    }
    assert_eq!((state(&store, "0"), state(&store, "4983")), ("gone", "gone"));
}

#[tokio::test]
async fn a_task_with_memory_and_no_pages_damages_its_snapshot() {
    let store = store(1 << 20);
    for (id, pagemap, whole) in [("web", "pagemap-8.img", false), ("db", "pagemap-7.img", true)] {
        let key = store.begin(id, &from("a")).unwrap();
        add(&store, key, "mm-7.img", RECORDS).await.unwrap();
        add(&store, key, pagemap, RECORDS).await.unwrap();
        add(&store, key, "inventory.img", RECORDS).await.unwrap();
        assert_eq!(store.complete(key, false).await.is_ok(), whole);
    }
    assert!(reason(&store, "web").starts_with("there are no pages of task 7"));
}

#[tokio::test]
async fn a_set_without_an_inventory_is_damaged_and_gives_its_bytes_back() {
    let store = store(1 << 20);
    let key = store.begin("web", &from("a")).unwrap();
    add(&store, key, "pages-1.img", &[7; 9000]).await.unwrap();
    assert_eq!(store.quota().used(), 12288);
    store.complete(key, false).await.unwrap_err();
    assert_eq!(reason(&store, "web"), "there is no inventory.img: the dump did not succeed");
    assert_eq!(store.quota().used(), 0);
    let counts = store.find("web", Snapshot::counts).unwrap();
    assert_eq!(counts, Counts { images: 1, bytes: 9000 });
}

#[tokio::test]
async fn an_image_cut_short_or_not_ended_damages_its_snapshot() {
    let store = store(1 << 20);
    for (name, bytes, expected) in [
        ("core-7.img", &RECORDS[..10], "image core-7.img is cut short"),
        ("inventory.img", &RECORDS[..8], "image inventory.img is cut short: it has no record"),
        ("inventory.img", &RECORDS[..3], "image inventory.img is cut short: it ends within"),
    ] {
        let key = store.begin("web", &from("a")).unwrap();
        add(&store, key, "inventory.img", RECORDS).await.unwrap();
        add(&store, key, name, bytes).await.unwrap();
        let said = store.complete(key, false).await.unwrap_err();
        assert!(said.starts_with(expected), "{said}");
    }
    let key = store.begin("web", &from("a")).unwrap();
    add(&store, key, "inventory.img", RECORDS).await.unwrap();
    store.begin_image(key, "core-7.img", false).unwrap();
    assert_eq!(store.complete(key, false).await.unwrap_err(), "image core-7.img has not ended");
}

#[tokio::test]
async fn a_restore_waits_until_its_snapshot_is_whole() {
    let store = store(1 << 20);
    let key = store.begin("web", &from("a")).unwrap();
    let claim = store.claim_oldest().unwrap();
    assert!(store.claim_oldest().is_none(), "another restore waits for another snapshot");
    let early = tokio::time::timeout(Duration::from_millis(20), claim.images()).await;
    assert!(early.is_err());
    add(&store, key, "inventory.img", RECORDS).await.unwrap();
    store.complete(key, false).await.unwrap();
    assert_eq!(claim.images().await.unwrap().len(), 1);
    claim.taken();
    assert_eq!(state(&store, "web"), "taken");
}

#[tokio::test]
async fn a_damaged_snapshot_is_refused_at_once_and_a_dropped_one_too() {
    let store = store(1 << 20);
    let key = store.begin("web", &from("a")).unwrap();
    let claim = store.claim_oldest().unwrap();
    store.fail(key, "the link broke");
    let refused = claim.images().await.unwrap_err().to_string();
    assert_eq!(refused, "snapshot web is damaged: the link broke");
    store.drop_snapshot("web");
    assert_eq!(claim.images().await.unwrap_err(), Unavailable::Dropped);
}

#[tokio::test]
async fn restores_take_the_oldest_first_and_each_its_own() {
    let store = store(1 << 20);
    whole(&store, "one").await;
    whole(&store, "two").await;
    let (first, second) = (store.claim_oldest().unwrap(), store.claim_oldest().unwrap());
    assert_eq!((first.id().unwrap(), second.id().unwrap()), ("one".into(), "two".into()));
    drop(first);
    let again = store.claim_oldest().unwrap();
    assert_eq!(again.id().unwrap(), "one", "a restore that read nothing leaves its snapshot");
}

#[tokio::test]
async fn an_id_in_use_is_refused_and_a_spent_one_is_used_again() {
    let store = store(1 << 20);
    let key = store.begin("web", &from("a")).unwrap();
    assert_eq!(store.begin("web", &from("b")), Err(Refused::UnderWay("web".into())));
    store.fail(key, "torn");
    whole(&store, "web").await;
    assert_eq!(store.begin("web", &from("b")), Err(Refused::Exists("web".into())));
    store.claim_oldest().unwrap().taken();
    assert!(store.begin("web", &from("b")).is_ok());
}

#[tokio::test]
async fn an_awaited_snapshot_becomes_the_one_that_comes() {
    let store = store(1 << 20);
    let key = store.expect("web", Permission::default()).unwrap();
    assert_eq!(state(&store, "web"), "awaited");
    store.reserve(key);
    assert_eq!(whole(&store, "web").await, key);
    assert!(store.claim_oldest().is_none(), "what is asked for by name is not another's");
    let claim = store.claim(key, Permission::default()).unwrap();
    assert_eq!(claim.images().await.unwrap().len(), 1);
}

#[tokio::test]
async fn what_nobody_waits_for_any_more_is_not_listed_unless_something_of_it_has_come() {
    let store = store(1 << 20);
    let listed = || store.key_of("web").is_some();
    let key = store.expect("web", Permission::default()).unwrap();
    let (first, copy) =
        (store.claim(key, Permission::default()).unwrap(), store.claim(key, COPY).unwrap());
    drop(first);
    assert!(listed(), "another waits");
    drop(copy);
    assert!(!listed());

    let key = store.expect("web", Permission::default()).unwrap();
    let directory = store.open_directory(key);
    drop(store.claim(key, Permission::default()).unwrap());
    assert!(listed(), "another CRIU may come to the directory");
    let waits = store.claim(key, Permission::default()).unwrap();
    drop(directory);
    assert!(listed());
    whole(&store, "web").await;
    drop(waits);
    assert_eq!(state(&store, "web"), "whole");
}

#[test]
fn a_sender_is_known_by_its_address_and_not_by_what_it_calls_itself() {
    for (name, address) in [
        ("host-a (192.0.2.7:41442)", "192.0.2.7:41442"),
        ("x (203.0.113.1:1) ([2001:db8::1]:1)", "[2001:db8::1]:1"),
        ("host-a (unix socket)", "unix socket"),
    ] {
        assert_eq!(from(name).address(), address);
    }
}

#[tokio::test]
async fn what_was_taken_or_damaged_expires_as_configured() {
    let store = store(1 << 20);
    let later = |seconds| Instant::now() + Duration::from_secs(seconds);
    whole(&store, "web").await;
    assert!(store.expire(later(1_000_000)).is_empty(), "what nobody took stays");
    store.claim_oldest().unwrap().taken();
    assert!(store.expire(later(9 * 60)).is_empty());
    let taken = ("web".to_owned(), from("a"), "it was taken, and store.keep is over");
    assert_eq!(store.expire(later(11 * 60)), std::slice::from_ref(&taken));
    assert_eq!(store.quota().used(), 0);

    store.configure(StoreSettings { keep: Keep::Taken, ..store.settings() });
    whole(&store, "web").await;
    let claim = store.claim_oldest().unwrap();
    claim.taken();
    assert!(store.expire(later(2)).is_empty(), "not while the restore reads");
    drop(claim);
    assert_eq!(store.expire(later(2)), [taken]);

    let key = store.begin("db", &from("a")).unwrap();
    store.fail(key, "torn");
    assert!(store.expire(later(10)).is_empty());
    let damaged = ("db".to_owned(), from("a"), "it is damaged, and store.keep-damaged is over");
    assert_eq!(store.expire(later(3601)), [damaged]);
}

#[tokio::test]
async fn the_sender_waits_at_the_quota_until_bytes_are_freed() {
    let store = store(16384);
    whole(&store, "old").await;
    let key = store.begin("new", &from("a")).unwrap();
    let image = store.begin_image(key, "pages-1.img", false).unwrap();
    let free = async {
        tokio::time::sleep(Duration::from_millis(10)).await;
        assert!(store.quota().is_reached());
        store.drop_snapshot("old");
    };
    let (charged, ()) = tokio::join!(store.charge(key, &image, 16384), free);
    charged.unwrap();
    assert_eq!(store.quota().used(), 16384);
    assert!(!store.quota().is_reached());
}

#[tokio::test]
async fn the_quota_is_exhausted_after_a_while_or_at_once_when_nothing_can_help() {
    let store = store(16384);
    whole(&store, "old").await;
    let key = store.begin("new", &from("a")).unwrap();
    let image = store.begin_image(key, "pages-1.img", false).unwrap();
    let late = store.charge(key, &image, 16384).await.unwrap_err();
    assert_eq!(
        late.to_string(),
        "quota exhausted: 4096 of 16384 bytes (store.max-bytes) were held for 50ms"
    );
    let never = store.charge(key, &image, 16385).await.unwrap_err();
    assert_eq!(never, Exhausted::Never { limit: 16384 });
    assert_eq!(store.quota().used(), 4096);
}

#[tokio::test]
async fn the_list_has_an_end() {
    let store = Store::new(StoreSettings { max_snapshots: 1, ..StoreSettings::default() });
    let key = store.begin("one", &from("a")).unwrap();
    assert_eq!(store.begin("two", &from("a")), Err(Refused::TooMany(1)));
    store.fail(key, "torn");
    assert!(store.begin("one", &from("a")).is_ok(), "a spent entry makes room for its id");
}

#[tokio::test]
async fn what_was_taken_is_not_given_to_one_who_awaits_another() {
    let store = store(1 << 20);
    whole(&store, "web").await;
    store.claim_oldest().unwrap().taken();
    let refused = store.expect("web", Permission::default());
    assert_eq!(refused, Err(Refused::Taken("web".into())));
    let key = store.expect("web", AGAIN).unwrap();
    let refused = store.claim(key, Permission::default()).unwrap_err();
    assert_eq!(refused, Unavailable::Taken("web".into()));
    assert_eq!(store.claim(key, AGAIN).unwrap().images().await.unwrap().len(), 1);
}

#[tokio::test]
async fn one_restore_gets_a_snapshot_unless_another_is_asked_for_as_a_copy() {
    let store = store(1 << 20);
    let key = store.expect("web", Permission::default()).unwrap();
    let first = store.claim(key, Permission::default()).unwrap();
    for permission in [Permission::default(), AGAIN] {
        let refused = store.claim(key, permission).unwrap_err();
        assert_eq!(refused, Unavailable::Claimed("web".into()), "also while it is awaited");
    }
    let copy = store.claim(key, COPY).unwrap();
    assert_eq!(whole(&store, "web").await, key);
    first.taken();
    drop((first, copy));
    let refused = store.claim(key, Permission::default()).unwrap_err();
    assert_eq!(refused, Unavailable::Taken("web".into()));
    store.claim(key, COPY).unwrap().failed();
    assert_eq!(state(&store, "web"), "taken", "the first one runs");
}

#[tokio::test]
async fn a_restore_that_failed_leaves_its_snapshot_as_it_was() {
    let store = store(1 << 20);
    let key = whole(&store, "web").await;
    store.claim(key, Permission::default()).unwrap().failed();
    assert_eq!(state(&store, "web"), "whole");
    let claim = store.claim(key, Permission::default()).unwrap();
    claim.taken();
    drop(claim);
    // The process of the first one may run, whatever becomes of another.
    let taken = Instant::now();
    store.claim(key, AGAIN).unwrap().failed();
    assert_eq!(state(&store, "web"), "taken");
    let refused = store.claim(key, Permission::default()).unwrap_err();
    assert_eq!(refused, Unavailable::Taken("web".into()));
    assert!(store.expire(taken + Duration::from_secs(600)).is_empty(), "it is kept as long again");
    assert!(store.claim(key, AGAIN).is_ok());
}

#[tokio::test]
async fn what_is_not_here_cannot_be_restored_again() {
    let store = store(1 << 20);
    assert_eq!(store.expect("web", AGAIN), Err(Refused::Gone("web".into())));
    store.expect("web", Permission::default()).unwrap();
    assert_eq!(store.expect("web", AGAIN), Err(Refused::Gone("web".into())), "it is awaited");
    whole(&store, "web").await;
    assert!(store.expect("web", AGAIN).is_ok());
    store.drop_snapshot("web");
    assert_eq!(store.expect("web", AGAIN), Err(Refused::Gone("web".into())));
}

#[tokio::test]
async fn a_look_at_a_snapshot_keeps_no_restore_away() {
    let store = store(1 << 20);
    let key = whole(&store, "web").await;
    let look = store.peek(key);
    assert_eq!(look.images().await.unwrap().len(), 1);
    assert_eq!(store.claim_oldest().unwrap().id().unwrap(), "web");
}

#[tokio::test]
async fn an_empty_image_is_charged_for_too() {
    let store = store(1 << 20);
    let key = store.begin("web", &from("a")).unwrap();
    let image = store.begin_image(key, "a.img", false).unwrap();
    store.charge(key, &image, 0).await.unwrap();
    assert_eq!(store.quota().used(), 4096);
    store.charge(key, &image, 100).await.unwrap();
    assert_eq!(store.quota().used(), 4096);
}

#[tokio::test]
async fn an_image_that_is_appended_to_goes_on_and_one_that_is_written_again_begins_anew() {
    let store = store(1 << 20);
    let key = store.begin("web", &from("a")).unwrap();
    add(&store, key, "a.img", b"one").await.unwrap();
    let image = store.begin_image(key, "a.img", true).unwrap();
    assert_eq!((image.len(), image.is_whole()), (3, false));
    assert_eq!(store.complete(key, true).await.unwrap_err(), "image a.img has not ended");

    let key = store.begin("web", &from("a")).unwrap();
    add(&store, key, "a.img", b"one").await.unwrap();
    assert_eq!(store.begin_image(key, "a.img", false).unwrap().len(), 0);
    assert_eq!(store.begin_image(key, "new.img", true).unwrap().len(), 0);
}

#[tokio::test]
async fn a_partial_snapshot_needs_no_inventory() {
    let store = store(1 << 20);
    let key = store.begin("1", &from("a")).unwrap();
    add(&store, key, "pages-1.img", &[7; 9000]).await.unwrap();
    store.complete(key, true).await.unwrap();
    assert_eq!(state(&store, "1"), "whole");
}

#[tokio::test]
async fn a_restore_takes_the_parents_too_and_they_leave_the_list() {
    let store = store(1 << 20);
    for id in ["1", "2", "3"] {
        let key = whole(&store, id).await;
        store.append_to_list(key, "web").unwrap();
    }
    assert_eq!(store.list_ids("web"), ["1", "2", "3"]);
    assert_eq!(store.restored("2").unwrap(), ["1", "2"]);
    assert_eq!(
        [state(&store, "1"), state(&store, "2"), state(&store, "3")],
        ["taken", "taken", "whole"]
    );
    assert_eq!(store.list_ids("web"), ["3"]);
    assert_eq!((store.restored("2"), store.restored("none")), (None, None));
    store.drop_snapshot("3");
    assert!(store.list_ids("web").is_empty());
}

#[tokio::test]
async fn the_lists_are_bounded() {
    let limits = StoreSettings { max_snapshots: 2, ..StoreSettings::default() };
    let store = Store::new(limits);
    let key = store.begin("1", &from("a")).unwrap();
    for list in ["a", "b"] {
        store.append_to_list(key, list).unwrap();
    }
    assert_eq!(store.append_to_list(key, "c"), Err(Refused::ListsTooLong(2)));
}

/// How long this thread has computed: what others on the machine do is not in it.
fn computed() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    time.try_into().unwrap()
}

/// Does something while others want their turn; returns the longest time that was computed without any, and what
/// came of it.
async fn longest_wait<T>(work: impl Future<Output = T>) -> (Duration, T) {
    let (longest, seen) = (Rc::new(Cell::new(Duration::ZERO)), Cell::new(computed()));
    let told = longest.clone();
    let tasks = tokio::task::LocalSet::new();
    let _releasing = tasks.spawn_local(pages::release_in_turns());
    let _ticking = tasks.spawn_local(async move {
        loop {
            let now = computed();
            told.set(told.get().max(now.saturating_sub(seen.replace(now))));
            tokio::task::yield_now().await;
        }
    });
    let done = tasks.run_until(work).await;
    (longest.get(), done)
}

/// An image whose bytes need not be there.
async fn add_sparse(store: &Store, key: Key, name: &str, len: u64) {
    let image = store.begin_image(key, name, false).unwrap();
    store.charge(key, &image, len).await.unwrap();
    image.file().set_len(len).unwrap();
    image.grown_to(len);
    image.end();
}

/// A pagemap of so many pages, of which the odd ones are in the parent if there is one.
fn pagemap(pages: u64, has_parent: bool) -> Vec<u8> {
    use crate::criu::pagemap::Pagemap;
    use crate::criu::pages::{Contents, Run};
    let mut pagemap = Pagemap::new(1);
    let mut push = |page: u64, count, contents| {
        pagemap.push(Run::new(page * pages::PAGE, count, contents).unwrap());
    };
    let present = Contents::Present { lazy: false };
    if has_parent {
        for page in (0..pages).step_by(2) {
            push(page, 1, present);
            push(page + 1, 1, Contents::Parent);
        }
    } else {
        push(0, pages, present);
    }
    pagemap.encode()
}

/// Some times what was seen; 0.1.0 stands still for seconds.
const TURN: Duration = Duration::from_millis(10);

#[tokio::test]
async fn others_have_their_turn_while_images_get_the_pages_of_a_parent_that_they_cut_to_pieces() {
    const PAGES: u64 = 1 << 17;
    let store = store(u64::MAX);
    let pagemaps = [pagemap(PAGES, false), pagemap(PAGES, true)];
    let (longest, ()) = longest_wait(async {
        let ids = [("web/1", None), ("web/2", Some("web/1"))];
        for ((id, parent), pagemap) in ids.into_iter().zip(pagemaps) {
            let key = store.begin(id, &from("a")).unwrap();
            let has = if parent.is_some() { PAGES / 2 } else { PAGES };
            add(&store, key, "pagemap-7.img", &pagemap).await.unwrap();
            add_sparse(&store, key, "pages-1.img", has * pages::PAGE).await;
            if let Some(parent) = parent {
                store.set_parent(key, parent).await.unwrap();
            }
            store.complete(key, true).await.unwrap();
        }
        assert_eq!(store.flat_of(store.key_of("web/2").unwrap()).await.unwrap().pages(), PAGES);
        store.drop_snapshot("web/1");
        store.drop_snapshot("web/2");
        // They are charged for until they have been let go.
        while store.quota().used() > 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert!(longest < TURN, "{longest:?}");
}

#[tokio::test]
async fn others_have_their_turn_while_records_are_counted() {
    let store = store(u64::MAX);
    let key = store.begin("web", &from("a")).unwrap();
    add(&store, key, "inventory.img", RECORDS).await.unwrap();
    let image = store.begin_image(key, "core-7.img", false).unwrap();
    image.file().write_all(&RECORDS[..8]).unwrap();
    // Zeros are empty records.
    image.file().set_len(256 << 20).unwrap();
    image.grown_to(256 << 20);
    image.end();
    let (longest, whole) = longest_wait(store.complete(key, false)).await;
    assert!(whole.is_ok() && longest < TURN, "{longest:?}");
}

#[tokio::test]
async fn others_have_their_turn_while_many_small_images_are_written_down() {
    let store = store(u64::MAX);
    let key = store.begin("web", &from("a")).unwrap();
    for image in 0..800 {
        add(&store, key, &format!("sk-queues-{image}.img"), &vec![1; 60 << 10]).await.unwrap();
    }
    let (longest, kept) = longest_wait(async {
        store.complete(key, true).await.unwrap();
        let kept = store.keep(key, |_| unreachable!()).await.unwrap().unwrap();
        kept.write().await
    })
    .await;
    assert!(kept.is_ok() && longest < TURN, "{longest:?}");
}

/// A snapshot of an attempt to move a process, whole.
async fn moved(store: &Rc<Store>, id: &str, attempt: u64) -> Key {
    let key = store.begin(id, &Sender { attempt, ..from("a") }).unwrap();
    add(store, key, "inventory.img", RECORDS).await.unwrap();
    store.complete(key, false).await.unwrap();
    key
}

#[tokio::test]
async fn what_its_source_withdraws_is_not_restored_and_who_waits_for_it_is_told() {
    let store = store(1 << 20);
    let claim = store
        .claim(store.expect("web", Permission::default()).unwrap(), Permission::default())
        .unwrap();
    assert_eq!(store.withdraw("web", None, 7, "criu failed"), Withdrawn::Unknown);
    assert!(claim.images().await.unwrap_err().to_string().contains("criu failed"));
    drop(claim);

    let late = store.begin("web", &Sender { attempt: 7, ..from("a") });
    assert_eq!(late, Err(Refused::Withdrawn("web".into())), "it was still on its way");
    moved(&store, "web", 8).await;
    assert_eq!(store.withdraw("web", None, 8, "it failed"), Withdrawn::Withdrawn);
    assert_eq!((state(&store, "web"), store.quota().used()), ("damaged", 0));
    assert_eq!(store.withdraw("web", None, 8, "again"), Withdrawn::Withdrawn);

    // The next restore waits for the next attempt.
    store.expect("web", Permission::default()).unwrap();
    assert_eq!(state(&store, "web"), "awaited");
}

#[tokio::test]
async fn only_its_own_source_withdraws_an_attempt_and_not_once_a_restore_has_it() {
    let store = store(1 << 20);
    let key = moved(&store, "web", 7).await;
    let elsewhere = Some([192, 0, 2, 7].into());
    for (host, attempt) in [(None, 8), (elsewhere, 7), (None, 0)] {
        assert_eq!(store.withdraw("web", host, attempt, "no"), Withdrawn::Unknown);
        assert_eq!(state(&store, "web"), "whole");
    }
    let claim = store.claim(key, Permission::default()).unwrap();
    assert_eq!(store.withdraw("web", None, 7, "late"), Withdrawn::Taken);
    claim.taken();
    drop(claim);
    assert_eq!(store.withdraw("web", None, 7, "late"), Withdrawn::Taken);
    assert_eq!(state(&store, "web"), "taken");
}
