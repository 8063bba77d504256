//! Files that nobody holds any more are closed by a thread: the kernel takes 0.1 s and more to free a gigabyte.

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::rc::Rc;

use tokio::sync::Notify;
use tokio::task::spawn_blocking;

use super::quota::Charge;

/// So many bytes are freed within a step of the event loop, in so many files: no thread is started for them.
const LITTLE: u64 = 8 << 20;
const FEW: usize = 256;

thread_local! {
    static UNUSED: Unused = Unused::default();
}

/// What is to be closed, of this thread's event loop.
#[derive(Debug, Default)]
struct Unused {
    files: RefCell<Vec<(Rc<File>, Option<Charge>)>>,
    /// Whether there is somebody who [closes it](close_in_background).
    awaited: Cell<bool>,
    come: Rc<Notify>,
}

/// Closes a file when nobody else holds it, and gives back what was charged for it then: at once where there is nobody who
/// does it in the background, as at the thread's end.
pub(super) fn close(file: &Rc<File>, charge: Option<Charge>) {
    let mut part = Some((file.clone(), charge));
    let _ = UNUSED.try_with(|unused| {
        if unused.awaited.get() {
            unused.files.borrow_mut().extend(part.take());
            unused.come.notify_one();
        }
    });
}

/// Has a thread close what nobody holds any more, as long as this is polled.
pub async fn close_in_background() {
    let come = UNUSED.with(|unused| unused.come.clone());
    let _awaited = Awaited::begin();
    loop {
        come.notified().await;
        let (files, charges): (Vec<_>, Vec<_>) =
            UNUSED.with(|unused| unused.files.take()).into_iter().unzip();
        let bytes: u64 = charges.iter().flatten().map(Charge::bytes).sum();
        let is_much = bytes > LITTLE || files.len() > FEW;
        let last: Vec<File> = files.into_iter().filter_map(Rc::into_inner).collect();
        if is_much {
            // It can fail only by a panic, and to close a file has none.
            let _ = spawn_blocking(move || drop(last)).await;
        } else {
            drop(last);
        }
        drop(charges);
    }
}

struct Awaited;

impl Awaited {
    fn begin() -> Awaited {
        UNUSED.with(|unused| unused.awaited.set(true));
        Awaited
    }
}

impl Drop for Awaited {
    fn drop(&mut self) {
        let left = UNUSED.try_with(|unused| {
            unused.awaited.set(false);
            unused.files.take()
        });
        drop(left);
    }
}

#[cfg(test)]
mod tests {
    use tokio::task::{LocalSet, spawn_local, yield_now};

    use super::*;
    use crate::store::image::Image;
    use crate::store::quota::Quota;

    const PAGE: u64 = 4096;

    #[tokio::test]
    async fn what_a_file_was_charged_for_is_given_back_when_it_is_closed() {
        let quota = Quota::new(64 << 20);
        let image = |len| Image::create("pages-1.img", quota.charge_now(len).unwrap()).unwrap();
        let background = async {
            let closing = spawn_local(close_in_background());
            yield_now().await;
            for len in [PAGE, LITTLE, 2 * LITTLE] {
                drop(image(len));
                assert_eq!(quota.used(), len);
                while quota.used() > 0 {
                    yield_now().await;
                }
            }
            closing.abort();
            let _ = closing.await;
            drop(image(PAGE));
            assert_eq!(quota.used(), 0, "there is nobody who closes it later");
        };
        LocalSet::new().run_until(background).await;
    }
}
