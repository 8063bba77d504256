//! Who is at the other end of a connection that may be TCP, and may be from this machine.
//!
//! TCP has no `SO_PEERCRED`. But the kernel knows both ends of a connection within a machine, each with the
//! user whose socket it is, and can be asked for one ([`sock_diag`]). Where it cannot, it lists them all
//! (`/proc/self/net/tcp`, proc(5)), which takes milliseconds when there are many: that is read outside the event loop.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use rustix::net::sockopt::socket_peercred;
use rustix::net::{getpeername, getsockname};
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;

use super::sessions::is_admitted;
use crate::sys::connected::{Peer, Stream, canonical};
use crate::sys::sock_diag;

/// The state of a connection that neither end has closed (`include/net/tcp_states.h`).
const ESTABLISHED: &str = "01";

/// Why a peer is not served.
#[derive(Debug, thiserror::Error)]
pub enum NotAdmitted {
    /// It is on another machine.
    #[error(
        "it is on another machine; set `insecure = true` to let in whoever reaches the socket, on a \
         network that you trust"
    )]
    NotLocal,
    /// The kernel lists no such peer: it has gone, or lives in another network namespace.
    #[error("its user is not known")]
    Unknown,
    /// It may not.
    #[error("its uid, {0}, is not in allow-uids")]
    NotAllowed(u32),
    /// The user cannot be looked up.
    #[error("its user cannot be told: {0}")]
    Io(#[from] io::Error),
}

/// Whose a peer is: what it holds of something that is scarce counts as that one's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Owner {
    /// A user of this machine.
    User(u32),
    /// Another machine. One with IPv6 has all addresses of a network of 64 bits.
    Host(IpAddr),
}

impl Owner {
    fn host(ip: IpAddr) -> Owner {
        Owner::Host(match ip.to_canonical() {
            IpAddr::V6(ip) => network(ip, 64).into(),
            IpAddr::V4(ip) => ip.into(),
        })
    }
}

/// The network of so many bits, up to 128 and at least one, that an address is in.
pub fn network(ip: Ipv6Addr, bits: u32) -> Ipv6Addr {
    Ipv6Addr::from_bits(ip.to_bits() & (u128::MAX << (128 - bits)))
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Owner::User(uid) => write!(f, "uid {uid}"),
            Owner::Host(ip) => ip.fmt(f),
        }
    }
}

/// Checks that a peer may connect, and tells whose it is: that it is a process of this machine, of a user who [may](is_admitted). Peers of
/// other machines are only let in if that is `insecure`, whoever they are. A process that connects to an address that its own
/// machine has, whichever that is, is no peer of another machine.
pub async fn admit_stream(
    stream: &Stream,
    allowed: &[u32],
    insecure: bool,
) -> Result<Owner, NotAdmitted> {
    let owner = match stream.peer() {
        Peer::Unix => Owner::User(socket_peercred(stream).map_err(io::Error::from)?.uid.as_raw()),
        Peer::Tcp(peer) => owner_of(stream, peer).await?,
    };
    match owner {
        Owner::User(uid) if is_admitted(uid, allowed) => Ok(owner),
        Owner::User(uid) => Err(NotAdmitted::NotAllowed(uid)),
        Owner::Host(_) if insecure => Ok(owner),
        Owner::Host(_) => Err(NotAdmitted::NotLocal),
    }
}

async fn owner_of(stream: &Stream, peer: SocketAddr) -> Result<Owner, NotAdmitted> {
    let ours = SocketAddr::try_from(getsockname(stream).map_err(io::Error::from)?);
    let ours = canonical(ours.map_err(io::Error::from)?);
    let scope = match getpeername(stream).ok().flatten().map(SocketAddr::try_from) {
        Some(Ok(SocketAddr::V6(peer))) => peer.scope_id(),
        _ => 0,
    };
    let asked = sock_diag::owner(peer, ours, scope, || (ours, peer));
    let owner = match asked {
        Err(error) if error.kind() == io::ErrorKind::Unsupported => listed(peer, ours).await?,
        asked => asked?,
    };
    if let Some(uid) = owner {
        return Ok(Owner::User(uid));
    }
    // Who hides a socket from the question above, or has closed it, must not be taken for another machine.
    let is_here = peer.ip().is_loopback()
        || peer.ip() == ours.ip()
        || match sock_diag::is_of_this_machine(peer.ip()) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => false,
            is_here => is_here?,
        };
    if is_here { Err(NotAdmitted::Unknown) } else { Ok(Owner::host(peer.ip())) }
}

/// So many threads read the lists at once.
static READERS: Semaphore = Semaphore::const_new(2);

