//! Who sees which part of a layer: how many holds there are on each page of it.

use std::collections::BTreeMap;
use std::ops::Range;

/// A count for each page number, kept as the numbers at which it changes.
#[derive(Debug, Default)]
pub(super) struct Seen {
    /// The count from this number to the next; before the first it is 0. No two neighbours are
    /// equal.
    from: BTreeMap<u64, usize>,
}

impl Seen {
    /// One more sees these pages.
    pub(super) fn add(&mut self, range: Range<u64>) {
        self.cut(range.start);
        self.cut(range.end);
        for (_, count) in self.from.range_mut(range.clone()) {
            *count += 1;
        }
        self.heal(range);
    }

    /// One of those who [saw](Self::add) these pages sees them no longer. Returns what nobody sees
    /// now.
    pub(super) fn remove(&mut self, range: Range<u64>) -> Vec<Range<u64>> {
        self.cut(range.start);
        self.cut(range.end);
        let mut unseen: Vec<Range<u64>> = Vec::new();
        let mut open = None;
        for (number, count) in self.from.range_mut(range.clone()) {
            unseen.extend(open.take().map(|start| start..*number));
            *count = count.saturating_sub(1);
            open = (*count == 0).then_some(*number);
        }
        unseen.extend(open.map(|start| start..range.end));
        self.heal(range);
        unseen
    }

    /// How many of these pages nobody sees.
    pub(super) fn unseen(&self, range: Range<u64>) -> u64 {
        let (mut at, mut count, mut unseen) = (range.start, self.before(range.start + 1), 0);
        for (number, next) in self.from.range(range.start + 1..range.end) {
            unseen += if count == 0 { number - at } else { 0 };
            (at, count) = (*number, *next);
        }
        unseen + if count == 0 { range.end - at } else { 0 }
    }

    /// Makes a number one at which the count may change.
    fn cut(&mut self, number: u64) {
        let before = self.before(number + 1);
        self.from.entry(number).or_insert(before);
    }

    /// Within a range all counts change alike: only at its ends may neighbours have become equal.
    fn heal(&mut self, range: Range<u64>) {
        for number in [range.start, range.end] {
            if self.from.get(&number) == Some(&self.before(number)) {
                self.from.remove(&number);
            }
        }
    }

    /// The count just before a number.
    fn before(&self, number: u64) -> usize {
        self.from.range(..number).next_back().map_or(0, |(_, count)| *count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

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
        assert!(seen.from.is_empty());
    }

    proptest! {
        #[test]
        fn it_counts_as_an_array_does(ranges in prop::collection::vec((0..40u64, 1..20u64), 1..40)) {
            let (mut seen, mut model) = (Seen::default(), [0usize; 64]);
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
                let counts: Vec<usize> = (0..64).map(|page| seen.before(page + 1)).collect();
                prop_assert_eq!(&counts, &model);
                let free = model[5..30].iter().filter(|count| **count == 0).count() as u64;
                prop_assert_eq!(seen.unseen(5..30), free);
                let neighbours: Vec<usize> = seen.from.values().copied().collect();
                prop_assert!(neighbours.windows(2).all(|pair| pair[0] != pair[1]));
            }
            for range in held {
                seen.remove(range);
            }
            prop_assert!(seen.from.is_empty());
        }
    }
}
