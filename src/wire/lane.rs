//! One connection of a link, over any stream socket: frames in and out, payload by splice.
//!
//! The two directions are used by different tasks. A [`Writer`] or [`Reader`] whose future was
//! dropped in the middle of a frame is of no use any more; the link has to end.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::net::{RecvFlags, SendFlags, recv, send};
use tokio::io::Interest;
use tokio::time::timeout;

use super::frame::{self, BadFrame, HEADER_LEN, Header, PREFACE_LEN};
use super::message::{BadMessage, Message};
use crate::sys::connected::Stream;
use crate::sys::pipe::{Pipe, transfer, transfer_from_file, transfer_to_file};

pub use crate::sys::pipe::DEFAULT_CAPACITY;

/// A peer is gone when it was silent for this many keep-alive intervals.
const SILENT_INTERVALS: u32 = 3;
/// How often a peer that nothing is read from is looked at.
const LOOK: Duration = Duration::from_millis(100);

/// Why a lane ends.
#[derive(Debug, thiserror::Error)]
pub enum LaneError {
    /// The peer closed it between two frames.
    #[error("the peer closed the connection")]
    Closed,
    /// The peer closed it within a frame.
    #[error("the connection ended in the middle of a frame")]
    Torn,
    /// Nothing came for that long.
    #[error("nothing came from the peer for {0:?}")]
    Silent(Duration),
    /// See [`BadFrame`].
    #[error("{0}")]
    Frame(#[from] BadFrame),
    /// See [`BadMessage`].
    #[error("{0}")]
    Message(#[from] BadMessage),
    /// The connection failed, or the local end of a splice did.
    #[error("{0}")]
    Io(#[from] io::Error),
}

impl LaneError {
    /// Whether the peer is to blame: what came is not the protocol.
    pub fn is_fault(&self) -> bool {
        matches!(self, LaneError::Frame(_) | LaneError::Message(_))
    }

    /// Whether the peer has simply gone. One that goes with bytes unread leaves a reset behind.
    pub fn is_end(&self) -> bool {
        match self {
            LaneError::Closed => true,
            LaneError::Io(error) => {
                matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe)
            }
            _ => false,
        }
    }
}

/// Splits a connection into its two directions, for messages without payload at first. Both sides send a sign of
/// life every `keep_alive`.
pub fn split(stream: Stream, keep_alive: Duration) -> (Reader<()>, Writer<()>) {
    let patience = keep_alive * SILENT_INTERVALS;
    let stream = Arc::new(stream);
    (Reader { stream: stream.clone(), pipe: (), patience }, Writer { stream, pipe: () })
}

/// The outgoing direction, and the pipe through which payload passes, once there is one.
#[derive(Debug)]
pub struct Writer<P = Pipe> {
    stream: Arc<Stream>,
    pipe: P,
}

impl Writer<()> {
    /// Makes it one for payload, too, through a pipe of so many bytes. A direction that carries none needs no more
    /// than [`DEFAULT_CAPACITY`].
    pub fn with_pipe(self, capacity: usize) -> io::Result<Writer> {
        Ok(Writer { stream: self.stream, pipe: Pipe::new(capacity)? })
    }
}

impl<P> Writer<P> {
    /// Sends the preface.
    pub async fn send_preface(&mut self) -> io::Result<()> {
        self.send_bytes(&frame::preface(), SendFlags::empty()).await
    }

    /// Sends a message without payload.
    pub async fn send(&mut self, message: &Message) -> io::Result<()> {
        self.send_bytes(&message.encode(0), SendFlags::empty()).await
    }

    async fn send_bytes(&mut self, mut bytes: &[u8], flags: SendFlags) -> io::Result<()> {
        let flags = flags | SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        while !bytes.is_empty() {
            let sent = self
                .stream
                .async_io(Interest::WRITABLE, || Ok(send(&*self.stream, bytes, flags)?))
                .await?;
            bytes = &bytes[sent..];
        }
        Ok(())
    }
}

impl Writer {
    /// The pipe that the next payload is put into: it is empty now.
    pub fn payload(&self) -> &Pipe {
        &self.pipe
    }

    /// Sends a message, and as its payload the `len` bytes that are in [`payload`](Self::payload).
    pub async fn send_payload(&mut self, message: &Message, mut len: usize) -> io::Result<()> {
        // MORE joins the header with the payload in one segment.
        self.send_bytes(&message.encode(len), SendFlags::MORE).await?;
        while len > 0 {
            len -= self.send_pipe(len).await?;
        }
        Ok(())
    }

    /// Sends a message, and as its payload `len` bytes from `offset` of a file, which has them.
    pub async fn send_file(
        &mut self,
        message: &Message,
        file: BorrowedFd<'_>,
        mut offset: u64,
        mut len: usize,
    ) -> io::Result<()> {
        let more = if len > 0 { SendFlags::MORE } else { SendFlags::empty() };
        self.send_bytes(&message.encode(len), more).await?;
        while len > 0 {
            let mut filled = transfer_from_file(file, &mut offset, &self.pipe.into, len)?;
            if filled == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            len -= filled;
            while filled > 0 {
                filled -= self.send_pipe(filled).await?;
            }
        }
        Ok(())
    }

    /// Drops what is in [`payload`](Self::payload): nobody wants it any more.
    pub fn drop_payload(&mut self) -> io::Result<()> {
        self.pipe = Pipe::new(self.pipe.capacity())?;
        Ok(())
    }

    /// Sends some of the `len` bytes that the pipe holds, so that only the socket can say "not yet".
    async fn send_pipe(&mut self, len: usize) -> io::Result<usize> {
        let send = || transfer(&self.pipe.out, &*self.stream, len);
        self.stream.async_io(Interest::WRITABLE, send).await
    }
}

/// The incoming direction, likewise.
#[derive(Debug)]
pub struct Reader<P = Pipe> {
    stream: Arc<Stream>,
    pipe: P,
    patience: Duration,
}

impl Reader<()> {
    /// Makes it one for payload, too, through a pipe of so many bytes.
    pub fn with_pipe(self, capacity: usize) -> io::Result<Reader> {
        Ok(Reader { stream: self.stream, pipe: Pipe::new(capacity)?, patience: self.patience })
    }
}

impl<P> Reader<P> {
    /// The connection, to look at.
    pub fn stream(&self) -> &Stream {
        &self.stream
    }

    /// Receives and checks the preface.
    pub async fn receive_preface(&mut self) -> Result<(), LaneError> {
        let mut bytes = [0; PREFACE_LEN];
        self.receive_exactly(&mut bytes, LaneError::Closed).await?;
        Ok(frame::check_preface(bytes)?)
    }

    /// Receives the next message, and the length of the payload after it, which has to be taken by
    /// [`payload_to_file`](Self::payload_to_file) or [`discard`](Self::discard) before the next.
    pub async fn receive(&mut self) -> Result<(Message, usize), LaneError> {
        // Reading no further than the header leaves the payload in the kernel, to be spliced.
        let mut header = [0; HEADER_LEN];
        self.receive_exactly(&mut header, LaneError::Closed).await?;
        let header = Header::decode(header)?;
        let mut bytes = vec![0; header.message_len];
        self.receive_exactly(&mut bytes, LaneError::Torn).await?;
        Ok((Message::decode(header, &bytes)?, header.payload_len))
    }

    /// Reads `len` bytes of payload into memory, for what is small.
    pub async fn payload_to_memory(&mut self, len: usize) -> Result<Vec<u8>, LaneError> {
        let mut bytes = vec![0; len];
        self.receive_exactly(&mut bytes, LaneError::Torn).await?;
        Ok(bytes)
    }

    /// Drops `len` bytes of payload.
    pub async fn discard(&mut self, mut len: usize) -> Result<(), LaneError> {
        let mut sink = vec![0; len.min(64 << 10)];
        while len > 0 {
            let room = sink.len().min(len);
            self.receive_exactly(&mut sink[..room], LaneError::Torn).await?;
            len -= room;
        }
        Ok(())
    }

    /// Resolves when the peer has closed its direction, though not all that it sent has been read.
    pub async fn hung_up(&self) {
        while self.stream.ready(Interest::READABLE).await.is_ok_and(|ready| !ready.is_read_closed())
        {
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Calls `io` until it is no longer "not yet", or the peer has been silent for too long.
    async fn in_time<T>(&self, mut io: impl FnMut() -> io::Result<T>) -> Result<T, LaneError> {
        loop {
            let begun = Instant::now();
            let done = timeout(self.patience, self.stream.async_io(Interest::READABLE, &mut io));
            if let Ok(done) = done.await {
                return Ok(done?);
            }
            // After this process itself has stood still, its timers go off before it hears what has come
            // meanwhile, and a peer that stood still with it has to have its time anew.
            let stood_still = begun.elapsed() > self.patience + self.patience / SILENT_INTERVALS;
            let look = timeout(LOOK, self.stream.async_io(Interest::READABLE, &mut io));
            match look.await {
                Ok(done) => return Ok(done?),
                Err(_) if stood_still => {}
                Err(_) => return Err(LaneError::Silent(self.patience)),
            }
        }
    }

    async fn receive_exactly(
        &mut self,
        bytes: &mut [u8],
        at_start: LaneError,
    ) -> Result<(), LaneError> {
        let mut at_end = at_start;
        let mut filled = 0;
        while filled < bytes.len() {
            let rest = &mut bytes[filled..];
            let receive = || Ok(recv(&*self.stream, &mut *rest, RecvFlags::DONTWAIT)?.0);
            match self.in_time(receive).await? {
                0 => return Err(at_end),
                received => filled += received,
            }
            at_end = LaneError::Torn;
        }
        Ok(())
    }
}

impl Reader {
    /// Moves `len` bytes of payload to the end of a file, where `offset` is.
    pub async fn payload_to_file(
        &mut self,
        file: BorrowedFd<'_>,
        offset: &mut u64,
        len: usize,
    ) -> Result<(), LaneError> {
        let mut left = len;
        while left > 0 {
            let mut filled = self.fill_pipe(left).await?;
            left -= filled;
            while filled > 0 {
                filled -= transfer_to_file(&self.pipe.out, file, offset, filled)?;
            }
        }
        Ok(())
    }

    /// Moves what has come of the payload into the pipe, which is empty, so that only the socket
    /// can say "not yet".
    async fn fill_pipe(&mut self, len: usize) -> Result<usize, LaneError> {
        let fill = || transfer(&*self.stream, &self.pipe.into, len.min(self.pipe.capacity()));
        match self.in_time(fill).await? {
            0 => Err(LaneError::Torn),
            filled => Ok(filled),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;
    use std::process::Command;

    fn reader(keep_alive: Duration) -> (Reader<()>, OwnedFd) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let ours = Stream::from_unix(tokio::net::UnixStream::from_std(ours).unwrap());
        (split(ours, keep_alive).0, theirs.into())
    }

    #[tokio::test(flavor = "current_thread")]
    async fn what_came_while_this_side_stood_still_is_no_silence() {
        let (mut reader, theirs) = reader(Duration::from_millis(100));
        // Says something to a process that is stopped for longer than it is patient.
        let script = r"kill -STOP $PPID; sleep 0.5; printf '\4\0\0\0\0\0\0\0'; kill -CONT $PPID";
        let mut peer = Command::new("sh").args(["-c", script]).stdout(theirs).spawn().unwrap();
        let received = reader.receive().await;
        assert!(matches!(received, Ok((Message::KeepAlive(_), 0))), "{received:?}");
        assert!(peer.wait().unwrap().success());
    }

    #[tokio::test(flavor = "current_thread")]
    async fn silence_ends_a_lane() {
        let (mut reader, _theirs) = reader(Duration::from_millis(10));
        assert!(matches!(reader.receive().await, Err(LaneError::Silent(_))));
    }
}
