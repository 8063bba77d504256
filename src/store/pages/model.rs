//! Random chains of snapshots, in real memfds, against a model of plain maps.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use proptest::prelude::*;
use proptest::sample::Index as Pick;

use super::tests::{charge, fill, held, numbers, pages};
use super::*;
use crate::store::quota::Quota;

/// The number that each page is filled with, and its flags, by space and page.
type Model = BTreeMap<u64, BTreeMap<u64, (u64, u32)>>;

/// What a round does with some pages that follow each other.
#[derive(Debug, Clone, Copy, PartialEq)]
enum What {
    Add(u32),
    Inherit,
    Nothing,
}

/// How a round ends.
#[derive(Debug, Clone)]
enum End {
    Commit,
    /// Its session is lost.
    Cut(Pick),
    /// It sends a page again.
    Overlap(Pick),
    /// It names a page that the parent does not have.
    Orphan(u64),
}

#[derive(Debug, Clone)]
struct Step {
    parent: Option<Pick>,
    /// For each space, unless its process has exited: pages from the lowest address on.
    spaces: Vec<Option<Vec<(What, u64)>>>,
    /// Where in their order the spaces' pages begin to come.
    rotated: Pick,
    /// Which snapshots are dropped while it comes, and after it.
    drops: [Option<Pick>; 2],
    end: End,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let what = prop_oneof![
        4 => Just(What::Inherit), 2 => Just(What::Add(0)), 1 => Just(What::Add(2)), 1 => Just(What::Nothing)
    ];
    let space = prop::option::weighted(0.9, prop::collection::vec((what, 1..7u64), 0..14));
    let pick = any::<Pick>;
    let end = prop_oneof![
        6 => Just(End::Commit),
        1 => pick().prop_map(End::Cut),
        1 => pick().prop_map(End::Overlap),
        1 => (0..60u64).prop_map(End::Orphan),
    ];
    let drop = || prop::option::weighted(0.4, pick());
    let parent = prop::option::weighted(0.9, pick());
    let spaces = prop::collection::vec(space, 3);
    let step = (parent, spaces, pick(), [drop(), drop()], end).prop_map(
        |(parent, spaces, rotated, drops, end)| Step { parent, spaces, rotated, drops, end },
    );
    prop::collection::vec(step, 1..12)
}

/// All snapshots that are kept, and what they must hold.
struct Bench {
    quota: Quota,
    kept: Vec<(Flat<u64>, Model)>,
    next: u64,
}

impl Bench {
    fn run(&mut self, step: &Step) {
        let parent = step.parent.filter(|_| !self.kept.is_empty());
        let parent = parent.map(|pick| self.kept[pick.index(self.kept.len())].clone());
        let had = parent.as_ref().map(|(_, model)| model.clone()).unwrap_or_default();
        let mut round = Round::new(parent.map(|(flat, _)| flat));
        self.drop(step.drops[0]);

        let mut plan = plan(step, &had);
        let mut model = Model::new();
        for space in
            (0..).zip(&step.spaces).filter_map(|(space, pages)| pages.as_ref().map(|_| space))
        {
            round.open(&space).unwrap();
            model.insert(space, BTreeMap::new());
        }
        if let End::Cut(cut) = step.end {
            plan.truncate(cut.index(plan.len() + 1));
        }
        for (space, range, what) in &plan {
            self.act(&mut round, &mut model, &had, *space, *range, *what);
        }
        self.check([&had, &model]);
        match step.end {
            End::Commit => self.kept.push((round.commit().unwrap(), model)),
            End::Overlap(pick) if !plan.is_empty() => {
                let (space, range, _) = plan[pick.index(plan.len())];
                let again = charge(&self.quota, range);
                let refused = round.accept(&space, range, 0, again).unwrap_err();
                let (space, address) = (space.to_string(), range.address());
                assert_eq!(refused, Refused::Twice { space, address });
                assert_eq!(round.commit().unwrap_err(), refused);
            }
            End::Orphan(page) if !had.get(&0).is_some_and(|space| space.contains_key(&page)) => {
                let refused = round.inherit(&0, pages(page, 1)).unwrap_err();
                assert!(
                    refused.to_string().contains(&format!("{:#x} of page space 0", page * PAGE))
                );
                assert_eq!(round.commit().unwrap_err(), refused);
            }
            End::Cut(_) | End::Overlap(_) | End::Orphan(_) => drop(round),
        }
        self.check([]);
        self.drop(step.drops[1]);
        self.check([]);
    }

