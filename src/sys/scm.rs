//! Descriptors over unix sockets (`SCM_RIGHTS`, unix(7)).

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// Room for as many descriptors as one honest message carries, and one more so that a surplus is
/// seen as such.
const ROOM: usize = 2;

/// Receives the one byte that a descriptor belongs to, and the descriptor. `Ok(None)` is the end of
/// the stream.
///
/// # Errors
///
/// `WouldBlock` when nothing is there; `InvalidData` when the byte came with no descriptor or with
/// more than one (which are closed), or when this process has no room for another descriptor.
pub fn receive_descriptor(socket: impl AsFd) -> io::Result<Option<OwnedFd>> {
    match receive_byte(socket)? {
        None => Ok(None),
        Some((_, Some(descriptor))) => Ok(Some(descriptor)),
        Some((_, None)) => Err(invalid("no descriptor passed with the request")),
    }
}

/// Receives one byte, and the descriptor that belongs to it, if one does. `Ok(None)` is the end of the
/// stream. The errors are those of [`receive_descriptor`], except that a byte alone is none.
///
/// Reading exactly one byte is what ties the descriptor to its request: the kernel hands over
/// descriptors with the byte they were sent with.
pub fn receive_byte(socket: impl AsFd) -> io::Result<Option<(u8, Option<OwnedFd>)>> {
    let mut byte = [0];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(ROOM))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let received = recvmsg(socket, &mut [IoSliceMut::new(&mut byte)], &mut control, flags)?;
    let mut descriptors: Vec<OwnedFd> = control
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(rights) => Some(rights),
            _ => None,
        })
        .flatten()
        .collect();
    if received.bytes == 0 {
        return Ok(None);
    }
    let cut = received.flags.contains(ReturnFlags::CTRUNC);
    if cut && descriptors.is_empty() {
        return Err(invalid(
            "no room for the descriptor passed: too many open files (LimitNOFILE=)",
        ));
    }
    if cut || descriptors.len() > 1 {
        return Err(invalid("more than one descriptor passed with a request"));
    }
    Ok(Some((byte[0], descriptors.pop())))
}

/// Sends one byte and the descriptor that belongs to it.
pub fn send_descriptor(socket: impl AsFd, descriptor: BorrowedFd<'_>) -> io::Result<()> {
    send(socket, &[0], Some(descriptor), SendFlags::NOSIGNAL)
}

/// Sends a message, at once or not at all, and the descriptor that belongs to it, if one does.
pub fn send_message(
    socket: impl AsFd,
    message: &[u8],
    descriptor: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    send(socket, message, descriptor, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)
}

fn send(
    socket: impl AsFd,
    message: &[u8],
    descriptor: Option<BorrowedFd<'_>>,
    flags: SendFlags,
) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if let Some(descriptor) = &descriptor {
        control.push(SendAncillaryMessage::ScmRights(std::slice::from_ref(descriptor)));
    }
    sendmsg(socket, &[IoSlice::new(message)], &mut control, flags)?;
    Ok(())
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_descriptor_belongs_to_its_byte() {
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        ours.write_all(b"head").unwrap();
        let (end, _other) = rustix::pipe::pipe().unwrap();
        send_descriptor(&ours, end.as_fd()).unwrap();
        ours.write_all(b"x").unwrap();

        let mut head = [0; 4];
        theirs.read_exact(&mut head).unwrap();
        assert!(receive_descriptor(&theirs).unwrap().is_some());
        let missing = receive_descriptor(&theirs).unwrap_err();
        assert_eq!(missing.to_string(), "no descriptor passed with the request");
        drop(ours);
        assert!(receive_descriptor(&theirs).unwrap().is_none());
    }

    #[test]
    fn a_surplus_of_descriptors_is_refused() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (a, b) = rustix::pipe::pipe().unwrap();
        let descriptors = [a.as_fd(), b.as_fd(), a.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&descriptors));
        sendmsg(&ours, &[IoSlice::new(&[0])], &mut control, SendFlags::NOSIGNAL).unwrap();
        assert!(receive_descriptor(&theirs).unwrap_err().to_string().contains("more than one"));
    }
}
