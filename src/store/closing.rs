//! Files that nobody holds any more are closed by a thread: the kernel takes 0.1 s and more to free a gigabyte.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
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

/// Somebody holds a file no more. When nobody does it is closed, and what was charged for it is given back: at once where there
/// is nobody who does it in the background, as at the thread's end.
pub fn close(file: &Rc<File>, charge: Option<Charge>) {
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
    // What others hold still, who say so when they hold it no more.
    let mut held: HashMap<*const File, Vec<Charge>> = HashMap::new();
    loop {
        come.notified().await;
        let (mut last, mut charges): (Vec<File>, Vec<Charge>) = (Vec::new(), Vec::new());
        for (file, charge) in UNUSED.with(|unused| unused.files.take()) {
            let known = Rc::as_ptr(&file);
            held.entry(known).or_default().extend(charge);
            if let Some(file) = Rc::into_inner(file) {
                last.push(file);
                charges.extend(held.remove(&known).into_iter().flatten());
            }
        }
        let bytes: u64 = charges.iter().map(Charge::bytes).sum();
        if bytes > LITTLE || last.len() > FEW {
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
