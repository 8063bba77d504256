//! Peers that hold a place and do nothing with it, in the order in which they began to: when the places run out,
//! the one that has idled longest makes way.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use tokio::sync::oneshot;

/// Those that idle now.
#[derive(Debug, Clone, Default)]
pub struct Idlers(Rc<Places>);

#[derive(Debug, Default)]
struct Places {
    next: Cell<u64>,
    /// Dropping a sender tells its peer to go.
    taken: RefCell<BTreeMap<u64, oneshot::Sender<()>>>,
}

impl Idlers {
    /// How many there are.
    pub fn live(&self) -> usize {
        self.0.taken.borrow().len()
    }

    /// One more, until it is dropped.
    pub fn enter(&self) -> Idler {
        let number = self.0.next.replace(self.0.next.get() + 1);
        let (sender, turned_out) = oneshot::channel();
        self.0.taken.borrow_mut().insert(number, sender);
        Idler { places: self.0.clone(), number, turned_out }
    }

    /// Has the one go that has idled longest, if there is one.
    pub fn turn_out_oldest(&self) {
        self.0.taken.borrow_mut().pop_first();
    }
}

/// A peer that idles.
#[derive(Debug)]
pub struct Idler {
    places: Rc<Places>,
    number: u64,
    turned_out: oneshot::Receiver<()>,
}

impl Idler {
    /// Resolves when the peer has to make way.
    pub async fn turned_out(&mut self) {
        // Nothing is ever sent.
        let _ = (&mut self.turned_out).await;
    }
}

impl Drop for Idler {
    fn drop(&mut self) {
        self.places.taken.borrow_mut().remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::{Duration, timeout};

    #[tokio::test(flavor = "current_thread")]
    async fn who_has_idled_longest_makes_way() {
        let idlers = Idlers::default();
        let gone = idlers.enter();
        let (mut oldest, mut newest) = (idlers.enter(), idlers.enter());
        drop(gone);
        assert_eq!(idlers.live(), 2);
        idlers.turn_out_oldest();
        assert_eq!(idlers.live(), 1);
        oldest.turned_out().await;
        assert!(timeout(Duration::from_millis(1), newest.turned_out()).await.is_err());
    }
}
