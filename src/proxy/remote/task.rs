//! What a request does at the moment it is looked at, and what is left to do then.

use std::rc::Rc;

use rustix::io::Errno;

use super::snapshot::{Snapshot, Writing};
use super::{Appending, Refusal};
use crate::criu::remote::Request;
use crate::daemon::remote::BadClient;
use crate::daemon::sessions::Peer;
use crate::proxy::Proxy;

/// A request that has taken effect as far as others see it; the work is to be done.
#[derive(Debug)]
pub(super) enum Task {
    Write {
        writing: Writing,
        append: bool,
        acknowledge: bool,
    },
    Append {
        appending: Appending,
        acknowledge: bool,
    },
    Read {
        snapshot: String,
        name: String,
        pipe: Option<bool>,
    },
    ReadList {
        list: String,
        pipe: bool,
    },
    End {
        snapshot: Rc<Snapshot>,
        images: Option<u64>,
        acknowledge: bool,
    },
    EndAll(Vec<Rc<Snapshot>>),
    /// It is refused; the client is told, if it listens.
    Refused {
        refusal: Refusal,
        listens: bool,
    },
}

/// What a client comes with; `None` when it has closed.
pub(super) type Next = Result<Option<Task>, BadClient>;

/// What a request does at once.
pub(super) fn take(
    proxy: &Rc<Proxy>,
    peer: Peer,
    come: Result<Option<Request>, BadClient>,
) -> Next {
    let Some(request) = come? else { return Ok(None) };
    let refused = |listens| move |refusal| Task::Refused { refusal, listens };
    let task =
        match request {
            Request::Write { snapshot, name, append, acknowledge } => proxy
                .remote
                .written(proxy, &snapshot)
                .inspect(|snapshot| {
                    if !acknowledge {
                        snapshot.set_process(peer);
                    }
                })
                .and_then(|snapshot| snapshot.open(&name))
                .map_or_else(refused(acknowledge), |writing| Task::Write {
                    writing,
                    append,
                    acknowledge,
                }),
            Request::AppendToList { list, acknowledge } => {
                Task::Append { appending: proxy.remote.append(&list), acknowledge }
            }
            Request::Read { snapshot, name, pipe } => Task::Read { snapshot, name, pipe },
            Request::ReadList { list, pipe } => Task::ReadList { list, pipe },
            Request::EndOfDump { snapshot, images, acknowledge } => {
                proxy.remote.ending(&snapshot).map_or_else(refused(acknowledge), |snapshot| {
                    Task::End { snapshot, images, acknowledge }
                })
            }
            Request::HistoricalEndOfDump => Task::EndAll(proxy.remote.ended_by(peer)),
            Request::EndOfRestore { .. } | Request::HistoricalEndOfRestore => {
                let reason = "a restore ends at the cache, not at the proxy";
                refused(true)(Refusal::new(Errno::INVAL, reason))
            }
        };
    Ok(Some(task))
}
