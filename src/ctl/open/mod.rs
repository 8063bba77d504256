//! `open`: CRIU's stream socket in a directory of the user's choice, and a page server.

pub(super) mod args;

use std::fs;
use std::io::{self, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::symlink;
use std::path::Path;

use serde_json::json;

use self::args::Open;
use super::cli::Daemon;
use super::criu::quoted;
use super::exit::Failure;
use super::print::Output;
use super::reach;
use crate::control::model::Role;
use crate::control::{Client, ClientError, Reading};
use crate::criu::names::check_id;
use crate::criu::stream::{CAPTURE_SOCKET, SERVE_SOCKET};
use crate::daemon::CONTROL_SOCKET;
use crate::sys::unix;

/// Binds the sockets, hands them over, and tells the criu commands to use.
pub(super) async fn run(daemon: &Daemon, output: Output, open: &Open) -> Result<(), Failure> {
    let dir = fs::canonicalize(&open.dir).map_err(|error| {
        Failure::failed(format!("{}: {error}", open.dir.display()))
            .cure("give a directory that is there; criu reads its -D in the same place")
    })?;
    let id = reach::snapshot_id(open.snapshot.as_deref(), &dir)?;
    if let Some(parent) = &open.parent {
        check_id(parent).map_err(|bad| Failure::usage(format!("--parent: {bad}")))?;
    }
    let mut client = reach::one(daemon).await?;
    let role = client.status().await?.role;
    if role == Role::Cache {
        refuse_ways_of_a_dump(open)?;
    }
    let socket = match role {
        Role::Proxy => CAPTURE_SOCKET,
        Role::Cache => SERVE_SOCKET,
    };
    let pages = open.pages.map(bind_pages).transpose()?;
    let path = dir.join(socket);
    let listener = unix::bind(&dir, socket).map_err(|error| {
        Failure::failed(format!("{}: {error}", path.display()))
            .cure("one directory is one snapshot; use another, or drop what uses this one")
    })?;
    let (server, pages) = pages.unzip();
    if let Err(error) = hand_over(&mut client, &id, open, listener.into(), pages).await {
        let _ = fs::remove_file(&path);
        return Err(error.into());
    }

    if role == Role::Proxy {
        link_control_socket(client.path(), &dir);
    }
    let commands = commands(role, &dir, &id, server);
    let mut result = json!({ "snapshot": id, "socket": path, "command": commands[0] });
    if let Some(server) = server {
        result["address"] = json!(server.ip());
        result["port"] = json!(server.port());
        result["commands"] = json!(commands);
    }
    output.print(&result, || match server {
        // The first one is for a dump at once.
        Some(_) if role == Role::Proxy => commands[1..].join("\n"),
        _ => commands.join("\n"),
    })
}

/// Leaves a way to the proxy beside the socket, for `hook`. Without it, that asks the system's proxy.
fn link_control_socket(control: &Path, dir: &Path) {
    let link = dir.join(CONTROL_SOCKET);
    if fs::symlink_metadata(&link).is_ok_and(|found| found.is_symlink()) {
        let _ = fs::remove_file(&link);
    }
    let linked = std::path::absolute(control).and_then(|control| symlink(control, &link));
    if let Err(error) = linked {
        let mut stderr = io::stderr();
        let _ =
            writeln!(stderr, "{}: {error}; criu-imagectl hook needs --socket then", link.display());
    }
}

fn refuse_ways_of_a_dump(open: &Open) -> Result<(), Failure> {
    let given = match open {
        Open { to: Some(_), .. } => "--to is the way of a dump",
        Open { parent: Some(_), .. } => "--parent is for a dump",
        _ => return Ok(()),
    };
    Err(Failure::usage(format!("{given}, and this is a cache"))
        .cure("leave it out, or ask the proxy: --proxy"))
}

fn bind_pages(address: SocketAddr) -> Result<(SocketAddr, TcpListener), Failure> {
    let bound =
        TcpListener::bind(address).and_then(|listener| Ok((listener.local_addr()?, listener)));
    bound.map_err(|error| {
        Failure::failed(format!("--pages: {address}: {error}"))
            .cure("port 0 takes one that is free, as does --pages without a value")
    })
}

async fn hand_over(
    client: &mut Client,
    id: &str,
    open: &Open,
    listener: std::os::fd::OwnedFd,
    pages: Option<TcpListener>,
) -> Result<(), ClientError> {
    let to = open.to.as_deref();
    let reading = if open.again { Reading::TakeAgain } else { Reading::Take };
    client.open(id, to, reading, listener).await?;
    match pages {
        Some(pages) => client.open_pages(id, open.parent.as_deref(), to, pages.into()).await,
        None => Ok(()),
    }
}

/// What to run: the stream's command first, then what the page server is for.
fn commands(role: Role, dir: &Path, id: &str, server: Option<SocketAddr>) -> Vec<String> {
    let word = |path: &Path| quoted(&path.to_string_lossy());
    let at = word(dir);
    let pages = |server: SocketAddr| {
        format!("--page-server --address {} --port {}", server.ip(), server.port())
    };
    let dump = format!("criu dump --stream -D {at} -t PID --action-script criu-imagectl");
    match (role, server) {
        (Role::Proxy, None) => vec![dump],
        (Role::Cache, None) => vec![format!("criu restore --stream -D {at}")],
        (Role::Proxy, Some(server)) => {
            let [first, second, last] = ["1", "2", "3"].map(|round| word(&dir.join(round)));
            let pages = pages(server);
            vec![
                dump,
                format!("mkdir {first} {second} {last}"),
                format!("criu pre-dump -t PID -D {first} --track-mem {pages}"),
                format!(
                    "criu pre-dump -t PID -D {second} --track-mem --prev-images-dir ../1 {pages}"
                ),
                format!("criu dump -t PID -D {last} --track-mem --prev-images-dir ../2 {pages}"),
                format!("criu-imagectl push --snapshot {} {last}", quoted(id)),
            ]
        }
        (Role::Cache, Some(server)) => vec![
            format!("criu restore --stream -D {at}"),
            format!("criu lazy-pages -D {at} {}", pages(server)),
        ],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_commands_name_the_page_server_and_the_round_before() {
        let server = Some("127.0.0.1:4000".parse().unwrap());
        let told = commands(Role::Proxy, Path::new("/srv/a b"), "a b", server);
        assert_eq!(
            told[3],
            "criu pre-dump -t PID -D '/srv/a b/2' --track-mem --prev-images-dir ../1 --page-server \
             --address 127.0.0.1 --port 4000"
        );
        assert_eq!(told.last().unwrap(), "criu-imagectl push --snapshot 'a b' '/srv/a b/3'");
        let told = commands(Role::Cache, Path::new("/srv/web"), "web", server);
        assert_eq!(told.len(), 2);
        assert_eq!(commands(Role::Cache, Path::new("/srv/web"), "web", None).len(), 1);
    }
}
