//! What CRIU cannot restore from a pipe, and so not through the stream protocol: it has to be restored from files.
//!
//! Two places in CRIU (up to 4.2, and its main line of November 2025) need more of an image than to read it from its
//! beginning to its end:
//!
//! - `do_restore_nftables()` in `criu/net.c` asks fstat(2) how large the image is. The size of a pipe is 0: an empty script is run, and
//!   the restore succeeds without the rules.
//! - The restorer (`criu/pie/restorer.c`) reads the pages of private mappings that were not mapped before with preadv(2), which a pipe
//!   refuses (ESPIPE), so that the restore fails. With `--stream` all private mappings are mapped before, but for two kinds:
//!   `premap_priv_vmas()` in `criu/mem.c` leaves out those in huge pages and those that a plugin may move.
//!
//! Everything else was looked at, too, and is read in order: iptables images are the standard input of iptables-restore, shared
//! memory in huge pages is filled before it is mapped where it belongs.
//! `contrib/upstream/` tells CRIU's maintainers.

use super::fields::Fields;
use super::images::first_record;

/// `MAP_HUGETLB` of Linux, for the architectures that CRIU knows.
const MAP_HUGETLB: u64 = if cfg!(target_arch = "mips64") { 0x8_0000 } else { 0x4_0000 };

/// `VMA_FILE_PRIVATE`, `VMA_ANON_PRIVATE` and `VMA_EXT_PLUGIN` of `criu/include/image.h`: what a mapping is.
const VMA_FILE_PRIVATE: u64 = 1 << 6;
const VMA_ANON_PRIVATE: u64 = 1 << 9;
const VMA_EXT_PLUGIN: u64 = 1 << 27;

/// What of a snapshot has to be restored from files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NeedsFile {
    /// The rules of nftables in a network namespace.
    #[error("it has firewall rules, and CRIU runs none that come through a pipe")]
    Rules,
    /// Private memory in huge pages.
    #[error("it has private memory in huge pages, which CRIU cannot read from a pipe")]
    HugePages,
    /// Private memory that a plugin of CRIU's restores.
    #[error("it has private memory of a CRIU plugin, which CRIU cannot read from a pipe")]
    PluginMemory,
    /// Nobody has looked, or understood what is there. From files it is restored whatever it is.
    #[error("it cannot be told whether CRIU can read what it describes from a pipe")]
    Unknown,
}

/// What decides about an image, by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decides {
    /// Whether there is anything in it: nftables rules.
    Size,
    /// Which mappings it lists: those of a task.
    Mappings,
}

impl Decides {
    /// What decides about the image of that name; `None` if it goes through a pipe whatever is in it.
    pub fn of(name: &str) -> Option<Decides> {
        let stem = name.strip_suffix(".img")?;
        let (kind, number) = stem.rsplit_once('-')?;
        number.parse::<u32>().ok()?;
        match kind {
            "nftables" => Some(Decides::Size),
            "mm" => Some(Decides::Mappings),
            _ => None,
        }
    }
}

/// Whether the mappings that an `mm` image lists can be restored from a pipe; if not, why.
///
/// A mapping that has no pages would not need the file. That stands in another image, and a view costs nothing.
pub fn mappings_need_file(image: &[u8]) -> Option<NeedsFile> {
    let Some(mm) = first_record(image) else { return Some(NeedsFile::Unknown) };
    for field in Fields(mm) {
        let Some(field) = field else { return Some(NeedsFile::Unknown) };
        // `mm_entry.vmas`
        if let (14, Some(vma)) = (field.number, field.contents) {
            let found = mapping_needs_file(vma);
            if found.is_some() {
                return found;
            }
        }
    }
    None
}

