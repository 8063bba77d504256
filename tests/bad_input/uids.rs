//! Who may connect. Needs root, to be somebody else; without it there is nothing to test.

use std::fs::{self, File, Permissions};
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

use criu_image_relay::criu::stream::{CAPTURE_SOCKET, SERVE_SOCKET};

use crate::daemons::{Daemon, SOON, Settings};

const NOBODY: u32 = 65534;
/// Tells this program that it is the stranger, and which socket to connect to.
const SOCKET: &str = "BAD_INPUT_SOCKET";

/// Connects as another user, to a socket that its mode opens to all. Gives whether the session was
/// ended at once.
fn is_refused(daemon: &Daemon, socket: &str) -> bool {
    let path = daemon.dir().join(socket);
    fs::set_permissions(daemon.dir(), Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o666)).unwrap();
    // By its descriptor: the build directory may be closed to others.
    let this = File::open("/proc/self/exe").unwrap();
    let user = NOBODY.to_string();
    let status = Command::new("setpriv")
        .args(["--reuid", &user, "--regid", &user, "--clear-groups", "/proc/self/fd/0"])
        .args(["--exact", "uids::the_stranger", "--ignored"])
        .env(SOCKET, path)
        .current_dir("/")
        .stdin(this)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .unwrap();
    status.success()
}

#[test]
#[ignore = "run by the tests below, as another user"]
fn the_stranger() {
    let mut stream = UnixStream::connect(std::env::var_os(SOCKET).unwrap()).unwrap();
    stream.set_read_timeout(Some(SOON / 10)).unwrap();
    assert_eq!(stream.read(&mut [0]).unwrap(), 0, "the session goes on");
}

fn assert_checked(start: impl Fn(Settings<'_>) -> Daemon, socket: &str) {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: it needs root");
        return;
    }
    let strict = start(&[]);
    assert!(is_refused(&strict, socket));
    strict.assert_log(&["WARN", &format!("(uid {NOBODY})"), "allow-uids"]);
    let open = start(&[("allow-uids", "[65534]")]);
    assert!(!is_refused(&open, socket));
    assert_eq!(open.count_log("allow-uids"), 0);
}

#[test]
fn another_user_may_not_dump() {
    assert_checked(
        |settings| Daemon::proxy(crate::daemons::unused_address(), settings),
        CAPTURE_SOCKET,
    );
}

#[test]
fn another_user_may_not_restore() {
    assert_checked(|settings| Daemon::cache(settings).0, SERVE_SOCKET);
}
