//! What nobody sees any more is let go in steps: the runs of a gigabyte may be some hundred thousand, and each gives
//! a page back to the kernel.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use tokio::sync::Notify;

use super::layer::Layer;
use super::tree::Tree;
use crate::store::turns::Turns;

/// Trees of fewer runs are let go at once: that takes less than a step.
const MANY: usize = 512;

thread_local! {
    static UNUSED: Unused = Unused::default();
}

/// Pages of one run are given back in pieces of so many: of 1 MiB, or of half as many parts.
const PIECE: u64 = 256;

/// What nobody holds any more, on this thread's event loop.
#[derive(Debug, Default)]
struct Unused {
    parts: RefCell<Vec<Part>>,
    /// Whether there is somebody who [lets it go](release_in_turns).
    awaited: Cell<bool>,
    come: Rc<Notify>,
}

#[derive(Debug)]
enum Part {
    Tree(Tree),
    /// A hold on pages of a layer: it is taken back from its beginning on.
    Hold {
        layer: Rc<Layer>,
        offset: u64,
        pages: u64,
    },
}

/// Lets go of a tree: later if it is a large one, that nobody else holds. What it shows stays charged until it has
/// been let go.
pub(super) fn release(tree: Tree) {
    if tree.runs() < MANY || !tree.is_held_once() {
        return;
    }
    drop(later(Part::Tree(tree)));
}

/// Takes a hold on pages of a layer back: later if they are many, of which much may have been cut out.
pub(super) fn release_hold(layer: &Rc<Layer>, offset: u64, pages: u64) {
    let part = Part::Hold { layer: layer.clone(), offset, pages };
    if pages <= PIECE || later(part).is_some() {
        layer.release(offset, pages);
    }
}

/// Returns what is not to be let go later, but at once: where there is nobody who does it, as at the thread's end.
fn later(part: Part) -> Option<Part> {
    let mut part = Some(part);
    let _ = UNUSED.try_with(|unused| {
        if unused.awaited.get() {
            unused.parts.borrow_mut().extend(part.take());
            unused.come.notify_one();
        }
    });
    part
}

impl Part {
    /// Lets go of a little of it, and returns the rest.
    fn release_some(self) -> [Option<Part>; 2] {
        match self {
            Part::Tree(tree) => {
                let rest = tree.release_first().map(<[Tree; 2]>::from);
                rest.map_or([None, None], |rest| rest.map(|tree| Some(Part::Tree(tree))))
            }
            // With the last hold the whole file goes.
            Part::Hold { layer, .. } if Rc::strong_count(&layer) == 1 => [None, None],
            Part::Hold { layer, offset, pages } => {
                let now = pages.min(PIECE);
                layer.release(offset, now);
                let (offset, pages) = (offset + now, pages - now);
                [(pages > 0).then_some(Part::Hold { layer, offset, pages }), None]
            }
        }
    }
}

/// Lets go of large trees from now on, as long as this is polled: the others on this thread have their turn between
/// the steps.
pub async fn release_in_turns() {
    let come = UNUSED.with(|unused| unused.come.clone());
    let _awaited = Awaited::begin();
    loop {
        let mut turns = Turns::new();
        while let Some(part) = UNUSED.with(|unused| unused.parts.borrow_mut().pop()) {
            let is_hold = matches!(part, Part::Hold { .. });
            let rest = part.release_some();
            UNUSED.with(|unused| unused.parts.borrow_mut().extend(rest.into_iter().flatten()));
            if is_hold {
                turns.pass_after_much().await;
            } else {
                turns.pass().await;
            }
        }
        come.notified().await;
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
            unused.parts.take()
        });
        for part in left.into_iter().flatten() {
            if let Part::Hold { layer, offset, pages } = part {
                layer.release(offset, pages);
            }
        }
    }
}
