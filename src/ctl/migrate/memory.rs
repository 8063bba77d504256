//! The memory of the processes that are to move: how much there is, and how much of it was written to
//! since CRIU last looked.
//!
//! A pre-dump with `--track-mem` clears the soft-dirty bits; the kernel sets one when its page is written
//! to (`Documentation/admin-guide/mm/soft-dirty.rst`). So the next round can be counted before it is
//! made, by the rules by which CRIU chooses pages (`should_dump_page` in `criu/mem.c`). Memory that is
//! shared without a file CRIU does not track (`is_shmem_tracking_en` in `criu/shmem.c`): all of it goes in
//! every round.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use rustix::param::page_size;

/// More mapped memory than this is not looked through: it would take longer than it tells.
const MAX_MAPPED: u64 = 1 << 38;
/// Bytes of the pagemap that are read at a time.
const CHUNK: usize = 64 << 10;

/// Bits of an entry of `/proc/PID/pagemap` (`Documentation/admin-guide/mm/pagemap.rst`).
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const OF_FILE_OR_SHARED: u64 = 1 << 61;
const SOFT_DIRTY: u64 = 1 << 55;

/// The processes of a tree, its root first. Those that come or go meanwhile may be missing.
pub(super) fn tree(root: u32) -> Vec<u32> {
    let mut pids = vec![root];
    let mut next = 0;
    while let Some(pid) = pids.get(next) {
        pids.extend(children(*pid));
        next += 1;
    }
    pids
}

fn children(pid: u32) -> Vec<u32> {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    let lists = threads.flatten().map(|thread| thread.path().join("children"));
    let lists = lists.filter_map(|list| fs::read_to_string(list).ok());
    lists
        .flat_map(|list| list.split_whitespace().flat_map(str::parse).collect::<Vec<_>>())
        .collect()
}

/// The name of a process, as `ps` shows it.
pub(super) fn name(pid: u32) -> io::Result<String> {
    Ok(fs::read_to_string(format!("/proc/{pid}/comm"))?.trim_end().to_owned())
}

/// Whether a process is there and not dead, which it is before its parent has heard of it.
pub(super) fn lives(pid: u32) -> bool {
    let state = stat(pid).and_then(|fields| fields.chars().next());
    state.is_some_and(|state| !"ZX".contains(state))
}

/// The process whose child it is; `None` if there is none in this PID namespace.
pub(super) fn parent(pid: u32) -> Option<u32> {
    stat(pid)?.split(' ').nth(1)?.parse().ok().filter(|parent| *parent != 0)
}

/// What the kernel says of a process after its name (see proc(5)): its state comes first.
fn stat(pid: u32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name may have anything in it.
    stat.rsplit_once(") ").map(|(_, fields)| fields.to_owned())
}

/// The memory that a dump of these processes has to bring, in bytes: what is in memory or swapped
/// out, and belongs to no file. What is shared is counted for each.
pub(super) fn held(pids: &[u32]) -> u64 {
    let status = |pid: &u32| fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    pids.iter().map(status).map(|status| held_by_status(&status)).sum()
}

fn held_by_status(status: &str) -> u64 {
    let held = ["RssAnon:", "RssShmem:", "VmSwap:"];
    let lines = status.lines().filter(|line| held.iter().any(|name| line.starts_with(name)));
    let kib = lines.filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
    kib.sum::<u64>().saturating_mul(1024)
}

/// The memory of these processes that the next round brings, in bytes: what was written to since the
/// last one, and what is shared.
///
/// # Errors
///
/// When there is too much to look through, or it may not be looked at.
pub(super) fn dirty(pids: &[u32]) -> io::Result<u64> {
    let mut dirty = DirtyPages { budget: MAX_MAPPED, private: 0, shared: HashMap::new() };
    for pid in pids {
        match dirty.add(*pid) {
            // A process that has ended needs no page any more.
            Err(error) if fs::exists(format!("/proc/{pid}")).unwrap_or(true) => return Err(error),
            _ => {}
        }
    }
    Ok((dirty.private + dirty.shared.values().sum::<u64>()) * page_size() as u64)
}

/// How many runs of pages a dump of these processes has to bring: pages that follow each other.
///
/// # Errors
///
/// Those of [`dirty`].
pub(super) fn runs(pids: &[u32]) -> io::Result<u64> {
    let (mut budget, mut runs) = (MAX_MAPPED, 0);
    for pid in pids {
        match runs_of(*pid, &mut budget) {
            Ok(more) => runs += more,
            Err(error) if fs::exists(format!("/proc/{pid}")).unwrap_or(true) => return Err(error),
            Err(_) => {}
        }
    }
    Ok(runs)
}

