//! The numbers of the commands.

use super::command::BadCommand;

/// The flags of `ADD_F` stand above the command.
pub(super) const COMMAND_BITS: u32 = 16;

/// The commands by their numbers, `PS_IOV_*` in `criu/page-xfer.c`. They are the same from CRIU 3.5 to
/// 4.2; older ones lack `ADD_F` and GET, and those before 1.4 OPEN2, PARENT and `FORCE_CLOSE`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Pages that follow, of CRIU before 3.5.
    Add = 1,
    /// Pages that are in the parent, of CRIU before 3.5.
    Hole = 2,
    /// A space begins.
    Open = 3,
    /// A space begins, and an answer is waited for.
    Open2 = 4,
    /// Whether a space has a parent.
    Parent = 5,
    /// Pages, with flags.
    AddFlags = 6,
    /// Pages are asked for.
    Get = 7,
    /// The end.
    Close = 0x1023,
    /// The end of a round, on a socket that stays.
    ForceClose = 0x1024,
}

impl Kind {
    const ALL: [Kind; 9] = [
        Kind::Add,
        Kind::Hole,
        Kind::Open,
        Kind::Open2,
        Kind::Parent,
        Kind::AddFlags,
        Kind::Get,
        Kind::Close,
        Kind::ForceClose,
    ];

    /// The kind of a header's `cmd`.
    pub(super) fn of(cmd: u32) -> Result<Kind, BadCommand> {
        let number = cmd & ((1 << COMMAND_BITS) - 1);
        let known = Kind::ALL.into_iter().find(|kind| *kind as u32 == number);
        known.ok_or(BadCommand::Unknown(number))
    }

    /// Its name in CRIU, without `PS_IOV_`.
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::Add => "ADD",
            Kind::Hole => "HOLE",
            Kind::Open => "OPEN",
            Kind::Open2 => "OPEN2",
            Kind::Parent => "PARENT",
            Kind::AddFlags => "ADD_F",
            Kind::Get => "GET",
            Kind::Close => "CLOSE",
            Kind::ForceClose => "FORCE_CLOSE",
        }
    }
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}
