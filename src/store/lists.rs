//! Lists of snapshot ids, oldest first: which snapshot's parent is which.

use std::collections::BTreeMap;

/// Every list by its name. Each id stands in a list at most once.
#[derive(Debug, Default)]
pub(super) struct Lists(BTreeMap<String, Vec<String>>);

impl Lists {
    /// Appends an id. One that is there already moves to the end: its snapshot began anew.
    pub(super) fn append(&mut self, list: &str, id: &str) {
        let ids = self.0.entry(list.to_owned()).or_default();
        ids.retain(|known| known != id);
        ids.push(id.to_owned());
    }

    /// The ids of a list.
    pub(super) fn ids(&self, list: &str) -> &[String] {
        self.0.get(list).map_or(&[], Vec::as_slice)
    }

    /// Those that stand before an id in any list: its parents, and theirs.
    pub(super) fn parents(&self, id: &str) -> Vec<String> {
        let before = |ids: &Vec<String>| {
            ids.iter().position(|known| known == id).map(|own| ids[..own].to_vec())
        };
        self.0.values().filter_map(before).flatten().collect()
    }

    /// How many ids there are in all lists.
    pub(super) fn len(&self) -> usize {
        self.0.values().map(Vec::len).sum()
    }

    /// A snapshot is no longer held.
    pub(super) fn forget(&mut self, id: &str) {
        self.0.retain(|_, ids| {
            ids.retain(|known| known != id);
            !ids.is_empty()
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_stands_at_the_end_and_once() {
        let mut lists = Lists::default();
        for id in ["1", "2", "3", "2"] {
            lists.append("web", id);
        }
        assert_eq!(lists.ids("web"), ["1", "3", "2"]);
        assert_eq!(lists.parents("2"), ["1", "3"]);
        assert_eq!(lists.parents("1"), [""; 0]);
        assert_eq!(lists.ids("db"), [""; 0]);
    }

    #[test]
    fn what_is_no_longer_held_leaves_every_list() {
        let mut lists = Lists::default();
        lists.append("", "1");
        lists.append("web", "1");
        lists.append("web", "2");
        lists.forget("1");
        assert_eq!((lists.ids(""), lists.ids("web")), (&[][..], &["2".to_owned()][..]));
        assert_eq!(lists.len(), 1);
    }
}
