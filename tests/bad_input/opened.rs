//! Directories and page servers that are opened for snapshots: what awaits a dump is not forgotten, and what
//! nothing can come of any more is closed.

use std::path::Path;

use criu_image_relay::control::model::SnapshotState;
use criu_image_relay::criu::stream::{CAPTURE_SOCKET, SERVE_SOCKET};

use crate::criu::{Criu, RECORDS};
use crate::daemons::{Daemon, eventually};
use crate::hosts::Hosts;

/// More than a proxy lists of those that have ended.
const MANY: usize = 260;

/// A dump that ends before its inventory.
fn fail(mut dump: Criu) {
    dump.write("core-7.img", RECORDS);
}

/// Waits until so many are listed, and all have ended.
#[track_caller]
fn assert_listed(proxy: &Daemon, count: usize) {
    let mut listed = 0;
    let reached = eventually(|| {
        let list = proxy.list();
        listed = list.len();
        list.iter().all(|known| known.state == SnapshotState::Damaged) && listed == count
    });
    assert!(reached, "{listed} are listed, not {count}");
}

/// A dump in a directory succeeds.
#[track_caller]
fn assert_dumps(hosts: &Hosts, id: &str, dir: &Path) {
    let mut dump = Criu::in_directory(dir, CAPTURE_SOCKET);
    dump.write("core-7.img", RECORDS);
    dump.complete();
    hosts.proxy.assert_state(id, SnapshotState::Whole);
}

#[test]
fn a_directory_in_which_a_dump_failed_is_known_after_many_others_have_ended() {
    let hosts = Hosts::start();
    let dir = tempfile::tempdir().unwrap();
    hosts.proxy.try_open_directory("kept", dir.path(), CAPTURE_SOCKET).unwrap();
    fail(Criu::in_directory(dir.path(), CAPTURE_SOCKET));
    hosts.proxy.assert_state("kept", SnapshotState::Damaged);
    for _ in 0..MANY {
        fail(Criu::dump(&hosts.proxy));
    }
    // Those that are kept, and that for which a socket is open.
    assert_listed(&hosts.proxy, 257);
    hosts.proxy.assert_state("kept", SnapshotState::Damaged);
    assert_dumps(&hosts, "kept", dir.path());

    // One that is dropped gives back its socket at once.
    hosts.proxy.try_open_directory("dropped", dir.path(), "other.sock").unwrap();
    fail(Criu::in_directory(dir.path(), "other.sock"));
    hosts.proxy.assert_state("dropped", SnapshotState::Damaged);
    hosts.proxy.drop_snapshot("dropped");
    let bound = eventually(|| criu_image_relay::sys::unix::bind(dir.path(), "other.sock").is_ok());
    assert!(bound, "somebody listens for a snapshot that was dropped");
}

#[test]
fn the_socket_of_an_opened_directory_is_gone_when_its_dump_or_restore_has_ended() {
    let hosts = Hosts::start();
    let dir = tempfile::tempdir().unwrap();
    hosts.cache.try_open_directory("web", dir.path(), SERVE_SOCKET).unwrap();
    hosts.proxy.try_open_directory("web", dir.path(), CAPTURE_SOCKET).unwrap();
    assert_dumps(&hosts, "web", dir.path());
    let has = |name: &str| dir.path().join(name).exists();
    assert!(eventually(|| !has(CAPTURE_SOCKET)), "the dump's socket is left behind");
    assert!(has(SERVE_SOCKET));
    assert_eq!(Criu::in_directory(dir.path(), SERVE_SOCKET).read("core-7.img"), RECORDS);
    assert!(eventually(|| !has(SERVE_SOCKET)), "the restore's socket is left behind");
}

#[test]
fn a_daemon_says_where_its_sockets_are() {
    let hosts = Hosts::start();
    for (daemon, socket) in [(&hosts.proxy, CAPTURE_SOCKET), (&hosts.cache, SERVE_SOCKET)] {
        let path = daemon.dir().join(socket);
        daemon.assert_log(&[" serves ", &format!("stream on {},", path.display())]);
    }
}

#[test]
fn sockets_that_are_open_for_snapshots_are_bounded_and_the_refusal_says_so() {
    let hosts = Hosts::start();
    let dir = tempfile::tempdir().unwrap();
    let open = |k: usize| {
        hosts.proxy.try_open_directory(&format!("web-{k}"), dir.path(), &format!("{k}.sock"))
    };
    for k in 0..1024 {
        open(k).unwrap();
    }
    let refused = open(1024).unwrap_err().to_string();
    assert!(refused.contains("1024 sockets are open for snapshots"), "{refused}");
    let refused = hosts.proxy.try_open_pages("web-0", None).unwrap_err().to_string();
    assert!(refused.contains("drop snapshots that are no longer wanted"), "{refused}");
    assert!(hosts.proxy.show("web-1024").is_none(), "what was refused is awaited");
    hosts.proxy.drop_snapshot("web-7");
    assert!(eventually(|| open(1024).is_ok()), "there is no room though one was dropped");
}