fn runs_of(pid: u32, budget: &mut u64) -> io::Result<u64> {
    let (maps, pagemap) = mappings(pid)?;
    let mut runs = 0;
    for mapping in maps.lines().filter_map(Mapping::parse) {
        mapping.spend(budget)?;
        runs += mapping.count(&pagemap, |entry| mapping.is_held(entry))?.runs;
    }
    Ok(runs)
}

/// What a process has mapped, and its pagemap.
fn mappings(pid: u32) -> io::Result<(String, File)> {
    let proc = PathBuf::from(format!("/proc/{pid}"));
    Ok((fs::read_to_string(proc.join("maps"))?, File::open(proc.join("pagemap"))?))
}

/// Pages, and runs of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Count {
    pages: u64,
    runs: u64,
}

/// Pages that are counted.
struct DirtyPages {
    /// How many bytes of mappings may be looked through yet.
    budget: u64,
    private: u64,
    /// By what is shared: the most that one process has of it.
    shared: HashMap<String, u64>,
}

impl DirtyPages {
    fn add(&mut self, pid: u32) -> io::Result<()> {
        let (maps, pagemap) = mappings(pid)?;
        for mapping in maps.lines().filter_map(Mapping::parse) {
            mapping.spend(&mut self.budget)?;
            let pages = mapping.count(&pagemap, |entry| mapping.has_to_go(entry))?.pages;
            match mapping.shared {
                None => self.private += pages,
                Some(shared) => {
                    let most = self.shared.entry(shared).or_default();
                    *most = pages.max(*most);
                }
            }
        }
        Ok(())
    }
}

/// A mapping whose pages a dump brings.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Mapping {
    start: u64,
    end: u64,
    /// Of memory that is shared without a file: which part of what.
    shared: Option<String>,
}

impl Mapping {
    /// Reads a line of `/proc/PID/maps`; `None` if a dump brings no page of it.
    fn parse(line: &str) -> Option<Mapping> {
        let mut words = line.split_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let bound = |hex| u64::from_str_radix(hex, 16).ok();
        let (start, end) = (bound(start)?, bound(end)?);
        let private = words.next()?.ends_with('p');
        let (offset, device, inode) = (words.next()?, words.next()?, words.next()?);
        let name = words.next().unwrap_or_default();
        let has = |names: &[&str]| names.iter().any(|known| name.starts_with(known));
        let no_file = ["/dev/zero", "/SYSV", "/memfd:", "[anon_shmem"];
        let shared = (!private && has(&no_file)).then(|| format!("{device} {inode} {offset}"));
        let of_kernel = has(&["[vvar", "[vsyscall]", "[uprobes]"]);
        let wanted = start < end && !of_kernel && (private || shared.is_some());
        wanted.then_some(Mapping { start, end, shared })
    }

    /// Takes what it maps from what may be looked through.
    fn spend(&self, budget: &mut u64) -> io::Result<()> {
        *budget = budget
            .checked_sub(self.end - self.start)
            .ok_or_else(|| io::Error::other("too much is mapped"))?;
        Ok(())
    }

    /// How many of its pages are wanted, and how many runs of them there are.
    fn count(&self, pagemap: &File, wanted: impl Fn(u64) -> bool) -> io::Result<Count> {
        let page = page_size() as u64;
        let mut entries = vec![0; CHUNK];
        let (mut at, end) = (self.start / page * 8, self.end / page * 8);
        let (mut count, mut in_run) = (Count::default(), false);
        while at < end {
            let len = usize::try_from(end - at).unwrap_or(usize::MAX).min(entries.len());
            let got = pagemap.read_at(&mut entries[..len], at)? / 8 * 8;
            if got == 0 {
                break;
            }
            let read = entries[..got].chunks_exact(8).filter_map(|entry| entry.try_into().ok());
            for entry in read.map(u64::from_ne_bytes) {
                let is_wanted = wanted(entry);
                count.pages += u64::from(is_wanted);
                count.runs += u64::from(is_wanted && !in_run);
                in_run = is_wanted;
            }
            at += got as u64;
        }
        Ok(count)
    }

