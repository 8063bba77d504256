//! The outgoing direction of a link: what the proxy is told, and a sign of life now and then. It goes
//! on while the incoming direction waits for the quota.

use std::os::fd::AsFd;
use std::rc::Rc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::interval;

use crate::criu::pages::Space;
use crate::store::Image;
use crate::store::pages::{Flat, Layer};
use crate::wire::lane::{LaneError, Writer};
use crate::wire::message::{KeepAlive, Message};

/// What a proxy is told.
#[derive(Debug)]
pub(super) enum Answer {
    /// Just that.
    Message(Message),
    /// A message, and as its payload a part of an image, which has it in one file.
    Part {
        /// The message.
        message: Message,
        /// The image.
        image: Rc<Image>,
        /// Where the part begins, in bytes.
        offset: u64,
        /// How long it is, in bytes.
        len: usize,
    },
    /// A message, and as its payload pages that lie together in a layer.
    Pages {
        /// The message.
        message: Message,
        /// The layer.
        layer: Rc<Layer>,
        /// Where the pages begin in its file, in bytes.
        offset: u64,
        /// How many bytes they have.
        len: usize,
        /// As long as it is there, so are they.
        _held: Flat<Space>,
    },
}

/// The outgoing direction.
pub(super) struct Answers {
    writer: Writer,
    queue: mpsc::Receiver<Answer>,
    keep_alive: Duration,
}

impl Answers {
    /// Sends what is in the queue.
    pub(super) fn new(
        writer: Writer,
        queue: mpsc::Receiver<Answer>,
        keep_alive: Duration,
    ) -> Answers {
        Answers { writer, queue, keep_alive }
    }

    /// Sends until the link breaks; says why it did.
    pub(super) async fn send(&mut self) -> LaneError {
        let mut pulse = interval(self.keep_alive);
        loop {
            let answer = tokio::select! {
                Some(answer) = self.queue.recv() => answer,
                _ = pulse.tick() => Answer::Message(Message::KeepAlive(KeepAlive {})),
            };
            if let Err(error) = self.send_one(answer).await {
                return error.into();
            }
        }
    }

    /// What was to be said before the end.
    pub(super) async fn flush(&mut self) {
        while let Ok(answer) = self.queue.try_recv() {
            if self.send_one(answer).await.is_err() {
                return;
            }
        }
    }

    /// For the last word.
    pub(super) fn writer(&mut self) -> &mut Writer {
        &mut self.writer
    }

    async fn send_one(&mut self, answer: Answer) -> std::io::Result<()> {
        match answer {
            Answer::Message(message) => self.writer.send(&message).await,
            Answer::Part { message, image, offset, len } => {
                let (file, offset) = match image.part(offset, len as u64) {
                    Some(part) => (part.file, part.offset),
                    None => (image.file(), 0),
                };
                self.writer.send_file(&message, file.as_fd(), offset, len).await
            }
            Answer::Pages { message, layer, offset, len, _held } => {
                self.writer.send_file(&message, layer.as_fd(), offset, len).await
            }
        }
    }
}
