//! The outgoing direction of a link: what the proxy has to say, one frame after the other.

use std::io;
use std::rc::Rc;

use tokio::sync::{mpsc, oneshot};
use tokio::time::{interval, timeout};

use super::connection::Over;
use super::regions;
use super::upload::Chunk;
use crate::config::LinkSettings;
use crate::criu::pages::{Run, Space};
use crate::sys::ends::Source;
use crate::wire::lane::Writer;
use crate::wire::message::{KeepAlive, Message, PagesForget};
use crate::wire::sender::{Sender, of_attempt};

/// What the lane is told to do next.
#[derive(Debug)]
pub(super) enum Command {
    Begin {
        snapshot: u32,
        id: String,
        parent: Option<String>,
        named: bool,
        attempt: u64,
    },
    BeginRound {
        snapshot: u32,
        id: String,
        parent: Option<String>,
        attempt: u64,
    },
    Space {
        snapshot: u32,
        space: Space,
    },
    Pages {
        snapshot: u32,
        run: Run,
    },
    /// At most `len` bytes of the pages that were announced last.
    PageData {
        snapshot: u32,
        source: Rc<Source>,
        len: usize,
        moved: oneshot::Sender<io::Result<Chunk>>,
    },
    List {
        snapshot: u32,
        list: String,
    },
    BeginImage {
        snapshot: u32,
        image: u32,
        name: String,
        append: bool,
    },
    Chunk {
        snapshot: u32,
        image: u32,
        source: Rc<Source>,
        moved: oneshot::Sender<io::Result<Chunk>>,
    },
    EndImage {
        snapshot: u32,
        image: u32,
    },
    End {
        snapshot: u32,
        partial: bool,
        memory_may_have_changed: bool,
    },
    Abort {
        snapshot: u32,
        reason: String,
    },
    /// What belongs to no snapshot that is sent.
    Say(Message),
    Forget {
        id: String,
    },
}

/// The sending task: one command after the other, so that frames never mix, and between them the answers
/// that are `owed` to the cache's requests. Returns why the connection is over.
pub(super) async fn send(
    mut writer: Writer,
    mut queue: mpsc::Receiver<Command>,
    mut owed: mpsc::Receiver<u32>,
    settings: &LinkSettings,
) -> Over {
    let mut sender = Sender::default();
    let mut pulse = interval(settings.keep_alive);
    let max_chunk = usize::try_from(settings.max_chunk).unwrap_or(usize::MAX);
    loop {
        let command = tokio::select! {
            command = queue.recv() => match command {
                Some(command) => command,
                None => return Over::ended("nobody uses it any more"),
            },
            Some(request) = owed.recv() => Command::Say(regions::answer(request)),
            _ = pulse.tick() => Command::Say(Message::KeepAlive(KeepAlive {})),
        };
        let sent = obey(command, &mut sender, &mut writer, max_chunk);
        // A cache that waits for its quota reads nothing for a while; one that never reads again
        // must not hold CRIU's process frozen.
        match timeout(settings.ack_timeout, sent).await {
            Err(_) => {
                let limit = settings.ack_timeout;
                return Over::ended(format!("the cache has read nothing for {limit:?}"));
            }
            Ok(Err(error)) => return Over::ended(error.to_string()),
            Ok(Ok(())) => {}
        }
    }
}

async fn obey(
    command: Command,
    sender: &mut Sender,
    writer: &mut Writer,
    max_chunk: usize,
) -> io::Result<()> {
    let message = match command {
        Command::Begin { snapshot, id, parent, named, attempt } => {
            Some(of_attempt(sender.begin_child(snapshot, &id, parent.as_deref(), named), attempt))
        }
        Command::BeginRound { snapshot, id, parent, attempt } => {
            Some(of_attempt(sender.begin_round(snapshot, &id, parent.as_deref()), attempt))
        }
        Command::Space { snapshot, space } => sender.space(snapshot, space),
        Command::Pages { snapshot, run } => sender.pages(snapshot, run),
        Command::List { snapshot, list } => sender.list(snapshot, &list),
        Command::BeginImage { snapshot, image, name, append } => {
            sender.begin_image(snapshot, image, &name, append)
        }
        Command::EndImage { snapshot, image } => sender.end_image(snapshot, image),
        Command::End { snapshot, partial, memory_may_have_changed } => {
            sender.end(snapshot, partial, memory_may_have_changed)
        }
        Command::Say(message) => Some(message),
        Command::Forget { id } => Some(Message::PagesForget(PagesForget { id })),
        Command::Abort { snapshot, reason } => sender.abort(snapshot, &reason),
        Command::Chunk { snapshot, image, source, moved } => {
            let data = |len| sender.data(snapshot, image, len);
            let outcome = forward(&source, max_chunk, data, writer).await?;
            // An image that has gone does not want to know.
            let _ = moved.send(outcome);
            None
        }
        Command::PageData { snapshot, source, len, moved } => {
            let data = |len| sender.page_data(snapshot, len);
            let outcome = forward(&source, len.min(max_chunk), data, writer).await?;
            let _ = moved.send(outcome);
            None
        }
    };
    match message {
        Some(message) => writer.send(&message).await,
        None => Ok(()),
    }
}

/// Moves what has come, at most `max` bytes, as the payload of `message`, which is given their number. The
/// outer error is the link's, the inner one the source's.
async fn forward(
    source: &Source,
    max: usize,
    message: impl FnOnce(usize) -> Option<Message>,
    writer: &mut Writer,
) -> io::Result<io::Result<Chunk>> {
    // Into the lane's own pipe first: then the length is known, nobody else can take the bytes
    // away, and CRIU has room for the next while these are sent.
    let len = match source.transfer_to(writer.payload(), max) {
        Ok(0) => return Ok(Ok(Chunk::End)),
        Ok(len) => len,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Ok(Chunk::NotYet)),
        Err(error) => return Ok(Err(error)),
    };
    let Some(message) = message(len) else {
        writer.drop_payload()?;
        return Ok(Err(io::ErrorKind::ConnectionAborted.into()));
    };
    writer.send_payload(&message, len).await?;
    Ok(Ok(Chunk::Moved(len as u64)))
}
