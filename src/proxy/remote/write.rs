//! One image that a client writes, from its header to what the cache says of it.

use std::rc::Rc;
use std::time::Duration;

use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::timeout;

use super::session::Session;
use super::snapshot::{Snapshot, Writing};
use crate::criu::images::may_be_lent;
use crate::criu::remote::Reply;
use crate::daemon::remote::BadClient;
use crate::daemon::sessions::BadSession;
use crate::proxy::copy::Copy;
use crate::proxy::failure::Failure;
use crate::proxy::forward::Forward;
use crate::proxy::upload::{Told, Upload, lost};
use crate::sys::ends::Source;
use crate::sys::held::Held;

impl Session {
    /// From the header to the image's end, and for an acknowledged one until the cache has it.
    pub(super) async fn write_image(
        &self,
        writing: &Writing,
        append: bool,
        acknowledge: bool,
    ) -> Result<bool, Failure> {
        if !acknowledge && may_be_lent(&writing.name) {
            return self.write_lent_image(writing, append).await;
        }
        let (snapshot, name) = (&writing.snapshot, &writing.name);
        let limit = self.settings.link.ack_timeout;
        let upload = snapshot.upload(&self.proxy).await?;
        let (image, mut told) = upload.begin_watched_image(name, append).await;
        snapshot.record.begin_image(name, append);
        if acknowledge {
            hear(&upload, &mut told, Told::Ready, limit).await?;
            self.client.reply(&Reply::done()).await.map_err(|bad| damaged(name, bad))?;
        }
        let source = Rc::new(self.source(snapshot, name).await?);
        let forward = Forward {
            upload: upload.clone(),
            image,
            name: name.clone(),
            source: source.clone(),
            record: snapshot.record.clone(),
            records: self.proxy.records.clone(),
            written: snapshot.written.clone(),
            stall_timeout: self.settings.sessions.stall_timeout,
            pipe_size: usize::try_from(self.settings.sessions.pipe_size).unwrap_or(usize::MAX),
        };
        let ended = if acknowledge {
            forward.run_until_said(self.client.said_its_end(&source)).await
        } else {
            forward.run().await
        };
        ended?;
        if acknowledge {
            hear(&upload, &mut told, Told::Acknowledged, limit).await?;
        }
        Ok(matches!(*source, Source::Pipe(_)))
    }

    /// An image whose writer waits for nobody, and may lend what it writes: it is copied whatever the link does.
    async fn write_lent_image(&self, writing: &Writing, append: bool) -> Result<bool, Failure> {
        let (snapshot, name, budget) = (&writing.snapshot, &writing.name, &self.proxy.budget);
        let source = self.source(snapshot, name).await?;
        let through_pipe = matches!(source, Source::Pipe(_));
        let held = Held::new(name, source, budget).map_err(|error| Failure::Image {
            name: name.clone(),
            cause: format!("it cannot be copied: {error}"),
        })?;
        let held = Rc::new(held);
        let stall_timeout = self.settings.sessions.stall_timeout;
        let pipe_size = usize::try_from(self.settings.sessions.pipe_size).unwrap_or(usize::MAX);
        let written = snapshot.written.clone();
        let copy = Copy { held: held.clone(), written, stall_timeout, pipe_size };
        let sending = async {
            let upload = snapshot.upload(&self.proxy).await?;
            let image = upload.begin_image(name, append).await;
            snapshot.record.begin_image(name, append);
            let forward = Forward {
                upload: upload.clone(),
                image,
                name: name.clone(),
                source: Rc::new(Source::Held(held)),
                record: snapshot.record.clone(),
                records: self.proxy.records.clone(),
                written: snapshot.written.clone(),
                stall_timeout,
                pipe_size,
            };
            forward.run().await
        };
        let mut copying = std::pin::pin!(copy.run(budget, || ()));
        let mut sending = std::pin::pin!(sending);
        let outcome = tokio::select! {
            ended = &mut sending => ended,
            () = &mut copying => sending.await,
        };
        outcome.map(|_| through_pipe)
    }

    /// Waits for the first byte of an image, or its pipe, as long as an image may stand still.
    async fn source(&self, snapshot: &Snapshot, name: &str) -> Result<Source, Failure> {
        let limit = self.settings.sessions.stall_timeout;
        loop {
            match timeout(limit, self.client.source(name)).await {
                Ok(source) => return source.map_err(|bad| damaged(name, bad)),
                Err(_) if snapshot.written.get().elapsed() < limit => {}
                Err(_) => {
                    let cause = format!("nothing was written for {limit:?}");
                    return Err(Failure::Image { name: name.to_owned(), cause });
                }
            }
        }
    }
}

/// Waits for what the cache says of an image.
async fn hear(
    upload: &Upload,
    told: &mut UnboundedReceiver<Told>,
    wanted: Told,
    limit: Duration,
) -> Result<(), Failure> {
    let heard = async {
        while let Some(said) = told.recv().await {
            if said == wanted {
                return Ok(());
            }
        }
        Err(lost(upload.fate().await))
    };
    let heard = upload.connection.within(limit, heard).await;
    heard.unwrap_or_else(|_| Err(Failure::unanswered(limit)))
}

fn damaged(name: &str, bad: BadClient) -> Failure {
    match bad {
        // It names the image itself.
        BadClient::Session(bad @ BadSession::Pipe { .. }) => bad.into(),
        bad => Failure::Image { name: name.to_owned(), cause: bad.to_string() },
    }
}
