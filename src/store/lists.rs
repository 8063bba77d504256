//! Lists of snapshot ids, oldest first: which snapshot's parent is which. The ids of one process, from its first
//! pre-dump to its dump, are a chain. A list of one migration is one chain; CRIU's old clients know one list for
//! all, and there a chain ends with the dump that says the end of all its snapshots.

use std::collections::BTreeMap;
use std::net::IpAddr;

/// The host that sends the snapshots of a list; `None` for a unix socket.
type Host = Option<IpAddr>;

/// Every list by its name and its host: two hosts that use the same name have a list each. Each id
/// stands in a list at most once.
#[derive(Debug, Default)]
pub(super) struct Lists(BTreeMap<String, BTreeMap<Host, Vec<Entry>>>);

/// An id in a list.
#[derive(Debug)]
struct Entry {
    id: String,
    /// Whether it is the last of its chain: what comes after it has other parents, or none.
    ends_chain: bool,
}

impl Lists {
    /// Appends an id. One that is there already moves to the end: its snapshot began anew.
    pub(super) fn append(&mut self, list: &str, host: Host, id: &str) {
        let entries = self.0.entry(list.to_owned()).or_default().entry(host).or_default();
        remove(entries, id);
        entries.push(Entry { id: id.to_owned(), ends_chain: false });
    }

    /// The ids of a list, one host's after the other.
    pub(super) fn ids(&self, list: &str) -> Vec<String> {
        let entries = self.0.get(list).into_iter().flat_map(BTreeMap::values).flatten();
        entries.map(|entry| entry.id.clone()).collect()
    }

    /// The ids of the chain of one host's list that has not ended.
    pub(super) fn open_chain(&self, list: &str, host: Host) -> Vec<String> {
        let entries = self.entries(list, host);
        let from = entries.iter().rposition(|entry| entry.ends_chain).map_or(0, |last| last + 1);
        entries[from..].iter().map(|entry| entry.id.clone()).collect()
    }

    /// Whether an id stands in one host's list.
    pub(super) fn has(&self, list: &str, host: Host, id: &str) -> bool {
        self.entries(list, host).iter().any(|entry| entry.id == id)
    }

    /// The lists of a host that an id stands in.
    pub(super) fn names_of(&self, id: &str, host: Host) -> Vec<String> {
        self.0.keys().filter(|name| self.has(name, host, id)).cloned().collect()
    }

    /// An id is the last of its chain.
    pub(super) fn end_chain(&mut self, id: &str) {
        let entries = self.0.values_mut().flat_map(BTreeMap::values_mut).flatten();
        entries.filter(|entry| entry.id == id).for_each(|entry| entry.ends_chain = true);
    }

    /// Those that stand before an id in its chain, in any list: its parents, and theirs.
    pub(super) fn parents(&self, id: &str) -> Vec<String> {
        let before = |entries: &Vec<Entry>| {
            let before = &entries[..entries.iter().position(|entry| entry.id == id)?];
            let from = before.iter().rposition(|entry| entry.ends_chain).map_or(0, |last| last + 1);
            Some(before[from..].iter().map(|entry| entry.id.clone()).collect::<Vec<_>>())
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
            hosts.retain(|_, entries| {
                remove(entries, id);
                !entries.is_empty()
            });
            !hosts.is_empty()
        });
    }

    fn entries(&self, list: &str, host: Host) -> &[Entry] {
        self.0.get(list).and_then(|hosts| hosts.get(&host)).map_or(&[], Vec::as_slice)
    }
}

/// Takes an id out. Where its chain ended, it ends with the one before.
fn remove(entries: &mut Vec<Entry>, id: &str) {
    let Some(at) = entries.iter().position(|entry| entry.id == id) else { return };
    let removed = entries.remove(at);
    if let (true, Some(before)) = (removed.ends_chain, at.checked_sub(1)) {
        entries[before].ends_chain = true;
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
            (lists.open_chain("", None), lists.open_chain("", other)),
            (["a".into()].into(), ["b".into()].into())
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

    #[test]
    fn a_chain_ends_and_the_next_one_has_other_parents() {
        let mut lists = Lists::default();
        for id in ["a1", "a2", "a3"] {
            lists.append("", None, id);
        }
        lists.end_chain("a3");
        assert_eq!(lists.open_chain("", None), [""; 0]);
        for id in ["b1", "b2"] {
            lists.append("", None, id);
        }
        assert_eq!(lists.open_chain("", None), ["b1", "b2"]);
        assert_eq!(
            (lists.parents("b2"), lists.parents("a3")),
            (vec!["b1".into()], vec!["a1".into(), "a2".into()])
        );
        assert_eq!(lists.ids("").len(), 5);
        // Whatever becomes of its last one.
        lists.forget("a3");
        assert_eq!((lists.parents("b1"), lists.parents("a2")), (vec![], vec!["a1".into()]));
        lists.append("", None, "a2");
        assert_eq!(lists.parents("a2"), ["b1", "b2"]);
        lists.forget("a1");
        assert_eq!(lists.parents("b2"), ["b1"]);
    }
}
