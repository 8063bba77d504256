//! An image on its way from a daemon.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;

use super::connection::Connection;
use super::{Error, Way};
use crate::sys::pump;
use crate::sys::unix::is_close;

/// An image that is being read. It may be dropped before its end.
#[derive(Debug)]
pub struct Reader {
    pipe: Option<File>,
    connection: Connection,
    size: u64,
    left: u64,
}

impl Reader {
    /// After its header: hears how large the image is, and passes the pipe.
    pub(super) fn open(mut connection: Connection, way: Way) -> Result<Reader, Error> {
        let size = connection.reply()?.size;
        let size = size.ok_or_else(|| connection.broken("an image whose size is not told"))?;
        let pipe = match way {
            Way::Socket => None,
            Way::Pipe => {
                let (out, into) = pump::pipe().map_err(Error::Io)?;
                connection.pass(into.as_fd())?;
                // With it open here as well, the end of the image would never come.
                drop(into);
                Some(out.into())
            }
        };
        Ok(Reader { pipe, connection, size, left: size })
    }

    /// The image's size, in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Writes the whole image into a file, from the file's start, and tells `progress` what has moved. An
    /// image of which something was read already goes without that.
    pub fn copy_to(mut self, file: &File, progress: &mut dyn FnMut(u64)) -> Result<u64, Error> {
        let moved = match &self.pipe {
            Some(pipe) => pump::to_file(pipe, file, progress)?,
            None => return Ok(pump::copy(&mut self, &mut { file }, progress)?),
        };
        if moved == self.left { Ok(moved) } else { Err(self.torn(self.size - self.left + moved)) }
    }

    pub(super) fn broken(&self, why: &str) -> Error {
        self.connection.broken(why)
    }

    fn torn(&self, come: u64) -> Error {
        self.broken(&format!("the image has {} bytes, {come} have come", self.size))
    }

    fn cut_short(&self) -> io::Error {
        self.torn(self.size - self.left).into()
    }
}

/// An image that ends before its size is [`io::ErrorKind::UnexpectedEof`], with an [`Error`] in it.
impl Read for Reader {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let len = bytes.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        if len == 0 {
            return Ok(0);
        }
        let read = match &mut self.pipe {
            Some(pipe) => pipe.read(&mut bytes[..len]),
            None => self.connection.socket.read(&mut bytes[..len]),
        };
        match read {
            Ok(0) => Err(self.cut_short()),
            Ok(read) => {
                self.left -= read as u64;
                Ok(read)
            }
            Err(error) if is_close(&error) => Err(self.cut_short()),
            Err(error) => Err(error),
        }
    }
}
