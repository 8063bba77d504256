//! CRIU's requests during a dump, each with the pipe that belongs to it.

use std::time::Duration;

use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::config::SessionSettings;
use crate::criu::stream::decode_request;
use crate::daemon::sessions::{BadSession, read_request, receive_pipe};
use crate::sys::pipe::PipeReader;

/// An image that CRIU opens, and the pipe that it passed.
pub(super) type Request = Result<(String, PipeReader), BadSession>;

/// CRIU's requests, read by a task of their own so that waiting for the next can be given up at any
/// point without losing a part of it.
pub(super) struct Requests {
    requests: mpsc::Receiver<Request>,
    _reader: JoinSet<()>,
}

impl Requests {
    /// Starts to read.
    pub(super) fn read_from(mut socket: UnixStream, settings: &SessionSettings) -> Requests {
        let patience = settings.request_timeout;
        // A descriptor is only received when its image can be begun.
        let (sender, requests) = mpsc::channel(1);
        let mut reader = JoinSet::new();
        reader.spawn_local(async move {
            loop {
                let request = match read_request(&mut socket, patience).await {
                    Ok(None) => return,
                    Ok(Some(request)) => opened(&socket, &request, patience).await,
                    Err(error) => Err(error),
                };
                let over = request.is_err();
                if sender.send(request).await.is_err() || over {
                    return;
                }
            }
        });
        Requests { requests, _reader: reader }
    }

    /// The next request with its pipe; `None` when CRIU has closed the socket.
    pub(super) async fn next(&mut self) -> Option<Request> {
        self.requests.recv().await
    }
}

/// The image that a request opens, and the pipe that comes after it.
async fn opened(socket: &UnixStream, request: &[u8], patience: Duration) -> Request {
    let name = decode_request(request)?;
    let pipe = receive_pipe(socket, &name, patience, PipeReader::adopt).await?;
    Ok((name, pipe))
}
