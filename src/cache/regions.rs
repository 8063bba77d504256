//! What a proxy asks for: parts of images, which a dump reads of its parents, and pages.

use std::net::IpAddr;
use std::rc::Rc;

use rustix::io::Errno;

use crate::criu::page_server::answer::GET_MAX;
use crate::criu::remote::PARENT;
use crate::store::pages::PAGE;
use crate::store::{Image, Snapshot, State, Store};
use crate::wire::message::{Message, PagesRequest, REGION_MAX, Region, RegionRequest};
use crate::wire::spaces::requested;

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
        Err(refusal) => refused(asked.request, refusal),
    }
}

/// Answers a request from `host` for pages, with what there is of them now.
pub(super) async fn answer_pages(
    store: &Store,
    host: Option<IpAddr>,
    asked: &PagesRequest,
) -> Answer {
    pages(store, host, asked).await.unwrap_or_else(|refusal| refused(asked.request, refusal))
}

fn refused(request: u32, (errno, reason): Refusal) -> Answer {
    let error = errno.raw_os_error().unsigned_abs();
    Answer::Message(Message::no_region(request, error, &reason))
}

async fn pages(
    store: &Store,
    host: Option<IpAddr>,
    asked: &PagesRequest,
) -> Result<Answer, Refusal> {
    let (space, range) = requested(asked).map_err(|bad| (Errno::INVAL, bad.to_string()))?;
    let id = &asked.snapshot_id;
    let none = |why: String| (Errno::NOENT, why);
    let listed = look(store, host, id, |_| ())?.and_then(|()| store.key_of(id));
    let key = listed.ok_or_else(|| none(format!("no snapshot {id} is held")))?;
    let flat = store.flat_of(key).await.map_err(|why| none(format!("snapshot {id}: {why}")))?;
    let index = flat.space(&space);
    let index = index.ok_or_else(|| none(format!("snapshot {id} has no {space}")))?;
    let first = |max| range.split(max).0;
    let there = first(GET_MAX).and_then(|range| index.leading(range));
    let together = first(REGION_MAX as u64 / PAGE).and_then(|range| index.together(range));
    let (Some(there), Some((pages, layer, offset))) = (there, together) else {
        let address = range.address();
        return Err(none(format!("{space} of snapshot {id} has no page at {address:#x}")));
    };
    let region = Region { request: asked.request, size: there.bytes(), ..Region::default() };
    Ok(Answer::Pages {
        message: Message::Region(region),
        layer: layer.clone(),
        offset,
        len: usize::try_from(pages.bytes()).unwrap_or(REGION_MAX),
        _held: flat.clone(),
    })
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
        let named = |snapshot: &Snapshot| snapshot.images()?.get(name).cloned();
        let image = look(store, host, id, named)?.flatten();
        let Some(image) = image else { return Err(missing(id, name)) };
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

/// Looks at a snapshot. What other hosts sent is not there for this one: it is the memory of their processes.
fn look<T>(
    store: &Store,
    host: Option<IpAddr>,
    id: &str,
    look: impl FnOnce(&Snapshot) -> T,
) -> Result<Option<T>, Refusal> {
    store
        .find(id, |snapshot| match &snapshot.state {
            _ if snapshot.sender.host != host => Ok(None),
            State::Damaged { reason, .. } => {
                Err((Errno::IO, format!("snapshot {id} is damaged: {reason}")))
            }
            State::Taken(_) => Err((Errno::STALE, format!("a restore has taken snapshot {id}"))),
            State::Awaited | State::Paged | State::Receiving(_) | State::Whole(_) => {
                Ok(Some(look(snapshot)))
            }
        })
        .unwrap_or(Ok(None))
}

pub(super) fn missing(id: &str, name: &str) -> Refusal {
    (Errno::NOENT, format!("snapshot {id} has no image {name}"))
}
