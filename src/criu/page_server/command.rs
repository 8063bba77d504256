//! What a header means.

use super::header::Header;
use super::kind::{COMMAND_BITS, Kind};
use crate::criu::pages::{BadFlags, BadRange, Contents, PageRange, Run, Space};

/// The types of spaces in `dst_id`, its lowest byte.
const TYPE_BITS: u32 = 8;
const TYPE_TASK: u64 = 1;
const TYPE_SHMEM: u64 = 2;

/// A command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// A space begins.
    Open {
        /// Which.
        space: Space,
        /// Whether the client waits to hear if it has a parent (OPEN2).
        answer: bool,
    },
    /// The client asks whether a space has a parent.
    Parent {
        /// Which.
        space: Space,
    },
    /// Pages of a space. Those that are present follow.
    Pages {
        /// Which. It was opened.
        space: Space,
        /// The pages.
        run: Run,
    },
    /// A lazy-pages daemon asks for pages.
    Get {
        /// The image's id without a type: a task's pid.
        id: u64,
        /// Where the pages begin.
        address: u64,
        /// How many; fewer may be sent.
        pages: u64,
    },
    /// The dump has sent everything, and closes the connection when it has heard the status.
    Close,
    /// The same, but the socket may be another's, who goes on with the next round.
    ForceClose,
}

/// What is wrong with a header. The connection ends; nothing else does.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadCommand {
    /// Perhaps of a later CRIU: what follows it is not known.
    #[error("unknown page server command {0}")]
    Unknown(u32),
    /// The first header fits neither dialect.
    #[error(
        "the first command fits neither the 24 bytes of CRIU up to 4.1 nor the 32 of later ones"
    )]
    NoDialect,
    /// By these the dialects cannot be told apart, and there is nothing that they could belong to.
    #[error("{0} as the first command of a connection")]
    First(Kind),
    /// Only `ADD_F` has flags.
    #[error("{kind} with the flags {flags:#x}; only ADD_F has any")]
    StrayFlags {
        /// The command.
        kind: Kind,
        /// The flags.
        flags: u32,
    },
    /// The command is about no pages, and names some.
    #[error("{kind} with {pages} pages at {address:#x}")]
    StrayRange {
        /// The command.
        kind: Kind,
        /// How many.
        pages: u64,
        /// Where.
        address: u64,
    },
    /// CLOSE is about no space.
    #[error("{0} with the id {1:#x}")]
    StrayId(Kind, u64),
    /// See [`BadFlags`].
    #[error("{kind} for {space}, {pages} pages at {address:#x}: {flags}")]
    Flags {
        /// The command.
        kind: Kind,
        /// Whose.
        space: Space,
        /// How many.
        pages: u64,
        /// Where.
        address: u64,
        /// What is wrong.
        flags: BadFlags,
    },
    /// See [`BadRange`].
    #[error("{kind} for {space}: {range}")]
    Range {
        /// The command.
        kind: Kind,
        /// Whose.
        space: Space,
        /// What is wrong.
        range: BadRange,
    },
    /// The same for GET, which does not say whether the id is a task's.
    #[error("GET for the id {id}: {range}")]
    GetRange {
        /// The id.
        id: u64,
        /// What is wrong.
        range: BadRange,
    },
    /// It names neither a task nor shared memory.
    #[error("{kind} for {dst_id:#x}, which is neither a task's id nor that of shared memory")]
    NoSpace {
        /// The command.
        kind: Kind,
        /// What it named.
        dst_id: u64,
    },
    /// For sending: no CRIU up to 4.1 can be told.
    #[error("{0} pages are more than the header of CRIU up to 4.1 can say")]
    TooManyForShort(u64),
}

