//! Where the daemons' sockets are under systemd, and which unit has each: `proxy/` and `cache/`, and those of
//! instances, `proxy@NAME/` and `cache@NAME/`.

use std::path::{Path, PathBuf};

use crate::control::model::Role;
use crate::control::{CACHE_SOCKET, PROXY_SOCKET};
use crate::criu::remote;
use crate::daemon::CONTROL_SOCKET;

/// Where the relay's directories are under systemd: on a tmpfs.
pub(super) const RUN: &str = "/run/criu-image";

/// What a name may have, so that every socket's path fits (unix(7): 107 bytes).
const NAME_MAX: usize = 60;

/// The name of an instance, as the argument of an option.
pub(super) fn instance(name: &str) -> Result<String, String> {
    let fits = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if name.is_empty() || name.len() > NAME_MAX || !name.chars().all(fits) {
        return Err(format!(
            "at most {NAME_MAX} letters, digits, \".\", \"-\" or \"_\" are expected: what follows the @ in the \
             name of its units"
        ));
    }
    Ok(name.to_owned())
}

/// The control socket of a daemon.
pub(super) fn control_socket(role: Role, instance: Option<&str>) -> PathBuf {
    match (role, instance) {
        (Role::Proxy, None) => PROXY_SOCKET.into(),
        (Role::Cache, None) => CACHE_SOCKET.into(),
        (role, Some(name)) => {
            Path::new(RUN).join(format!("{}@{name}", word(role))).join(CONTROL_SOCKET)
        }
    }
}

/// The daemon, as options and directories name it.
pub(super) fn word(role: Role) -> &'static str {
    match role {
        Role::Proxy => "proxy",
        Role::Cache => "cache",
    }
}

/// The unit that has a socket, if it is one of systemd's.
pub(super) fn unit(socket: &Path) -> Option<String> {
    let place = socket.strip_prefix(RUN).ok()?.to_str()?;
    let (dir, file) = place.split_once('/')?;
    let (daemon, at) = dir.split_at(dir.find('@').unwrap_or(dir.len()));
    let kind = match (daemon, file) {
        ("proxy" | "cache", CONTROL_SOCKET) => "control",
        ("proxy", remote::PROXY_SOCKET) | ("cache", remote::CACHE_SOCKET) => "remote",
        _ => return None,
    };
    Some(format!("criu-image-{daemon}-{kind}{at}.socket"))
}

/// The service that has a socket, likewise.
pub(super) fn service(socket: &Path) -> Option<String> {
    let (_, dir) = (unit(socket)?, socket.parent()?.file_name()?.to_str()?);
    Some(format!("criu-image-{dir}.service"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instance_has_its_name_behind_the_at() {
        let socket = |role, instance| control_socket(role, instance).to_str().unwrap().to_owned();
        assert_eq!(socket(Role::Proxy, None), "/run/criu-image/proxy/control.sock");
        assert_eq!(socket(Role::Cache, Some("b")), "/run/criu-image/cache@b/control.sock");
        assert_eq!(instance("rack-7.b_2"), Ok("rack-7.b_2".to_owned()));
        for wrong in ["", "a/b", "a@b", "a b", "ä", &"x".repeat(61)] {
            assert!(instance(wrong).is_err(), "{wrong}");
        }
        let longest = "/run/criu-image/cache@/streamer-capture.sock".len() + NAME_MAX;
        assert!(longest <= 107);
    }

    #[test]
    fn a_socket_tells_its_unit() {
        assert_eq!(
            service(Path::new("/run/criu-image/cache@b/control.sock")).as_deref(),
            Some("criu-image-cache@b.service")
        );
        assert_eq!(service(Path::new("/tmp/ckpt/control.sock")), None);
        let unit = |path: &str| unit(Path::new(path));
        let some = |name: &str| Some(name.to_owned());
        for (path, name) in [
            (PROXY_SOCKET, "criu-image-proxy-control.socket"),
            ("/run/criu-image/cache@b/control.sock", "criu-image-cache-control@b.socket"),
            ("/run/criu-image/proxy@a-1/img-proxy.sock", "criu-image-proxy-remote@a-1.socket"),
            ("/run/criu-image/cache/img-cache.sock", "criu-image-cache-remote.socket"),
        ] {
            assert_eq!(unit(path), some(name));
        }
        for other in [
            "/srv/control.sock",
            "/run/criu-image/web-1/control.sock",
            "/run/criu-image/cache/img-proxy.sock",
            "/run/criu-image/control.sock",
        ] {
            assert_eq!(unit(other), None, "{other}");
        }
    }
}
