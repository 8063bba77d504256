//! Rounds of a snapshot's pages: they come one after the other, each as a whole or not at all.
//!
//! A round is based on the pages of the snapshot that is named as its parent: the snapshot itself, whose
//! rounds before it goes on from, or another. After one that failed there is nothing to be based on: CRIU has reset the kernel's
//! notes of what changed, whether or not its pages came.

use std::net::IpAddr;

use super::pages::{Flat, Round};
use super::quota::{Charge, Exhausted};
use super::snapshot::{Sender, Snapshot, State};
use super::{Key, Refused, Store, one_more};
use crate::criu::pages::Space;
use crate::timeline::PhaseName;

/// A round that is coming.
#[derive(Debug)]
pub struct ComingRound {
    /// Its snapshot.
    key: Key,
    /// Tells it from others of the same snapshot.
    number: u64,
    /// What takes its pages.
    pub round: Round<Space>,
}

impl ComingRound {
    /// Its snapshot.
    pub fn key(&self) -> Key {
        self.key
    }
}

/// What a snapshot's next round can be based on.
enum Base {
    /// On the parent that is named, if that is another.
    Other,
    /// A round has failed: on nothing.
    Nothing,
    /// On the rounds before as well.
    Own(Flat<Space>),
}

impl Store {
    /// A round of a snapshot's pages begins. One snapshot has one at a time. Returns also the page spaces
    /// that its parent has.
    ///
    /// Others have their turn while the pages of a parent are looked for in its images.
    pub async fn begin_round(
        &self,
        id: &str,
        sender: &Sender,
        parent: Option<&str>,
    ) -> Result<(ComingRound, Vec<Space>), Refused> {
        self.must_not_be_withdrawn(id, sender)?;
        let next = || self.find(id, |known| known.next_round(sender)).transpose();
        let of_other = match (next()?, parent) {
            (None | Some(Base::Own(_) | Base::Other), Some(parent)) if parent != id => {
                Some(self.pages_of(parent, sender.host).await?)
            }
            _ => None,
        };
        let known = next()?;
        let (parent, flat) = match (known.unwrap_or(Base::Other), parent) {
            (Base::Own(flat), Some(parent)) if parent == id => (None, Some(flat)),
            (Base::Own(_) | Base::Other, Some(parent)) if parent != id => {
                (self.key_of(parent), of_other)
            }
            _ => (None, None),
        };
        let key = match self.key_of(id) {
            Some(key) => key,
            None => self.list(Snapshot::new(id, sender, State::Paged))?,
        };
        let number = self.next_round.replace(self.next_round.get() + 1);
        self.update(key, |snapshot| snapshot.begin_round(number, sender, parent));
        let spaces = flat.iter().flat_map(Flat::spaces).map(|(space, _)| *space).collect();
        Ok((ComingRound { key, number, round: Round::new(flat) }, spaces))
    }

    /// Charges a round for pages, before they are accepted; waits for room.
    pub async fn charge_pages(
        &self,
        coming: &ComingRound,
        bytes: u64,
    ) -> Result<Charge, Exhausted> {
        let patience = self.settings.borrow().quota_wait;
        let held = || self.charged(coming.key) + coming.round.charged();
        self.quota.charge(bytes, held, patience).await
    }

    /// Whether a round is still wanted.
    pub fn is_paging(&self, coming: &ComingRound) -> bool {
        self.look(coming.key, |snapshot| snapshot.pages.coming == Some(coming.number)) == Some(true)
    }

    /// Everything of a round has come: its pages are the snapshot's. The error is why they are not, and
    /// those from before still are. A parent that had nothing but pages can be no use any more; it is
    /// dropped, and its id returned.
    pub fn complete_round(&self, coming: ComingRound) -> Result<Option<String>, String> {
        if !self.is_paging(&coming) {
            one_more(&self.tally.rounds_failed);
            return Err(Refused::Dropped.to_string());
        }
        let ComingRound { key, round, .. } = coming;
        let bytes = round.charged();
        let flat = round.commit().map_err(|refused| {
            let reason = refused.to_string();
            self.lose_round(key, &reason);
            reason
        })?;
        let mut parent = None;
        self.update(key, |snapshot| parent = snapshot.end_round(flat, bytes));
        one_more(&self.tally.rounds_held);
        let superseded = parent.and_then(|parent| {
            let only_pages = |known: &Snapshot| matches!(known.state, State::Paged);
            let id = self.look(parent, |known| only_pages(known).then(|| known.id.clone()))??;
            self.remove(&id, &self.tally.superseded).map(|_| id)
        });
        Ok(superseded)
    }

    /// A round will not be completed. The pages from before stay as they were, if the snapshot's images are
    /// not coming as well: those have lost their pages.
    pub fn fail_round(&self, coming: &ComingRound, reason: &str) {
        if self.is_paging(coming) {
            self.lose_round(coming.key, reason);
        }
    }

    fn lose_round(&self, key: Key, reason: &str) {
        one_more(&self.tally.rounds_failed);
        self.update(key, |snapshot| {
            snapshot.fail_round(reason);
            if matches!(snapshot.state, State::Damaged { .. }) {
                one_more(&self.tally.damaged);
            }
        });
        self.forget_empty(key);
    }

