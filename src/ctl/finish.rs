//! `finish`: the dump of images by name has ended, or the restore.

use serde_json::json;

use super::cli::{Daemon, Finish};
use super::exit::{Exit, Failure};
use super::print::{Output, clean};
use super::reach;
use crate::control::model::Role;

/// Says the end to the daemon that is meant.
pub(super) fn run(daemon: &Daemon, output: Output, finish: &Finish) -> Result<(), Failure> {
    let id = &finish.snapshot;
    reach::must_be_id(id)?;
    let role = reach::remote_role(daemon)?;
    let client = reach::remote(daemon, role);
    let (finished, state) = match role {
        Role::Proxy => (client.finish_dump(id, finish.images), "whole"),
        Role::Cache if finish.images.is_some() => {
            return Err(Failure::usage("--images is of a dump, and this is a cache")
                .cure("leave it out, or ask the proxy: --proxy"));
        }
        Role::Cache => (client.finish_restore(id), "taken"),
    };
    finished.map_err(|error| {
        let failure = Failure::from(error);
        match failure.exit {
            Exit::NoSuchSnapshot => failure.cure("criu-imagectl list"),
            Exit::Damaged => failure.cure("it can never be restored: dump it again"),
            _ => failure,
        }
    })?;
    let result = json!({ "snapshot": id, "state": state });
    output.print(&result, || format!("{}: {state}", clean(id)))
}