    fn act(
        &mut self,
        round: &mut Round<u64>,
        model: &mut Model,
        had: &Model,
        space: u64,
        range: PageRange,
        what: What,
    ) {
        let model = model.get_mut(&space).unwrap();
        let numbered = range.start..range.end;
        match what {
            What::Add(flags) => {
                let charge = charge(&self.quota, range);
                let place = round.accept(&space, range, flags, charge).unwrap();
                fill(&place, self.next);
                round.filled(place);
                model.extend(numbered.zip((self.next..).map(|number| (number, flags))));
                self.next += range.pages();
            }
            What::Inherit => {
                round.inherit(&space, range).unwrap();
                model.extend(numbered.map(|page| (page, had[&space][&page])));
            }
            What::Nothing => {}
        }
    }

    fn drop(&mut self, pick: Option<Pick>) {
        if let Some(pick) = pick.filter(|_| !self.kept.is_empty()) {
            self.kept.swap_remove(pick.index(self.kept.len()));
        }
    }

    /// Holds every snapshot against its model, and the charge and the memory against all of them and
    /// what `else` can be seen.
    fn check<const N: usize>(&self, others: [&Model; N]) {
        let mut layers = BTreeMap::new();
        let mut runs = 0;
        for (flat, model) in &self.kept {
            assert_eq!(&read(flat), model);
            for run in flat.spaces().flat_map(|(_, index)| index.runs()) {
                layers.insert(Rc::as_ptr(run.layer()), run.layer());
                runs += 1;
            }
            check_parts(flat, model);
        }
        let models = self.kept.iter().map(|(_, model)| model).chain(others);
        let seen: BTreeSet<u64> = models
            .flat_map(BTreeMap::values)
            .flat_map(BTreeMap::values)
            .map(|(number, _)| *number)
            .collect();
        assert_eq!(self.quota.used(), seen.len() as u64 * PAGE);
        let charged: u64 = layers.values().map(|layer| layer.charged()).sum();
        assert!(N > 0 || charged == self.quota.used(), "{charged}");
        let memory: u64 = layers.values().map(|layer| held(layer)).sum();
        assert!(memory <= charged + runs * PAGE, "{memory} bytes for {charged} in {runs} runs");
    }
}

/// What a round does, in the order in which it does it.
fn plan(step: &Step, had: &Model) -> Vec<(u64, PageRange, What)> {
    let mut plan = Vec::new();
    for (space, wanted) in (0..).zip(&step.spaces) {
        let mut at = 0;
        for (what, count) in wanted.iter().flatten() {
            // What the parent does not have cannot be inherited: the range is cut there.
            let has = |page: &u64| had.get(&space).is_some_and(|space| space.contains_key(page));
            let named = (at..at + count).filter(|page| *what != What::Inherit || has(page));
            for page in named {
                match plan.last_mut() {
                    Some((last, PageRange { start, end }, before))
                        if (*last, *end, *before) == (space, page, *what) && *start >= at =>
                    {
                        *end += 1;
                    }
                    _ => plan.push((space, pages(page, 1), *what)),
                }
            }
            at += count;
        }
    }
    plan.retain(|(_, _, what)| *what != What::Nothing);
    if !plan.is_empty() {
        let middle = step.rotated.index(plan.len());
        plan.rotate_left(middle);
    }
    plan
}

/// A snapshot, read back from its files.
fn read(flat: &Flat<u64>) -> Model {
    let space = |(space, index): (&u64, &Index)| {
        index.check();
        let run = |run: &Rc<Run>| {
            let flags = run.flags();
            let numbered = (run.range().start..).zip(numbers(run));
            numbered.map(|(page, number)| (page, (number, flags))).collect::<Vec<_>>()
        };
        (*space, index.runs().flat_map(run).collect())
    };
    flat.spaces().map(space).collect()
}

/// Holds what is looked up against the model, page for page.
fn check_parts(flat: &Flat<u64>, model: &Model) {
    for (space, index) in flat.spaces() {
        let range = pages(3, 50);
        let mut at = range.start;
        for part in index.parts(range) {
            let (part, there) = match part {
                Part::Pages { range, offset, run } => {
                    assert_eq!(offset - run.offset(), range.address() - run.range().address());
                    (range, true)
                }
                Part::Gap(range) => (range, false),
            };
            assert_eq!(part.start, at);
            assert!((part.start..part.end).all(|page| model[space].contains_key(&page) == there));
            at = part.end;
        }
        assert_eq!(at, range.end);
        for (nth, page) in (0..).zip(model[space].keys()) {
            let (mut runs, before) = index.runs_at(nth);
            assert_eq!(runs.next().unwrap().range().start + before, *page);
        }
        assert!(index.runs_at(index.pages()).0.next().is_none());
    }
}

proptest! {
    #[test]
    fn every_kept_snapshot_is_what_its_rounds_made_it(steps in steps()) {
        let mut bench = Bench { quota: Quota::new(1 << 30), kept: Vec::new(), next: 1 };
        for step in &steps {
            bench.run(step);
        }
        let quota = bench.quota.clone();
        drop(bench);
        prop_assert_eq!(quota.used(), 0);
    }
}
