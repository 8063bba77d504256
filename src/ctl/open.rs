//! `open`: CRIU's stream socket in a directory of the user's choice.

use std::fs;
use std::path::Path;

use serde_json::json;

use super::cli::{Daemon, Open};
use super::exit::Failure;
use super::print::Output;
use super::reach;
use crate::control::Reading;
use crate::control::model::Role;
use crate::criu::stream::{CAPTURE_SOCKET, SERVE_SOCKET};
use crate::sys::unix;

/// Binds the socket, hands it over, and tells the criu command to use.
pub(super) async fn run(daemon: &Daemon, output: Output, open: &Open) -> Result<(), Failure> {
    let dir = fs::canonicalize(&open.dir).map_err(|error| {
        Failure::failed(format!("{}: {error}", open.dir.display()))
            .cure("give a directory that is there; criu reads its -D in the same place")
    })?;
    let id = reach::snapshot_id(open.snapshot.as_deref(), &dir)?;
    let mut client = reach::one(daemon).await?;
    let role = client.status().await?.role;
    let (socket, verb, rest) = match role {
        Role::Proxy => (CAPTURE_SOCKET, "dump", " -t PID"),
        Role::Cache if open.to.is_some() => {
            return Err(Failure::usage("--to is the way of a dump, and this is a cache")
                .cure("leave it out, or ask the proxy: --proxy"));
        }
        Role::Cache => (SERVE_SOCKET, "restore", ""),
    };
    let path = dir.join(socket);
    let listener = unix::bind(&dir, socket).map_err(|error| {
        Failure::failed(format!("{}: {error}", path.display()))
            .cure("one directory is one snapshot; use another, or drop what uses this one")
    })?;
    let reading = if open.again { Reading::TakeAgain } else { Reading::Take };
    let handed_over = client.open(&id, open.to.as_deref(), reading, listener.into()).await;
    if let Err(error) = handed_over {
        let _ = fs::remove_file(&path);
        return Err(error.into());
    }

    let command = format!("criu {verb} --stream -D {}{rest}", quoted(&dir));
    let result = json!({ "snapshot": id, "socket": path, "command": command });
    output.print(&result, || command.clone())
}

/// A path as a shell reads it back.
fn quoted(path: &Path) -> String {
    let path = path.to_string_lossy();
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+,:@%=".contains(c);
    if path.chars().all(plain) {
        path.into_owned()
    } else {
        format!("'{}'", path.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shell_reads_the_path_back() {
        assert_eq!(quoted(Path::new("/srv/web-1")), "/srv/web-1");
        assert_eq!(quoted(Path::new("/srv/my web's")), r"'/srv/my web'\''s'");
    }
}
