//! Which daemon is meant, and connecting to it.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use super::cli::Daemon;
use super::exit::{Exit, Failure};
use super::place::{self, word};
use crate::client;
use crate::control::Client;
use crate::control::model::Role;
use crate::criu::names::check_id;
use crate::criu::remote;

/// Both daemons.
const ROLES: [Role; 2] = [Role::Proxy, Role::Cache];

/// The sockets of every daemon that is asked: the named one, or those that exist.
pub(super) fn all(daemon: &Daemon) -> Result<Vec<PathBuf>, Failure> {
    if let Some(path) = named(daemon) {
        return Ok(vec![path]);
    }
    let sockets = ROLES.map(|role| control(daemon, role));
    let there: Vec<_> = sockets.iter().filter(|path| path.exists()).cloned().collect();
    if there.is_empty() { Err(none_of(&sockets)) } else { Ok(there) }
}

/// No daemon is there that could be meant.
fn none_of([proxy, cache]: &[PathBuf; 2]) -> Failure {
    let what =
        format!("no daemon is here: neither {} nor {} exists", proxy.display(), cache.display());
    let cure = match (place::unit(proxy), place::unit(cache)) {
        (Some(proxy), Some(cache)) => {
            format!("systemctl start {proxy} (source host) or {cache} (destination host)")
        }
        _ => "start the daemon whose --work-dir this is".to_owned(),
    };
    Failure::new(Exit::Unreachable, what).cure(cure)
}

/// Connects to the one daemon that is meant.
pub(super) async fn one(daemon: &Daemon) -> Result<Client, Failure> {
    let mut sockets = all(daemon)?;
    match (sockets.pop(), sockets.is_empty()) {
        (Some(path), true) => Ok(Client::connect(path).await?),
        _ => Err(Failure::usage("both a proxy and a cache are here")
            .cure("say which one is meant: --proxy or --cache")),
    }
}

/// Connects to the daemon of a role, for a command that only this one has.
pub(super) async fn only(
    daemon: &Daemon,
    role: Role,
    command: &'static str,
) -> Result<Client, Failure> {
    let wrong = match role {
        Role::Proxy => daemon.cache,
        Role::Cache => daemon.proxy,
    };
    if wrong {
        return Err(mistaken(command, role));
    }
    let path = control(daemon, role);
    let mut client = Client::connect(path).await?;
    if client.status().await?.role == role { Ok(client) } else { Err(mistaken(command, role)) }
}

/// The daemon of a role on its socket of the remote protocol, which lies beside the control socket.
pub(super) fn remote(daemon: &Daemon, role: Role) -> client::Client {
    client::Client::at(beside(&control(daemon, role), role))
}

/// The daemon that is meant, by which sockets of the remote protocol exist.
pub(super) fn remote_role(daemon: &Daemon) -> Result<Role, Failure> {
    let sockets = ROLES.map(|role| beside(&control(daemon, role), role));
    match (sockets[0].exists(), sockets[1].exists()) {
        _ if daemon.proxy => Ok(Role::Proxy),
        _ if daemon.cache => Ok(Role::Cache),
        (true, true) => Err(Failure::usage("both a proxy and a cache are here")
            .cure("say which one is meant: --proxy or --cache")),
        (true, false) => Ok(Role::Proxy),
        (false, true) => Ok(Role::Cache),
        (false, false) => Err(none_of(&sockets)),
    }
}

/// The socket of the remote protocol in the directory of a control socket.
fn beside(control: &Path, role: Role) -> PathBuf {
    control.with_file_name(match role {
        Role::Proxy => remote::PROXY_SOCKET,
        Role::Cache => remote::CACHE_SOCKET,
    })
}

/// The control socket of the daemon of a role that is meant.
fn control(daemon: &Daemon, role: Role) -> PathBuf {
    let by_role = || place::control_socket(role, daemon.instance.as_deref());
    daemon.socket.clone().unwrap_or_else(by_role)
}

/// A command that only the daemon of a role has was asked of the other one.
pub(super) fn mistaken(command: &str, role: Role) -> Failure {
    let name = word(role);
    Failure::usage(format!("{command} is a command of the {name}, not of the other daemon"))
        .cure(format!("criu-imagectl --{name} {command} …"))
}

fn named(daemon: &Daemon) -> Option<PathBuf> {
    if daemon.proxy {
        Some(control(daemon, Role::Proxy))
    } else if daemon.cache {
        Some(control(daemon, Role::Cache))
    } else {
        daemon.socket.clone()
    }
}

/// The snapshot that a directory stands for: the id given, or the directory's name.
pub(super) fn snapshot_id(given: Option<&str>, dir: &Path) -> Result<String, Failure> {
    let name = match given {
        Some(id) => Some(id.to_owned()),
        // The directory may be `.` or a link, and need not be there yet.
        None => std::fs::canonicalize(dir)
            .unwrap_or_else(|_| dir.to_owned())
            .file_name()
            .and_then(OsStr::to_str)
            .map(str::to_owned),
    };
    let Some(name) = name else {
        return Err(Failure::usage(format!("{} gives no snapshot its name", dir.display()))
            .cure("name it: --snapshot ID"));
    };
    match check_id(&name) {
        Ok(()) => Ok(name),
        Err(bad) => Err(Failure::usage(bad.to_string()).cure("name it otherwise: --snapshot ID")),
    }
}

/// An id of the remote protocol, which may be a path.
pub(super) fn must_be_id(id: &str) -> Result<(), Failure> {
    check_id(id).map_err(|bad| Failure::usage(bad.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_names_its_snapshot() {
        let dir = tempfile::tempdir().unwrap();
        let web = dir.path().join("web");
        assert_eq!(snapshot_id(None, &web).unwrap(), "web");
        assert_eq!(snapshot_id(Some("db"), &web).unwrap(), "db");
        std::fs::create_dir(&web).unwrap();
        std::os::unix::fs::symlink(&web, dir.path().join("link")).unwrap();
        assert_eq!(snapshot_id(None, &dir.path().join("link")).unwrap(), "web");
        assert_eq!(snapshot_id(Some("/tmp/1"), &web).unwrap(), "/tmp/1");
        for (given, dir) in [(Some("a\nb"), "x"), (None, "/")] {
            assert_eq!(snapshot_id(given, Path::new(dir)).unwrap_err().exit, Exit::Usage);
        }
    }
}
