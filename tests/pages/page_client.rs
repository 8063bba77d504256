//! What speaks in the place of a CRIU that dumps to a page server: each step on its own, in either
//! dialect, and up to any byte.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use criu_image_relay::criu::page_server::command::Command;
use criu_image_relay::criu::page_server::header::{Dialect, Header};
use criu_image_relay::criu::pages::{Contents, PAGE_SIZE, Run, Space};

use crate::daemons::SOON;

/// How long to look whether nothing comes, where nothing must.
const A_WHILE: Duration = Duration::from_millis(150);

/// What the daemon says when it holds all of a round.
pub(crate) const HELD: i32 = 0;

/// A CRIU run that is connected to a page server.
pub(crate) struct PageClient {
    socket: Socket,
    dialect: Dialect,
    /// How many bytes may still be sent; then the client is gone.
    left: Option<u64>,
    has_heard: bool,
}

enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl PageClient {
    /// On a connection that was handed over, as with `--ps-socket`.
    pub(crate) fn on(socket: UnixStream, dialect: Dialect) -> PageClient {
        socket.set_read_timeout(Some(SOON)).unwrap();
        socket.set_write_timeout(Some(SOON)).unwrap();
        PageClient { socket: Socket::Unix(socket), dialect, left: None, has_heard: false }
    }

    /// On a port, as with `--address` and `--port`.
    pub(crate) fn at(address: SocketAddr, dialect: Dialect) -> PageClient {
        let socket = TcpStream::connect(address).unwrap();
        // As CRIU does.
        socket.set_nodelay(true).unwrap();
        socket.set_read_timeout(Some(SOON)).unwrap();
        socket.set_write_timeout(Some(SOON)).unwrap();
        PageClient { socket: Socket::Tcp(socket), dialect, left: None, has_heard: false }
    }

    /// It is gone after so many more bytes.
    pub(crate) fn gone_after(&mut self, bytes: u64) {
        self.left = Some(bytes);
    }

    /// Whether it is gone.
    pub(crate) fn is_gone(&self) -> bool {
        self.left == Some(0)
    }

    /// Whether it has heard any answer. CRIU waits for the first one before it does anything to the process.
    pub(crate) fn has_heard(&self) -> bool {
        self.has_heard
    }

    /// Says any bytes.
    pub(crate) fn say(&mut self, bytes: &[u8]) -> io::Result<()> {
        let Some(left) = self.left else { return self.socket.write_all(bytes) };
        let len = bytes.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        self.left = Some(left - len as u64);
        self.socket.write_all(&bytes[..len])?;
        if self.is_gone() {
            self.socket.shut(Shutdown::Write)?;
            return Err(io::Error::new(ErrorKind::ConnectionAborted, "the client is gone"));
        }
        Ok(())
    }

    /// Says a header, whatever it means.
    pub(crate) fn header(&mut self, header: Header) -> io::Result<()> {
        self.say(&header.encode(self.dialect).unwrap())
    }

    /// Says a command.
    pub(crate) fn command(&mut self, command: Command) -> io::Result<()> {
        self.header(command.header())
    }

    /// Asks whether a space has a parent.
    pub(crate) fn has_parent(&mut self, space: Space) -> io::Result<bool> {
        self.command(Command::Parent { space })?;
        Ok(told(i32::from_ne_bytes(self.hear()?)))
    }

    /// Opens a space; hears whether it has a parent.
    pub(crate) fn open(&mut self, space: Space) -> io::Result<bool> {
        self.command(Command::Open { space, answer: true })?;
        let [answer] = self.hear()?;
        Ok(told(answer.into()))
    }

    /// Says that pages are as in the parent.
    pub(crate) fn hole(&mut self, space: Space, address: u64, pages: u64) -> io::Result<()> {
        let run = Run::new(address, pages, Contents::Parent).unwrap();
        self.command(Command::Pages { space, run })
    }

    /// Sends pages.
    pub(crate) fn pages(
        &mut self,
        space: Space,
        address: u64,
        lazy: bool,
        bytes: &[u8],
    ) -> io::Result<()> {
        self.announce(space, address, lazy, bytes.len() as u64 / PAGE_SIZE)?;
        self.say(bytes)
    }

    /// Says that pages follow.
    pub(crate) fn announce(
        &mut self,
        space: Space,
        address: u64,
        lazy: bool,
        pages: u64,
    ) -> io::Result<()> {
        let run = Run::new(address, pages, Contents::Present { lazy }).unwrap();
        self.command(Command::Pages { space, run })
    }

    /// Ends the round, after which the connection is over; hears the status.
    pub(crate) fn close(&mut self) -> io::Result<i32> {
        self.command(Command::Close)?;
        self.status()
    }

    /// Ends the round, and another may follow; hears the status.
    pub(crate) fn force_close(&mut self) -> io::Result<i32> {
        self.command(Command::ForceClose)?;
        self.status()
    }

    /// The answer to a GET: the pages that are given, of that task and from that address on.
    pub(crate) fn given(&mut self, task: u64, address: u64) -> io::Result<Vec<u8>> {
        let header = match self.dialect {
            Dialect::Short => Header::short(&self.hear()?),
            Dialect::Long => Header::long(&self.hear()?),
        };
        let present = Command::Pages {
            space: Space::Task(1),
            run: Run::new(address, header.nr_pages, Contents::Present { lazy: false }).unwrap(),
        };
        assert_eq!(header, Header { dst_id: task, ..present.header() });
        let mut pages = vec![0; usize::try_from(header.nr_pages * PAGE_SIZE).unwrap()];
        self.socket.read_exact(&mut pages)?;
        Ok(pages)
    }

    /// The status that ends a round.
    pub(crate) fn status(&mut self) -> io::Result<i32> {
        Ok(i32::from_ne_bytes(self.hear()?))
    }

    fn hear<const LEN: usize>(&mut self) -> io::Result<[u8; LEN]> {
        let mut answer = [0; LEN];
        self.socket.read_exact(&mut answer)?;
        self.has_heard = true;
        Ok(answer)
    }

    /// The daemon has ended the session, or does so now: CRIU hears that the round has failed, or nothing
    /// at all.
    #[track_caller]
    pub(crate) fn assert_failed(&mut self) {
        let said = self.rest();
        assert!(said.is_empty() || said == [0xff; 4], "{said:?} instead of a failure");
    }

    /// What the daemon still says until it ends the session.
    #[track_caller]
    pub(crate) fn rest(&mut self) -> Vec<u8> {
        let mut said = Vec::new();
        match self.socket.read_to_end(&mut said) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
            Err(error) => panic!("{error} instead of the session's end, after {said:?}"),
        }
        said
    }

    /// The daemon says nothing for now.
    #[track_caller]
    pub(crate) fn assert_waits(&mut self) {
        self.socket.set_read_timeout(A_WHILE);
        let said = self.socket.read(&mut [0; 64]);
        assert_eq!(said.unwrap_err().kind(), ErrorKind::WouldBlock);
        self.socket.set_read_timeout(SOON);
    }
}

/// An answer that is yes or no.
fn told(answer: i32) -> bool {
    assert!([0, 1].contains(&answer), "{answer} instead of yes or no");
    answer == 1
}

impl Socket {
    fn shut(&self, direction: Shutdown) -> io::Result<()> {
        match self {
            Socket::Unix(socket) => socket.shutdown(direction),
            Socket::Tcp(socket) => socket.shutdown(direction),
        }
    }

    fn set_read_timeout(&self, limit: Duration) {
        match self {
            Socket::Unix(socket) => socket.set_read_timeout(Some(limit)),
            Socket::Tcp(socket) => socket.set_read_timeout(Some(limit)),
        }
        .unwrap();
    }
}

impl Read for Socket {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Socket::Unix(socket) => socket.read(bytes),
            Socket::Tcp(socket) => socket.read(bytes),
        }
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Socket::Unix(socket) => socket.write(bytes),
            Socket::Tcp(socket) => socket.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