    /// Whether an entry of the pagemap tells of a page that a dump brings.
    fn is_held(&self, entry: u64) -> bool {
        let there = entry & (PRESENT | SWAPPED) != 0;
        there && (entry & OF_FILE_OR_SHARED == 0 || self.shared.is_some())
    }

    /// Whether an entry of the pagemap tells of a page that the next round brings.
    fn has_to_go(&self, entry: u64) -> bool {
        let there = entry & (PRESENT | SWAPPED) != 0;
        let written = entry & SOFT_DIRTY != 0 && entry & OF_FILE_OR_SHARED == 0;
        there && (written || self.shared.is_some())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_are_those_that_a_dump_brings() {
        let parse = Mapping::parse;
        let heap = "00400000-00402000 rw-p 00000000 00:00 0      [heap]";
        assert_eq!(parse(heap), Some(Mapping { start: 0x40_0000, end: 0x40_2000, shared: None }));
        let plain = "7f0000000000-7f0000001000 rw-p 00000000 00:00 0 ";
        assert!(parse(plain).is_some_and(|mapping| mapping.shared.is_none()));
        let shared = "7f00-8f00 rw-s 00001000 00:01 5   /dev/zero (deleted)";
        assert_eq!(parse(shared).and_then(|mapping| mapping.shared).unwrap(), "00:01 5 00001000");
        let of_file = "7f00-8f00 r--p 00000000 08:01 77 /usr/lib/x86_64-linux-gnu/libc.so.6";
        assert!(parse(of_file).is_some());
        for not in [
            "7f00-8f00 rw-s 00000000 08:01 77 /srv/data",
            "7ffe0000-7ffe1000 r--p 00000000 00:00 0 [vvar]",
            "ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0 [vsyscall]",
            "8f00-7f00 rw-p 0 00:00 0",
            "7f00 rw-p",
            "",
        ] {
            assert_eq!(parse(not), None, "{not}");
        }
    }

    #[test]
    fn pages_are_those_that_crius_next_round_takes() {
        let private = Mapping { start: 0, end: 1, shared: None };
        let shared = Mapping { shared: Some(String::new()), ..private };
        for (entry, in_private, in_shared) in [
            (PRESENT | SOFT_DIRTY, true, true),
            (SWAPPED | SOFT_DIRTY, true, true),
            (PRESENT | SOFT_DIRTY | OF_FILE_OR_SHARED, false, true),
            (PRESENT, false, true),
            (SOFT_DIRTY, false, false),
            (0, false, false),
        ] {
            assert_eq!(private.has_to_go(entry), in_private, "{entry:x}");
            assert_eq!(shared.has_to_go(entry), in_shared, "{entry:x}");
            assert!(!in_private || private.is_held(entry), "{entry:x}");
        }
    }

    #[test]
    fn pages_that_follow_each_other_are_a_run() {
        let pagemap = tempfile::tempfile().unwrap();
        let entries = [PRESENT, PRESENT, 0, SWAPPED, PRESENT | OF_FILE_OR_SHARED, PRESENT];
        let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_ne_bytes()).collect();
        pagemap.write_all_at(&bytes, 0).unwrap();
        let end = entries.len() as u64 * page_size() as u64;
        let private = Mapping { start: 0, end, shared: None };
        let count = private.count(&pagemap, |entry| private.is_held(entry)).unwrap();
        assert_eq!(count, Count { pages: 4, runs: 3 });
        let shared = Mapping { shared: Some(String::new()), ..private };
        let count = shared.count(&pagemap, |entry| shared.is_held(entry)).unwrap();
        assert_eq!(count, Count { pages: 5, runs: 2 });
    }

    #[test]
    fn memory_is_what_belongs_to_no_file() {
        let status = "Name:\tx\nVmRSS:\t 900 kB\nRssAnon:\t 512 kB\nRssFile:\t 300 kB\n\
                      RssShmem:\t 88 kB\nVmSwap:\t 1 kB\n";
        assert_eq!(held_by_status(status), 601 << 10);
        assert_eq!(held_by_status(""), 0);
    }

    #[test]
    fn this_process_can_be_looked_at() {
        let own = std::process::id();
        assert_eq!(tree(own).first(), Some(&own));
        assert!(held(&[own]) > 0);
        assert!(dirty(&[own]).is_ok());
        assert!(runs(&[own]).unwrap() > 0);
        assert!(name(own).is_ok_and(|name| !name.is_empty()));
    }
}
