//! Runs in the order of their addresses, in a tree whose versions share what they have in common.
//!
//! The tree is balanced by weight, with the operations and the constants of Haskell's `Data.Map`
//! (Hirai and Yamamoto, "Balancing weight-balanced trees", 2011): all follow from [`Tree::link`]. Nothing
//! in a node ever changes. Cutting and joining make a few nodes along one path, as many as the
//! logarithm of the runs, and share all others: so a snapshot's pages are inherited by the thousand
//! without touching them, and its parent is as it was.

use std::rc::Rc;

use super::layer::Run;
use crate::criu::pages::PageRange;

/// One side may be at most so many times heavier than the other.
const DELTA: usize = 3;
/// Beyond this ratio of its grandchildren, a double rotation is needed.
const RATIO: usize = 2;

/// Runs that do not overlap.
#[derive(Debug, Clone, Default)]
pub(super) struct Tree(Option<Rc<Node>>);

#[derive(Debug)]
struct Node {
    left: Tree,
    run: Rc<Run>,
    right: Tree,
    /// How many runs there are in this node and below.
    runs: usize,
    /// How many pages they have.
    pages: u64,
}

impl Tree {
    /// A tree of one run.
    pub(super) fn of(run: Run) -> Tree {
        Tree::node(Tree::default(), Rc::new(run), Tree::default())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_none()
    }

    /// Whether there is no other that has all of it.
    pub(super) fn is_held_once(&self) -> bool {
        self.0.as_ref().is_some_and(|node| Rc::strong_count(node) == 1)
    }

    /// Lets go of one run, and returns what lies on both sides of it; `None` if somebody else holds them all.
    pub(super) fn release_first(self) -> Option<(Tree, Tree)> {
        let Node { left, right, .. } = Rc::into_inner(self.0?)?;
        Some((left, right))
    }

    /// How many runs.
    pub(super) fn runs(&self) -> usize {
        self.0.as_ref().map_or(0, |node| node.runs)
    }

    /// How many pages in them.
    pub(super) fn pages(&self) -> u64 {
        self.0.as_ref().map_or(0, |node| node.pages)
    }

    pub(super) fn first(&self) -> Option<&Rc<Run>> {
        let mut node = self.0.as_ref()?;
        while let Some(left) = &node.left.0 {
            node = left;
        }
        Some(&node.run)
    }

    fn last(&self) -> Option<&Rc<Run>> {
        let mut node = self.0.as_ref()?;
        while let Some(right) = &node.right.0 {
            node = right;
        }
        Some(&node.run)
    }

    /// What lies in a range; of runs that reach beyond it, their parts. What is left of them outside of it is
    /// never looked at: a big run of which many small parts are asked for costs for each as much as a small one.
    pub(super) fn slice(&self, range: PageRange) -> Tree {
        let Some(node) = &self.0 else { return Tree::default() };
        let Node { left, run, right, .. } = &**node;
        let PageRange { start, end } = run.range();
        if range.end <= start {
            return left.slice(range);
        }
        if range.start >= end {
            return right.slice(range);
        }
        let before = if range.start < start { left.from(range.start) } else { Tree::default() };
        let after = if range.end > end { right.until(range.end) } else { Tree::default() };
        match Tree::cut(run, range) {
            Some(run) => Tree::link(before, run, after),
            None => Tree::concat(before, after),
        }
    }

    /// What lies before a page.
    pub(super) fn until(&self, page: u64) -> Tree {
        let Some(node) = &self.0 else { return Tree::default() };
        let Node { left, run, right, .. } = &**node;
        if page <= run.range().start {
            return left.until(page);
        }
        let rest = right.until(page);
        if page >= run.range().end && rest.pages() == right.pages() {
            return self.clone();
        }
        match Tree::cut(run, PageRange { start: 0, end: page }) {
            Some(run) => Tree::link(left.clone(), run, rest),
            None => left.clone(),
        }
    }

    /// What lies from a page on.
    pub(super) fn from(&self, page: u64) -> Tree {
        let Some(node) = &self.0 else { return Tree::default() };
        let Node { left, run, right, .. } = &**node;
        if page >= run.range().end {
            return right.from(page);
        }
        let rest = left.from(page);
        if page <= run.range().start && rest.pages() == left.pages() {
            return self.clone();
        }
        match Tree::cut(run, PageRange { start: page, end: u64::MAX }) {
            Some(run) => Tree::link(rest, run, right.clone()),
            None => right.clone(),
        }
    }

    /// The part of a run that lies in a range, which is the run itself if all of it does.
    fn cut(run: &Rc<Run>, range: PageRange) -> Option<Rc<Run>> {
        let PageRange { start, end } = run.range();
        if range.start <= start && end <= range.end {
            return Some(run.clone());
        }
        run.part(range).map(Rc::new)
    }

    /// One tree after the other. Where the last run of one goes on in the first of the other, they
    /// become one run.
    pub(super) fn concat(left: Tree, right: Tree) -> Tree {
        let (Some(last), Some(first)) = (left.last(), right.first()) else {
            return if left.is_empty() { right } else { left };
        };
        match last.with(first) {
            Some(both) => Tree::link(left.without_last(), Rc::new(both), right.without_first()),
            None => Tree::link(left.without_last(), last.clone(), right),
        }
    }

    fn without_last(&self) -> Tree {
        let Some(node) = &self.0 else { return Tree::default() };
        if node.right.is_empty() {
            return node.left.clone();
        }
        Tree::balance(node.left.clone(), node.run.clone(), node.right.without_last())
    }

