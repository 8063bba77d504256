//! A link that is up: the snapshots that share it, and the two tasks that speak on it.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::rc::Rc;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{interval, timeout};

use crate::config::LinkSettings;
use crate::sys::pipe::PipeReader;
use crate::wire::lane::{Reader, Writer};
use crate::wire::message::{KeepAlive, Message};
use crate::wire::sender::{Said, Sender, said};

/// How many commands may wait for the lane. Each image has at most one chunk under way.
const QUEUE: usize = 64;

/// What becomes of a snapshot at the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fate {
    /// It is under way.
    Open,
    /// The cache has it.
    Acknowledged {
        /// Images that the cache has.
        images: u64,
        /// Bytes that the cache has.
        bytes: u64,
    },
    /// It never will have it, and why.
    Lost(String),
}

/// What the lane is told to do next.
#[derive(Debug)]
enum Command {
    Begin {
        snapshot: u32,
        id: String,
    },
    BeginImage {
        snapshot: u32,
        image: u32,
        name: String,
    },
    Chunk {
        snapshot: u32,
        image: u32,
        pipe: Rc<PipeReader>,
        moved: oneshot::Sender<io::Result<Chunk>>,
    },
    EndImage {
        snapshot: u32,
        image: u32,
    },
    End {
        snapshot: u32,
    },
    Abort {
        snapshot: u32,
        reason: String,
    },
}

/// What came of a look into an image's pipe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Chunk {
    /// So many bytes were sent.
    Moved(u64),
    /// Nothing was there yet.
    NotYet,
    /// The image has ended.
    End,
}

/// A link that is up. Snapshots share it.
#[derive(Debug)]
pub struct Connection {
    commands: mpsc::Sender<Command>,
    fates: RefCell<HashMap<u32, watch::Sender<Fate>>>,
    next: Cell<u32>,
    closed: Cell<bool>,
}

impl Connection {
    /// A connection, and the work of its two directions: it ends with the reason for which the
    /// connection is over.
    pub(super) fn start(
        reader: Reader,
        writer: Writer,
        settings: &LinkSettings,
    ) -> (Rc<Connection>, impl Future<Output = String> + 'static) {
        let (commands, queue) = mpsc::channel(QUEUE);
        let connection = Rc::new(Connection {
            commands,
            fates: RefCell::default(),
            next: Cell::new(0),
            closed: Cell::new(false),
        });
        let shared = connection.clone();
        let settings = settings.clone();
        let over = async move {
            tokio::select! {
                why = receive(reader, &shared) => why,
                why = send(writer, queue, &settings) => why,
            }
        };
        (connection, over)
    }

    /// Begins a snapshot.
    pub async fn begin(self: &Rc<Self>, id: &str) -> Upload {
        let snapshot = self.next.replace(self.next.get().wrapping_add(1));
        let sender = watch::Sender::new(Fate::Open);
        let fate = sender.subscribe();
        self.fates.borrow_mut().insert(snapshot, sender);
        let upload = Upload { connection: self.clone(), snapshot, next_image: Cell::new(0), fate };
        upload.tell(Command::Begin { snapshot, id: id.to_owned() }).await;
        upload
    }

    /// Whether it is over.
    pub fn is_closed(&self) -> bool {
        self.closed.get()
    }

    /// Every snapshot under way is lost; returns how many.
    pub(super) fn close(&self, why: &str) -> usize {
        self.closed.set(true);
        let fates = std::mem::take(&mut *self.fates.borrow_mut());
        for fate in fates.values() {
            settle(fate, Fate::Lost(why.to_owned()));
        }
        fates.len()
    }

    fn settle(&self, snapshot: u32, outcome: Fate) {
        if let Some(fate) = self.fates.borrow_mut().remove(&snapshot) {
            settle(&fate, outcome);
        }
    }
}

fn settle(fate: &watch::Sender<Fate>, outcome: Fate) {
    fate.send_if_modified(|fate| {
        let open = *fate == Fate::Open;
        if open {
            *fate = outcome;
        }
        open
    });
}

/// One snapshot on its way to the cache. What is told to a connection that has broken goes nowhere:
/// the [fate](Upload::fate) tells.
#[derive(Debug)]
pub struct Upload {
    connection: Rc<Connection>,
    snapshot: u32,
    next_image: Cell<u32>,
    fate: watch::Receiver<Fate>,
}

impl Upload {
    /// Begins an image; the number is for the calls that follow.
    pub async fn begin_image(&self, name: &str) -> u32 {
        let image = self.next_image.replace(self.next_image.get().wrapping_add(1));
        let (snapshot, name) = (self.snapshot, name.to_owned());
        self.tell(Command::BeginImage { snapshot, image, name }).await;
        image
    }

    /// Sends what is in the pipe, at most one chunk.
    pub async fn chunk(&self, image: u32, pipe: &Rc<PipeReader>) -> io::Result<Chunk> {
        let (moved, outcome) = oneshot::channel();
        let (snapshot, pipe) = (self.snapshot, pipe.clone());
        self.tell(Command::Chunk { snapshot, image, pipe, moved }).await;
        outcome.await.unwrap_or_else(|_| Err(io::ErrorKind::ConnectionAborted.into()))
    }

