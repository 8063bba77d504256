//! The format of CRIU's image files, as far as the relay has to know it: enough to tell an image
//! that is whole from one that was cut short.
//!
//! An image is one or two 32-bit magic numbers and then records, each a 32-bit length and a
//! protobuf message (`criu/protobuf.c`, <https://criu.org/Images>). Some are raw, and some carry
//! raw bytes between their records (`criu/image-desc.c`, `lib/pycriu/images/images.py`).

use std::io::{self, BufReader, Read, Seek};

/// The image that a dump writes last, and only on success.
pub const INVENTORY: &str = "inventory.img";

/// Images that start with this have a second magic number of their own (`criu/include/magic.h`).
const IMG_COMMON_MAGIC: u32 = 0x5456_4319;
/// The same for images that only tools read.
const IMG_SERVICE_MAGIC: u32 = 0x5510_5940;

/// The images that are records from their magic number to their end, without `.img` and the number
/// of their task or namespace. Raw images, those with raw bytes between their records, and those
/// that a later CRIU or a plugin may write are not judged.
#[rustfmt::skip]
const RECORDS: [&str; 48] = [
    "apparmor", "binfmt-misc", "bpfmap-file", "cgroup", "core", "cpuinfo", "creds", "eventfd",
    "eventpoll", "eventpoll-tfd", "ext-files", "fanotify", "fanotify-mark", "fdinfo", "fifo",
    "filelocks", "files", "fs", "ids", "inetsk", "inotify", "inotify-wd", "inventory",
    "ipcns-var", "itimers", "memfd", "mm", "mountpoints", "netdev", "netlinksk", "netns",
    "ns-files", "packetsk", "pagemap", "pagemap-shmem", "pidns", "pipes", "posix-timers",
    "pstree", "reg-files", "remap-fpath", "rlimit", "seccomp", "sigacts", "signalfd", "timens",
    "timerfd", "unixsk",
];

/// Whether an image of that name is records from its magic number to its end.
pub fn is_records(name: &str) -> bool {
    let Some(stem) = name.strip_suffix(".img") else { return false };
    let kind = stem.trim_end_matches(|digit: char| digit.is_ascii_digit());
    let kind = if kind.len() < stem.len() { kind.strip_suffix('-').unwrap_or(kind) } else { kind };
    RECORDS.contains(&kind)
}

/// Whether CRIU may splice what it writes into an image of that name: the memory of its process, or files and pipes that
/// others share, which may change as long as nobody has copied it. All else it writes by write(2), which copies.
pub fn may_be_lent(name: &str) -> bool {
    !is_records(name)
}

/// Why an image is not whole.
#[derive(Debug, thiserror::Error)]
pub enum CutShort {
    /// It ends before or within its magic numbers.
    #[error("it ends within its magic number, at byte {0}")]
    Magic(u64),
    /// A record's length is cut, or its record is.
    #[error("the record at byte {at} needs {needed} bytes more than the image has")]
    Record {
        /// Where the record begins, in bytes from the image's start.
        at: u64,
        /// How many bytes are missing.
        needed: u64,
    },
    /// It could not be read.
    #[error("it cannot be read: {0}")]
    Io(#[from] io::Error),
}

/// A walk over the records of an image. It reads lengths only; the records are skipped.
#[derive(Debug)]
pub struct Walk<R> {
    image: BufReader<R>,
    len: u64,
    /// Where the next record begins.
    at: u64,
    records: u64,
}

impl<R: Read + Seek> Walk<R> {
    /// Begins at the start of an image of `len` bytes.
    pub fn begin(mut image: BufReader<R>, len: u64) -> Result<Walk<R>, CutShort> {
        let mut at = 4;
        if len < at {
            return Err(CutShort::Magic(len));
        }
        let magic = read_u32(&mut image)?;
        if magic == IMG_COMMON_MAGIC || magic == IMG_SERVICE_MAGIC {
            at += 4;
            if len < at {
                return Err(CutShort::Magic(len));
            }
            read_u32(&mut image)?;
        }
        Ok(Walk { image, len, at, records: 0 })
    }

    /// Walks on, over at most `most` records. Returns how many the image has once it is at its end.
    pub fn go_on(&mut self, most: u64) -> Result<Option<u64>, CutShort> {
        let Walk { len, at, .. } = *self;
        let mut at = at;
        for _ in 0..most {
            if at >= len {
                return Ok(Some(self.records));
            }
            if len - at < 4 {
                return Err(CutShort::Record { at, needed: 4 - (len - at) });
            }
            let record = read_u32(&mut self.image)?;
            let end = at + 4 + u64::from(record);
            if end > len {
                return Err(CutShort::Record { at, needed: end - len });
            }
            self.image.seek_relative(i64::from(record))?;
            at = end;
            self.at = at;
            self.records += 1;
        }
        Ok(None)
    }
}

/// The first record of an image that is all there, without its length; `None` if there is no such record.
pub(super) fn first_record(image: &[u8]) -> Option<&[u8]> {
    let (magic, mut rest) = image.split_first_chunk()?;
    if [IMG_COMMON_MAGIC, IMG_SERVICE_MAGIC].contains(&u32::from_le_bytes(*magic)) {
        rest = rest.get(4..)?;
    }
    let (len, rest) = rest.split_first_chunk()?;
    rest.get(..usize::try_from(u32::from_le_bytes(*len)).ok()?)
}

fn read_u32(image: &mut impl Read) -> io::Result<u32> {
    let mut bytes = [0; 4];
    image.read_exact(&mut bytes)?;
    Ok(u32::from_le_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Cursor;

    fn image(records: &[&[u8]]) -> Vec<u8> {
        let mut bytes = IMG_COMMON_MAGIC.to_le_bytes().to_vec();
        bytes.extend_from_slice(&0x5831_3116u32.to_le_bytes());
        for record in records {
            bytes.extend_from_slice(&u32::try_from(record.len()).unwrap().to_le_bytes());
            bytes.extend_from_slice(record);
        }
        bytes
    }

    fn check(bytes: &[u8]) -> Result<u64, CutShort> {
        let mut walk = Walk::begin(BufReader::new(Cursor::new(bytes)), bytes.len() as u64)?;
        loop {
            if let Some(records) = walk.go_on(2)? {
                return Ok(records);
            }
        }
    }

    #[test]
    fn every_cut_but_those_between_records_is_seen() {
        let whole = image(&[b"one", b"", b"three"]);
        assert_eq!(check(&whole).unwrap(), 3);
        let between = [8, 15, 19, whole.len()];
        for cut in 0..=whole.len() {
            assert_eq!(check(&whole[..cut]).is_ok(), between.contains(&cut), "cut at {cut}");
        }
    }

    #[test]
    fn a_length_beyond_the_image_is_a_cut() {
        let mut bytes = image(&[]);
        bytes.extend_from_slice(&[0xff; 4]);
        let error = check(&bytes).unwrap_err().to_string();
        assert_eq!(error, "the record at byte 8 needs 4294967295 bytes more than the image has");
    }

    #[test]
    fn raw_and_mixed_images_are_not_judged_as_records() {
        for name in ["pages-1.img", "tmpfs-52.tar.gz.img", "sk-queues.img", "iptables-9.img"] {
            assert!(!is_records(name), "{name}");
        }
        for name in ["inventory.img", "core-7.img", "pagemap-shmem-2.img", "netns-9.img"] {
            assert!(is_records(name), "{name}");
        }
        assert!(!is_records("something-new.img"));
    }
}
