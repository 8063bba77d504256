//! How others move the same process: the same recipe, and the same question to the restored process.

use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

use crate::Way;
use crate::bed::{self, BOTH, Bed, Host};
use crate::fault::Disturbed;

/// Where their images and sockets are.
const IMAGES: &str = "/tmp/images";
/// Where netcat and the page server listen.
const COPY_PORT: &str = "9100";
const PAGES_PORT: &str = "9101";

/// Puts their programs into both hosts.
pub(crate) fn prepare(bed: &Bed, ways: &[Way]) {
    if !ways.iter().any(|way| way.is_peer()) {
        return;
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bed/netcat");
    let made = Command::new(script).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let netcat = PathBuf::from(String::from_utf8(made.stdout).unwrap().trim());
    for host in BOTH {
        bed.copy(host, &netcat, "/opt/netcat");
    }
    if ways.contains(&Way::Streamer) {
        let streamer = std::env::var("CRIU_IMAGE_STREAMER")
            .expect("CRIU_IMAGE_STREAMER has to say where the program criu-image-streamer is");
        for host in BOTH {
            bed.copy(host, Path::new(&streamer), "/usr/local/bin/");
        }
    }
}

/// Dumps a process on host A and restores it on host B; returns how long the dump took.
pub(crate) fn migrate(
    bed: &Bed,
    way: Way,
    pid: &str,
    disturbed: &Disturbed,
) -> Result<Duration, String> {
    for host in BOTH {
        bed.ok(host, &["sh", "-c", &format!("rm -rf {IMAGES}; mkdir {IMAGES}")]);
    }
    match way {
        Way::Streamer => streamer(bed, pid, disturbed),
        Way::PageServer => page_server(bed, pid, disturbed),
        _ => directory(bed, pid, disturbed),
    }
}

/// The program that takes the pages out of the streamer's pipe is the one that is stopped.
fn streamer(bed: &Bed, pid: &str, disturbed: &Disturbed) -> Result<Duration, String> {
    let line = format!("/opt/netcat/nc -d -l {COPY_PORT} | criu-image-streamer -D {IMAGES} serve");
    let serve = bed.spawn(Host::B, &["sh", "-c", &line]);
    listens(bed, COPY_PORT);
    let line = format!("criu-image-streamer -D {IMAGES} capture | {}", to_host_b());
    let capture = bed.spawn(Host::A, &["bash", "-o", "pipefail", "-c", &line]);
    let socket = |name: &str| format!("{IMAGES}/streamer-{name}.sock");
    bed::wait_until("the streamer captures", || {
        bed.run(Host::A, &["test", "-S", &socket("capture")]).status.success()
    });
    let reader = bed.ok(Host::A, &["pgrep", "-f", "nc.openbsd -N"]);
    let dumped = disturbed.dump(bed, &Bed::dump(pid, IMAGES), Some((Host::A, reader.trim())));
    // It listens when it has everything.
    let wait = format!("until [ -S {} ]; do sleep 0.01; done; exec ", socket("serve"));
    let restore = wait + &Bed::restore(IMAGES).join(" ");
    let restore = || succeeded(bed, Host::B, &["timeout", "60", "sh", "-c", &restore]);
    let moved = dumped.and_then(|took| restore().map(|()| took));
    end(capture, moved.is_ok());
    end(serve, moved.is_ok());
    moved
}

/// What was started for one migration ends with it.
fn end(mut child: Child, well: bool) {
    if well {
        bed::finish(child);
    } else {
        let _ = child.kill();
        let _ = child.wait();
    }
}

fn page_server(bed: &Bed, pid: &str, disturbed: &Disturbed) -> Result<Duration, String> {
    // Below a shell: `nsenter` stops with what it has started, and does not go on with it.
    let line =
        format!("criu page-server -D {IMAGES} -o pages.log --port {PAGES_PORT} || exit 1; exit 0");
    let server = bed.spawn(Host::B, &["sh", "-c", &line]);
    listens(bed, PAGES_PORT);
    let reader = bed.ok(Host::B, &["pgrep", "-x", "criu"]);
    let dump = ["criu", "dump", "-t", pid, "-D", IMAGES, "-o", "dump.log", "--page-server"];
    let dump = [&dump[..], &["--address", "host-b", "--port", PAGES_PORT]].concat();
    let dumped = disturbed.dump(bed, &dump, Some((Host::B, reader.trim())));
    end(server, dumped.is_ok());
    dumped.and_then(|took| restore_files(bed).map(|()| took))
}

/// A copy of the images is made when CRIU has ended: nobody reads memory meanwhile who could be stopped.
fn directory(bed: &Bed, pid: &str, disturbed: &Disturbed) -> Result<Duration, String> {
    let dump = ["criu", "dump", "-t", pid, "-D", IMAGES, "-o", "dump.log"];
    let took = disturbed.dump(bed, &dump, None)?;
    restore_files(bed)?;
    Ok(took)
}

/// Copies what lies in the directory to host B, and restores it.
fn restore_files(bed: &Bed) -> Result<(), String> {
    let line = format!("/opt/netcat/nc -d -l {COPY_PORT} | tar -C {IMAGES} -x");
    let unpack = bed.spawn(Host::B, &["bash", "-o", "pipefail", "-c", &line]);
    listens(bed, COPY_PORT);
    let line = format!("tar -C {IMAGES} -c . | {}", to_host_b());
    bed.ok(Host::A, &["bash", "-o", "pipefail", "-c", &line]);
    bed::finish(unpack);
    succeeded(bed, Host::B, &["criu", "restore", "-d", "-D", IMAGES, "-o", "restore.log"])
}

fn succeeded(bed: &Bed, host: Host, command: &[&str]) -> Result<(), String> {
    let output = bed.run(host, command);
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{command:?}: {}{}", output.status, String::from_utf8_lossy(&output.stderr)))
}

fn listens(bed: &Bed, port: &str) {
    let filter = format!("sport = :{port}");
    bed::wait_until("somebody listens on host B", || {
        !bed.ok(Host::B, &["ss", "-Hltn", &filter]).is_empty()
    });
}

fn to_host_b() -> String {
    format!("/opt/netcat/nc -N host-b {COPY_PORT}")
}
