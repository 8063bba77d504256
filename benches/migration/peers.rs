//! What others do between the same two CRIUs. All images that become files are in memory (tmpfs), and
//! what is copied is copied by netcat, without encryption.
//!
//! - copy: `criu dump` to tmpfs, all of it copied with tar, `criu restore`. What podman's export does,
//!   without its archive, the container, and compression;
//! - page server: `criu page-server` on the destination, whose pages come from `criu dump`; its other
//!   images are copied with tar. What p.haul and go-phaul do in their last round;
//! - streamer: `criu-image-streamer` on both sides and netcat between.
//!
//! criu-image-streamer has to be built before: `CRIU_IMAGE_STREAMER` says where it is.

use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use crate::bed::{self, BOTH, Bed, Host};
use crate::ways::{IMAGES, Run, Way, measure, restore_files};

/// What others do.
pub(crate) const PEERS: [Way; 3] =
    [("copy", copy), ("page server", page_server), ("streamer", streamer)];

/// Where the ports of netcat and of the page server are.
const COPY_PORT: &str = "9100";
const PAGES_PORT: &str = "9101";

/// Puts their programs into both hosts.
pub(crate) fn prepare(bed: &Bed) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bed/netcat");
    let made = Command::new(script).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let tree = PathBuf::from(String::from_utf8(made.stdout).unwrap().trim());
    let streamer = std::env::var("CRIU_IMAGE_STREAMER").expect(
        "CRIU_IMAGE_STREAMER has to say where criu-image-streamer is: clone \
         github.com/checkpoint-restore/criu-image-streamer and build it there (make)",
    );
    for host in BOTH {
        bed.copy(host, &tree, "/opt/netcat");
        bed.copy(host, Path::new(&streamer), "/usr/local/bin/");
    }
}

fn copy(bed: &Bed, name: &str, mib: u32) -> Run {
    with_files(bed, name, mib, |pid| {
        let unpack = listen(bed, &format!("tar -C {IMAGES} -x"));
        let start = Instant::now();
        bed.ok(Host::A, &["criu", "dump", "-t", pid, "-D", IMAGES, "-o", "dump.log"]);
        let dump = start.elapsed();
        send_files(bed);
        bed::finish(unpack);
        bed.ok(Host::B, &restore_files());
        (dump, start.elapsed())
    })
}

fn page_server(bed: &Bed, name: &str, mib: u32) -> Run {
    with_files(bed, name, mib, |pid| {
        let unpack = listen(bed, &format!("tar -C {IMAGES} -x"));
        let server = ["criu", "page-server", "-D", IMAGES, "-o", "pages.log", "--port", PAGES_PORT];
        let server = bed.spawn(Host::B, &server);
        listens(bed, PAGES_PORT);
        let dump = ["criu", "dump", "-t", pid, "-D", IMAGES, "-o", "dump.log", "--page-server"];
        let to = ["--address", "host-b", "--port", PAGES_PORT];
        let start = Instant::now();
        bed.ok(Host::A, &[&dump[..], &to].concat());
        let dump = start.elapsed();
        send_files(bed);
        bed::finish(unpack);
        bed::finish(server);
        bed.ok(Host::B, &restore_files());
        (dump, start.elapsed())
    })
}

fn streamer(bed: &Bed, name: &str, mib: u32) -> Run {
    with_files(bed, name, mib, |pid| {
        let serve = listen(bed, &format!("criu-image-streamer -D {IMAGES} serve"));
        let capture = format!("criu-image-streamer -D {IMAGES} capture | {}", to_host_b());
        let capture = bed.spawn(Host::A, &["bash", "-o", "pipefail", "-c", &capture]);
        let socket = |name: &str| format!("{IMAGES}/streamer-{name}.sock");
        bed::wait_until("the streamer captures", || {
            bed.run(Host::A, &["test", "-S", &socket("capture")]).status.success()
        });
        let start = Instant::now();
        bed.ok(Host::A, &Bed::dump(pid, IMAGES));
        let dump = start.elapsed();
        // It listens when it has everything.
        let wait = format!("until [ -S {} ]; do sleep 0.002; done; exec ", socket("serve"));
        bed.ok(Host::B, &["sh", "-c", &(wait + &Bed::restore(IMAGES).join(" "))]);
        let total = start.elapsed();
        bed::finish(capture);
        bed::finish(serve);
        (dump, total)
    })
}

/// A run with a directory for images on either host.
fn with_files(
    bed: &Bed,
    name: &str,
    mib: u32,
    way: impl FnOnce(&str) -> (Duration, Duration),
) -> Run {
    for host in BOTH {
        bed.ok(host, &["mkdir", IMAGES]);
    }
    let run = measure(bed, name, mib, Host::B, way);
    for host in BOTH {
        bed.ok(host, &["rm", "-rf", IMAGES]);
    }
    run
}

/// Starts a command on host B that reads what one connection brings.
fn listen(bed: &Bed, reader: &str) -> Child {
    let line = format!("/opt/netcat/nc -d -l {COPY_PORT} | {reader}");
    let child = bed.spawn(Host::B, &["bash", "-o", "pipefail", "-c", &line]);
    listens(bed, COPY_PORT);
    child
}

fn listens(bed: &Bed, port: &str) {
    let filter = format!("sport = :{port}");
    bed::wait_until("somebody listens on host B", || {
        !bed.ok(Host::B, &["ss", "-Hltn", &filter]).is_empty()
    });
}

/// Copies the images to where [`listen`] was told.
fn send_files(bed: &Bed) {
    let line = format!("tar -C {IMAGES} -c . | {}", to_host_b());
    bed.ok(Host::A, &["bash", "-o", "pipefail", "-c", &line]);
}

fn to_host_b() -> String {
    format!("/opt/netcat/nc -N host-b {COPY_PORT}")
}
