//! One connection on which dumps send pages, as a state machine: checks the order and says what to do.
//!
//! ```text
//! PARENT*  (OPEN2 pages*)*  CLOSE                     one dump, one connection
//! (PARENT* (OPEN2 pages*)*  FORCE_CLOSE)*             one round after the other
//! ```

use std::collections::HashSet;

use super::answer;
use super::command::Command;
use super::kind::Kind;
use crate::criu::pages::{Contents, Run, Space};

/// What has to be done about a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// A space begins. The answer, if one is waited for, is sent.
    Open {
        /// Which.
        space: Space,
        /// The answer to OPEN2.
        answer: Option<[u8; 1]>,
    },
    /// This answer is sent.
    Answer([u8; 4]),
    /// Pages: they belong after those that came before in this space.
    Pages {
        /// Whose.
        space: Space,
        /// Which.
        run: Run,
        /// How many bytes of them follow on the wire.
        payload_len: u64,
    },
    /// The round has ended. [The status](answer::status) is sent when all of it is safe.
    RoundEnds {
        /// Whether another may follow; without, the client closes the connection.
        force: bool,
    },
}

/// A client that breaks the order. Its connection ends, and its round is no part of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// Pages of a space that is not the one that was opened last.
    #[error("pages of {space} at {address:#x}, which is not open")]
    NotOpen {
        /// Which.
        space: Space,
        /// Where.
        address: u64,
    },
    /// CRIU opens each space once in a round.
    #[error("{0} opened twice in one round")]
    OpenedTwice(Space),
    /// A client that opens more and more.
    #[error("more than {0} spaces opened in one round")]
    TooManySpaces(usize),
    /// CRIU sends the pages of a space in the order of their addresses.
    #[error("pages of {space} at {address:#x}, below {end:#x}, where the last ones ended")]
    Backwards {
        /// Whose.
        space: Space,
        /// Where they begin.
        address: u64,
        /// Where those before end.
        end: u64,
    },
    /// It was told that there is none.
    #[error("pages of {space} at {address:#x} are said to be in a parent that there is not")]
    NoParent {
        /// Whose.
        space: Space,
        /// Where.
        address: u64,
    },
    /// GET is for the other direction.
    #[error("GET on a connection on which a dump sends pages")]
    Get,
    /// The client has said its last.
    #[error("{0} after CLOSE")]
    AfterClose(Kind),
    /// A dump that was broken off.
    #[error("the connection was closed within a round, without CLOSE")]
    BrokenOff,
}

/// A connection.
#[derive(Debug)]
pub struct Session {
    max_spaces: usize,
    /// Those of this round.
    opened: HashSet<Space>,
    state: State,
}

#[derive(Debug)]
enum State {
    /// Nothing of a round has come.
    Between,
    /// Something of a round, but no space is open.
    Begun,
    Open(OpenSpace),
    Closed,
}

#[derive(Debug, Clone, Copy)]
struct OpenSpace {
    space: Space,
    has_parent: bool,
    /// Where the last pages ended.
    end: u64,
}

impl Session {
    /// A connection on which nothing has come yet. `max_spaces` may be opened in a round.
    pub fn new(max_spaces: usize) -> Session {
        Session { max_spaces, opened: HashSet::new(), state: State::Between }
    }

    /// Takes a command in. `has_parent` says whether the space is in the parent of this round.
    pub fn receive(
        &mut self,
        command: Command,
        has_parent: impl FnOnce(Space) -> bool,
    ) -> Result<Action, Violation> {
        if matches!(self.state, State::Closed) {
            return Err(Violation::AfterClose(command.kind()));
        }
        match command {
            Command::Open { space, answer } => {
                let has_parent = has_parent(space);
                self.open(space, has_parent)?;
                Ok(Action::Open { space, answer: answer.then(|| answer::open(has_parent)) })
            }
            Command::Parent { space } => {
                if matches!(self.state, State::Between) {
                    self.state = State::Begun;
                }
                Ok(Action::Answer(answer::parent(has_parent(space))))
            }
            Command::Pages { space, run } => self.pages(space, run),
            Command::Get { .. } => Err(Violation::Get),
            Command::Close => Ok(self.round_ends(false)),
            Command::ForceClose => Ok(self.round_ends(true)),
        }
    }

    /// The client has closed the connection.
    pub fn disconnected(&self) -> Result<(), Violation> {
        match self.state {
            State::Between | State::Closed => Ok(()),
            State::Begun | State::Open(_) => Err(Violation::BrokenOff),
        }
    }