/// The same for one mapping, a `vma_entry`.
fn mapping_needs_file(vma: &[u8]) -> Option<NeedsFile> {
    let (mut flags, mut status) = (0, 0);
    for field in Fields(vma) {
        match field.map(|field| (field.number, field.value)) {
            Some((6, Some(value))) => flags = value,
            Some((7, Some(value))) => status = value,
            Some(_) => {}
            None => return Some(NeedsFile::Unknown),
        }
    }
    if status & (VMA_FILE_PRIVATE | VMA_ANON_PRIVATE) == 0 {
        None
    } else if flags & MAP_HUGETLB != 0 {
        Some(NeedsFile::HugePages)
    } else if status & VMA_EXT_PLUGIN != 0 {
        Some(NeedsFile::PluginMemory)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::super::fields::put_field;
    use super::*;
    use proptest::prelude::*;

    const REGULAR: u64 = 1;
    const FILE_SHARED: u64 = 1 << 7;
    const ANON_SHARED: u64 = 1 << 8;
    const MAP_PRIVATE: u64 = 2;
    const MAP_ANONYMOUS: u64 = 0x20;

    fn vma(flags: u64, status: u64) -> Vec<u8> {
        let mut vma = Vec::new();
        let fields =
            [(1, 0x1000), (2, 0x20_1000), (3, 0), (4, 0), (5, 3), (6, flags), (7, status), (8, 1)];
        for (number, value) in fields {
            put_field(&mut vma, number, value);
        }
        vma
    }

    fn mm(vmas: &[Vec<u8>]) -> Vec<u8> {
        let mut record = Vec::new();
        put_field(&mut record, 1, 0x40_0000);
        put_field(&mut record, 12, 3);
        for vma in vmas {
            record.extend([14 << 3 | 2, u8::try_from(vma.len()).unwrap()]);
            record.extend(vma);
        }
        let len = u32::try_from(record.len()).unwrap().to_le_bytes();
        [&b"\x19\x43\x56\x54\x20\x28\x49\x57"[..], &len, &record].concat()
    }

    #[test]
    fn private_memory_in_huge_pages_or_of_a_plugin_needs_a_file() {
        let usual = vma(MAP_PRIVATE | MAP_ANONYMOUS, REGULAR | VMA_ANON_PRIVATE);
        for (flags, status, needs) in [
            (MAP_PRIVATE | MAP_ANONYMOUS, REGULAR | VMA_ANON_PRIVATE, None),
            (MAP_PRIVATE | MAP_HUGETLB, REGULAR | VMA_ANON_PRIVATE, Some(NeedsFile::HugePages)),
            // 2 MiB pages of a memfd, mapped privately
            (
                MAP_PRIVATE | MAP_HUGETLB | 21 << 26,
                REGULAR | VMA_FILE_PRIVATE,
                Some(NeedsFile::HugePages),
            ),
            (1 | MAP_HUGETLB, REGULAR | ANON_SHARED, None),
            (1 | MAP_HUGETLB, REGULAR | FILE_SHARED, None),
            (
                MAP_PRIVATE,
                REGULAR | VMA_FILE_PRIVATE | VMA_EXT_PLUGIN,
                Some(NeedsFile::PluginMemory),
            ),
            (1, REGULAR | FILE_SHARED | VMA_EXT_PLUGIN, None),
        ] {
            let image = mm(&[usual.clone(), vma(flags, status), usual.clone()]);
            assert_eq!(mappings_need_file(&image), needs, "{flags:#x} {status:#x}");
        }
        assert_eq!(mappings_need_file(&mm(&[])), None);
    }

    #[test]
    fn what_is_not_understood_needs_a_file() {
        let cut = mm(&[vma(MAP_PRIVATE, REGULAR | VMA_ANON_PRIVATE)]);
        for len in 0..cut.len() {
            assert_eq!(mappings_need_file(&cut[..len]), Some(NeedsFile::Unknown), "{len}");
        }
        assert_eq!(mappings_need_file(&mm(&[b"\x30".to_vec()])), Some(NeedsFile::Unknown));
    }

    #[test]
    fn the_images_that_decide_are_known_by_their_names() {
        for (name, decides) in [
            ("nftables-9.img", Some(Decides::Size)),
            ("mm-4711.img", Some(Decides::Mappings)),
            ("iptables-9.img", None),
            ("mm-x.img", None),
            ("mm.img", None),
            ("nftables-9", None),
        ] {
            assert_eq!(Decides::of(name), decides, "{name}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_look_panic(image: Vec<u8>) {
            mappings_need_file(&image);
        }
    }
}
