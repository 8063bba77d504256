//! An image on its way to the proxy.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;

use super::connection::Connection;
use super::{Error, Way};
use crate::sys::pump;
use crate::sys::unix::is_close;

/// An image that is being written.
///
/// [`finish`](Writer::finish) says its end. An acknowledged writer that is dropped before is to the proxy
/// one that died: the image, and with it the snapshot, is damaged. One that is not acknowledged cannot
/// be told from one that has finished: what was written is the image.
#[derive(Debug)]
pub struct Writer {
    // Dropped before the connection is, so that the pipe's end comes first.
    pipe: Option<File>,
    connection: Connection,
    acknowledge: bool,
}

impl Writer {
    /// After its header: hears whether the image is accepted, and passes the pipe.
    pub(super) fn open(
        mut connection: Connection,
        way: Way,
        acknowledge: bool,
    ) -> Result<Writer, Error> {
        if acknowledge {
            connection.reply()?;
        }
        let pipe = match way {
            Way::Socket => None,
            Way::Pipe => {
                let (out, into) = pump::pipe().map_err(Error::Io)?;
                connection.pass(out.as_fd())?;
                // With it open here as well, a proxy that gave up would not be noticed.
                drop(out);
                Some(into.into())
            }
        };
        Ok(Writer { pipe, connection, acknowledge })
    }

    /// Writes all of it.
    pub(super) fn put(&mut self, bytes: &[u8]) -> Result<(), Error> {
        Ok(self.write_all(bytes)?)
    }

    /// Writes a file, from its start to its end, and tells `progress` what has moved. Through a pipe it is
    /// spliced: the file must not be changed before [`finish`](Writer::finish) has returned.
    pub fn copy_from(&mut self, file: &File, progress: &mut dyn FnMut(u64)) -> Result<u64, Error> {
        let moved = match &self.pipe {
            Some(pipe) => pump::from_file(file, pipe, progress),
            None => return Ok(pump::copy(&mut { file }, self, progress)?),
        };
        moved.map_err(|error| self.why(error))
    }

    /// Says the end of the image. Acknowledged, it returns when the cache has all of it.
    pub fn finish(mut self) -> Result<(), Error> {
        match self.pipe.take() {
            Some(pipe) => {
                drop(pipe);
                if self.acknowledge {
                    self.connection.say(&[0])?;
                }
            }
            None => self.connection.shut_down()?,
        }
        if self.acknowledge { self.connection.reply().map(drop) } else { Ok(()) }
    }

    /// Why something could not be written: if the proxy has given up, and says why, that is it.
    fn why(&mut self, error: io::Error) -> Error {
        if !is_close(&error) {
            return Error::Io(error);
        }
        if self.acknowledge {
            // It is the session's last word, or the close.
            self.pipe = None;
            if let Err(why) = self.connection.reply() {
                return why;
            }
        }
        self.connection.closed()
    }
}

impl Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = match &mut self.pipe {
            Some(pipe) => pipe.write(bytes),
            None => self.connection.socket.write(bytes),
        };
        match written {
            Err(error) if is_close(&error) => Err(self.why(error).into()),
            written => written,
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
