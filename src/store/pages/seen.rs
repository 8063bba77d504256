//! Who sees which part of a layer: how many holds there are on each page of it.
//!
//! What is kept are the page numbers at which the count changes, and by how much. A hold is two of these
//! changes, wherever it begins and ends and whatever holds there are within it. So one big run that is cut into
//! many costs as much for each piece as a small one: to count along a hold, over all that is cut out of it,
//! would cost the square of the pieces.

use std::cmp::Ordering;
use std::hash::BuildHasher;
use std::ops::Range;

/// A count for each page number; before the first change it is 0.
#[derive(Debug, Default)]
pub(super) struct Seen {
    changes: Tree,
    /// Gives each change a place in the tree that no peer can know beforehand.
    priorities: Priorities,
}

#[cfg(not(test))]
type Priorities = std::hash::RandomState;
/// The same in each run: what is counted in a test does not depend on chance.
#[cfg(test)]
type Priorities = std::hash::BuildHasherDefault<std::hash::DefaultHasher>;

/// Changes in the order of their numbers. The tree is a treap (Seidel and Aragon, "Randomized search trees",
/// 1996): no change lies below one of a lower priority, and priorities are as good as random. So it is about as
/// deep as the logarithm of its changes.
type Tree = Option<Box<Change>>;

#[derive(Debug)]
struct Change {
    /// The first page number with the other count.
    number: u64,
    priority: u32,
    /// By how much the count is higher than before; never 0.
    by: i32,
    /// By how much all changes in this node and below it raise the count.
    sum: i32,
    /// How high the count is, at the lowest, after one of them, if it is 0 before them.
    low: i32,
    left: Tree,
    right: Tree,
}

impl Seen {
    /// One more sees these pages.
    pub(super) fn add(&mut self, range: Range<u64>) {
        self.change(range.start, 1);
        self.change(range.end, -1);
    }

    /// One of those who [saw](Self::add) these pages sees them no longer. Returns what nobody sees
    /// now.
    pub(super) fn remove(&mut self, range: Range<u64>) -> Vec<Range<u64>> {
        self.change(range.start, -1);
        self.change(range.end, 1);
        self.unseen(range).collect()
    }

    /// What nobody sees of these pages, in order.
    pub(super) fn unseen(&self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
        let mut at = Some(range.start);
        std::iter::from_fn(move || {
            let from = at.filter(|at| *at < range.end)?;
            let start = if count(&self.changes, from) == 0 {
                from
            } else {
                next_unseen(&self.changes, 0, from).filter(|start| *start < range.end)?
            };
            at = next(&self.changes, start);
            Some(start..at.map_or(range.end, |end| end.min(range.end)))
        })
    }

    fn change(&mut self, number: u64, by: i32) {
        // The upper half is as random as the whole.
        let priority = (self.priorities.hash_one(number) >> 32) as u32;
        change(&mut self.changes, Change::new(number, priority, by));
    }
}

impl Change {
    fn new(number: u64, priority: u32, by: i32) -> Change {
        Change { number, priority, by, sum: by, low: by, left: None, right: None }
    }

    /// The count after this change, if it is `before` before all that lie in this node and below.
    fn count(&self, before: i32) -> i32 {
        before + sum(&self.left) + self.by
    }

    /// What lies below has changed.
    fn update(&mut self) {
        let here = self.count(0);
        let left = self.left.as_ref().map(|left| left.low);
        let right = self.right.as_ref().map(|right| here + right.low);
        self.sum = here + sum(&self.right);
        self.low = left.into_iter().chain(right).fold(here, i32::min);
    }
}

fn sum(tree: &Tree) -> i32 {
    tree.as_ref().map_or(0, |change| change.sum)
}

fn change(tree: &mut Tree, new: Change) {
    visit();
    let Some(node) = tree else {
        *tree = Some(Box::new(new));
        return;
    };
    match new.number.cmp(&node.number) {
        Ordering::Less => {
            change(&mut node.left, new);
            if node.left.as_ref().is_some_and(|left| left.priority > node.priority) {
                lift_left(node);
            }
        }
        Ordering::Greater => {
            change(&mut node.right, new);
            if node.right.as_ref().is_some_and(|right| right.priority > node.priority) {
                lift_right(node);
            }
        }
        Ordering::Equal => {
            node.by += new.by;
            if node.by == 0 {
                *tree = join(node.left.take(), node.right.take());
                return;
            }
        }
    }
    node.update();
}

/// The left child takes its parent's place.
fn lift_left(node: &mut Box<Change>) {
    let Some(mut up) = node.left.take() else { return };
    node.left = up.right.take();
    node.update();
    std::mem::swap(node, &mut up);
    node.right = Some(up);
}

/// The right child takes its parent's place.
fn lift_right(node: &mut Box<Change>) {
    let Some(mut up) = node.right.take() else { return };
    node.right = up.left.take();
    node.update();
    std::mem::swap(node, &mut up);
    node.left = Some(up);
}

