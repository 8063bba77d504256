//! Lists of snapshot ids, oldest first: which snapshot's parent is which.

use std::collections::BTreeMap;
use std::net::IpAddr;

/// The host that sends the snapshots of a list; `None` for a unix socket.
type Host = Option<IpAddr>;

/// Every list by its name and its host: two hosts that use the same name have a list each. Each id
/// stands in a list at most once.
#[derive(Debug, Default)]
pub(super) struct Lists(BTreeMap<String, BTreeMap<Host, Vec<String>>>);

impl Lists {
    /// Appends an id. One that is there already moves to the end: its snapshot began anew.
    pub(super) fn append(&mut self, list: &str, host: Host, id: &str) {
        let ids = self.0.entry(list.to_owned()).or_default().entry(host).or_default();
        ids.retain(|known| known != id);
        ids.push(id.to_owned());
    }

    /// The ids of a list, one host's after the other.
    pub(super) fn ids(&self, list: &str) -> Vec<String> {
        self.0.get(list).into_iter().flat_map(BTreeMap::values).flatten().cloned().collect()
    }

    /// The ids of one host's list.
    pub(super) fn ids_of(&self, list: &str, host: Host) -> &[String] {
        self.0.get(list).and_then(|hosts| hosts.get(&host)).map_or(&[], Vec::as_slice)
    }

    /// The lists of a host that an id stands in.
    pub(super) fn names_of(&self, id: &str, host: Host) -> Vec<String> {
        let has = |hosts: &BTreeMap<Host, Vec<String>>| {
            hosts.get(&host).is_some_and(|ids| ids.iter().any(|known| known == id))
        };
        self.0.iter().filter(|(_, hosts)| has(hosts)).map(|(name, _)| name.clone()).collect()
    }

    /// Those that stand before an id in any list: its parents, and theirs.
    pub(super) fn parents(&self, id: &str) -> Vec<String> {
        let before = |ids: &Vec<String>| {
            ids.iter().position(|known| known == id).map(|own| ids[..own].to_vec())
        };
        self.0.values().flat_map(BTreeMap::values).filter_map(before).flatten().collect()
    }

    /// How many ids there are in all lists.
    pub(super) fn len(&self) -> usize {
        self.0.values().flat_map(BTreeMap::values).map(Vec::len).sum()
    }

    /// A snapshot is no longer held.
    pub(super) fn forget(&mut self, id: &str) {
        self.0.retain(|_, hosts| {
            hosts.retain(|_, ids| {
                ids.retain(|known| known != id);
                !ids.is_empty()
            });
            !hosts.is_empty()
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
            lists.append("web", None, id);
        }
        assert_eq!(lists.ids("web"), ["1", "3", "2"]);
        assert_eq!(lists.parents("2"), ["1", "3"]);
        assert_eq!(lists.parents("1"), [""; 0]);
        assert_eq!(lists.ids("db"), [""; 0]);
    }

    #[test]
    fn hosts_have_lists_of_their_own() {
        let (mut lists, other) = (Lists::default(), Some([192, 0, 2, 7].into()));
        lists.append("", None, "a");
        lists.append("", other, "b");
        assert_eq!(
            (lists.ids_of("", None), lists.ids_of("", other)),
            (&["a".into()][..], &["b".into()][..])
        );
        assert_eq!(lists.parents("b"), [""; 0]);
        assert_eq!(lists.ids(""), ["a", "b"]);
    }

    #[test]
    fn what_is_no_longer_held_leaves_every_list() {
        let mut lists = Lists::default();
        lists.append("", None, "1");
        lists.append("web", None, "1");
        lists.append("web", None, "2");
        lists.forget("1");
        assert_eq!((lists.ids("").len(), lists.ids("web")), (0, vec!["2".to_owned()]));
        assert_eq!(lists.len(), 1);
    }
}
