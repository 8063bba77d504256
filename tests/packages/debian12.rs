//! The same package on Debian 12: systemd 252, the oldest that is supported. Its own CRIU does not run on
//! today's kernels, so the images are made by that of Debian 13, and go to the process they are of there.

use std::fs::File;
use std::process::Command;

use crate::bed::{BOTH, Bed, Host};
use crate::built::{fresh_hosts, install, ok, package, repository};

/// Sends what is in a directory of one host to another, of another bed.
fn carry(from: (&Bed, Host), to: (&Bed, Host), dir: &str) {
    let machine = tempfile::tempdir().unwrap();
    let archive = machine.path().join("archive");
    let mut pack = from.0.command(from.1, &["tar", "-C", dir, "-c", "."]);
    assert!(pack.stdout(File::create(&archive).unwrap()).status().unwrap().success());
    let unpacked = machine.path().join("images");
    std::fs::create_dir(&unpacked).unwrap();
    let mut unpack = Command::new("tar");
    unpack.arg("-C").arg(&unpacked).arg("-xf").arg(&archive);
    assert!(unpack.status().unwrap().success());
    to.0.copy(to.1, &unpacked, dir);
}

#[test]
fn services_sockets_push_and_extract_work_on_debian_12() {
    let new = fresh_hosts(None);
    let pid = new.workload(Host::A, "web", 16);
    let before = new.ask(Host::A, "web", &pid);
    new.ok(Host::A, &["mkdir", "/tmp/web"]);
    new.ok(Host::A, &["criu", "dump", "-t", &pid, "-D", "/tmp/web", "-o", "dump.log"]);

    let rootfs = ok(&[repository().join("tests/bed/rootfs").to_str().unwrap(), "bookworm"]);
    let old = fresh_hosts(Some(rootfs.trim()));
    let version = old.ok(Host::A, &["systemctl", "--version"]);
    assert!(version.starts_with("systemd 252"), "{version}");
    for host in BOTH {
        install(&old, host, package());
    }
    old.trust();
    for (host, sockets) in [
        (Host::A, &["stream", "remote", "pages", "control"][..]),
        (Host::B, &["link", "stream", "remote", "pages", "control"]),
    ] {
        for socket in sockets {
            let socket = format!("{}-{socket}.socket", host.daemon());
            old.ok(host, &["systemctl", "enable", "--now", &socket]);
        }
    }
    carry((&new, Host::A), (&old, Host::A), "/tmp/web");
    old.ok(Host::A, &["criu-imagectl", "push", "/tmp/web"]);
    old.ok(Host::B, &["criu-imagectl", "extract", "--snapshot", "web", "/tmp/web"]);
    old.ok(Host::A, &["criu-imagectl", "put", "--list", "--finish", "host", "/etc/hostname"]);
    assert_eq!(old.ok(Host::B, &["criu-imagectl", "get", "host", "hostname"]), "host-a\n");
    for host in BOTH {
        old.ok(host, &["systemctl", "is-active", host.daemon()]);
        let failed =
            old.ok(host, &["systemctl", "list-units", "--failed", "--plain", "--no-legend"]);
        assert_eq!(failed, "");
    }

    carry((&old, Host::B), (&new, Host::B), "/tmp/web");
    new.ok(Host::B, &["criu", "restore", "-d", "-D", "/tmp/web", "-o", "restore.log"]);
    assert_eq!(new.ask(Host::B, "web", &pid).checksum, before.checksum);
}
