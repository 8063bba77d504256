//! The daemons as systemd's services.

use crate::bed::{BOTH, Bed, Host, wait_until};

fn is_active(bed: &Bed, host: Host) -> bool {
    let state = bed.run(host, &["systemctl", "is-active", host.daemon()]);
    String::from_utf8_lossy(&state.stdout).trim() == "active"
}

#[track_caller]
fn migrate(bed: &Bed, name: &str) {
    let pid = bed.workload(Host::A, name, 16);
    let before = bed.ask(Host::A, name, &pid);
    bed.ok(Host::A, &Bed::hooked_dump(&pid, Host::A.work_dir()));
    bed.ok(Host::B, &Bed::restore(Host::B.work_dir()));
    assert_eq!(bed.ask(Host::B, name, &pid).checksum, before.checksum);
}

#[test]
fn a_service_starts_with_the_first_connection_to_its_socket() {
    let bed = Bed::up();
    assert!(BOTH.iter().all(|host| !is_active(&bed, *host)));
    migrate(&bed, "web");
    assert!(BOTH.iter().all(|host| is_active(&bed, *host)));
    for host in BOTH {
        let failed =
            bed.ok(host, &["systemctl", "list-units", "--failed", "--plain", "--no-legend"]);
        assert_eq!(failed, "");
    }
}

#[test]
fn images_by_name_start_the_services_too_and_can_be_done_without() {
    let bed = Bed::up();
    bed.ok(Host::A, &["criu-imagectl", "put", "--list", "--finish", "web", "/etc/hostname"]);
    assert_eq!(bed.ok(Host::B, &["criu-imagectl", "get", "web", "hostname"]), "host-a\n");
    bed.ok(Host::B, &["criu-imagectl", "finish", "web"]);
    for host in BOTH {
        let socket = format!("{}-remote.socket", host.daemon());
        bed.ok(host, &["systemctl", "mask", "--now", &socket]);
        bed.ok(host, &["systemctl", "restart", host.daemon()]);
    }
    migrate(&bed, "db");
    let gone = bed.run(Host::A, &["criu-imagectl", "put", "web", "/etc/hostname"]);
    assert_eq!(gone.status.code(), Some(3));
}

#[test]
fn the_status_line_and_the_journal_tell_the_story_of_a_snapshot() {
    let bed = Bed::up();
    migrate(&bed, "web");
    let id = bed.list(Host::A)[0]["id"].as_str().unwrap().to_owned();
    assert_eq!(bed.ctl(Host::A, &["wait", &id])["state"], "whole");
    assert_eq!(bed.ctl(Host::B, &["wait", &id, "--for", "taken"])["state"], "taken");
    for (host, line) in [(Host::A, "1 sent"), (Host::B, "1 taken")] {
        wait_until("the status line is up to date", || {
            bed.ok(host, &["systemctl", "status", host.daemon()]).contains(line)
        });
    }
    let messages = |host| {
        let mut entries = bed.journal(host, &[&format!("CRIU_SNAPSHOT={id}")]);
        for entry in &entries {
            assert!(entry["MESSAGE_ID"].is_string(), "{entry}");
            assert_eq!(entry["_SYSTEMD_UNIT"], format!("{}.service", host.daemon()));
        }
        // The first dump also tells that it brought the link up.
        entries.retain(|entry| entry["CRIU_BYTES"].is_string());
        for entry in &entries {
            assert!(entry["CRIU_BYTES"].as_str().unwrap().parse::<u64>().unwrap() > 16 << 20);
            assert!(entry["CRIU_SECONDS"].is_string() && entry["CRIU_IMAGES"].is_string());
        }
        let message = |entry: &serde_json::Value| entry["MESSAGE"].as_str().unwrap().to_owned();
        entries.iter().map(message).collect::<Vec<_>>()
    };
    let sent = messages(Host::A);
    assert!(sent.len() == 1 && sent[0].contains("sent to 10.77.0.2:9996"), "{sent:?}");
    let kept = messages(Host::B);
    assert!(
        kept.len() == 2 && kept[0].contains("is whole") && kept[1].contains("taken"),
        "{kept:?}"
    );
}

#[test]
fn an_idle_cache_restarted_serves_on_the_same_sockets() {
    let bed = Bed::up();
    migrate(&bed, "one");
    let before = bed.daemon_pid(Host::B);
    bed.ok(Host::B, &["systemctl", "restart", "criu-image-cache"]);
    assert_ne!(bed.daemon_pid(Host::B), before);
    migrate(&bed, "two");
    bed.ok(Host::A, &["systemctl", "restart", "criu-image-proxy"]);
    migrate(&bed, "three");
}