/// The user of the socket between two addresses, by the lists of all of them.
async fn listed(local: SocketAddr, remote: SocketAddr) -> io::Result<Option<u32>> {
    // The semaphore is never closed.
    let _reader = READERS.acquire().await;
    spawn_blocking(move || read_lists(local, remote)).await.map_err(io::Error::other)?
}

fn read_lists(local: SocketAddr, remote: SocketAddr) -> io::Result<Option<u32>> {
    for list in ["/proc/self/net/tcp", "/proc/self/net/tcp6"] {
        match std::fs::read_to_string(list) {
            Ok(list) => {
                if let Some(uid) = owner(&list, local, remote) {
                    return Ok(Some(uid));
                }
            }
            // A kernel without IPv6.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

/// The user of the socket between two addresses.
fn owner(list: &str, local: SocketAddr, remote: SocketAddr) -> Option<u32> {
    // sl local_address rem_address st tx_queue:rx_queue tr:tm->when retrnsmt uid …
    list.lines().skip(1).find_map(|line| {
        let mut words = line.split_ascii_whitespace().skip(1);
        let ends = (address(words.next()?)?, address(words.next()?)?);
        let open = words.next()? == ESTABLISHED;
        let uid = words.nth(3)?.parse().ok()?;
        (open && ends == (local, remote)).then_some(uid)
    })
}

/// An address as the list has it: words of 32 bits in the machine's own order, in hex, and the port.
fn address(text: &str) -> Option<SocketAddr> {
    let (ip, port) = text.split_once(':')?;
    let word = |at: usize| {
        let digits = ip.get(8 * at..8 * at + 8)?;
        u32::from_str_radix(digits, 16).ok().map(u32::to_ne_bytes)
    };
    let ip = match ip.len() {
        8 => IpAddr::V4(Ipv4Addr::from(word(0)?)),
        32 => {
            let bytes = [word(0)?, word(1)?, word(2)?, word(3)?].concat();
            IpAddr::V6(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?))
        }
        _ => return None,
    };
    Some(canonical(SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::{TcpListener, TcpStream, UnixStream};

    #[tokio::test]
    async fn a_peer_of_this_machine_is_known_by_its_user() {
        for bound in ["127.0.0.1:0", "[::]:0"] {
            let listener = TcpListener::bind(bound).await.unwrap();
            let port = listener.local_addr().unwrap().port();
            let client = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
            let (accepted, peer) = listener.accept().await.unwrap();
            let accepted = Stream::from_tcp(accepted, peer).unwrap();
            admit_stream(&accepted, &[], false).await.unwrap();
            let listed = listed(client.local_addr().unwrap(), client.peer_addr().unwrap()).await;
            assert_eq!(listed.unwrap(), Some(rustix::process::getuid().as_raw()));
            drop(client);
            let refused = admit_stream(&accepted, &[], false).await.unwrap_err().to_string();
            assert_eq!(refused, "its user is not known", "what nobody holds any more is nobody's");
        }
        let (ours, _theirs) = UnixStream::pair().unwrap();
        admit_stream(&Stream::from_unix(ours), &[], false).await.unwrap();
    }

    #[test]
    fn all_addresses_of_an_ipv6_host_are_one_owner() {
        let owner = |ip: &str| Owner::host(ip.parse().unwrap());
        assert_eq!(owner("2001:db8:1:2::7"), owner("2001:db8:1:2:ffff::1"));
        assert_ne!(owner("2001:db8:1:2::7"), owner("2001:db8:1:3::7"));
        assert_eq!(owner("::ffff:192.0.2.7"), owner("192.0.2.7"));
        assert_ne!(owner("192.0.2.7"), owner("192.0.2.8"));
    }

    #[test]
    fn the_user_stands_beside_the_addresses() {
        let list = "\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:270B 00000000:0000 0A 00000000:00000000 00:00000000 00000000   107        0 1 1
   1: 0100007F:270B 0100007F:9C40 01 00000000:00000000 00:00000000 00000000   107        0 2 1
   2: 0100007F:9C40 0100007F:270B 01 00000000:00000000 00:00000000 00000000  1000        0 3 1
   3: 0100007F:9C41 0100007F:270B 06 00000000:00000000 00:00000000 00000000     0        0 0 1
   4: 0000000000000000FFFF00000100007F:9C42 0000000000000000FFFF00000100007F:270B 01 00000000:00000000 00:00000000 00000000  1001        0 3 1
   5: torn";
        let at = |port| SocketAddr::from(([127, 0, 0, 1], port));
        assert_eq!(owner(list, at(0x9c40), at(9995)), Some(1000));
        assert_eq!(owner(list, at(0x9c41), at(9995)), None, "closed");
        assert_eq!(owner(list, at(0x9c42), at(9995)), Some(1001));
        assert_eq!(owner(list, at(0x9c43), at(9995)), None);
    }
}
