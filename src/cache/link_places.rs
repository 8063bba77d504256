//! Who has a link, where there are only so many. One host may have them all. When another one wants a link, it gets that of
//! the host that has the most; if it has none, and nobody has more than one, it gets an idle one.
//!
//! [`decide`] says who is next and for whom a link ends; [`LinkPlaces`] acts.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::{Rc, Weak};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use crate::daemon::local_peers::Owner;
use crate::daemon::sessions::{Session, Sessions};

/// A link is idle on which nothing was moved for so long: a proxy keeps its link when it has sent all it had. Between two rounds
/// of a migration it is less.
const IDLE: Duration = Duration::from_secs(10);

/// The links that may be up at once.
#[derive(Debug)]
pub(super) struct LinkPlaces(Rc<RefCell<State>>);

#[derive(Debug)]
struct State {
    max: usize,
    next: u64,
    held: BTreeMap<u64, Held>,
    waiting: BTreeMap<u64, Waiting>,
}

#[derive(Debug)]
struct Held {
    owner: Owner,
    activity: Rc<Activity>,
    /// Dropping it tells the link to end.
    _end: oneshot::Sender<()>,
}

#[derive(Debug)]
struct Waiting {
    owner: Owner,
    granted: oneshot::Sender<LinkPlace>,
}

/// A link that is up, or about to be, until it is dropped.
#[derive(Debug)]
pub(super) struct LinkPlace {
    places: Weak<RefCell<State>>,
    number: u64,
    activity: Rc<Activity>,
    ended: oneshot::Receiver<()>,
}

/// What goes on on a link.
#[derive(Debug)]
pub(super) struct Activity {
    /// When something was moved last that is no sign of life.
    moved: Cell<Instant>,
    transfers: Sessions,
}

/// A link, for the decision.
#[derive(Debug, Clone, Copy)]
struct Link {
    number: u64,
    owner: Owner,
    in_transfer: bool,
    moved: Instant,
}

impl Link {
    fn is_idle(&self, now: Instant) -> bool {
        !self.in_transfer && now.saturating_duration_since(self.moved) >= IDLE
    }
}

/// What the decision is.
#[derive(Debug, PartialEq, Eq)]
struct Next {
    /// Who of those that wait gets a link.
    waiting: usize,
    /// Which link ends for it.
    ends: Option<u64>,
}

/// Who of those that wait, in the order in which they came, gets the next link. That is who has the fewest. If there is
/// none, one of a host ends that has the most, and more than the newcomer will have: that on which nothing was moved for
/// longest, and none in the middle of a transfer if another one can go. For who has none an idle one may end of a host that has no
/// other.
fn decide(links: &[Link], waiting: &[Owner], max: usize, now: Instant) -> Option<Next> {
    let mut counts = BTreeMap::<Owner, usize>::new();
    for link in links {
        *counts.entry(link.owner).or_default() += 1;
    }
    let count = |owner: &Owner| counts.get(owner).copied().unwrap_or(0);
    let (index, owner) = waiting.iter().enumerate().min_by_key(|(_, owner)| count(owner))?;
    if links.len() < max {
        return Some(Next { waiting: index, ends: None });
    }
    let (most, has) = (counts.values().copied().max()?, count(owner));
    let may_end = |link: &&Link| {
        count(&link.owner) == most && (most > has + 1 || (has == 0 && link.is_idle(now)))
    };
    let quietest =
        links.iter().filter(may_end).min_by_key(|link| (link.in_transfer, link.moved))?;
    Some(Next { waiting: index, ends: Some(quietest.number) })
}

impl LinkPlaces {
    /// So many, none of them taken.
    pub(super) fn new(max: u64) -> LinkPlaces {
        let max = usize::try_from(max).unwrap_or(usize::MAX);
        let state = State { max, next: 0, held: BTreeMap::new(), waiting: BTreeMap::new() };
        LinkPlaces(Rc::new(RefCell::new(state)))
    }

    /// A link for a host, as soon as it may have one.
    pub(super) async fn take(&self, owner: Owner) -> LinkPlace {
        let (granted, place) = oneshot::channel();
        let number = {
            let mut state = self.0.borrow_mut();
            let number = state.number();
            state.waiting.insert(number, Waiting { owner, granted });
            number
        };
        let _waits = Waits { places: &self.0, number };
        settle(&self.0);
        match place.await {
            Ok(place) => place,
            // A sender is dropped by `_waits` only.
            Err(_) => std::future::pending().await,
        }
    }
}

/// Somebody who waits, until it is dropped.
struct Waits<'a> {
    places: &'a RefCell<State>,
    number: u64,
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        let gone = self.places.borrow_mut().waiting.remove(&self.number);
        drop(gone);
    }
}

/// Gives out what can be given.
fn settle(places: &Rc<RefCell<State>>) {
    loop {
        let granted = places.borrow_mut().grant_next(places);
        let Some((granted, place)) = granted else { return };
        // A place that nobody takes any more comes back as it is dropped.
        let _ = granted.send(place);
    }
}

impl State {
    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn grant_next(
        &mut self,
        places: &Rc<RefCell<State>>,
    ) -> Option<(oneshot::Sender<LinkPlace>, LinkPlace)> {
        let links: Vec<Link> = self
            .held
            .iter()
            .map(|(&number, Held { owner, activity, .. })| Link {
                number,
                owner: *owner,
                in_transfer: activity.transfers.live() > 0,
                moved: activity.moved.get(),
            })
            .collect();
        let owners: Vec<Owner> = self.waiting.values().map(|waiting| waiting.owner).collect();
        let next = decide(&links, &owners, self.max, Instant::now())?;
        // It does not count from now on; what it still has to say it may.
        next.ends.and_then(|number| self.held.remove(&number));
        let waiting = *self.waiting.keys().nth(next.waiting)?;
        let Waiting { owner, granted } = self.waiting.remove(&waiting)?;
        let (end, ended) = oneshot::channel();
        let activity = Rc::new(Activity::new());
        let number = self.number();
        self.held.insert(number, Held { owner, activity: activity.clone(), _end: end });
        let place = LinkPlace { places: Rc::downgrade(places), number, activity, ended };
        Some((granted, place))
    }
}

