//! One image of a restore, from its memfd into the pipe or the socket that it is read from.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::rc::Rc;

use rustix::io::Errno;

use super::restore::Failure;
use crate::store::Image;
use crate::sys::ends::Sink;
use crate::sys::pipe::{DEFAULT_CAPACITY, Pipe, transfer_from_file};

/// What CRIU is reading, and how far it has come.
#[derive(Debug, Default)]
pub(super) struct Reading {
    /// How many pipes are open for an image.
    pub(super) open: RefCell<BTreeMap<String, usize>>,
    /// Grows with every byte that CRIU takes.
    pub(super) bytes: Cell<u64>,
}

impl Reading {
    fn begin(&self, name: &str) {
        *self.open.borrow_mut().entry(name.to_owned()).or_default() += 1;
    }

    fn end(&self, name: &str) {
        let mut open = self.open.borrow_mut();
        if let Some(pipes) = open.get_mut(name) {
            *pipes -= 1;
            if *pipes == 0 {
                open.remove(name);
            }
        }
    }
}

/// One image on its way to who reads it.
///
/// CRIU holds its pipe's lock while it copies out of it. So the next bytes are looked up in the
/// memfd meanwhile, into a pipe of our own, and then change pipes at once.
pub(super) struct Fill {
    sink: Sink,
    image: Rc<Image>,
    staging: Pipe,
    reading: Rc<Reading>,
    taken: u64,
}

impl Fill {
    /// Makes ready to serve an image.
    pub(super) fn begin(
        sink: Sink,
        image: Rc<Image>,
        pipe_size: usize,
        reading: &Rc<Reading>,
    ) -> io::Result<Fill> {
        let large = image.len() > DEFAULT_CAPACITY as u64;
        let capacity = if large { pipe_size } else { DEFAULT_CAPACITY };
        if large {
            sink.grow(capacity);
        }
        let staging = Pipe::new(capacity)?;
        reading.begin(image.name());
        Ok(Fill { sink, image, staging, reading: reading.clone(), taken: 0 })
    }

    /// Returns how many bytes were taken: CRIU may close a pipe before its end (it does so for nftables
    /// images), and that is the image's end.
    pub(super) async fn run(mut self) -> Result<u64, Failure> {
        let filled = self.fill().await;
        let name = self.image.name();
        self.reading.end(name);
        match filled {
            Err(error)
                if matches!(Errno::from_io_error(&error), Some(Errno::PIPE | Errno::CONNRESET)) =>
            {
                tracing::debug!(criu_image = name, "closed after {} bytes", self.taken);
            }
            Err(cause) => return Err(Failure::Image { name: name.to_owned(), cause }),
            Ok(()) => {}
        }
        Ok(self.taken)
    }

    async fn fill(&mut self) -> io::Result<()> {
        let mut offset = 0;
        while offset < self.image.len() {
            let mut staged = self.stage(&mut offset)?;
            while staged > 0 {
                let moved = self.sink.transfer_from(&self.staging, staged).await?;
                staged -= moved;
                self.taken += moved as u64;
                self.reading.bytes.set(self.reading.bytes.get() + moved as u64);
            }
        }
        Ok(())
    }

    /// Looks up what fits into the staging pipe, which is empty, from `offset` of the image on, and moves
    /// `offset` on. Pages may lie in several files.
    fn stage(&self, offset: &mut u64) -> io::Result<usize> {
        let (into, room) = (&self.staging.into, self.staging.capacity());
        let mut staged = 0;
        while let Some(part) = self.image.part(*offset, (room - staged) as u64) {
            let (mut at, len) = (part.offset, usize::try_from(part.len).unwrap_or(room));
            match transfer_from_file(part.file, &mut at, into, len) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(moved) => {
                    staged += moved;
                    *offset += moved as u64;
                }
                // A pipe holds fewer bytes when its pages are not full.
                Err(error) if staged > 0 && error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(staged)
    }
}
