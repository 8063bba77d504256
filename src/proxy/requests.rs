//! CRIU's requests during a dump, each with the pipe that belongs to it.

use std::cell::Cell;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use rustix::io::ioctl_fionread;
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::config::SessionSettings;
use crate::criu::images::INVENTORY;
use crate::criu::stream::decode_request;
use crate::daemon::sessions::{BadSession, read_request, receive_pipe};
use crate::sys::pipe::PipeReader;

/// An image that CRIU opens, and the pipe that it passed.
pub(super) type Request = Result<(String, PipeReader), BadSession>;

/// How far CRIU's requests are read.
#[derive(Debug, Default)]
pub(super) struct Asked {
    /// The reader has handed over all that it has read.
    idle: Cell<bool>,
    inventory: Cell<bool>,
}

impl Asked {
    /// Whether CRIU has asked for the last image.
    pub(super) fn for_inventory(&self) -> bool {
        self.inventory.get()
    }
}

/// CRIU's requests, read by a task of their own so that waiting for the next can be given up at any
/// point without losing a part of it.
pub(super) struct Requests {
    queue: mpsc::Receiver<Request>,
    asked: Rc<Asked>,
    /// CRIU's socket, to look at.
    socket: Option<OwnedFd>,
    _reader: JoinSet<()>,
}

impl Requests {
    /// Starts to read.
    pub(super) fn read_from(mut socket: UnixStream, settings: &SessionSettings) -> Requests {
        let patience = settings.request_timeout;
        // A descriptor is only received when its image can be begun.
        let (sender, queue) = mpsc::channel(1);
        let asked = Rc::<Asked>::default();
        let look_at = socket.as_fd().try_clone_to_owned().ok();
        let reading = asked.clone();
        let mut reader = JoinSet::new();
        reader.spawn_local(async move {
            loop {
                reading.idle.set(true);
                let request = read_request(&mut socket, patience).await;
                reading.idle.set(false);
                let request = match request {
                    Ok(None) => return,
                    Ok(Some(request)) => opened(&socket, &request, &reading, patience).await,
                    Err(error) => Err(error),
                };
                let over = request.is_err();
                if sender.send(request).await.is_err() || over {
                    return;
                }
            }
        });
        Requests { queue, asked, socket: look_at, _reader: reader }
    }

    /// How far they are read.
    pub(super) fn asked(&self) -> &Rc<Asked> {
        &self.asked
    }

    /// CRIU's socket, for somebody else who looks at it. `None` for want of a descriptor.
    pub(super) fn socket(&self) -> Option<OwnedFd> {
        self.socket.as_ref()?.try_clone().ok()
    }

    /// Whether all that CRIU has asked for so far was handed over.
    pub(super) fn are_all_read(&self) -> bool {
        let unread = |socket: &OwnedFd| ioctl_fionread(socket).unwrap_or(0);
        self.asked.idle.get()
            && self.queue.is_empty()
            && self.socket.as_ref().is_none_or(|socket| unread(socket) == 0)
    }

    /// The next request with its pipe; `None` when CRIU has closed the socket.
    pub(super) async fn next(&mut self) -> Option<Request> {
        self.queue.recv().await
    }
}

/// The image that a request opens, and the pipe that comes after it.
async fn opened(socket: &UnixStream, request: &[u8], asked: &Asked, patience: Duration) -> Request {
    let name = decode_request(request)?;
    if name == INVENTORY {
        asked.inventory.set(true);
    }
    let pipe = receive_pipe(socket, &name, patience, PipeReader::adopt).await?;
    Ok((name, pipe))
}
