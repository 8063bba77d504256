//! What the cache is asked for on a link, and what it asks for: parts of images, and pages.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::sync::Arc;

use rustix::io::Errno;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use crate::wire::message::{Message, REGIONS_MAX, Region};

/// A region, and its bytes.
pub(super) type Answered = (Region, Vec<u8>);

/// The regions that were asked for and have not come.
#[derive(Debug)]
pub(super) struct Regions {
    asked: RefCell<HashMap<u32, Asked>>,
    next: Cell<u32>,
    free: Arc<Semaphore>,
}

/// A region that was asked for. It counts until the cache has answered, whether or not somebody still
/// waits for it.
#[derive(Debug)]
struct Asked {
    answer: oneshot::Sender<Answered>,
    _counts: OwnedSemaphorePermit,
}

impl Regions {
    /// A number for a request, when not too many others are unanswered, and where its answer comes.
    /// `None` when the link is over.
    pub(super) async fn begin(&self) -> Option<(u32, oneshot::Receiver<Answered>)> {
        let counts = self.free.clone().acquire_owned().await.ok()?;
        let request = self.next.replace(self.next.get().wrapping_add(1));
        let (sender, answer) = oneshot::channel();
        let asked = Asked { answer: sender, _counts: counts };
        self.asked.borrow_mut().insert(request, asked);
        Some((request, answer))
    }

    /// One has come: who asked for it gets it, if they are still there.
    pub(super) fn deliver(&self, region: Region, bytes: Vec<u8>) {
        let asked = self.asked.borrow_mut().remove(&region.request);
        let _ = asked.map(|asked| asked.answer.send((region, bytes)));
    }

    /// No answer will come any more.
    pub(super) fn close(&self) {
        self.free.close();
        self.asked.borrow_mut().clear();
    }
}

/// The answer to a request of the cache. What it has acknowledged is not kept here, and nothing is left behind
/// yet that it could come for.
pub(super) fn answer(request: u32) -> Message {
    let error = Errno::NOENT.raw_os_error().unsigned_abs();
    Message::no_region(request, error, "this proxy keeps no images and no pages at the source")
}

impl Default for Regions {
    fn default() -> Regions {
        let free = Arc::new(Semaphore::new(REGIONS_MAX));
        Regions { asked: RefCell::default(), next: Cell::new(0), free }
    }
}