    fn open(&mut self, space: Space, has_parent: bool) -> Result<(), Violation> {
        if self.opened.contains(&space) {
            return Err(Violation::OpenedTwice(space));
        }
        if self.opened.len() >= self.max_spaces {
            return Err(Violation::TooManySpaces(self.max_spaces));
        }
        self.opened.insert(space);
        self.state = State::Open(OpenSpace { space, has_parent, end: 0 });
        Ok(())
    }

    fn pages(&mut self, space: Space, run: Run) -> Result<Action, Violation> {
        let address = run.address();
        let open = match &mut self.state {
            State::Open(open) if open.space == space => open,
            _ => return Err(Violation::NotOpen { space, address }),
        };
        if address < open.end {
            return Err(Violation::Backwards { space, address, end: open.end });
        }
        if run.contents() == Contents::Parent && !open.has_parent {
            return Err(Violation::NoParent { space, address });
        }
        open.end = run.end();
        Ok(Action::Pages { space, run, payload_len: run.payload_len() })
    }

    fn round_ends(&mut self, force: bool) -> Action {
        self.opened.clear();
        self.state = if force { State::Between } else { State::Closed };
        Action::RoundEnds { force }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::criu::pages::tests::runs;
    use proptest::prelude::*;

    const TASK: Space = Space::Task(7);
    const SHMEM: Space = Space::Shmem(9);
    const OPEN: Command = Command::Open { space: TASK, answer: true };
    const PRESENT: Contents = Contents::Present { lazy: false };

    fn pages(space: Space, address: u64, pages: u64, contents: Contents) -> Command {
        Command::Pages { space, run: Run::new(address, pages, contents).unwrap() }
    }

    /// What the last of the commands gives; the others have to be accepted.
    fn last(commands: &[Command], has_parent: bool) -> Result<Action, Violation> {
        let mut session = Session::new(8);
        let (last, first) = commands.split_last().unwrap();
        for command in first {
            session.receive(*command, |_| has_parent).unwrap();
        }
        session.receive(*last, |_| has_parent)
    }

    #[test]
    fn a_dump_in_order_is_told_what_to_do() {
        let mut session = Session::new(8);
        let mut receive = |command| session.receive(command, |space| space == TASK).unwrap();
        assert_eq!(receive(Command::Parent { space: TASK }), Action::Answer([1, 0, 0, 0]));
        assert_eq!(receive(OPEN), Action::Open { space: TASK, answer: Some([1]) });
        for (contents, payload_len) in [
            (PRESENT, 8192),
            (Contents::Parent, 0),
            (Contents::Lazy, 0),
            (Contents::Present { lazy: true }, 8192),
        ] {
            let address = 0x10000 + 0x2000 * u64::from(contents.flags());
            let run = Run::new(address, 2, contents).unwrap();
            let action = Action::Pages { space: TASK, run, payload_len };
            assert_eq!(last(&[OPEN, Command::Pages { space: TASK, run }], true), Ok(action));
        }
        let old = Command::Open { space: SHMEM, answer: false };
        assert_eq!(receive(old), Action::Open { space: SHMEM, answer: None });
        assert_eq!(receive(Command::Close), Action::RoundEnds { force: false });
        assert_eq!(session.disconnected(), Ok(()));
    }

    #[test]
    fn rounds_follow_one_another_until_close() {
        let mut session = Session::new(1);
        for force in [true, true, false] {
            session.receive(OPEN, |_| false).unwrap();
            session.receive(pages(TASK, 0x1000, 1, PRESENT), |_| false).unwrap();
            assert_eq!(session.disconnected(), Err(Violation::BrokenOff));
            let end = if force { Command::ForceClose } else { Command::Close };
            assert_eq!(session.receive(end, |_| false), Ok(Action::RoundEnds { force }));
            assert_eq!(session.disconnected(), Ok(()));
        }
        for command in [OPEN, Command::Close, Command::Parent { space: TASK }] {
            let error = Violation::AfterClose(command.kind());
            assert_eq!(session.receive(command, |_| false), Err(error));
        }
    }

    #[test]
    fn what_breaks_the_order_is_refused() {
        let page = |address| pages(TASK, address, 2, PRESENT);
        let hole = pages(TASK, 0x1000, 2, Contents::Parent);
        let get = Command::Get { id: 7, address: 0x1000, pages: 1 };
        let parent = Command::Parent { space: TASK };
        for (commands, said) in [
            (&[page(0x1000)][..], "pages of task 7 at 0x1000, which is not open"),
            (&[parent, page(0x1000)], "pages of task 7 at 0x1000, which is not open"),
            (
                &[OPEN, Command::ForceClose, page(0x1000)],
                "pages of task 7 at 0x1000, which is not open",
            ),
            (
                &[OPEN, Command::Open { space: SHMEM, answer: true }, page(0x1000)],
                "pages of task 7 at 0x1000, which is not open",
            ),
            (
                &[OPEN, page(0x4000), page(0x3000)],
                "pages of task 7 at 0x3000, below 0x6000, where the last ones ended",
            ),
            (
                &[OPEN, page(0x4000), page(0x5000)],
                "pages of task 7 at 0x5000, below 0x6000, where the last ones ended",
            ),
            (
                &[OPEN, hole],
                "pages of task 7 at 0x1000 are said to be in a parent that there is not",
            ),
            (&[OPEN, OPEN], "task 7 opened twice in one round"),
            (&[OPEN, get], "GET on a connection on which a dump sends pages"),
            (&[OPEN, Command::Close, page(0x1000)], "ADD_F after CLOSE"),
        ] {
            assert_eq!(last(commands, false).unwrap_err().to_string(), said);
        }
        let mut many: Vec<_> =
            (1..10).map(|pid| Command::Open { space: Space::Task(pid), answer: true }).collect();
        assert_eq!(last(&many, false), Err(Violation::TooManySpaces(8)));
        many.pop();
        assert!(last(&many, false).is_ok());
    }

    #[test]
    fn a_round_that_has_begun_must_end() {
        let mut session = Session::new(8);
        assert_eq!(session.disconnected(), Ok(()));
        session.receive(Command::Parent { space: TASK }, |_| false).unwrap();
        assert_eq!(session.disconnected(), Err(Violation::BrokenOff));
    }

    /// Rounds in order: for each its spaces, and their runs.
    fn rounds() -> impl Strategy<Value = Vec<Vec<Command>>> {
        let space = (runs(), any::<bool>(), any::<bool>());
        let round = proptest::collection::vec(space, 0..4).prop_map(|spaces| {
            let mut commands = Vec::new();
            for (number, (runs, answer, asks)) in spaces.into_iter().enumerate() {
                let space = [TASK, SHMEM, Space::Task(9), Space::Shmem(7)][number];
                commands.extend(asks.then_some(Command::Parent { space }));
                commands.push(Command::Open { space, answer });
                commands.extend(runs.into_iter().map(|run| Command::Pages { space, run }));
            }
            commands.push(Command::ForceClose);
            commands
        });
        proptest::collection::vec(round, 1..4)
    }

    /// Takes commands in as long as they are accepted; checks what is always true of the actions.
    fn run(session: &mut Session, commands: &[Command]) -> Result<(), Violation> {
        let (mut open, mut end) = (None, 0);
        for command in commands {
            match session.receive(*command, |_| true)? {
                Action::Open { space, .. } => (open, end) = (Some(space), 0),
                Action::Pages { space, run, payload_len } => {
                    assert_eq!(open, Some(space));
                    assert!(run.address() >= end && payload_len <= run.end() - run.address());
                    end = run.end();
                }
                Action::RoundEnds { .. } => open = None,
                Action::Answer(_) => {}
            }
        }
        Ok(())
    }

    proptest! {
        #[test]
        fn what_is_in_order_is_accepted(rounds in rounds()) {
            let mut session = Session::new(4);
            prop_assert_eq!(run(&mut session, &rounds.concat()), Ok(()));
            prop_assert_eq!(session.disconnected(), Ok(()));
        }

        /// One bit of one header turned over: refused, or the commands that are made of it are in order.
        #[test]
        fn a_corrupted_header_is_refused_or_still_in_order(
            rounds in rounds(), which: proptest::sample::Index, bit in 0u32..224
        ) {
            let mut commands = rounds.concat();
            let at = which.index(commands.len());
            let mut header = commands[at].header();
            match bit {
                0..32 => header.cmd ^= 1 << bit,
                32..96 => header.nr_pages ^= 1 << (bit - 32),
                96..160 => header.vaddr ^= 1 << (bit - 96),
                _ => header.dst_id ^= 1 << (bit - 160),
            }
            if let Ok(command) = Command::decode(&header) {
                commands[at] = command;
                let _ = run(&mut Session::new(4), &commands);
            }
        }

        #[test]
        fn a_command_left_out_said_twice_or_exchanged_is_refused_or_still_in_order(
            rounds in rounds(), which: proptest::sample::Index, how in 0..3
        ) {
            let mut commands = rounds.concat();
            let at = which.index(commands.len());
            let (command, next) = (commands[at], (at + 1) % commands.len());
            match how {
                0 => drop(commands.remove(at)),
                1 => commands.insert(at, command),
                _ => commands.swap(at, next),
            }
            let result = run(&mut Session::new(4), &commands);
            if how == 1 && matches!(command, Command::Open { .. } | Command::Pages { .. }) {
                prop_assert!(result.is_err());
            }
        }
    }
}
