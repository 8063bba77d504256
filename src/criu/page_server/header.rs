//! The headers: their two dialects, and how to read no byte more than one, since pages follow.

use prost::bytes::Buf;

use super::command::{BadCommand, Command};
use super::kind::Kind;
use crate::criu::pages::PAGE_SIZE;

/// The header of CRIU up to 4.1, in bytes; by as many one can tell which of the two it is.
pub const SHORT_LEN: usize = 24;
/// The header of CRIU from 4.2 on, in bytes.
pub const LONG_LEN: usize = 32;

/// Which header a client sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// CRIU up to 4.1: the number of pages has 32 bits.
    Short,
    /// CRIU from 4.2 on: it has 64 bits, after 4 bytes of padding.
    Long,
}

impl Dialect {
    /// How long its headers are, in bytes.
    pub fn header_len(self) -> usize {
        match self {
            Dialect::Short => SHORT_LEN,
            Dialect::Long => LONG_LEN,
        }
    }

    /// Tells the dialect by the first bytes of a connection. A dump begins with OPEN, OPEN2 or PARENT, a
    /// lazy-pages daemon with GET.
    ///
    /// `None` for CLOSE and `FORCE_CLOSE`, which have nothing but a command: a dump that failed before it
    /// opened anything begins with one of them.
    pub fn recognise(first: &[u8; SHORT_LEN]) -> Result<Option<Dialect>, BadCommand> {
        let Header { cmd, nr_pages: count, vaddr: middle, dst_id: last } = Header::short(first);
        // CRIU sets the padding to 0, but C promises nothing about it: the count of pages is looked at
        // only where the rest says that it is one.
        match Kind::of(cmd)? {
            // Neither count nor address, and no space is 0.
            Kind::Open | Kind::Open2 | Kind::Parent => match (middle, last) {
                (0, 0) => Ok(Some(Dialect::Long)),
                (0, _) if count == 0 => Ok(Some(Dialect::Short)),
                _ => Err(BadCommand::NoDialect),
            },
            // The middle is the address in the short one: aligned. In the long one it is the count, and
            // no lazy-pages daemon asks for as many as a page has bytes (at most 4 MiB,
            // `MAX_XFER_LEN` in criu/uffd.c).
            Kind::Get => match middle {
                address if address % PAGE_SIZE == 0 && count != 0 && fits_an_id(last) => {
                    Ok(Some(Dialect::Short))
                }
                1..PAGE_SIZE if last % PAGE_SIZE == 0 => Ok(Some(Dialect::Long)),
                _ => Err(BadCommand::NoDialect),
            },
            Kind::Close | Kind::ForceClose => {
                if (middle, last) == (0, 0) {
                    Ok(None)
                } else {
                    Err(BadCommand::NoDialect)
                }
            }
            kind @ (Kind::Add | Kind::AddFlags | Kind::Hole) => Err(BadCommand::First(kind)),
        }
    }
}

/// Whether the id of an image in GET can be that: a task's pid.
fn fits_an_id(id: u64) -> bool {
    (1..=i32::MAX as u64).contains(&id)
}

/// A header, whatever it means (`struct page_server_iov`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// The command, and flags above it.
    pub cmd: u32,
    /// How many pages.
    pub nr_pages: u64,
    /// Where they begin.
    pub vaddr: u64,
    /// Whose they are.
    pub dst_id: u64,
}

impl Header {
    /// Encodes it. Fails if the short header has no room for so many pages.
    pub fn encode(&self, dialect: Dialect) -> Result<Vec<u8>, BadCommand> {
        let mut bytes = self.cmd.to_le_bytes().to_vec();
        match dialect {
            Dialect::Short => {
                let pages = u32::try_from(self.nr_pages)
                    .map_err(|_| BadCommand::TooManyForShort(self.nr_pages))?;
                bytes.extend(pages.to_le_bytes());
            }
            Dialect::Long => {
                bytes.extend([0; 4]);
                bytes.extend(self.nr_pages.to_le_bytes());
            }
        }
        bytes.extend(self.vaddr.to_le_bytes());
        bytes.extend(self.dst_id.to_le_bytes());
        Ok(bytes)
    }

    /// Decodes a short one.
    pub fn short(bytes: &[u8; SHORT_LEN]) -> Header {
        let mut rest = &bytes[..];
        let (cmd, nr_pages) = (rest.get_u32_le(), rest.get_u32_le().into());
        Header { cmd, nr_pages, vaddr: rest.get_u64_le(), dst_id: rest.get_u64_le() }
    }