impl Command {
    /// Takes a header for what it means.
    pub fn decode(header: &Header) -> Result<Command, BadCommand> {
        let &Header { cmd, nr_pages: pages, vaddr: address, dst_id } = header;
        let (kind, flags) = (Kind::of(cmd)?, cmd >> COMMAND_BITS);
        if flags != 0 && kind != Kind::AddFlags {
            return Err(BadCommand::StrayFlags { kind, flags });
        }
        match kind {
            Kind::Add | Kind::Hole | Kind::AddFlags => {
                let space = decode_space(kind, dst_id)?;
                let contents = match kind {
                    Kind::Add => Ok(Contents::Present { lazy: false }),
                    Kind::Hole => Ok(Contents::Parent),
                    _ => Contents::from_flags(flags),
                };
                let contents = contents.map_err(|flags| BadCommand::Flags {
                    kind,
                    space,
                    pages,
                    address,
                    flags,
                })?;
                let run = Run::new(address, pages, contents)
                    .map_err(|range| BadCommand::Range { kind, space, range })?;
                return Ok(Command::Pages { space, run });
            }
            Kind::Get => {
                PageRange::new(address, pages)
                    .map_err(|range| BadCommand::GetRange { id: dst_id, range })?;
                return Ok(Command::Get { id: dst_id, address, pages });
            }
            Kind::Open | Kind::Open2 | Kind::Parent | Kind::Close | Kind::ForceClose => {}
        }
        if (pages, address) != (0, 0) {
            return Err(BadCommand::StrayRange { kind, pages, address });
        }
        match kind {
            Kind::Parent => Ok(Command::Parent { space: decode_space(kind, dst_id)? }),
            Kind::Close | Kind::ForceClose if dst_id != 0 => Err(BadCommand::StrayId(kind, dst_id)),
            Kind::Close => Ok(Command::Close),
            Kind::ForceClose => Ok(Command::ForceClose),
            _ => {
                let space = decode_space(kind, dst_id)?;
                Ok(Command::Open { space, answer: kind == Kind::Open2 })
            }
        }
    }

    /// The header that says it, as CRIU from 3.5 on.
    pub fn header(&self) -> Header {
        let bare = |kind: Kind, dst_id| Header { cmd: kind as u32, nr_pages: 0, vaddr: 0, dst_id };
        match *self {
            Command::Open { space, answer: false } => bare(Kind::Open, dst_id(space)),
            Command::Open { space, answer: true } => bare(Kind::Open2, dst_id(space)),
            Command::Parent { space } => bare(Kind::Parent, dst_id(space)),
            Command::Close => bare(Kind::Close, 0),
            Command::ForceClose => bare(Kind::ForceClose, 0),
            Command::Pages { space, run } => Header {
                cmd: run.contents().flags() << COMMAND_BITS | Kind::AddFlags as u32,
                nr_pages: run.pages(),
                vaddr: run.address(),
                dst_id: dst_id(space),
            },
            Command::Get { id, address, pages } => {
                Header { nr_pages: pages, vaddr: address, ..bare(Kind::Get, id) }
            }
        }
    }

    /// Its kind, as CRIU from 3.5 on would say it.
    pub fn kind(&self) -> Kind {
        match self {
            Command::Open { answer: false, .. } => Kind::Open,
            Command::Open { answer: true, .. } => Kind::Open2,
            Command::Parent { .. } => Kind::Parent,
            Command::Pages { .. } => Kind::AddFlags,
            Command::Get { .. } => Kind::Get,
            Command::Close => Kind::Close,
            Command::ForceClose => Kind::ForceClose,
        }
    }
}

/// The space that a `dst_id` names. CRIU before 3.4 sent for its type a constant that changed from version to
/// version (`decode_pm`).
fn decode_space(kind: Kind, dst_id: u64) -> Result<Space, BadCommand> {
    let id = dst_id >> TYPE_BITS;
    let space = match dst_id & ((1 << TYPE_BITS) - 1) {
        TYPE_TASK | 10 | 11 | 16 | 17 => match i32::try_from(id) {
            Ok(pid) if pid > 0 => Some(Space::Task(pid.unsigned_abs())),
            _ => None,
        },
        TYPE_SHMEM | 27 | 28 | 29 | 32 | 33 | 34 => Some(Space::Shmem(id)),
        _ => None,
    };
    space.ok_or(BadCommand::NoSpace { kind, dst_id })
}

