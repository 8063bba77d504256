//! What the kernel says of one TCP socket, and of one address: `sock_diag(7)` and rtnetlink(7).
//!
//! Each question is one request of a fixed size and one answer, which the kernel gives before the request's
//! send(2) returns, and finds by its hash tables: it costs the same however many connections there are.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::io::Errno;
use rustix::net::netlink::{SOCK_DIAG, SocketAddrNetlink};
use rustix::net::{
    AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType, recv, sendto,
    socket_with,
};

use super::connected::canonical;

// include/uapi/linux/netlink.h
const HEADER_LEN: usize = 16;
const REQUEST: u16 = 1;
const ERROR: u16 = 2;
// include/uapi/linux/sock_diag.h, inet_diag.h; include/net/tcp_states.h
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const TCP: u8 = 6;
const ESTABLISHED: u8 = 1;
const NO_COOKIE: [u8; 8] = [0xff; 8];
const SOCKET_ID_LEN: usize = 48;
const SOCKET_LEN: usize = 4 + SOCKET_ID_LEN + 5 * 4;
// include/uapi/linux/rtnetlink.h
const GET_ROUTE: u16 = 26;
const ROUTE_LEN: usize = 12;
const ROUTE_TYPE: usize = 7;
const DESTINATION: u16 = 1;
const TYPE_LOCAL: u8 = 2;

/// No answer to these questions is longer, in bytes; the tail of a longer one is of no interest.
const ANSWER_MAX: usize = 1024;

/// The user who holds the established TCP socket between two addresses on this machine; `None` if there is no
/// such socket. `scope` is the interface of a link-local address, else 0. The error is `Unsupported` when the kernel cannot tell
/// or may not be asked.
///
/// A kernel without `tcp_diag` has the same answer for every socket as for one that does not exist. So
/// `present`, the ends of a socket that is known to be there, is asked for until one was found.
pub fn owner(
    local: SocketAddr,
    remote: SocketAddr,
    scope: u32,
    present: impl FnOnce() -> (SocketAddr, SocketAddr),
) -> io::Result<Option<u32>> {
    static FINDS: AtomicBool = AtomicBool::new(false);
    let found = ask_for_socket(local, remote, scope)?;
    if found.is_none() && !FINDS.load(Ordering::Relaxed) {
        let (local, remote) = present();
        if ask_for_socket(local, remote, scope)?.is_none() {
            return Err(io::ErrorKind::Unsupported.into());
        }
    }
    FINDS.store(true, Ordering::Relaxed);
    // The socket of a connection that is closing may be nobody's any more, and then counts as root's.
    Ok(found.filter(|found| found.open).map(|found| found.uid))
}

/// Whether what is sent to an address stays on this machine. The error is `Unsupported` when the kernel may
/// not be asked.
pub fn is_of_this_machine(address: IpAddr) -> io::Result<bool> {
    let (family, bytes) = match address.to_canonical() {
        IpAddr::V4(ip) => (AddressFamily::INET, ip.octets().to_vec()),
        IpAddr::V6(ip) => (AddressFamily::INET6, ip.octets().to_vec()),
    };
    let len = u8::try_from(bytes.len()).unwrap_or(0);
    let mut body = vec![low(family), 8 * len, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    body.extend_from_slice(&(4 + u16::from(len)).to_ne_bytes());
    body.extend_from_slice(&DESTINATION.to_ne_bytes());
    body.extend_from_slice(&bytes);
    // Protocol 0 is NETLINK_ROUTE.
    match ask(None, GET_ROUTE, &body)? {
        Some(route) if route.len() >= ROUTE_LEN => Ok(route[ROUTE_TYPE] == TYPE_LOCAL),
        Some(_) => Err(io::ErrorKind::InvalidData.into()),
        // There is no way to it: it is not here.
        None => Ok(false),
    }
}

/// A socket as the kernel tells of it.
struct Found {
    open: bool,
    uid: u32,
}

fn ask_for_socket(local: SocketAddr, remote: SocketAddr, scope: u32) -> io::Result<Option<Found>> {
    let (local, remote) = (canonical(local), canonical(remote));
    let family = if local.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let mut body = vec![low(family), TCP, 0, 0];
    body.extend_from_slice(&u32::MAX.to_ne_bytes());
    body.extend_from_slice(&local.port().to_be_bytes());
    body.extend_from_slice(&remote.port().to_be_bytes());
    body.extend_from_slice(&padded(local.ip()));
    body.extend_from_slice(&padded(remote.ip()));
    body.extend_from_slice(&scope.to_ne_bytes());
    body.extend_from_slice(&NO_COOKIE);
    let answer = ask(Some(SOCK_DIAG), SOCK_DIAG_BY_FAMILY, &body)?;
    answer.map_or(Ok(None), |answer| found(&answer, local, remote))
}

/// What an answer says, if it is about the socket that was meant: without one, the kernel
/// tells of a socket that listens on the address.
fn found(answer: &[u8], local: SocketAddr, remote: SocketAddr) -> io::Result<Option<Found>> {
    if answer.len() < SOCKET_LEN {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let port = |at: usize| u16::from_be_bytes([answer[at], answer[at + 1]]);
    let word = |at: usize| u32::from_ne_bytes([0, 1, 2, 3].map(|byte| answer[at + byte]));
    let ip = |at: usize| {
        let bytes: [u8; 16] = std::array::from_fn(|byte| answer[at + byte]);
        if i32::from(answer[0]) == i32::from(low(AddressFamily::INET)) {
            IpAddr::V4(Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3]))
        } else {
            IpAddr::V6(Ipv6Addr::from(bytes))
        }
    };
    let ends =
        (canonical(SocketAddr::new(ip(8), port(4))), canonical(SocketAddr::new(ip(24), port(6))));
    let fields = 4 + SOCKET_ID_LEN;
    let (uid, inode) = (word(fields + 12), word(fields + 16));
    let open = answer[1] == ESTABLISHED && inode != 0;
    Ok((ends == (local, remote)).then_some(Found { open, uid }))
}