/// One tree, and one whose numbers are all higher.
fn join(left: Tree, right: Tree) -> Tree {
    visit();
    match (left, right) {
        (Some(mut left), Some(right)) if left.priority > right.priority => {
            left.right = join(left.right.take(), Some(right));
            left.update();
            Some(left)
        }
        (Some(left), Some(mut right)) => {
            right.left = join(Some(left), right.left.take());
            right.update();
            Some(right)
        }
        (left, right) => left.or(right),
    }
}

/// The count at a number.
fn count(mut tree: &Tree, number: u64) -> i32 {
    let mut before = 0;
    while let Some(node) = tree {
        visit();
        if number < node.number {
            tree = &node.left;
        } else {
            before = node.count(before);
            tree = &node.right;
        }
    }
    before
}

/// The first number after this one at which the count changes.
fn next(mut tree: &Tree, number: u64) -> Option<u64> {
    let mut next = None;
    while let Some(node) = tree {
        visit();
        if number < node.number {
            next = Some(node.number);
            tree = &node.left;
        } else {
            tree = &node.right;
        }
    }
    next
}

/// The first number after this one from which on the count is 0, if it is `before` before the tree.
fn next_unseen(tree: &Tree, before: i32, number: u64) -> Option<u64> {
    visit();
    let node = tree.as_ref().filter(|node| before + node.low <= 0)?;
    let here = node.count(before);
    if number < node.number {
        let left = next_unseen(&node.left, before, number);
        let found = left.or_else(|| (here == 0).then_some(node.number));
        if found.is_some() {
            return found;
        }
    }
    next_unseen(&node.right, here, number)
}

#[cfg(not(test))]
fn visit() {}
#[cfg(test)]
use tests::visit;

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::cell::Cell;

    thread_local! { static VISITED: Cell<u64> = const { Cell::new(0) } }

    pub(super) fn visit() {
        VISITED.set(VISITED.get() + 1);
    }

    /// How many nodes of such trees this thread has visited: work, whatever the machine is doing.
    pub(in crate::store) fn visited() -> u64 {
        VISITED.get()
    }

    /// Holds the tree against what it promises; returns its changes.
    fn changes(tree: &Tree) -> Vec<(u64, i32)> {
        let Some(node) = tree else { return Vec::new() };
        assert_ne!(node.by, 0);
        for below in [&node.left, &node.right].into_iter().flatten() {
            assert!(below.priority <= node.priority);
        }
        let mut all = changes(&node.left);
        all.push((node.number, node.by));
        all.extend(changes(&node.right));
        assert!(all.is_sorted_by(|one, other| one.0 < other.0));
        let counts = all.iter().scan(0, |count, (_, by)| {
            *count += by;
            Some(*count)
        });
        let counts: Vec<i32> = counts.collect();
        assert_eq!(
            (node.sum, Some(node.low)),
            (counts[counts.len() - 1], counts.iter().min().copied())
        );
        all
    }

    #[test]
    fn what_nobody_sees_any_more_is_told_once() {
        let mut seen = Seen::default();
        seen.add(0..100);
        seen.add(10..20);
        seen.add(30..40);
        assert_eq!(seen.remove(0..100), [0..10, 20..30, 40..100]);
        let told: Vec<u64> = seen.remove(10..20).into_iter().flatten().collect();
        assert_eq!(told, (10..20).collect::<Vec<u64>>());
        let told: Vec<u64> = seen.remove(30..40).into_iter().flatten().collect();
        assert_eq!(told, (30..40).collect::<Vec<u64>>());
        assert!(seen.changes.is_none());
    }

    proptest! {
        #[test]
        fn it_counts_as_an_array_does(ranges in prop::collection::vec((0..40u64, 1..20u64), 1..40)) {
            let (mut seen, mut model) = (Seen::default(), [0i32; 64]);
            let mut held: Vec<Range<u64>> = Vec::new();
            for (index, (start, len)) in ranges.into_iter().enumerate() {
                let range = start..start + len;
                seen.add(range.clone());
                range.clone().for_each(|page| model[usize::try_from(page).unwrap()] += 1);
                held.push(range);
                if index % 3 == 2 {
                    let gone = held.swap_remove(usize::try_from(start).unwrap() % held.len());
                    let mut unseen = Vec::new();
                    for page in gone.clone() {
                        let count = &mut model[usize::try_from(page).unwrap()];
                        *count -= 1;
                        unseen.extend((*count == 0).then_some(page));
                    }
                    let told: Vec<u64> = seen.remove(gone).into_iter().flatten().collect();
                    prop_assert_eq!(told, unseen);
                }
                let counts: Vec<i32> = (0..64).map(|page| count(&seen.changes, page)).collect();
                prop_assert_eq!(&counts, &model);
                let free = (5..30).filter(|page| counts[*page] == 0);
                let told = seen.unseen(5..30).flatten().map(|page| usize::try_from(page).unwrap());
                prop_assert!(told.eq(free));
                changes(&seen.changes);
            }
            for range in held {
                seen.remove(range);
            }
            prop_assert!(seen.changes.is_none());
        }
    }
}
