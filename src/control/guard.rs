//! Bounds on what a peer of the control socket may make the daemon hold.
//!
//! zlink keeps what it reads until a message ends, up to 100 MiB, and queues the descriptors that
//! came with it without a limit. Both would let one peer fill the daemon, so they are counted here,
//! below zlink.

use std::io;

use zlink::connection::socket::{ReadHalf, ReadResult, Socket};
use zlink::unix::Stream;

/// No call is longer than this, in bytes.
pub(super) const CALL_MAX: usize = 64 << 10;

/// A unix socket whose peer is held to [`CALL_MAX`] and to one descriptor for a call.
#[derive(Debug)]
pub(super) struct Guarded(pub(super) Stream);

impl Socket for Guarded {
    type ReadHalf = GuardedReader;
    type WriteHalf = <Stream as Socket>::WriteHalf;

    const CAN_TRANSFER_FDS: bool = true;

    fn split(self) -> (Self::ReadHalf, Self::WriteHalf) {
        let (socket, writer) = self.0.split();
        (GuardedReader { socket, bytes: 0, descriptors: 0 }, writer)
    }
}

/// The reading half.
#[derive(Debug)]
pub(super) struct GuardedReader {
    pub(super) socket: <Stream as Socket>::ReadHalf,
    /// Bytes that zlink holds of a message that has not ended.
    bytes: usize,
    /// Descriptors that came with them.
    descriptors: usize,
}

impl ReadHalf for GuardedReader {
    async fn read(&mut self, buffer: &mut [u8]) -> zlink::Result<ReadResult> {
        let read = self.socket.read(buffer).await?;
        self.bytes += read.bytes_read();
        self.descriptors += read.fds().len();
        if self.bytes > CALL_MAX {
            return Err(refused(format!("a call of more than {CALL_MAX} bytes")));
        }
        if self.descriptors > 1 {
            return Err(refused("more than one descriptor passed with a call".to_owned()));
        }
        // A NUL ends a message; zlink empties its buffer when nothing follows.
        if read.bytes_read().checked_sub(1).is_some_and(|last| buffer[last] == 0) {
            self.bytes = 0;
            self.descriptors = 0;
        }
        Ok(read)
    }
}

fn refused(what: String) -> zlink::Error {
    zlink::Error::Io(io::Error::new(io::ErrorKind::InvalidData, what))
}