    /// Drops a snapshot that `host` sent and that has nothing but pages. Returns whether there was one.
    pub fn forget_pages(&self, id: &str, host: Option<IpAddr>) -> bool {
        let only_pages =
            |known: &Snapshot| matches!(known.state, State::Paged) && known.sender.host == host;
        self.find(id, only_pages) == Some(true) && self.drop_snapshot(id).is_some()
    }

    /// The pages of a snapshot that `host` sent.
    async fn pages_of(&self, id: &str, host: Option<IpAddr>) -> Result<Flat<Space>, Refused> {
        let sent = |key: &Key| self.look(*key, |known| known.sender.host == host) == Some(true);
        let pages = match self.key_of(id).filter(sent) {
            Some(key) => self.flat_of(key).await,
            None => Err("no such snapshot is held".to_owned()),
        };
        pages.map_err(|why| Refused::NoParent { parent: id.to_owned(), why })
    }

    /// The images of a snapshot that begins have pages in `parent`, see [`Store::complete`].
    pub async fn set_parent(&self, key: Key, parent: &str) -> Result<(), Refused> {
        let host = self.look(key, |snapshot| snapshot.sender.host).ok_or(Refused::Dropped)?;
        let flat = self.pages_of(parent, host).await?;
        let memory = self.find(parent, |parent| parent.memory).unwrap_or_default();
        self.update(key, |snapshot| {
            snapshot.pages.of_parent = Some(flat);
            snapshot.memory = memory;
        });
        Ok(())
    }
}

impl Snapshot {
    /// What a round that begins now would be based on; or why none can begin.
    fn next_round(&self, sender: &Sender) -> Result<Base, Refused> {
        let id = || self.id.clone();
        match &self.state {
            State::Paged | State::Receiving(_) => match &self.pages.flat {
                _ if self.sender.host != sender.host => Err(Refused::UnderWay(id())),
                _ if self.pages.coming.is_some() => Err(Refused::RoundUnderWay(id())),
                _ if self.pages.broken => Ok(Base::Nothing),
                Some(flat) => Ok(Base::Own(flat.clone())),
                None => Ok(Base::Other),
            },
            State::Whole(_) => Err(Refused::Exists(id())),
            State::Taken(_) if self.restores > 0 => Err(Refused::InUse(id())),
            State::Damaged { .. } => Ok(Base::Nothing),
            State::Awaited | State::Taken(_) => Ok(Base::Other),
        }
    }

    fn begin_round(&mut self, number: u64, sender: &Sender, parent: Option<Key>) {
        if !matches!(self.state, State::Paged | State::Receiving(_)) {
            self.begin(sender, State::Paged);
        }
        self.timeline.begin(PhaseName::Round);
        self.pages.coming = Some(number);
        self.pages.parent = parent;
    }

    /// Returns the parent that the round was based on.
    fn end_round(&mut self, flat: Flat<Space>, bytes: u64) -> Option<Key> {
        self.timeline.end(PhaseName::Round, bytes, false);
        self.pages.flat = Some(flat);
        (self.pages.coming, self.pages.broken) = (None, false);
        self.pages.parent.take()
    }

