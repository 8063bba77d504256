//! Parts of images that a proxy asks for: what a dump reads of its parents.

use std::net::IpAddr;
use std::rc::Rc;

use rustix::io::Errno;

use crate::criu::remote::PARENT;
use crate::store::{Image, State, Store};
use crate::wire::message::{Message, REGION_MAX, Region, RegionRequest};

use super::answers::Answer;

/// Why a region cannot be had.
pub(super) type Refusal = (Errno, String);

/// Answers a request from `host`, once the image that it asks for has ended.
pub(super) async fn answer(store: &Store, host: Option<IpAddr>, asked: &RegionRequest) -> Answer {
    match image(store, host, &asked.snapshot_id, &asked.name).await {
        Ok(image) => {
            let (size, max) = (image.len(), u64::from(asked.len).min(REGION_MAX as u64));
            // What lies in several files is answered up to the end of the first, and asked for again.
            let len = image.part(asked.offset, max).map_or(0, |part| part.len);
            let region = Region { request: asked.request, size, ..Region::default() };
            Answer::Part {
                message: Message::Region(region),
                image,
                offset: asked.offset,
                len: usize::try_from(len).unwrap_or(REGION_MAX),
            }
        }
        Err((errno, reason)) => {
            let error = errno.raw_os_error().unsigned_abs();
            Answer::Message(Message::no_region(asked.request, error, &reason))
        }
    }
}

/// The image of a snapshot that need not have ended itself; one that is still coming is waited for.
async fn image(
    store: &Store,
    host: Option<IpAddr>,
    id: &str,
    name: &str,
) -> Result<Rc<Image>, Refusal> {
    if name == PARENT {
        let list = store.list_image(id, Some(host)).map_err(|errno| (errno, errno.to_string()))?;
        return list.ok_or_else(|| (Errno::NOENT, "the list is empty".to_owned()));
    }
    let mut changed = store.watch();
    loop {
        let Some(image) = look(store, host, id, name)? else { return Err(missing(id, name)) };
        if image.is_whole() {
            return Ok(image);
        }
        tokio::select! {
            () = image.ended() => {}
            // The store is there as long as the cache is.
            _ = changed.changed() => {}
        }
    }
}

/// What other hosts sent is not there for this one: it is the memory of their processes.
fn look(
    store: &Store,
    host: Option<IpAddr>,
    id: &str,
    name: &str,
) -> Result<Option<Rc<Image>>, Refusal> {
    store
        .find(id, |snapshot| match &snapshot.state {
            _ if snapshot.sender.host != host => Ok(None),
            State::Damaged { reason, .. } => {
                Err((Errno::IO, format!("snapshot {id} is damaged: {reason}")))
            }
            State::Taken(_) => Err((Errno::STALE, format!("a restore has taken snapshot {id}"))),
            State::Awaited | State::Paged | State::Receiving(_) | State::Whole(_) => {
                Ok(snapshot.images().and_then(|images| images.get(name)).cloned())
            }
        })
        .unwrap_or(Ok(None))
}

pub(super) fn missing(id: &str, name: &str) -> Refusal {
    (Errno::NOENT, format!("snapshot {id} has no image {name}"))
}