    /// Decodes a long one. The padding may have any value.
    pub fn long(bytes: &[u8; LONG_LEN]) -> Header {
        let mut rest = &bytes[..];
        let (cmd, _padding) = (rest.get_u32_le(), rest.get_u32_le());
        let nr_pages = rest.get_u64_le();
        Header { cmd, nr_pages, vaddr: rest.get_u64_le(), dst_id: rest.get_u64_le() }
    }
}

/// The headers of one connection, put together from the bytes as they come.
#[derive(Debug, Default)]
pub struct Reader {
    dialect: Option<Dialect>,
    bytes: [u8; LONG_LEN],
    have: usize,
    /// The connection began with its end.
    over: bool,
}

impl Reader {
    /// A reader for a connection on which nothing has come yet.
    pub fn new() -> Reader {
        Reader::default()
    }

    /// The dialect, once the first command has come.
    pub fn dialect(&self) -> Option<Dialect> {
        self.dialect
    }

    /// Whether a header has begun and not ended.
    pub fn is_within_header(&self) -> bool {
        self.have != 0
    }

    /// Where the bytes belong that are needed next, and as many as can be read without taking any of
    /// what may follow the header. Empty only after a connection that [began with its
    /// end](Dialect::recognise): its dialect is not known, and nothing can follow.
    pub fn room(&mut self) -> &mut [u8] {
        let needed = self.needed();
        &mut self.bytes[self.have..needed]
    }

    fn needed(&self) -> usize {
        if self.over { 0 } else { self.dialect.map_or(SHORT_LEN, Dialect::header_len) }
    }