    fn fail_round(&mut self, reason: &str) {
        self.timeline.end(PhaseName::Round, 0, true);
        (self.pages.coming, self.pages.broken) = (None, true);
        let nothing_left = matches!(self.state, State::Paged) && self.pages.flat.is_none();
        if nothing_left || matches!(self.state, State::Receiving(_)) {
            self.fail(reason);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;
    use std::rc::Rc;

    use super::super::pages::{PAGE, PageRange};
    use super::*;
    use crate::config::StoreSettings;
    use crate::store::turns::at_once;

    const TASK: Space = Space::Task(7);

    fn store() -> Rc<Store> {
        Store::new(StoreSettings { max_bytes: 1 << 20, ..StoreSettings::default() })
    }

    fn sender() -> Sender {
        Sender { name: "a".to_owned(), host: None, attempt: 0 }
    }

    /// Brings pages, each filled with a byte.
    async fn bring(store: &Store, coming: &mut ComingRound, address: u64, bytes: &[u8]) {
        let range = PageRange::new(address, bytes.len() as u64).unwrap();
        let charge = store.charge_pages(coming, range.bytes()).await.unwrap();
        let place = coming.round.accept(&TASK, range, 4, charge).unwrap();
        for (page, byte) in bytes.iter().enumerate() {
            let at = place.offset() + page as u64 * PAGE;
            place.layer().file().write_all_at(&[*byte; 4096], at).unwrap();
        }
        coming.round.filled(place);
    }

    async fn round(store: &Store, id: &str, parent: Option<&str>, bytes: &[u8]) -> Option<String> {
        let (mut coming, _) = store.begin_round(id, &sender(), parent).await.unwrap();
        bring(store, &mut coming, 0x1000, bytes).await;
        store.complete_round(coming).unwrap()
    }

    fn state(store: &Store, id: &str) -> String {
        let state = store.find(id, |known| match &known.state {
            State::Paged => "paged".to_owned(),
            State::Damaged { reason, .. } => reason.clone(),
            other => format!("{other:?}"),
        });
        state.unwrap_or_else(|| "gone".to_owned())
    }

    #[tokio::test]
    async fn rounds_follow_each_other_and_a_failed_one_leaves_what_was_there() {
        let store = store();
        round(&store, "web", None, b"abc").await;
        assert_eq!((state(&store, "web").as_str(), store.quota().used()), ("paged", 3 * PAGE));

        // One that does not go on from it begins anew.
        let (other, spaces) = store.begin_round("web", &sender(), None).await.unwrap();
        assert_eq!(spaces, []);
        store.update(other.key, |snapshot| snapshot.pages.coming = None);
        let (mut second, spaces) = store.begin_round("web", &sender(), Some("web")).await.unwrap();
        assert_eq!(spaces, [TASK]);
        let refused = store.begin_round("web", &sender(), None).await.unwrap_err();
        assert_eq!(refused, Refused::RoundUnderWay("web".to_owned()));
        bring(&store, &mut second, 0x1000, b"x").await;
        second.round.inherit(&TASK, PageRange::new(0x2000, 2).unwrap()).unwrap();
        store.fail_round(&second, "the link broke");
        drop(second);
        assert_eq!((state(&store, "web").as_str(), store.quota().used()), ("paged", 3 * PAGE));

        // What came before is kept, and nothing can be based on it.
        let (third, spaces) = store.begin_round("web", &sender(), Some("web")).await.unwrap();
        assert_eq!(spaces, []);
        store.complete_round(third).unwrap();
        assert_eq!(store.quota().used(), 0);
    }

    #[tokio::test]
    async fn a_first_round_that_fails_damages_its_snapshot() {
        let store = store();
        let (coming, _) = store.begin_round("web", &sender(), None).await.unwrap();
        store.fail_round(&coming, "it was cut");
        assert_eq!(state(&store, "web"), "it was cut");
        // Another of that snapshot is another.
        let (other, _) = store.begin_round("web", &sender(), None).await.unwrap();
        assert!(store.complete_round(coming).is_err() && store.is_paging(&other));
        store.fail_round(&other, "it was cut, too");
        round(&store, "web", None, b"abc").await;
        assert_eq!(state(&store, "web"), "paged");
    }

    #[tokio::test]
    async fn a_parent_of_pages_only_is_superseded_and_others_are_refused_by_name() {
        let store = store();
        round(&store, "web/1", None, b"abc").await;
        let (mut second, _) = store.begin_round("web/2", &sender(), Some("web/1")).await.unwrap();
        second.round.inherit(&TASK, PageRange::new(0x3000, 1).unwrap()).unwrap();
        bring(&store, &mut second, 0x1000, b"x").await;
        let superseded = store.complete_round(second).unwrap();
        assert_eq!((superseded.as_deref(), store.quota().used()), (Some("web/1"), 2 * PAGE));
        assert_eq!(state(&store, "web/1"), "gone");

        let refused = |sender: &Sender, parent| {
            at_once(store.begin_round("web/3", sender, Some(parent))).unwrap_err().to_string()
        };
        let gone = "the parent web/1 cannot be used: no such snapshot is held";
        assert_eq!(refused(&sender(), "web/1"), gone);
        let elsewhere = Sender { host: Some([192, 0, 2, 7].into()), ..sender() };
        assert!(refused(&elsewhere, "web/2").contains("no such snapshot is held"));
        assert_eq!(state(&store, "web/3"), "gone");
    }

    #[tokio::test]
    async fn who_sent_pages_may_give_them_up_as_long_as_no_images_have_joined_them() {
        let store = store();
        round(&store, "web", None, b"abc").await;
        assert!(!store.forget_pages("web", Some([192, 0, 2, 7].into())));
        let key = store.begin("web", &sender()).unwrap();
        assert!(!store.forget_pages("web", None));
        store.fail(key, "the link broke");
        assert!(store.forget_pages("web", None) && !store.forget_pages("web", None));
        assert_eq!((state(&store, "web").as_str(), store.quota().used()), ("gone", 0));
    }

    #[tokio::test]
    async fn pages_survive_images_that_fail_if_they_were_there_before() {
        let store = store();
        round(&store, "web", None, b"abc").await;
        let key = store.begin("web", &sender()).unwrap();
        store.fail(key, "the link broke");
        assert_eq!((state(&store, "web").as_str(), store.quota().used()), ("paged", 3 * PAGE));
        let key = store.begin("web", &sender()).unwrap();
        let (coming, _) = store.begin_round("web", &sender(), None).await.unwrap();
        assert!(store.complete(key, true).await.unwrap_err().contains("a round of its pages"));
        store.complete_round(coming).unwrap();
        assert_eq!((state(&store, "web").as_str(), store.quota().used()), ("paged", 0));

        let key = store.begin("db", &sender()).unwrap();
        round(&store, "db", None, b"abc").await;
        store.fail(key, "the dump failed");
        assert_eq!((state(&store, "db").as_str(), store.quota().used()), ("the dump failed", 0));
    }
}
