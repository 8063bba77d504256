//! Page spaces and pages, as messages name them.

use super::message::{Message, PagesRequest, Space, Spaces};
use crate::criu::pages::{self, BadRange, PageRange};

/// Why there can be no such pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadPages {
    /// The id is none of a task.
    #[error("no task has the pid {0}")]
    NoTask(u64),
    /// See [`BadRange`].
    #[error("{0}")]
    Range(#[from] BadRange),
}

/// How many page spaces one [`Spaces`] holds, so that it is never too long: their ids have up to 10 bytes.
const SPACES_EACH: usize = 1024;

/// Page spaces, in as many messages as they need.
pub fn all_spaces(
    snapshot: u32,
    spaces: &[pages::Space],
) -> impl Iterator<Item = Message> + use<'_> {
    spaces.chunks(SPACES_EACH).map(move |spaces| {
        let mut message = Spaces { snapshot, ..Spaces::default() };
        for space in spaces {
            match *space {
                pages::Space::Task(pid) => message.tasks.push(pid),
                pages::Space::Shmem(id) => message.shmems.push(id),
            }
        }
        Message::Spaces(message)
    })
}

/// The page spaces of a message.
pub fn spaces(message: &Spaces) -> impl Iterator<Item = pages::Space> + use<'_> {
    let tasks = message.tasks.iter().copied().map(pages::Space::Task);
    tasks.chain(message.shmems.iter().copied().map(pages::Space::Shmem))
}

/// A page space, as it is announced.
pub fn space(snapshot: u32, space: pages::Space) -> Space {
    let (shmem, id) = numbered(space);
    Space { snapshot, shmem, id }
}

/// The page space that was announced.
pub fn announced(space: &Space) -> Result<pages::Space, BadPages> {
    named(space.shmem, space.id)
}

/// A request for pages of a range.
pub fn pages_request(
    request: u32,
    snapshot_id: &str,
    of: pages::Space,
    range: PageRange,
) -> Message {
    let (shmem, id) = numbered(of);
    let (snapshot_id, address, pages) = (snapshot_id.to_owned(), range.address(), range.pages());
    Message::PagesRequest(PagesRequest { request, snapshot_id, shmem, id, address, pages })
}

/// Which pages are asked for.
pub fn requested(asked: &PagesRequest) -> Result<(pages::Space, PageRange), BadPages> {
    Ok((named(asked.shmem, asked.id)?, PageRange::new(asked.address, asked.pages)?))
}

/// A page space in two fields: whether it is shared memory, and its id.
fn numbered(space: pages::Space) -> (bool, u64) {
    match space {
        pages::Space::Task(pid) => (false, pid.into()),
        pages::Space::Shmem(id) => (true, id),
    }
}

fn named(shmem: bool, id: u64) -> Result<pages::Space, BadPages> {
    if shmem {
        return Ok(pages::Space::Shmem(id));
    }
    id.try_into().map(pages::Space::Task).map_err(|_| BadPages::NoTask(id))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_that_cannot_be_are_not_asked_for() {
        let range = PageRange::new(0x7fff_0000, 9).unwrap();
        for space in [pages::Space::Task(7), pages::Space::Shmem(u64::MAX)] {
            let Message::PagesRequest(asked) = pages_request(5, "web", space, range) else {
                panic!()
            };
            assert_eq!((asked.request, requested(&asked)), (5, Ok((space, range))));
        }
        let refused = |shmem, id, address, pages| {
            let asked = PagesRequest { shmem, id, address, pages, ..PagesRequest::default() };
            requested(&asked).unwrap_err().to_string()
        };
        assert_eq!(refused(false, 1 << 32, 0, 1), "no task has the pid 4294967296");
        assert_eq!(refused(true, 1 << 32, 0, 0), "no pages at 0x0");
        assert!(refused(true, 3, 0x1008, 1).contains("which is not where a page begins"));
        for (address, pages) in [(!0xfff, 1), (0x1000, u64::MAX), (0, 1 << 52)] {
            assert!(refused(false, 7, address, pages).contains("end beyond 2^64"));
        }
    }
}