    /// Takes note that the first `len` bytes of [the room](Reader::room) were filled, and returns the
    /// command if that was its end. After an error there is no telling where the next header begins.
    pub fn filled(&mut self, len: usize) -> Result<Option<Command>, BadCommand> {
        self.have = self.have.saturating_add(len).min(self.needed());
        if self.over || self.have < self.needed() {
            return Ok(None);
        }
        let Some(first) = self.bytes.first_chunk() else { return Ok(None) };
        if self.dialect.is_none() {
            self.dialect = Dialect::recognise(first)?;
            match self.dialect {
                None => self.over = true,
                Some(Dialect::Short) => {}
                Some(Dialect::Long) => return Ok(None),
            }
        }
        self.have = 0;
        let header = match self.dialect {
            None | Some(Dialect::Short) => Header::short(first),
            Some(Dialect::Long) => Header::long(&self.bytes),
        };
        Command::decode(&header).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::criu::pages::{Contents, Run, Space};
    use proptest::prelude::*;

    const TASK: Space = Space::Task(7);

    fn read(reader: &mut Reader, mut bytes: &[u8]) -> Result<Option<Command>, BadCommand> {
        loop {
            let room = reader.room();
            let len = room.len().min(bytes.len());
            room[..len].copy_from_slice(&bytes[..len]);
            bytes = &bytes[len..];
            let command = reader.filled(len)?;
            if command.is_some() || bytes.is_empty() {
                assert!(bytes.is_empty(), "read beyond the header");
                return Ok(command);
            }
        }
    }

    fn first(bytes: &[u8]) -> Result<Option<Command>, BadCommand> {
        read(&mut Reader::new(), bytes)
    }

    #[test]
    fn the_bytes_are_what_criu_sends() {
        let open2 = Command::Open { space: TASK, answer: true };
        let short = b"\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x01\x07\0\0\0\0\0\0";
        let long = b"\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x01\x07\0\0\0\0\0\0";
        assert_eq!(open2.header().encode(Dialect::Short).unwrap(), short);
        assert_eq!(open2.header().encode(Dialect::Long).unwrap(), long);
        assert_eq!(first(short), Ok(Some(open2)));
        assert_eq!(first(long), Ok(Some(open2)));

        let run = Run::new(0x7fff_1234_5000, 0x203, Contents::Present { lazy: true }).unwrap();
        let pages = Command::Pages { space: Space::Shmem(0x0102), run };
        assert_eq!(
            pages.header().encode(Dialect::Short).unwrap(),
            b"\x06\0\x06\0\x03\x02\0\0\0\x50\x34\x12\xff\x7f\0\0\x02\x02\x01\0\0\0\0\0"
        );
        assert_eq!(
            pages.header().encode(Dialect::Long).unwrap(),
            b"\x06\0\x06\0\0\0\0\0\x03\x02\0\0\0\0\0\0\0\x50\x34\x12\xff\x7f\0\0\x02\x02\x01\0\0\0\0\0"
        );
        let force = Command::ForceClose.header();
        assert_eq!(force.encode(Dialect::Short).unwrap()[..5], *b"\x24\x10\0\0\0");
        let many = Header { nr_pages: 1 << 32, ..force };
        assert_eq!(many.encode(Dialect::Short), Err(BadCommand::TooManyForShort(1 << 32)));
        assert_eq!(Header::long(many.encode(Dialect::Long).unwrap()[..].try_into().unwrap()), many);
    }

    #[test]
    fn the_dialect_is_recognised_whatever_the_padding_is() {
        let commands = [
            Command::Open { space: TASK, answer: true },
            Command::Open { space: Space::Shmem(99), answer: false },
            Command::Parent { space: TASK },
            Command::Get { id: 4096, address: 0x40_0000, pages: 1 },
            Command::Get { id: 7, address: 0x7fff_1234_5000, pages: 1024 },
        ];
        for command in commands {
            for dialect in [Dialect::Short, Dialect::Long] {
                for padding in [0, 0xaa] {
                    let mut bytes = command.header().encode(dialect).unwrap();
                    if dialect == Dialect::Long {
                        bytes[4..8].fill(padding);
                    }
                    let mut reader = Reader::new();
                    assert_eq!(read(&mut reader, &bytes), Ok(Some(command)), "{command:?}");
                    assert_eq!(reader.dialect(), Some(dialect), "{command:?}");
                    assert_eq!(reader.room().len(), dialect.header_len());
                }
            }
        }
    }

    #[test]
    fn what_fits_neither_dialect_is_refused() {
        let header = |cmd, nr_pages, vaddr, dst_id| {
            first(&Header { cmd, nr_pages, vaddr, dst_id }.encode(Dialect::Short).unwrap())
        };
        for (cmd, nr_pages, vaddr, dst_id) in [
            (4, 1, 0, 0x701),      // OPEN2 with padding and an address in the long one
            (4, 0, 4096, 0x701),   // with an address in the short one
            (5, 0, 1, 0),          // PARENT with a count in the long one
            (7, 0, 4096, 7),       // GET for no pages
            (7, 1, 4096, 0),       // for nobody
            (7, 1, 4096, 1 << 31), // for a pid that is none
            (7, 1, 4097, 4096),    // unaligned, and too many
            (7, 0, 5, 4097),       // unaligned
            (0x1023, 0, 1, 0),     // CLOSE of something
        ] {
            assert_eq!(header(cmd, nr_pages, vaddr, dst_id), Err(BadCommand::NoDialect), "{cmd}");
        }
        assert_eq!(header(6, 1, 4096, 0x701), Err(BadCommand::First(Kind::AddFlags)));
        let error = header(0x5f47, 1, 0, 0).unwrap_err().to_string();
        assert_eq!(error, "unknown page server command 24391");
    }

    #[test]
    fn a_connection_may_begin_with_its_end() {
        for command in [Command::Close, Command::ForceClose] {
            let mut reader = Reader::new();
            let bytes = command.header().encode(Dialect::Short).unwrap();
            assert_eq!(read(&mut reader, &bytes), Ok(Some(command)));
            assert_eq!((reader.dialect(), reader.room().len()), (None, 0));
            assert_eq!(reader.filled(usize::MAX), Ok(None));
        }
    }

    #[test]
    fn headers_are_read_byte_by_byte_and_no_further() {
        let mut reader = Reader::new();
        let bytes = Command::Parent { space: TASK }.header().encode(Dialect::Long).unwrap();
        for (at, byte) in bytes.iter().enumerate() {
            assert_eq!(reader.room().len(), if at < 24 { 24 - at } else { 32 - at });
            assert_eq!(reader.is_within_header(), at > 0);
            reader.room()[0] = *byte;
            assert_eq!(reader.filled(1).unwrap().is_some(), at == 31);
        }
        assert!(!reader.is_within_header());
        assert_eq!(reader.room().len(), 32);
    }

    proptest! {
        #[test]
        fn a_header_survives_the_way(cmd: u32, count: u32, nr_pages: u64, vaddr: u64, dst_id: u64) {
            let header = Header { cmd, nr_pages, vaddr, dst_id };
            let long = header.encode(Dialect::Long).unwrap();
            prop_assert_eq!(Header::long(long[..].try_into().unwrap()), header);
            let header = Header { nr_pages: count.into(), ..header };
            let short = header.encode(Dialect::Short).unwrap();
            prop_assert_eq!(Header::short(short[..].try_into().unwrap()), header);
        }

        #[test]
        fn no_bytes_make_the_reader_panic(
            cmd in 0u32..10, bytes in proptest::collection::vec(any::<u8>(), 0..200)
        ) {
            let mut reader = Reader::new();
            let mut rest = &[&cmd.to_le_bytes()[..], &bytes].concat()[..];
            while !rest.is_empty() {
                let room = reader.room();
                let len = room.len().min(rest.len());
                room[..len].copy_from_slice(&rest[..len]);
                rest = &rest[len..];
                if len == 0 || reader.filled(len).is_err() {
                    break;
                }
            }
        }
    }
}
