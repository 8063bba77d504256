//! What is asked and measured before a migration begins.

use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use super::args::Migrate;
use super::commands::Commands;
use super::hand_over::HandOver;
use super::this_program;
use crate::control::model::LinkStatus;
use crate::control::{Client, ClientError};
use crate::ctl::exit::{Exit, Failure};
use crate::ctl::interrupts::Interrupts;
use crate::ctl::print::clean;

/// How long the link to the cache may take to come up.
const LINK_WITHIN: Duration = Duration::from_secs(3);

/// Has the proxy make its link to the cache, if it is not up. Without one nothing of the process is touched.
pub(super) async fn link(
    client: &mut Client,
    args: &Migrate,
    interrupts: &mut Interrupts,
) -> Result<(), Failure> {
    match interrupts.during(client.connect_link(args.to.as_deref(), LINK_WITHIN)).await? {
        Ok(link) if !link.up => Err(no_link(&link)),
        // What the proxy refuses now it refuses when a socket is opened; a proxy of 0.1.0 does not know the question.
        Ok(_) | Err(ClientError::Refused(_)) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn no_link(link: &LinkStatus) -> Failure {
    let what = format!("there is no link to the cache {}: {}", clean(&link.peer), clean(&link.why));
    Failure::new(Exit::Unreachable, what).cure(
        "see that criu-image-cache serves there and lets this host in (its journal says why not), and that the address \
         is right: --to, or `cache` in proxy.toml",
    )
}

/// Asks CRIU whether the kernel tells which pages were written to, and takes the time: most of it is
/// what CRIU takes to start.
pub(super) async fn tracking(
    args: &Migrate,
    work_dir: &Path,
    interrupts: &mut Interrupts,
) -> Result<Option<Duration>, Failure> {
    if args.max_rounds == 0 {
        return Ok(None);
    }
    let commands = Commands { args, work_dir, page_server: None, rounds: 0 };
    let check = commands.check();
    let mut begun = Instant::now();
    // The first run may take longer: it looks at the kernel and writes down what it found.
    for _ in 0..2 {
        begun = Instant::now();
        if !interrupts.during(check.succeeds()).await?? {
            let _ = writeln!(
                io::stderr(),
                "this kernel does not tell which pages are written to (criu check --feature \
                 mem_dirty_track): there are no rounds, only the final dump"
            );
            return Ok(None);
        }
    }
    Ok(Some(begun.elapsed()))
}

/// Does what CRIU's action script will do, but for handing over, and takes the time. What keeps it from being
/// run is found before the process is frozen.
pub(super) async fn rehearse(
    proxy: &Path,
    id: &str,
    dir: &Path,
    interrupts: &mut Interrupts,
) -> Result<Duration, Failure> {
    let hand_over = HandOver {
        socket: proxy.to_owned(),
        snapshot: id.to_owned(),
        to: None,
        dir: dir.to_owned(),
        attempt: 0,
    };
    let run = hand_over.rehearsal(&this_program()?);
    let begun = Instant::now();
    if interrupts.during(run.succeeds()).await?? {
        Ok(begun.elapsed())
    } else {
        Err(Failure::failed(
            "CRIU could not hand over: this program, or the proxy, does not answer",
        ))
    }
}