#[test]
fn what_is_whole_outlives_a_restart_and_a_crash_of_the_cache() {
    let bed = Bed::up();
    let pid = bed.workload(Host::A, "web", 64);
    let before = bed.ask(Host::A, "web", &pid);
    bed.ok(Host::A, &Bed::hooked_dump(&pid, Host::A.work_dir()));
    let id = bed.list(Host::A)[0]["id"].as_str().unwrap().to_owned();
    bed.ctl(Host::A, &["wait", &id]);
    bed.ok(Host::B, &["systemctl", "restart", "criu-image-cache"]);
    let killed = bed.daemon_pid(Host::B);
    bed.ok(Host::B, &["kill", "-KILL", &killed]);
    wait_until("systemd starts it again", || {
        let pid = bed.daemon_pid(Host::B);
        pid != killed && pid != "0"
    });
    let held = bed.list(Host::B);
    assert_eq!((&held[0]["id"], &held[0]["state"]), (&id.clone().into(), &"whole".into()));
    bed.ok(Host::B, &Bed::restore(Host::B.work_dir()));
    let after = bed.ask(Host::B, "web", &pid);
    assert_eq!((after.pid, &after.checksum), (before.pid, &before.checksum));
    assert_eq!(bed.ctl(Host::B, &["wait", &id, "--for", "taken"])["state"], "taken");
    bed.ok(Host::B, &["systemctl", "restart", "criu-image-cache"]);
    assert_eq!(bed.list(Host::B)[0]["state"], "taken", "it is not restored twice in silence");
    bed.ok(Host::B, &["criu-imagectl", "--cache", "drop", &id]);
    wait_until("systemd keeps nothing of it", || {
        let kept = ["systemctl", "show", "-P", "NFileDescriptorStore", "criu-image-cache"];
        bed.ok(Host::B, &kept).trim() == "0"
    });
}

/// However often systemd tries, and whatever the cache ends with.
#[test]
fn what_is_whole_outlives_starts_with_a_configuration_that_is_wrong() {
    let bed = Bed::up();
    bed.ok(Host::A, &["criu-imagectl", "put", "--list", "--finish", "web", "/etc/hostname"]);
    // More attempts than the usual limit allows, in a moment.
    let soon = "mkdir -p /run/systemd/system/criu-image-cache.service.d
        printf '[Service]\\nRestartSec=50ms\\nRestartSteps=0\\n' >/run/systemd/system/criu-image-cache.service.d/soon.conf
        systemctl daemon-reload";
    bed.ok(Host::B, &["sh", "-c", soon]);
    bed.configure(Host::B, "max-bytes", "\"1Q\"");
    let restart = ["systemctl", "restart", "criu-image-cache"];
    assert!(!bed.run(Host::B, &restart).status.success(), "it cannot start");
    wait_until("systemd has tried again and again", || {
        let restarts =
            bed.ok(Host::B, &["systemctl", "show", "-P", "NRestarts", "criu-image-cache"]);
        restarts.trim().parse::<u32>().unwrap() > 8
    });
    bed.configure(Host::B, "max-bytes", "\"1G\"");
    wait_until("it starts by itself", || is_active(&bed, Host::B));
    let held = bed.list(Host::B);
    assert_eq!((&held[0]["id"], &held[0]["state"]), (&"web".into(), &"whole".into()));
}

#[test]
fn a_reload_puts_a_good_configuration_in_force_and_leaves_a_bad_one() {
    let bed = Bed::up();
    let max_bytes = || bed.ctl(Host::B, &["status"])[0]["max_bytes"].clone();
    max_bytes();
    bed.configure(Host::B, "max-bytes", "\"1G\"");
    bed.ok(Host::B, &["systemctl", "reload", "criu-image-cache"]);
    wait_until("the new quota is in force", || max_bytes() == 1u64 << 30);
    bed.configure(Host::B, "max-bytes", "\"1Q\"");
    bed.ok(Host::B, &["systemctl", "reload", "criu-image-cache"]);
    wait_until("the refusal is in the journal", || {
        let entries = bed.journal(Host::B, &["-u", "criu-image-cache", "PRIORITY=3"]);
        entries.iter().any(|entry| entry["MESSAGE"].as_str().unwrap().contains("store.max-bytes"))
    });
    assert_eq!(max_bytes(), 1u64 << 30);
    assert!(is_active(&bed, Host::B));
    let checked = bed.run(Host::B, &["criu-image-cache", "--check-config"]);
    assert_eq!(checked.status.code(), Some(78));
}

/// Connects to a socket and tells whether the session is ended at once.
const CONNECT: &str = "import socket, sys
stream = socket.socket(socket.AF_UNIX)
stream.settimeout(2)
stream.connect(sys.argv[1])
try:
    print('ended' if stream.recv(1) == b'' else 'spoken to')
except TimeoutError:
    print('served')
";

#[test]
fn strangers_reach_no_socket_and_group_members_no_session() {
    let bed = Bed::up();
    let as_user = |host: Host, group: &str, socket: &str| {
        let path = format!("{}/{socket}", host.work_dir());
        let user = ["setpriv", "--reuid=65534", "--regid", group, "--clear-groups"];
        let client = ["python3", "-c", CONNECT, &path];
        let output = bed.run(host, &[&user[..], &client].concat());
        (output.status.success(), String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    for (host, stream, remote) in [
        (Host::A, "streamer-capture.sock", "img-proxy.sock"),
        (Host::B, "streamer-serve.sock", "img-cache.sock"),
    ] {
        for socket in [stream, remote, "control.sock"] {
            assert_eq!(as_user(host, "65534", socket), (false, String::new()), "{socket}");
            let ended = (true, "ended".to_owned());
            assert_eq!(as_user(host, "criu-image", socket), ended, "{socket}");
        }
        wait_until("the refusals are in the journal", || {
            let refused = bed.journal(host, &["-u", host.daemon(), "PRIORITY=4"]);
            let named = |entry: &serde_json::Value| {
                entry["MESSAGE"].as_str().unwrap().contains("(uid 65534) is refused")
            };
            refused.iter().filter(|entry| named(entry)).count() == 3
        });
        bed.configure(host, "allow-uids", "[65534]");
        bed.ok(host, &["systemctl", "reload", host.daemon()]);
        wait_until("the uid is allowed", || {
            as_user(host, "criu-image", stream) == (true, "served".to_owned())
        });
    }
}
