use std::os::unix::fs::{FileExt, MetadataExt};
use std::pin::pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use super::seen::tests::visited;
use super::*;
use crate::store::quota::{Charge, Quota};

pub(super) fn charge(quota: &Quota, range: PageRange) -> Charge {
    let mut charging = pin!(quota.charge(range.bytes(), || 0, Duration::ZERO));
    match charging.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(charge) => charge.unwrap(),
        Poll::Pending => panic!("the quota is too small"),
    }
}

pub(super) fn pages(start: u64, count: u64) -> PageRange {
    PageRange::new(start * PAGE, count).unwrap()
}

/// Fills each page of a place with its own number, counted from `first`.
pub(super) fn fill(place: &Place, first: u64) {
    for page in 0..place.bytes() / PAGE {
        let bytes = (first + page).to_le_bytes().repeat(512);
        place.layer().file().write_all_at(&bytes, place.offset() + page * PAGE).unwrap();
    }
}

/// The numbers that the pages of a run are filled with.
pub(super) fn numbers(run: &Run) -> Vec<u64> {
    let mut bytes = vec![0; usize::try_from(run.range().bytes()).unwrap()];
    run.layer().file().read_exact_at(&mut bytes, run.offset()).unwrap();
    let number = |page: &[u8]| {
        let number: [u8; 8] = page[..8].try_into().unwrap();
        assert!(page.chunks(8).all(|word| word == number), "a page is mixed");
        u64::from_le_bytes(number)
    };
    bytes.chunks(4096).map(number).collect()
}

/// Bytes that the kernel holds for a layer.
pub(super) fn held(layer: &Layer) -> u64 {
    layer.file().metadata().unwrap().blocks() * 512
}

fn add(round: &mut Round<u64>, quota: &Quota, space: u64, range: PageRange, first: u64) {
    let place = round.accept(&space, range, 0, charge(quota, range)).unwrap();
    fill(&place, first);
    round.filled(place);
}

/// A snapshot of pages 0..`count` of space 1, numbered from `first`.
fn snapshot(quota: &Quota, count: u64, first: u64) -> Flat<u64> {
    let mut round = Round::new(None);
    add(&mut round, quota, 1, pages(0, count), first);
    round.commit().unwrap()
}

/// Start, numbers of the pages, flags of each run.
fn view(index: &Index) -> Vec<(u64, Vec<u64>, u32)> {
    let view = |run: &Rc<Run>| (run.range().address() / PAGE, numbers(run), run.flags());
    index.runs().map(view).collect()
}

#[test]
fn the_flat_pagemap_has_the_newest_page_for_every_address() {
    let quota = Quota::new(1 << 20);
    let parent = snapshot(&quota, 8, 100);
    let mut round = Round::new(Some(parent.clone()));
    round.inherit(&1, pages(0, 2)).unwrap();
    add(&mut round, &quota, 1, pages(2, 2), 200);
    round.inherit(&1, pages(5, 3)).unwrap();
    let flat = round.commit().unwrap();
    let index = flat.space(&1).unwrap();
    let seen = [(0, vec![100, 101], 0), (2, vec![200, 201], 0), (5, vec![105, 106, 107], 0)];
    assert_eq!(view(index), seen);
    assert_eq!((flat.pages(), index.len(), index.pages()), (7, 3, 7));
    assert_eq!(view(parent.space(&1).unwrap()), [(0, (100..108).collect(), 0)]);

    let bases: Vec<Rc<Layer>> =
        parent.space(&1).unwrap().runs().map(|run| run.layer().clone()).collect();
    assert_eq!((quota.used(), held(&bases[0])), (10 * PAGE, 8 * PAGE));
    drop(parent);
    assert_eq!((quota.used(), held(&bases[0])), (7 * PAGE, 5 * PAGE));
    assert_eq!(view(index), seen);
}

#[test]
fn a_range_is_looked_up_in_parts_and_gaps() {
    let quota = Quota::new(1 << 20);
    let mut round = Round::new(None);
    add(&mut round, &quota, 1, pages(10, 4), 0);
    add(&mut round, &quota, 1, pages(20, 4), 4);
    let flat = round.commit().unwrap();
    let parts = |start, count| -> Vec<(u64, u64, Option<u64>)> {
        let part = |part| match part {
            Part::Pages { range, offset, .. } => {
                (range.address() / PAGE, range.pages(), Some(offset / PAGE))
            }
            Part::Gap(gap) => (gap.address() / PAGE, gap.pages(), None),
        };
        flat.space(&1).unwrap().parts(pages(start, count)).map(part).collect()
    };
    assert_eq!(
        parts(5, 30),
        [(5, 5, None), (10, 4, Some(0)), (14, 6, None), (20, 4, Some(4)), (24, 11, None)]
    );
    assert_eq!(parts(12, 9), [(12, 2, Some(2)), (14, 6, None), (20, 1, Some(4))]);
    assert_eq!(parts(22, 1), [(22, 1, Some(6))]);
    assert_eq!(parts(15, 3), [(15, 3, None)]);
}