impl LinkPlace {
    /// What goes on on the link.
    pub(super) fn activity(&self) -> Rc<Activity> {
        self.activity.clone()
    }

    /// Resolves when the link has to end, because another host is to have it.
    pub(super) async fn ended(&mut self) {
        // Nothing is ever sent.
        let _ = (&mut self.ended).await;
    }
}

impl Drop for LinkPlace {
    fn drop(&mut self) {
        if let Some(places) = self.places.upgrade() {
            let held = places.borrow_mut().held.remove(&self.number);
            drop(held);
            settle(&places);
        }
    }
}

impl Activity {
    /// Of a link on which nothing has been moved.
    pub(super) fn new() -> Activity {
        Activity { moved: Cell::new(Instant::now()), transfers: Sessions::default() }
    }

    /// Something is moved now.
    pub(super) fn moves(&self) {
        self.moved.set(Instant::now());
    }

    /// A transfer is under way until that is dropped.
    pub(super) fn begin_transfer(&self) -> Session {
        self.transfers.enter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::error::Elapsed;
    use tokio::time::timeout;

    const A: Owner = Owner::User(1);
    const B: Owner = Owner::User(2);
    const C: Owner = Owner::User(3);

    /// Links by their owners, the first of them quiet for longest.
    fn links(owners: &[(Owner, bool)]) -> Vec<Link> {
        let begun = Instant::now();
        let link = |(number, &(owner, in_transfer)): (usize, &(Owner, bool))| {
            let number = number as u64;
            Link { number, owner, in_transfer, moved: begun + Duration::from_secs(number) }
        };
        owners.iter().enumerate().map(link).collect()
    }

    fn decide_now(links: &[Link], waiting: &[Owner], max: usize) -> Option<Next> {
        decide(links, waiting, max, Instant::now())
    }

    fn next(waiting: usize, ends: Option<u64>) -> Next {
        Next { waiting, ends }
    }

    #[test]
    fn a_free_place_is_for_the_host_with_the_fewest_links() {
        let two = links(&[(A, false), (A, false), (B, false)]);
        assert_eq!(decide_now(&two, &[A, B, C, C], 4), Some(next(2, None)));
        assert_eq!(decide_now(&two, &[A, B], 4), Some(next(1, None)));
        assert_eq!(decide_now(&two, &[], 4), None);
    }

    #[test]
    fn who_has_all_of_them_waits_for_its_own() {
        assert_eq!(decide_now(&links(&[(A, false), (A, false)]), &[A], 2), None);
    }

    #[test]
    fn nobody_gets_more_than_who_gives() {
        assert_eq!(decide_now(&links(&[(A, false)]), &[B], 1), None);
        assert_eq!(decide_now(&links(&[(A, false), (A, false), (B, false)]), &[B], 3), None);
        assert_eq!(decide_now(&links(&[(A, false), (B, false)]), &[C], 2), None);
    }

    #[test]
    fn the_quietest_link_of_the_host_with_the_most_ends() {
        let all = [(B, false), (A, false), (A, false), (A, false)];
        assert_eq!(decide_now(&links(&all), &[A, C], 4), Some(next(1, Some(1))));
    }

    #[test]
    fn a_transfer_goes_on_if_another_link_can_end() {
        assert_eq!(decide_now(&links(&[(A, true), (A, false)]), &[B], 2), Some(next(0, Some(1))));
        assert_eq!(decide_now(&links(&[(A, true), (A, true)]), &[B], 2), Some(next(0, Some(0))));
    }

    #[test]
    fn who_has_none_gets_an_idle_one_of_who_has_no_other() {
        let all = links(&[(A, true), (B, false), (C, false)]);
        let after = |idle| all[1].moved + idle;
        let d = Owner::User(4);
        assert_eq!(decide(&all, &[d], 3, after(IDLE / 2)), None);
        assert_eq!(decide(&all, &[d], 3, after(IDLE)), Some(next(0, Some(1))));
        assert_eq!(decide(&all, &[A, B], 3, after(IDLE)), None, "a second one is not for that");
        let transfers = links(&[(A, true), (B, true)]);
        assert_eq!(decide(&transfers, &[C], 2, after(10 * IDLE)), None);
    }

    async fn now<T>(done: impl Future<Output = T>) -> Result<T, Elapsed> {
        timeout(Duration::from_millis(1), done).await
    }

    #[tokio::test(flavor = "current_thread")]
    async fn another_host_gets_a_link_of_who_has_them_all() {
        let places = LinkPlaces::new(3);
        let mut first = places.take(A).await;
        let (mut second, mut third) = (places.take(A).await, places.take(A).await);
        let transfer = first.activity().begin_transfer();
        third.activity().moves();
        assert!(now(places.take(A)).await.is_err(), "its own further ones wait");

        let others = now(places.take(B)).await.expect("a link for another host");
        now(async { second.ended().await }).await.expect("the quietest ends");
        assert!(now(async { first.ended().await }).await.is_err());
        drop((second, transfer));
        assert!(now(places.take(B)).await.is_err(), "as many as the first has now");
        let (mut waits, frees) = (Box::pin(places.take(A)), others);
        assert!(now(&mut waits).await.is_err());
        drop(frees);
        now(waits).await.expect("a place that was given back");
        assert!(now(async { third.ended().await }).await.is_err());
    }
}
