//! Places at a socket: so many peers are served at once, further ones wait. A peer that has said nothing yet holds its
//! place only as long as nobody waits for one.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use super::idlers::{Idler, Idlers};

/// A peer that was told to make way has gone by then; if not, the next one makes way.
const LOOK: Duration = Duration::from_millis(50);

/// The places at one socket, or at several that share them.
#[derive(Debug, Clone)]
pub struct Places {
    permits: Arc<Semaphore>,
    idlers: Idlers,
}

/// One of them, until it is dropped.
#[derive(Debug)]
pub struct Place {
    _permit: Option<OwnedSemaphorePermit>,
    /// While its peer is awaited to say something.
    idler: Option<Idler>,
}

impl Places {
    /// So many.
    pub fn new(max: u64) -> Places {
        let max = usize::try_from(max).unwrap_or(usize::MAX).min(Semaphore::MAX_PERMITS);
        Places { permits: Arc::new(Semaphore::new(max)), idlers: Idlers::default() }
    }

    /// One of them, for a peer that has come. While none is free, the peer makes way that has been silent for longest;
    /// those that have said something stay.
    pub async fn take(&self) -> Place {
        loop {
            if let Ok(permit) = self.permits.clone().try_acquire_owned() {
                return Place { _permit: Some(permit), idler: None };
            }
            self.idlers.turn_out_oldest();
            let free = timeout(LOOK, self.permits.clone().acquire_owned()).await;
            // The semaphore is never closed.
            if let Ok(Ok(permit)) = free {
                return Place { _permit: Some(permit), idler: None };
            }
        }
    }

    /// A peer has come to a place: it may be turned out until it has said something.
    pub fn await_first_word(&self, place: &mut Place) {
        place.idler = Some(self.idlers.enter());
    }
}

impl Place {
    /// A place where there are as many as are wanted.
    pub fn unlimited() -> Place {
        Place { _permit: None, idler: None }
    }

    /// Waits for what a peer says. If that is the first, `None` says that the peer has to make way. Dropping the future in
    /// the middle changes nothing.
    pub async fn unless_turned_out<T>(&mut self, said: impl Future<Output = T>) -> Option<T> {
        let Some(idler) = &mut self.idler else { return Some(said.await) };
        let said = tokio::select! {
            // What has come is looked at.
            biased;
            said = said => Some(said),
            () = idler.turned_out() => None,
        };
        self.idler = None;
        said
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::{pending, ready};

    #[tokio::test(flavor = "current_thread")]
    async fn who_has_said_nothing_makes_way_and_who_has_stays() {
        let places = Places::new(2);
        let (mut speaks, mut silent) = (places.take().await, places.take().await);
        places.await_first_word(&mut speaks);
        places.await_first_word(&mut silent);
        assert_eq!(speaks.unless_turned_out(ready(1)).await, Some(1));

        assert!(
            timeout(Duration::from_millis(1), silent.unless_turned_out(pending::<()>()))
                .await
                .is_err()
        );
        let newcomer = async {
            let mut place = places.take().await;
            places.await_first_word(&mut place);
            place
        };
        let turned_out = async {
            let said = silent.unless_turned_out(pending::<()>()).await;
            drop(silent);
            said
        };
        let (mut third, said) = tokio::join!(newcomer, turned_out);
        assert_eq!(said, None);
        assert_eq!(third.unless_turned_out(ready(3)).await, Some(3));
        assert!(timeout(3 * LOOK, places.take()).await.is_err(), "both work");
        assert_eq!(speaks.unless_turned_out(ready(2)).await, Some(2));
    }

    #[tokio::test(flavor = "current_thread")]
    async fn what_has_come_is_looked_at_though_others_want_the_place() {
        let places = Places::new(1);
        let mut place = places.take().await;
        places.await_first_word(&mut place);
        places.idlers.turn_out_oldest();
        assert_eq!(place.unless_turned_out(ready(1)).await, Some(1));
    }
}
