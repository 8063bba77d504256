//! The commands, and what each page holds after them.

use std::fmt;
use std::str::FromStr;

pub(crate) const PAGE: usize = 4096;
pub(crate) const PAGES_PER_MIB: usize = (1 << 20) / PAGE;

/// What a page holds.
pub(crate) type Page = [u64; PAGE / size_of::<u64>()];

/// Generations from here on are those of churn: commands have smaller ones.
const CHURN: u64 = 1 << 32;

#[derive(Debug, Clone, Copy)]
pub(crate) struct Sizes {
    /// Pages.
    pub(crate) private: usize,
    /// Pages.
    pub(crate) shared: usize,
    pub(crate) seed: u64,
}

impl Default for Sizes {
    fn default() -> Sizes {
        Sizes { private: 0, shared: 0, seed: 1 }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Command {
    Dirty { generation: u32, step: usize },
    Share { generation: u32, step: usize },
    Churn { percent: usize },
    Churned { pages: usize },
    Unmap { from: usize, count: usize },
    Move { from: usize, count: usize },
    Fork { name: String },
    Report,
    Exit,
}

impl FromStr for Command {
    type Err = String;

    fn from_str(text: &str) -> Result<Command, String> {
        let words: Vec<&str> = text.split_whitespace().collect();
        let number = |at: usize| {
            words[at].parse::<u32>().map_err(|error| format!("{text}: {}: {error}", words[at]))
        };
        let size = |at: usize| Ok::<_, String>(number(at)? as usize);
        let step = || match size(2)? {
            0 => Err(format!("{text}: there is no 0th page to begin with")),
            step => Ok(step),
        };
        Ok(match words[..] {
            ["dirty", _, _] => Command::Dirty { generation: number(1)?, step: step()? },
            ["share", _, _] => Command::Share { generation: number(1)?, step: step()? },
            ["churn", _] => Command::Churn { percent: size(1)? },
            ["churned", _] => Command::Churned { pages: size(1)? },
            ["unmap", _, _] => Command::Unmap { from: size(1)?, count: size(2)? },
            ["move", _, _] => Command::Move { from: size(1)?, count: size(2)? },
            ["fork", name] => Command::Fork { name: name.to_owned() },
            ["report"] => Command::Report,
            ["exit"] => Command::Exit,
            _ => return Err(format!("{text}: no such command; dirtier --help lists them")),
        })
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Command::Dirty { generation, step } => write!(f, "dirty {generation} {step}"),
            Command::Share { generation, step } => write!(f, "share {generation} {step}"),
            Command::Churn { percent } => write!(f, "churn {percent}"),
            Command::Churned { pages } => write!(f, "churned {pages}"),
            Command::Unmap { from, count } => write!(f, "unmap {from} {count}"),
            Command::Move { from, count } => write!(f, "move {from} {count}"),
            Command::Fork { name } => write!(f, "fork {name}"),
            Command::Report => write!(f, "report"),
            Command::Exit => write!(f, "exit"),
        }
    }
}

/// Which generation each page has; none where it is unmapped.
pub(crate) struct Model {
    seed: u64,
    private: Vec<Option<u64>>,
    shared: Vec<u64>,
    churned: usize,
}

impl Model {
    pub(crate) fn new(sizes: Sizes) -> Model {
        let (private, shared) = (vec![Some(0); sizes.private], vec![0; sizes.shared]);
        Model { seed: sizes.seed, private, shared, churned: 0 }
    }

    pub(crate) fn apply(&mut self, command: &Command) -> Result<(), String> {
        match *command {
            Command::Dirty { generation, step } => {
                for page in self.private.iter_mut().step_by(step).flatten() {
                    *page = generation.into();
                }
            }
            Command::Share { generation, step } => {
                self.shared.iter_mut().step_by(step).for_each(|page| *page = generation.into());
            }
            Command::Churned { pages } => {
                for _ in 0..pages {
                    let (page, generation) = churn_step(self.churned, self.private.len());
                    self.private[page].iter_mut().for_each(|page| *page = generation);
                    self.churned += 1;
                }
            }
            Command::Unmap { from, count } => self
                .private
                .get_mut(from..from + count)
                .ok_or_else(|| format!("{command}: there are fewer pages"))?
                .fill(None),
            _ => {}
        }
        Ok(())
    }

    pub(crate) fn checksums(&self) -> [u64; 2] {
        let private = self.private.iter().map(|page| (*page, PRIVATE)).collect::<Vec<_>>();
        let shared = self.shared.iter().map(|page| (Some(*page), SHARED)).collect::<Vec<_>>();
        [private, shared].map(|pages| {
            let mut sum = Checksum::new();
            for (number, (generation, area)) in pages.into_iter().enumerate() {
                if let Some(generation) = generation {
                    sum.add(number, &content(self.seed ^ area, number, generation));
                }
            }
            sum.0
        })
    }
}

/// What keeps a private page and a shared one of the same number apart.
pub(crate) const PRIVATE: u64 = 0;
pub(crate) const SHARED: u64 = 1 << 63;

/// Which page churn writes after so many, and the generation it gets.
pub(crate) fn churn_step(churned: usize, pages: usize) -> (usize, u64) {
    (churned % pages, CHURN + (churned / pages) as u64)
}

/// Pseudo-random words (xorshift64), other ones for each page and generation.
pub(crate) fn content(seed: u64, number: usize, generation: u64) -> Page {
    let mut state = [number as u64, generation]
        .into_iter()
        .fold(seed.wrapping_add(1), |state, word| mix(state ^ word))
        .max(1);
    std::array::from_fn(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    })
}

fn mix(word: u64) -> u64 {
    let word = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

/// Covers every word and its place, and which pages there are.
pub(crate) struct Checksum(pub(crate) u64);

impl Checksum {
    pub(crate) fn new() -> Checksum {
        Checksum(0)
    }

    pub(crate) fn add(&mut self, number: usize, page: &Page) {
        self.0 = mix(self.0 ^ number as u64);
        for word in page {
            self.0 = (self.0 ^ word).wrapping_mul(0x9e37_79b1_85eb_ca87).rotate_left(29);
        }
    }
}