    /// Ends an image.
    pub async fn end_image(&self, image: u32) {
        self.tell(Command::EndImage { snapshot: self.snapshot, image }).await;
    }

    /// Ends the snapshot: all was sent.
    pub async fn end(&self) {
        self.tell(Command::End { snapshot: self.snapshot }).await;
    }

    /// Gives the snapshot up.
    pub async fn abort(&self, reason: &str) {
        self.connection.settle(self.snapshot, Fate::Lost(reason.to_owned()));
        let reason = reason.to_owned();
        self.tell(Command::Abort { snapshot: self.snapshot, reason }).await;
    }

    /// Waits until the cache has acknowledged the snapshot or lost it.
    pub async fn fate(&self) -> Fate {
        let mut fate = self.fate.clone();
        match fate.wait_for(|fate| *fate != Fate::Open).await {
            Ok(settled) => settled.clone(),
            Err(_) => Fate::Lost("the link has ended".to_owned()),
        }
    }

    async fn tell(&self, command: Command) {
        let _ = self.connection.commands.send(command).await;
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        // A session that was torn down has told nobody: the cache need not wait for its link's end.
        if *self.fate.borrow() == Fate::Open {
            let reason = "the session at the proxy was torn down".to_owned();
            let _ = self
                .connection
                .commands
                .try_send(Command::Abort { snapshot: self.snapshot, reason });
        }
        self.connection.fates.borrow_mut().remove(&self.snapshot);
    }
}

/// The receiving task. Returns why the connection is over.
async fn receive(mut reader: Reader, connection: &Connection) -> String {
    loop {
        let heard = match reader.receive().await {
            Ok((message, _)) => said(message),
            Err(error) => return error.to_string(),
        };
        match heard {
            Ok(Said::Nothing) => {}
            Ok(Said::Acknowledged { snapshot, images, bytes }) => {
                connection.settle(snapshot, Fate::Acknowledged { images, bytes });
            }
            Ok(Said::Refused { snapshot, reason }) => {
                connection.settle(snapshot, Fate::Lost(format!("the cache gave it up: {reason}")));
            }
            Ok(Said::Goodbye(reason)) => return format!("the cache ended it: {reason}"),
            Err(error) => return format!("the cache broke the protocol: {error}"),
        }
    }
}

/// The sending task: one command after the other, so that frames never mix. Returns why the
/// connection is over.
async fn send(
    mut writer: Writer,
    mut queue: mpsc::Receiver<Command>,
    settings: &LinkSettings,
) -> String {
    let mut sender = Sender::default();
    let mut pulse = interval(settings.keep_alive);
    let max_chunk = usize::try_from(settings.max_chunk).unwrap_or(usize::MAX);
    loop {
        let command = tokio::select! {
            command = queue.recv() => match command {
                Some(command) => Some(command),
                None => return "nobody uses it any more".to_owned(),
            },
            _ = pulse.tick() => None,
        };
        let sent = async {
            match command {
                Some(command) => obey(command, &mut sender, &mut writer, max_chunk).await,
                None => writer.send(&Message::KeepAlive(KeepAlive {})).await,
            }
        };
        // A cache that waits for its quota reads nothing for a while; one that never reads again
        // must not hold CRIU's process frozen.
        match timeout(settings.ack_timeout, sent).await {
            Err(_) => return format!("the cache has read nothing for {:?}", settings.ack_timeout),
            Ok(Err(error)) => return error.to_string(),
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
        Command::Begin { snapshot, id } => Some(sender.begin(snapshot, &id)),
        Command::BeginImage { snapshot, image, name } => sender.begin_image(snapshot, image, &name),
        Command::EndImage { snapshot, image } => sender.end_image(snapshot, image),
        Command::End { snapshot } => sender.end(snapshot),
        Command::Abort { snapshot, reason } => sender.abort(snapshot, &reason),
        Command::Chunk { snapshot, image, pipe, moved } => {
            let outcome = forward(snapshot, image, &pipe, sender, writer, max_chunk).await?;
            // An image that has gone does not want to know.
            let _ = moved.send(outcome);
            None
        }
    };
    match message {
        Some(message) => writer.send(&message).await,
        None => Ok(()),
    }
}

/// Moves what is in an image's pipe. The outer error is the link's, the inner one the image's.
async fn forward(
    snapshot: u32,
    image: u32,
    pipe: &PipeReader,
    sender: &mut Sender,
    writer: &mut Writer,
    max_chunk: usize,
) -> io::Result<io::Result<Chunk>> {
    // Into the lane's own pipe first: then the length is known, nobody else can take the bytes
    // away, and CRIU has room for the next while these are sent.
    let len = match pipe.transfer_to(writer.payload(), max_chunk) {
        Ok(0) => return Ok(Ok(Chunk::End)),
        Ok(len) => len,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Ok(Chunk::NotYet)),
        Err(error) => return Ok(Err(error)),
    };
    let Some(message) = sender.data(snapshot, image, len) else {
        writer.drop_payload()?;
        return Ok(Err(io::ErrorKind::ConnectionAborted.into()));
    };
    writer.send_payload(&message, len).await?;
    Ok(Ok(Chunk::Moved(len as u64)))
}