/// A space as `dst_id`. CRIU keeps the lower 56 bits of the id of shared memory.
fn dst_id(space: Space) -> u64 {
    match space {
        Space::Task(pid) => u64::from(pid) << TYPE_BITS | TYPE_TASK,
        Space::Shmem(id) => id << TYPE_BITS | TYPE_SHMEM,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::criu::pages::tests::contents;
    use proptest::prelude::*;

    fn command() -> impl Strategy<Value = Command> {
        let space = prop_oneof![
            (1..i32::MAX).prop_map(|pid| Space::Task(pid.unsigned_abs())),
            (0..1u64 << 56).prop_map(Space::Shmem),
        ];
        let range = (0..1u64 << 40, 1..1u64 << 32);
        prop_oneof![
            (space.clone(), any::<bool>())
                .prop_map(|(space, answer)| Command::Open { space, answer }),
            space.clone().prop_map(|space| Command::Parent { space }),
            (space, range.clone(), contents()).prop_map(|(space, (page, pages), contents)| {
                Command::Pages { space, run: Run::new(page << 12, pages, contents).unwrap() }
            }),
            (any::<u64>(), range).prop_map(|(id, (page, pages))| Command::Get {
                id,
                address: page << 12,
                pages
            }),
            Just(Command::Close),
            Just(Command::ForceClose),
        ]
    }

    fn decode(cmd: u32, nr_pages: u64, vaddr: u64, dst_id: u64) -> Result<Command, BadCommand> {
        Command::decode(&Header { cmd, nr_pages, vaddr, dst_id })
    }

    #[test]
    fn old_commands_and_old_types_are_understood() {
        let pages = |contents| {
            let run = Run::new(0x1000, 2, contents).unwrap();
            Ok(Command::Pages { space: Space::Task(7), run })
        };
        assert_eq!(decode(1, 2, 0x1000, 0x70b), pages(Contents::Present { lazy: false }));
        assert_eq!(decode(2, 2, 0x1000, 0x70b), pages(Contents::Parent));
        let open = |space| Ok(Command::Open { space, answer: false });
        for kind in [1, 10, 11, 16, 17] {
            assert_eq!(decode(3, 0, 0, 0x700 | kind), open(Space::Task(7)), "{kind}");
        }
        for kind in [2, 27, 28, 29, 32, 33, 34] {
            assert_eq!(decode(3, 0, 0, 0x700 | kind), open(Space::Shmem(7)), "{kind}");
        }
        for kind in [0, 3, 9, 12, 26, 30, 31, 35, 255] {
            assert!(decode(3, 0, 0, 0x700 | kind).is_err(), "{kind}");
        }
    }

    #[test]
    fn what_is_wrong_is_said_with_the_command_the_space_and_the_address() {
        for (error, said) in [
            (decode(8, 0, 0, 0), "unknown page server command 8"),
            (
                decode(0xc_0006, 2, 0x1000, 0x701),
                "ADD_F for task 7, 2 pages at 0x1000: unknown flags 0x8 (known are 1 PE_PARENT, 2 PE_LAZY and 4 \
                 PE_PRESENT)",
            ),
            (
                decode(0x5_0006, 2, 0x1000, 0x902),
                "ADD_F for shared memory 9, 2 pages at 0x1000: the flags PE_PRESENT and PE_PARENT together",
            ),
            (decode(0x4_0006, 0, 0x1000, 0x701), "ADD_F for task 7: no pages at 0x1000"),
            (
                decode(0x4_0006, 1, 0x1010, 0x701),
                "ADD_F for task 7: pages at 0x1010, which is not where a page begins",
            ),
            (
                decode(1, u64::MAX, 0x1000, 0x701),
                "ADD for task 7: 18446744073709551615 pages at 0x1000 end beyond 2^64",
            ),
            (
                decode(4, 0, 0, 0x703),
                "OPEN2 for 0x703, which is neither a task's id nor that of shared memory",
            ),
            (
                decode(4, 0, 0, 0x0001),
                "OPEN2 for 0x1, which is neither a task's id nor that of shared memory",
            ),
            (decode(5, 1, 0x2000, 0x701), "PARENT with 1 pages at 0x2000"),
            (decode(0x4_0004, 0, 0, 0x701), "OPEN2 with the flags 0x4; only ADD_F has any"),
            (decode(0x1023, 0, 0, 0x701), "CLOSE with the id 0x701"),
            (decode(7, 0, 0x1000, 7), "GET for the id 7: no pages at 0x1000"),
        ] {
            assert_eq!(error.unwrap_err().to_string(), said);
        }
    }

    proptest! {
        #[test]
        fn a_command_survives_the_way(command in command()) {
            prop_assert_eq!(Command::decode(&command.header()), Ok(command));
        }

        #[test]
        fn no_header_makes_the_decoder_panic(
            cmd: u32, known in 0u32..9, nr_pages: u64, vaddr: u64, dst_id: u64
        ) {
            let _ = decode(cmd, nr_pages, vaddr, dst_id);
            let _ = decode(known, nr_pages, vaddr & !4095, dst_id & !0xfe);
        }
    }
}