/// An address in the sixteen bytes that the kernel has for one.
fn padded(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V4(ip) => {
            let [a, b, c, d] = ip.octets();
            [a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
        }
        IpAddr::V6(ip) => ip.octets(),
    }
}

/// A family in the one byte that a request has for it.
fn low(family: AddressFamily) -> u8 {
    family.as_raw().to_le_bytes()[0]
}

/// Asks the kernel one thing. `None` is that there is no such thing.
fn ask(protocol: Option<Protocol>, kind: u16, body: &[u8]) -> io::Result<Option<Vec<u8>>> {
    let socket =
        socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, protocol)
            .map_err(sorted)?;
    let len = u32::try_from(HEADER_LEN + body.len()).map_err(io::Error::other)?;
    let mut request = len.to_ne_bytes().to_vec();
    request.extend_from_slice(&kind.to_ne_bytes());
    request.extend_from_slice(&REQUEST.to_ne_bytes());
    request.extend_from_slice(&[0; 8]);
    request.extend_from_slice(body);
    let kernel = SocketAddrNetlink::new(0, 0);
    sendto(&socket, &request, SendFlags::DONTWAIT, &kernel).map_err(sorted)?;
    let mut answer = vec![0; ANSWER_MAX];
    let len = recv(&socket, &mut *answer, RecvFlags::DONTWAIT).map_err(sorted)?.0;
    answer.truncate(len);
    if len < HEADER_LEN {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let body = answer.split_off(HEADER_LEN);
    if u16::from_ne_bytes([answer[4], answer[5]]) != ERROR {
        return Ok(Some(body));
    }
    let code = body.first_chunk().copied().map_or(0, i32::from_ne_bytes);
    match Errno::from_raw_os_error(-code) {
        Errno::NOENT | Errno::NETUNREACH | Errno::HOSTUNREACH => Ok(None),
        errno => Err(sorted(errno)),
    }
}

/// An error, `Unsupported` if it says that the kernel has no such thing or that it may not be asked for.
fn sorted(errno: Errno) -> io::Error {
    match errno {
        Errno::AFNOSUPPORT
        | Errno::PROTONOSUPPORT
        | Errno::OPNOTSUPP
        | Errno::INVAL
        | Errno::PERM
        | Errno::ACCESS
        | Errno::NOSYS
        | Errno::CONNREFUSED => io::ErrorKind::Unsupported.into(),
        errno => errno.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn the_owner_of_one_socket_is_told() {
        let ours = Some(rustix::process::getuid().as_raw());
        for (bound, to) in
            [("127.0.0.1:0", "127.0.0.1"), ("[::]:0", "127.0.0.1"), ("[::1]:0", "::1")]
        {
            let listener = TcpListener::bind(bound).unwrap();
            let client = TcpStream::connect((to, listener.local_addr().unwrap().port())).unwrap();
            let (accepted, _) = listener.accept().unwrap();
            let (near, far) = (client.local_addr().unwrap(), client.peer_addr().unwrap());
            let ask = || owner(near, far, 0, || (far, near)).unwrap();
            assert_eq!(ask(), ours, "{bound}");
            assert_eq!(owner(far, near, 0, || (far, near)).unwrap(), ours, "the other end");
            drop(client);
            assert_eq!(ask(), None, "{bound}: what is closed is nobody's");
            drop(accepted);
            // Not the one that listens there.
            assert_eq!(owner(far, near, 0, || (far, near)).unwrap(), None);
        }
    }

    #[test]
    fn the_machine_knows_its_own_addresses() {
        for (address, is_ours) in
            [("127.0.0.1", true), ("127.9.9.9", true), ("::1", true), ("192.0.2.7", false)]
        {
            assert_eq!(is_of_this_machine(address.parse().unwrap()).unwrap(), is_ours, "{address}");
        }
    }
}
