//! `stats-dump`: what a dump or pre-dump cost, as CRIU wrote it into its work-dir
//! (`criu/stats.c`, `images/stats.proto`).

use std::time::Duration;

use prost::Message;

/// The file's name.
pub const STATS_DUMP: &str = "stats-dump";

/// The first magic number of images that only tools read, `IMG_SERVICE_MAGIC`, and the second one,
/// `STATS_MAGIC` (`criu/include/magic.h`).
const MAGICS: [u32; 2] = [0x5510_5940, 0x5709_3306];

/// Why a `stats-dump` says nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadStats {
    /// It is not such a file.
    #[error("it does not begin as CRIU's statistics do")]
    Magic,
    /// It ends too early.
    #[error("it is cut short")]
    Short,
    /// Its message cannot be decoded.
    #[error("its message is malformed: {0}")]
    Malformed(#[from] prost::DecodeError),
    /// It is about a restore.
    #[error("it tells of no dump")]
    NoDump,
}

/// What a dump cost.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DumpStats {
    /// How long it took until every task stood still.
    pub freezing: Duration,
    /// How long they stood still after that.
    pub frozen: Duration,
    /// How long writing pages took; in a pre-dump the tasks run meanwhile.
    pub memory_write: Duration,
    /// Pages that were looked at, of private and of shared memory.
    pub pages_scanned: u64,
    /// Pages left out because the parent has them.
    pub pages_in_parent: u64,
    /// Pages written.
    pub pages_written: u64,
}

/// `stats_entry`
#[derive(Clone, PartialEq, Message)]
struct StatsEntry {
    #[prost(message, optional, tag = "1")]
    dump: Option<DumpStatsEntry>,
}

/// `dump_stats_entry`, as far as it is of use here. Times are in microseconds.
#[derive(Clone, PartialEq, Message)]
struct DumpStatsEntry {
    #[prost(uint32, required, tag = "1")]
    freezing_time: u32,
    #[prost(uint32, required, tag = "2")]
    frozen_time: u32,
    #[prost(uint32, required, tag = "4")]
    memwrite_time: u32,
    #[prost(uint64, required, tag = "5")]
    pages_scanned: u64,
    #[prost(uint64, required, tag = "6")]
    pages_skipped_parent: u64,
    #[prost(uint64, required, tag = "7")]
    pages_written: u64,
    // Shared memory is told apart since CRIU 3.13.
    #[prost(uint64, optional, tag = "12")]
    shpages_scanned: Option<u64>,
    #[prost(uint64, optional, tag = "13")]
    shpages_skipped_parent: Option<u64>,
    #[prost(uint64, optional, tag = "14")]
    shpages_written: Option<u64>,
}

impl DumpStats {
    /// Decodes a `stats-dump`.
    pub fn decode(bytes: &[u8]) -> Result<DumpStats, BadStats> {
        let (magics, rest) = bytes.split_at_checked(8).ok_or(BadStats::Short)?;
        let expected = MAGICS.iter().flat_map(|magic| magic.to_le_bytes());
        if !magics.iter().copied().eq(expected) {
            return Err(BadStats::Magic);
        }
        let (len, rest) = rest.split_first_chunk().ok_or(BadStats::Short)?;
        let len = usize::try_from(u32::from_le_bytes(*len)).map_err(|_| BadStats::Short)?;
        let message = rest.get(..len).ok_or(BadStats::Short)?;
        let dump = StatsEntry::decode(message)?.dump.ok_or(BadStats::NoDump)?;
        Ok(DumpStats::from(&dump))
    }

    /// How long the tasks stood still in all.
    pub fn stopped(&self) -> Duration {
        self.freezing + self.frozen
    }
}

impl From<&DumpStatsEntry> for DumpStats {
    fn from(entry: &DumpStatsEntry) -> DumpStats {
        let micros = |time: u32| Duration::from_micros(time.into());
        let sum = |pages: u64, shared: Option<u64>| pages.saturating_add(shared.unwrap_or(0));
        DumpStats {
            freezing: micros(entry.freezing_time),
            frozen: micros(entry.frozen_time),
            memory_write: micros(entry.memwrite_time),
            pages_scanned: sum(entry.pages_scanned, entry.shpages_scanned),
            pages_in_parent: sum(entry.pages_skipped_parent, entry.shpages_skipped_parent),
            pages_written: sum(entry.pages_written, entry.shpages_written),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As CRIU 4.1.1 writes it: a record after the two magic numbers.
    fn file(message: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0x40, 0x59, 0x10, 0x55, 0x06, 0x33, 0x09, 0x57];
        bytes.extend(u32::try_from(message.len()).unwrap().to_le_bytes());
        bytes.extend(message);
        bytes
    }

    const DUMP: [u8; 35] = [
        0x0a, 33, // dump
        0x08, 0xe8, 0x07, // freezing_time 1000
        0x10, 0xd0, 0x0f, // frozen_time 2000
        0x18, 0x01, // memdump_time 1
        0x20, 0xb8, 0x17, // memwrite_time 3000
        0x28, 0x90, 0x4e, // pages_scanned 10000
        0x30, 0x07, // pages_skipped_parent 7
        0x38, 0x8f, 0x40, // pages_written 8207
        0x40, 0x00, // irmap_resolve
        0x48, 0x00, // pages_lazy
        0x50, 0x01, 0x58, 0x02, // page_pipes, page_pipe_bufs
        0x60, 0x05, 0x68, 0x01, 0x70, 0x02, // shpages_…
    ];

    #[test]
    fn a_dump_tells_its_times_and_pages() {
        let stats = DumpStats::decode(&file(&DUMP)).unwrap();
        assert_eq!(stats.freezing, Duration::from_millis(1));
        assert_eq!(stats.stopped(), Duration::from_millis(3));
        assert_eq!(stats.memory_write, Duration::from_millis(3));
        let pages = (stats.pages_scanned, stats.pages_in_parent, stats.pages_written);
        assert_eq!(pages, (10_005, 8, 8209));
    }

    #[test]
    fn what_is_no_statistics_is_refused() {
        let whole = file(&DUMP);
        for len in 0..whole.len() {
            assert!(DumpStats::decode(&whole[..len]).is_err(), "{len}");
        }
        assert_eq!(DumpStats::decode(&file(&[])), Err(BadStats::NoDump));
        assert_eq!(DumpStats::decode(&file(&[0x12, 0])), Err(BadStats::NoDump));
        assert!(matches!(DumpStats::decode(&file(&[0x0a, 9, 1])), Err(BadStats::Malformed(_))));
        let mut other = whole;
        other[4] = 0;
        assert_eq!(DumpStats::decode(&other), Err(BadStats::Magic));
        let mut huge = file(&[]);
        huge[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(DumpStats::decode(&huge), Err(BadStats::Short));
    }
}
