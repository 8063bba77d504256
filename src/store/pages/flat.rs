//! The flat pagemaps of a snapshot.

use std::collections::BTreeMap;
use std::rc::Rc;

use super::index::Index;

/// The newest page for every address of every page space, over all layers of a snapshot's chain.
///
/// It never changes. Whoever holds a clone, which costs nothing, sees its pages: they stay in their layers
/// and stay charged until the last clone is gone, whatever later snapshots bring. So a restore that reads
/// holds one.
#[derive(Debug)]
pub struct Flat<K>(Rc<BTreeMap<K, Index>>);

impl<K: Ord> Flat<K> {
    pub(super) fn new(spaces: BTreeMap<K, Index>) -> Flat<K> {
        Flat(Rc::new(spaces))
    }

    /// The pages of one page space; `None` if the snapshot has no such space.
    pub fn space(&self, space: &K) -> Option<&Index> {
        self.0.get(space)
    }

    /// All page spaces and their pages.
    pub fn spaces(&self) -> impl Iterator<Item = (&K, &Index)> {
        self.0.iter()
    }

    /// How many pages, in all spaces.
    pub fn pages(&self) -> u64 {
        self.0.values().map(Index::pages).sum()
    }
}

impl<K> Clone for Flat<K> {
    fn clone(&self) -> Flat<K> {
        Flat(self.0.clone())
    }
}
