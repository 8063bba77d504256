//! One image, from the pipe or the socket that it comes through to the link.

use std::cell::Cell;
use std::io;
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::time::timeout;

use super::failure::Failure;
use super::records::{Record, Records};
use super::upload::{Chunk, Upload};
use crate::daemon::remote::BadClient;
use crate::sys::ends::Source;
use crate::sys::pipe::DEFAULT_CAPACITY;

/// One image on its way.
pub(super) struct Forward {
    pub(super) upload: Rc<Upload>,
    pub(super) image: u32,
    pub(super) name: String,
    pub(super) source: Rc<Source>,
    pub(super) record: Rc<Record>,
    pub(super) records: Rc<Records>,
    /// CRIU keeps images open that it does not write to, while it writes others.
    pub(super) written: Rc<Cell<Instant>>,
    pub(super) stall_timeout: Duration,
    pub(super) pipe_size: usize,
}

impl Forward {
    /// Forwards until the image has ended; returns its name.
    pub(super) async fn run(self) -> Result<String, Failure> {
        let forwarded = self.forward().await;
        self.ended(forwarded).await
    }

    /// The same for an image whose writer says that it has come to its end.
    pub(super) async fn run_until_said(
        self,
        said: impl Future<Output = Result<bool, BadClient>>,
    ) -> Result<String, Failure> {
        let forwarded = match self.forward().await {
            Ok(()) => match said.await {
                Ok(true) => Ok(()),
                Ok(false) => Err("its writer went away in the middle of it".to_owned()),
                Err(bad) => Err(bad.to_string()),
            },
            failed => failed,
        };
        self.ended(forwarded).await
    }

    async fn ended(self, forwarded: Result<(), String>) -> Result<String, Failure> {
        match forwarded {
            Ok(()) => {
                self.record.end_image(&self.name);
                self.upload.end_image(self.image).await;
                Ok(self.name)
            }
            Err(cause) => Err(Failure::Image { name: self.name, cause }),
        }
    }

    async fn forward(&self) -> Result<(), String> {
        let mut grown = false;
        loop {
            match timeout(self.stall_timeout, self.source.readable()).await {
                Err(_) if self.written.get().elapsed() < self.stall_timeout => continue,
                Err(_) => return Err(format!("nothing was written for {:?}", self.stall_timeout)),
                Ok(ready) => ready.map_err(said)?,
            }
            match self.upload.chunk(self.image, &self.source).await.map_err(said)? {
                Chunk::NotYet => {}
                Chunk::End => return Ok(()),
                Chunk::Moved(bytes) => {
                    self.written.set(Instant::now());
                    self.record.sent(&self.name, bytes);
                    self.records.sent(bytes);
                    // Only the pipes that were full are worth the memory that the kernel grants.
                    if !grown && bytes >= DEFAULT_CAPACITY as u64 {
                        self.source.grow(self.pipe_size);
                        grown = true;
                    }
                }
            }
        }
    }
}

#[allow(clippy::needless_pass_by_value)] // for map_err
fn said(error: io::Error) -> String {
    error.to_string()
}
