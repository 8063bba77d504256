//! The drop-ins of docs/operations.md, as written there.

use crate::bed::{Bed, Host, wait_until};
use crate::handbook::{blocks, done};

/// The only block below a heading.
fn block(heading: &str) -> Vec<(Host, String)> {
    let [block] = <[_; 1]>::try_from(blocks(heading)).unwrap();
    block
}

fn put(bed: &Bed, id: &str) -> bool {
    let put = ["criu-imagectl", "put", "--list", "--finish", id, "/etc/hostname"];
    bed.run(Host::A, &put).status.success()
}

#[track_caller]
fn serves(bed: &Bed, id: &str) {
    assert!(put(bed, id));
    assert_eq!(bed.ok(Host::B, &["criu-imagectl", "get", id, "hostname"]), "host-a\n");
}

fn listeners(bed: &Bed) -> String {
    bed.ok(Host::B, &["ss", "--tcp", "--listening", "--numeric", "--no-header"])
}

#[test]
fn the_link_listens_where_it_is_told() {
    let bed = Bed::up();
    assert!(listeners(&bed).contains("*:9996"));
    done(&bed, &block("### Where to listen"));
    let listeners = listeners(&bed);
    assert!(listeners.contains("10.77.0.2:9996") && !listeners.contains("*:9996"), "{listeners}");
    serves(&bed, "web");
}

#[test]
fn only_the_peers_that_are_named_get_through() {
    let bed = Bed::up();
    let [at_the_cache, at_the_proxy] = <[_; 2]>::try_from(blocks("### Which peers")).unwrap();
    let connects = |host: Host, from: &str| {
        let connect = "import socket, sys; socket.create_connection(('10.77.0.2', 9996), 1, (sys.argv[1], 0))";
        bed.run(host, &["python3", "-c", connect, from]).status.success()
    };
    bed.ok(Host::A, &["ip", "address", "add", "10.77.0.3/24", "dev", "eth0"]);
    assert!(connects(Host::A, "10.77.0.3"));
    done(&bed, &at_the_cache);
    assert!(connects(Host::A, "10.77.0.1"));
    assert!(!connects(Host::A, "10.77.0.3"));
    serves(&bed, "web");

    // Another cache than the one that it may reach.
    done(&bed, &at_the_proxy);
    serves(&bed, "db");
    bed.ok(Host::B, &["ip", "address", "add", "10.77.0.4/24", "dev", "eth0"]);
    bed.configure(Host::A, "connect-timeout", "\"1s\"");
    bed.configure(Host::A, "give-up-after", "\"2s\"");
    bed.configure(Host::A, "cache", "\"10.77.0.4\"");
    bed.ok(Host::A, &["systemctl", "reload", "criu-image-proxy"]);
    assert!(!put(&bed, "job"));
}

#[test]
fn another_user_has_the_daemon_and_its_sockets() {
    let bed = Bed::up();
    serves(&bed, "web");
    done(&bed, &block("### Another user"));
    let group = bed.ok(Host::B, &["stat", "-c", "%G", "/run/criu-image/cache/control.sock"]);
    assert_eq!(group.trim(), "relay");
    serves(&bed, "db");
    let owner = bed.ok(Host::B, &["ps", "-o", "user=", "-C", "criu-image-cache"]);
    assert_eq!(owner.trim(), "relay");
    // The daemon looks at who asks by its own user, and at the uid of who wants pages.
    bed.ok(
        Host::B,
        &["setpriv", "--reuid=relay", "--regid=relay", "--clear-groups", "criu-imagectl", "list"],
    );
    let before = [
        "setpriv",
        "--reuid=criu-image",
        "--regid=relay",
        "--clear-groups",
        "criu-imagectl",
        "list",
    ];
    assert!(!bed.run(Host::B, &before).status.success());
}

#[test]
fn what_is_held_is_kept_over_a_stop_if_systemd_is_told_so() {
    let bed = Bed::up();
    let stop = || {
        assert!(put(&bed, "web"));
        bed.ok(Host::B, &["systemctl", "stop", "criu-image-cache"]);
        bed.list(Host::B).len()
    };
    assert_eq!(stop(), 0);
    done(&bed, &block("### What is held, over a stop"));
    assert_eq!(stop(), 1);
    assert_eq!(bed.ok(Host::B, &["criu-imagectl", "get", "web", "hostname"]), "host-a\n");
}

#[test]
fn a_journal_namespace_has_what_the_cache_tells() {
    let bed = Bed::up();
    let mut block = block("### A journal of its own");
    let script = &mut block[0].1;
    // Reading is part of it: there has to be something by then.
    let read = script.find("journalctl").unwrap();
    let reading = script.split_off(read);
    done(&bed, &block);
    serves(&bed, "web");
    wait_until("the namespace has it", || {
        let journal = bed.run(Host::B, &["bash", "-c", &reading]);
        String::from_utf8_lossy(&journal.stdout).contains("snapshot web is whole")
    });
    let journal = bed.journal(Host::B, &["CRIU_SNAPSHOT=web"]);
    assert!(journal.is_empty(), "{journal:?}");
}

#[test]
fn a_log_file_can_be_written_where_it_is_allowed() {
    let bed = Bed::up();
    bed.configure(Host::B, "file", "\"/var/log/criu-image-relay/cache.log\"");
    let cannot_start = bed.run(Host::B, &["criu-imagectl", "--cache", "status"]);
    let words = String::from_utf8_lossy(&cannot_start.stderr);
    assert_eq!(cannot_start.status.code(), Some(3), "{words}");
    let cure = "it cannot start, or stands still: journalctl -u criu-image-cache.service says why";
    assert!(words.contains(cure), "{words}");
    done(&bed, &block("### A log file"));
    let log = bed.ok(Host::B, &["cat", "/var/log/criu-image-relay/cache.log"]);
    assert!(log.contains(" serves"), "{log}");
}

#[test]
fn a_daemon_may_be_elsewhere() {
    let bed = Bed::up();
    bed.ok(Host::B, &["cp", "/usr/bin/criu-image-cache", "/usr/local/bin/"]);
    done(&bed, &block("### Binaries elsewhere"));
    serves(&bed, "web");
    let runs = bed.ok(Host::B, &["readlink", &format!("/proc/{}/exe", bed.daemon_pid(Host::B))]);
    assert_eq!(runs.trim(), "/usr/local/bin/criu-image-cache");
    bed.ok(Host::B, &["systemctl", "reload", "criu-image-cache"]);
}