#[test]
fn the_pages_that_a_range_begins_with_are_told_and_which_of_them_lie_together() {
    let quota = Quota::new(1 << 20);
    let mut round = Round::new(Some(snapshot(&quota, 12, 100)));
    round.inherit(&1, pages(0, 4)).unwrap();
    add(&mut round, &quota, 1, pages(4, 2), 200);
    // With other flags it is another run.
    let more = pages(6, 2);
    let place = round.accept(&1, more, 2, charge(&quota, more)).unwrap();
    fill(&place, 202);
    round.filled(place);
    round.inherit(&1, pages(8, 2)).unwrap();
    let flat = round.commit().unwrap();
    let index = flat.space(&1).unwrap();
    for (page, count, leading, together) in [
        (0, 100, Some(10), Some((4, 0))),
        (0, 3, Some(3), Some((3, 0))),
        (2, 100, Some(8), Some((2, 2))),
        (4, 100, Some(6), Some((4, 0))),
        (5, 2, Some(2), Some((2, 1))),
        (7, 2, Some(2), Some((1, 3))),
        (8, 2, Some(2), Some((2, 8))),
        (10, 2, None, None),
    ] {
        let range = pages(page, count);
        assert_eq!(index.leading(range), leading.map(|count| pages(page, count)), "{range:?}");
        let found = index.together(range).map(|(found, layer, offset)| {
            let mut first = [0; 8];
            layer.file().read_exact_at(&mut first, offset).unwrap();
            let number = u64::from_le_bytes(first);
            assert_eq!(number % 100, if number >= 200 { page - 4 } else { page });
            (found, offset / PAGE)
        });
        assert_eq!(
            found,
            together.map(|(count, offset)| (pages(page, count), offset)),
            "{range:?}"
        );
    }
}

#[test]
fn runs_that_go_on_become_one_unless_their_flags_differ() {
    let quota = Quota::new(1 << 20);
    let mut round = Round::new(None);
    add(&mut round, &quota, 1, pages(0, 2), 0);
    add(&mut round, &quota, 1, pages(2, 2), 2);
    let range = pages(4, 1);
    let place = round.accept(&1, range, 2, charge(&quota, range)).unwrap();
    fill(&place, 4);
    round.filled(place);
    let parent = round.commit().unwrap();
    let seen = [(0, vec![0, 1, 2, 3], 0), (4, vec![4], 2)];
    assert_eq!(view(parent.space(&1).unwrap()), seen);

    let mut round = Round::new(Some(parent));
    for page in [1, 3, 4, 0, 2] {
        round.inherit(&1, pages(page, 1)).unwrap();
    }
    let flat = round.commit().unwrap();
    assert_eq!(view(flat.space(&1).unwrap()), seen);
}

#[test]
fn a_refused_round_changes_nothing_and_says_what_was_wrong() {
    let quota = Quota::new(1 << 20);
    let parent = snapshot(&quota, 4, 0);
    let refuse = |parent: Option<&Flat<u64>>, refuse: &dyn Fn(&mut Round<u64>) -> Refused| {
        let mut round = Round::new(parent.cloned());
        add(&mut round, &quota, 1, pages(2, 2), 10);
        let refused = refuse(&mut round);
        assert_eq!(round.commit().unwrap_err(), refused, "it is not forgotten");
        assert_eq!(quota.used(), 4 * PAGE);
        refused.to_string()
    };
    let parent = Some(&parent);
    assert_eq!(
        refuse(parent, &|round| round.inherit(&1, pages(0, 3)).unwrap_err()),
        "address 0x2000 of page space 1 came twice in one snapshot"
    );
    assert_eq!(
        refuse(parent, &|round| {
            let range = pages(3, 2);
            round.accept(&1, range, 0, charge(&quota, range)).unwrap_err()
        }),
        "address 0x3000 of page space 1 came twice in one snapshot"
    );
    assert_eq!(
        refuse(parent, &|round| round.inherit(&1, pages(4, 1)).unwrap_err()),
        "address 0x4000 of page space 1 is said to be in the parent, which does not have it"
    );
    assert_eq!(
        refuse(parent, &|round| round.inherit(&7, pages(0, 1)).unwrap_err()),
        "address 0x0 of page space 7 is said to be in the parent, which does not have it"
    );
    assert_eq!(
        refuse(None, &|round| round.inherit(&1, pages(0, 1)).unwrap_err()),
        "address 0x0 of page space 1 is said to be in the parent, and there is none"
    );
    assert_eq!(
        refuse(parent, &|round| {
            let (huge, range) = (Quota::new(u64::MAX), pages(16, i64::MAX as u64 / PAGE));
            round.accept(&1, range, 0, charge(&huge, range)).unwrap_err()
        }),
        "page space 1 has too many pages"
    );
}

#[test]
fn a_round_whose_pages_have_not_come_is_cut_short() {
    let quota = Quota::new(1 << 20);
    let mut round = Round::new(None);
    add(&mut round, &quota, 1, pages(0, 1), 0);
    let place = round.accept(&1, pages(1, 3), 0, charge(&quota, pages(1, 3))).unwrap();
    assert_eq!((place.offset(), place.bytes(), round.charged()), (PAGE, 3 * PAGE, 4 * PAGE));
    assert_eq!(
        round.commit().unwrap_err().to_string(),
        "the snapshot is cut short: 3 pages were announced and did not come"
    );
    assert_eq!(quota.used(), 3 * PAGE, "somebody may still write them");
    drop(place);
    assert_eq!(quota.used(), 0);
}