    fn without_first(&self) -> Tree {
        let Some(node) = &self.0 else { return Tree::default() };
        if node.left.is_empty() {
            return node.right.clone();
        }
        Tree::balance(node.left.without_first(), node.run.clone(), node.right.clone())
    }

    /// A tree, a run after it, and a tree after that, however different their weights.
    fn link(left: Tree, run: Rc<Run>, right: Tree) -> Tree {
        match (&left.0, &right.0) {
            (_, Some(node)) if DELTA * left.runs() < node.runs => {
                let joined = Tree::link(left, run, node.left.clone());
                Tree::balance(joined, node.run.clone(), node.right.clone())
            }
            (Some(node), _) if DELTA * right.runs() < node.runs => {
                let joined = Tree::link(node.right.clone(), run, right);
                Tree::balance(node.left.clone(), node.run.clone(), joined)
            }
            _ => Tree::node(left, run, right),
        }
    }

    /// The same for two trees of which one has become a little too heavy.
    fn balance(left: Tree, run: Rc<Run>, right: Tree) -> Tree {
        let (light, heavy) = (left.runs(), right.runs());
        match (&left.0, &right.0) {
            _ if light + heavy <= 1 => Tree::node(left, run, right),
            (_, Some(node)) if heavy > DELTA * light => Tree::rotate_left(left, run, node),
            (Some(node), _) if light > DELTA * heavy => Tree::rotate_right(node, run, right),
            _ => Tree::node(left, run, right),
        }
    }

    fn rotate_left(left: Tree, run: Rc<Run>, right: &Node) -> Tree {
        let outer = right.right.clone();
        match &right.left.0 {
            Some(inner) if inner.runs >= RATIO * outer.runs() => Tree::node(
                Tree::node(left, run, inner.left.clone()),
                inner.run.clone(),
                Tree::node(inner.right.clone(), right.run.clone(), outer),
            ),
            _ => Tree::node(Tree::node(left, run, right.left.clone()), right.run.clone(), outer),
        }
    }

    fn rotate_right(left: &Node, run: Rc<Run>, right: Tree) -> Tree {
        let outer = left.left.clone();
        match &left.right.0 {
            Some(inner) if inner.runs >= RATIO * outer.runs() => Tree::node(
                Tree::node(outer, left.run.clone(), inner.left.clone()),
                inner.run.clone(),
                Tree::node(inner.right.clone(), run, right),
            ),
            _ => Tree::node(outer, left.run.clone(), Tree::node(left.right.clone(), run, right)),
        }
    }

    fn node(left: Tree, run: Rc<Run>, right: Tree) -> Tree {
        let runs = left.runs() + right.runs() + 1;
        let pages = left.pages() + right.pages() + run.range().pages();
        Tree(Some(Rc::new(Node { left, run, right, runs, pages })))
    }

    /// The runs that end after a page, in order.
    pub(super) fn iter_from(&self, page: u64) -> Runs<'_> {
        let mut above = Vec::new();
        let mut tree = self;
        while let Some(node) = &tree.0 {
            if node.run.range().end > page {
                above.push(&**node);
                tree = &node.left;
            } else {
                tree = &node.right;
            }
        }
        Runs { above }
    }

    /// The runs from the one that has the `nth` page of all (from 0), in order, and how many pages it has
    /// before that.
    pub(super) fn iter_at(&self, mut nth: u64) -> (Runs<'_>, u64) {
        let mut above = Vec::new();
        let mut tree = self;
        while let Some(node) = &tree.0 {
            let before = node.left.pages();
            if nth < before {
                above.push(&**node);
                tree = &node.left;
            } else if nth - before < node.run.range().pages() {
                above.push(&**node);
                return (Runs { above }, nth - before);
            } else {
                nth -= before + node.run.range().pages();
                tree = &node.right;
            }
        }
        (Runs { above: Vec::new() }, 0)
    }

    /// Holds the tree against what it promises.
    #[cfg(test)]
    pub(super) fn check(&self) {
        let runs: Vec<_> = self.iter_from(0).collect();
        assert_eq!(runs.len(), self.runs());
        assert_eq!(runs.iter().map(|run| run.range().pages()).sum::<u64>(), self.pages());
        for pair in runs.windows(2) {
            assert!(pair[0].range().end <= pair[1].range().start, "{pair:?} overlap");
            assert!(pair[0].with(pair[1]).is_none(), "{pair:?} are one");
        }
        self.check_balance();
    }

    #[cfg(test)]
    fn check_balance(&self) {
        let Some(node) = &self.0 else { return };
        let (left, right) = (node.left.runs(), node.right.runs());
        assert!(left + right <= 1 || left.max(right) <= DELTA * left.min(right), "{left}:{right}");
        node.left.check_balance();
        node.right.check_balance();
    }
}

/// Runs in the order of their addresses.
#[derive(Debug)]
pub struct Runs<'a> {
    /// The next one, and those above it that come later.
    above: Vec<&'a Node>,
}

impl<'a> Iterator for Runs<'a> {
    type Item = &'a Rc<Run>;

    fn next(&mut self) -> Option<&'a Rc<Run>> {
        let node = self.above.pop()?;
        let mut tree = &node.right;
        while let Some(next) = &tree.0 {
            self.above.push(next);
            tree = &next.left;
        }
        Some(&node.run)
    }
}