#[test]
fn a_space_that_is_named_is_there_and_one_that_is_not_is_dropped() {
    let quota = Quota::new(1 << 20);
    let parent = snapshot(&quota, 4, 0);
    let mut round = Round::new(Some(parent.clone()));
    round.open(&2).unwrap();
    let flat = round.commit().unwrap();
    assert!(flat.space(&1).is_none());
    assert!(flat.space(&2).unwrap().is_empty());
    let layer = Rc::downgrade(parent.space(&1).unwrap().runs().next().unwrap().layer());
    drop(parent);
    assert_eq!((quota.used(), layer.strong_count()), (0, 0), "the layer is closed");
}

#[test]
fn page_spaces_are_bounded() {
    let mut round = Round::<u64>::new(None);
    for space in 0..1 << 16 {
        round.open(&space).unwrap();
    }
    round.open(&7).unwrap();
    assert_eq!(
        round.open(&(1 << 16)).unwrap_err().to_string(),
        "page space 65536 is one too many: a snapshot has at most 65536"
    );
}

#[test]
fn a_reader_keeps_what_it_reads_while_later_rounds_are_committed() {
    let quota = Quota::new(1 << 20);
    let reader = snapshot(&quota, 4, 0);
    let mut newest = reader.clone();
    for number in 1..=3 {
        let mut round = Round::new(Some(newest));
        add(&mut round, &quota, 1, pages(0, 3), 100 * number);
        round.inherit(&1, pages(3, 1)).unwrap();
        newest = round.commit().unwrap();
    }
    assert_eq!(quota.used(), (4 + 3) * PAGE);
    assert_eq!(view(reader.space(&1).unwrap()), [(0, vec![0, 1, 2, 3], 0)]);
    drop(reader);
    assert_eq!(quota.used(), 4 * PAGE);
    assert_eq!(view(newest.space(&1).unwrap()), [(0, vec![300, 301, 302], 0), (3, vec![3], 0)]);
}

#[test]
fn a_page_that_sits_in_a_pipe_survives_its_being_punched() {
    let quota = Quota::new(1 << 20);
    let parent = snapshot(&quota, 4, 7);
    let run = parent.space(&1).unwrap().runs().next().unwrap().clone();
    let (out, into) = rustix::pipe::pipe().unwrap();
    let (mut offset, len) = (run.offset(), 3 * 4096);
    let moved = crate::sys::pipe::transfer_from_file(run.layer(), &mut offset, &into, len).unwrap();
    assert_eq!(moved, len);

    let mut round = Round::new(Some(parent));
    round.inherit(&1, pages(3, 1)).unwrap();
    let _flat = round.commit().unwrap();
    let layer = run.layer().clone();
    drop(run);
    assert_eq!((quota.used(), held(&layer)), (PAGE, PAGE));
    let mut bytes = vec![0; len];
    rustix::io::retry_on_intr(|| rustix::io::read(&out, &mut bytes)).unwrap();
    for (page, number) in bytes.chunks(4096).zip(7u64..) {
        assert!(page.chunks(8).all(|word| word == number.to_le_bytes()));
    }
}

/// What it costs to send every second page of `count` again, and then, while that is kept, to say of each single
/// page that it is as before: visits to nodes of [`Seen`](super::seen), for each run.
fn visits_a_run(count: u64) -> u64 {
    let quota = Quota::new(u64::MAX);
    let all = pages(0, count);
    let mut first = Round::new(None);
    let place = first.accept(&1, all, 0, charge(&quota, all)).unwrap();
    first.filled(place);
    let first = first.commit().unwrap();
    let before = visited();
    let mut second = Round::new(Some(first.clone()));
    for page in (0..count).step_by(2) {
        let place = second.accept(&1, pages(page, 1), 0, charge(&quota, pages(page, 1))).unwrap();
        second.filled(place);
        second.inherit(&1, pages(page + 1, 1)).unwrap();
    }
    let second = second.commit().unwrap();
    // Its runs become one again, over all that the second has cut out.
    let mut third = Round::new(Some(first.clone()));
    for page in 0..count {
        third.inherit(&1, pages(page, 1)).unwrap();
    }
    let third = third.commit().unwrap();
    assert_eq!((second.pages(), third.space(&1).unwrap().len()), (count, 1));
    drop((first, third));
    assert_eq!(quota.used(), count * PAGE);
    drop(second);
    assert_eq!(quota.used(), 0);
    (visited() - before) / (2 * count)
}

#[test]
fn what_a_run_costs_hardly_grows_with_the_run_that_it_is_cut_out_of() {
    let (small, big) = (visits_a_run(1 << 11), visits_a_run(1 << 15));
    // With the logarithm: 1.4 times. By walking all it would be 16 times.
    assert!(big * 10 <= small * 16, "{small} visits a run of 2^11 pages, {big} of 2^15");
}
