//! The messages that an operator acts on, caused for real and read back as journalctl explains them.

use std::collections::BTreeMap;
use std::process::Child;

use serde_json::Value;

use crate::bed::{BOTH, Bed, Host, wait_until};
use crate::messages::{Event, events, fields};

/// The event of that name, as the page of operations has it.
fn event(name: &str) -> Event {
    events().into_iter().find(|event| event.name == name).unwrap()
}

/// Waits until a message of the event has come on the host. `journalctl -x` explains it under this subject, in which
/// `@CRIU_PEER@` is whoever it was, and it has all its fields.
#[track_caller]
pub(crate) fn assert_told(bed: &Bed, host: Host, name: &str, subject: &str) -> Value {
    let event = event(name);
    let matching = [format!("MESSAGE_ID={}", event.id)];
    let matching: Vec<_> = matching.iter().map(String::as_str).collect();
    let mut last = None;
    wait_until(&format!("{name} on host {host:?}"), || {
        last = bed.journal(host, &matching).pop();
        last.is_some()
    });
    let entry = last.unwrap();
    let subject = subject.replace("@CRIU_PEER@", entry["CRIU_PEER"].as_str().unwrap_or_default());
    let explained = bed.ok(host, &["journalctl", "-x", "--no-pager", "-n", "1", matching[0]]);
    assert!(explained.contains(&format!(" Subject: {subject}\n")), "{subject}:\n{explained}");
    assert!(explained.contains(" Next: "), "{explained}");
    let priority = BTreeMap::from([("info", "6"), ("warning", "4"), ("error", "3")]);
    assert_eq!(entry["PRIORITY"], priority[event.level.as_str()], "{entry}");
    for field in &event.fields {
        assert!(entry[field].is_string(), "{field} of {entry}");
    }
    entry
}

/// Each field of what the daemons have said is in the journal once, and those of their own are known.
#[track_caller]
fn assert_each_field_once(bed: &Bed) {
    let known = fields();
    for host in BOTH {
        for entry in bed.journal(host, &["-u", host.daemon()]) {
            for (field, value) in entry.as_object().unwrap() {
                assert!(value.is_string(), "{field} of {entry}");
                let ours = field.starts_with("CRIU_");
                assert!(!ours || known.contains(field), "{field} of {entry}");
            }
        }
    }
}

/// Puts an image of so many MiB into a snapshot and ends it; returns whether that went well.
fn put(bed: &Bed, id: &str, mib: u32) -> bool {
    let command = format!(
        "head -c {mib}M /dev/zero | criu-imagectl put --list --finish --name memory.img {id} -"
    );
    bed.run(Host::A, &["sh", "-c", &command]).status.success()
}

/// Begins a snapshot through the proxy that is not ended.
fn begin(bed: &Bed, id: &str) -> Child {
    let stuck = "(head -c 1M /dev/zero; exec sleep 1000) 2>/dev/null";
    let put = format!("exec criu-imagectl put --list --name memory.img {id} - < <{stuck}");
    let putting = bed.spawn(Host::A, &["bash", "-c", &put]);
    let received = || {
        let list = bed.list(Host::B);
        list.iter().any(|snapshot| snapshot["id"] == id && snapshot["bytes"] == 1 << 20)
    };
    wait_until("the first bytes have come", received);
    putting
}

/// Says something on the proxy's control socket that is no call, and waits until it is disconnected.
const NOT_VARLINK: &str = "import socket
stream = socket.socket(socket.AF_UNIX)
stream.connect('/run/criu-image/proxy/control.sock')
stream.sendall(b'GET / HTTP/1.1\\0')
stream.settimeout(10)
assert stream.recv(1) == b''
";

/// Ends a command that waits for something that does not come.
fn end(mut command: Child) {
    command.kill().unwrap();
    command.wait().unwrap();
}

#[test]
fn journald_reads_the_whole_catalog() {
    let bed = Bed::up();
    let catalog = bed.ok(Host::A, &["journalctl", "--list-catalog"]);
    for event in events() {
        let entry = catalog.lines().find(|line| line.starts_with(&event.id));
        assert!(entry.is_some_and(|entry| entry.contains("criu-image-relay: ")), "{event:?}");
    }
}

#[test]
fn the_messages_of_snapshots_come_with_their_explanations() {
    let bed = Bed::up();
    for (key, value) in [("max-bytes", "16M"), ("quota-wait", "1s"), ("keep", "1s")] {
        bed.configure(Host::B, key, &format!("{value:?}"));
    }
    let pid = bed.workload(Host::A, "web", 4);
    bed.ok(Host::A, &Bed::hooked_dump(&pid, Host::A.work_dir()));
    bed.ok(Host::B, &Bed::restore(Host::B.work_dir()));
    let sent = bed.list(Host::A)[0]["id"].as_str().unwrap().to_owned();
    assert_told(&bed, Host::A, "SNAPSHOT_SENT", &format!("Snapshot {sent} is at the cache"));
    assert_told(&bed, Host::B, "SNAPSHOT_WHOLE", &format!("Snapshot {sent} is whole"));
    assert_told(&bed, Host::B, "SNAPSHOT_TAKEN", &format!("Snapshot {sent} was taken"));
    let subject = format!("Snapshot {sent} is not kept any longer");
    assert_told(&bed, Host::B, "SNAPSHOT_EXPIRED", &subject);

    assert!(put(&bed, "one", 8));
    assert!(!put(&bed, "one", 1), "it is held");
    let refused = assert_told(&bed, Host::B, "SNAPSHOT_REFUSED", "Snapshot one is refused");
    assert!(refused["CRIU_REASON"].as_str().unwrap().contains("is held already"), "{refused}");

    assert!(!put(&bed, "two", 12), "there is no room");
    let waits = "The quota is reached, snapshot two waits";
    assert_told(&bed, Host::B, "QUOTA_REACHED", waits);
    assert_told(&bed, Host::B, "QUOTA_EXHAUSTED", "There is no room for snapshot two");
    for host in BOTH {
        let damaged = assert_told(&bed, host, "SNAPSHOT_DAMAGED", "Snapshot two is damaged");
        assert!(damaged["CRIU_REASON"].as_str().unwrap().contains("quota exhausted"), "{damaged}");
    }
    bed.ok(Host::B, &["mkdir", "/tmp/two"]);
    bed.ok(Host::B, &["criu-imagectl", "open", "/tmp/two"]);
    assert!(!bed.run(Host::B, &Bed::restore("/tmp/two")).status.success());
    let subject = "@CRIU_PEER@ did not get its snapshot";
    let failed = assert_told(&bed, Host::B, "RESTORE_FAILED", subject);
    assert_eq!(failed["CRIU_SNAPSHOT"], "two");

    bed.ok(Host::B, &["criu-imagectl", "drop", "one"]);
    let dropped = assert_told(&bed, Host::B, "SNAPSHOT_DROPPED", "Snapshot one was dropped");
    assert!(dropped["CRIU_PEER"].as_str().unwrap().ends_with("(uid 0)"), "{dropped}");
    assert_each_field_once(&bed);
}

#[test]
fn the_messages_of_links_come_with_their_explanations() {
    let bed = Bed::up();
    bed.configure(Host::A, "give-up-after", "\"3s\"");
    let cache = "10.77.0.2:9996";
    let link = ["criu-image-cache-link.socket", "criu-image-cache.service"];
    bed.ok(Host::B, &[&["systemctl", "stop"], &link[..]].concat());
    assert!(!put(&bed, "one", 1), "there is no cache");
    let subject = format!("There is no link to the cache {cache}");
    assert_told(&bed, Host::A, "NO_LINK", &subject);
    bed.ok(Host::B, &["systemctl", "start", link[0]]);
    assert!(put(&bed, "one", 1));
    assert_told(&bed, Host::A, "LINK_BACK", &format!("The link to {cache} is back"));
    let proxy = assert_told(&bed, Host::B, "LINK_UP", "The link to @CRIU_PEER@ is up");
    assert!(proxy["CRIU_PEER"].as_str().unwrap().starts_with("10.77.0.1:"), "{proxy}");

    let putting = begin(&bed, "web");
    bed.ok(Host::B, &["kill", "-KILL", &bed.daemon_pid(Host::B)]);
    let lost = assert_told(&bed, Host::A, "LINK_LOST", &format!("The link to {cache} is lost"));
    assert_eq!(lost["CRIU_SNAPSHOTS"], "1");
    end(putting);
    wait_until("systemd has started the cache again", || {
        bed.run(Host::B, &["systemctl", "is-active", "criu-image-cache"]).status.success()
    });

    let putting = begin(&bed, "db");
    bed.ok(Host::A, &["kill", "-KILL", &bed.daemon_pid(Host::A)]);
    assert_told(&bed, Host::B, "LINK_LOST", "The link to @CRIU_PEER@ is lost");
    end(putting);
    assert!(put(&bed, "db", 1));
    assert_told(&bed, Host::B, "LINK_BACK", "The link to @CRIU_PEER@ is back");
    bed.ok(Host::A, &["systemctl", "stop", "criu-image-proxy"]);
    assert_told(&bed, Host::B, "LINK_ENDED", "The link to @CRIU_PEER@ has ended");
    assert_each_field_once(&bed);
}

#[test]
fn the_messages_of_peers_and_daemons_come_with_their_explanations() {
    let bed = Bed::up();
    assert!(put(&bed, "web", 1));
    let cache = "criu-image-cache";
    let started = assert_told(&bed, Host::B, "DAEMON_STARTED", "criu-image-cache serves");
    let serves = "remote on /run/criu-image/cache/img-cache.sock";
    assert!(started["MESSAGE"].as_str().unwrap().contains(serves), "{started}");

    bed.ok(Host::A, &["bash", "-c", "echo GET / HTTP/1.1 >/dev/tcp/10.77.0.2/9996"]);
    assert_told(&bed, Host::B, "PROTOCOL_ERROR", "@CRIU_PEER@ broke the protocol");
    // Nor are the fields lost where the level leaves out all that is below the message.
    bed.configure(Host::A, "level", "\"warn\"");
    bed.ok(Host::A, &["systemctl", "reload", "criu-image-proxy"]);
    let stranger = ["setpriv", "--reuid=65534", "--regid=criu-image", "--clear-groups"];
    let status = ["criu-imagectl", "--proxy", "status"];
    assert!(!bed.run(Host::A, &[&stranger[..], &status].concat()).status.success());
    let refused = assert_told(&bed, Host::A, "PEER_REFUSED", "@CRIU_PEER@ may not connect");
    assert!(refused["CRIU_PEER"].as_str().unwrap().ends_with("(uid 65534)"), "{refused}");
    bed.ok(Host::A, &["python3", "-c", NOT_VARLINK]);
    assert_told(&bed, Host::A, "PROTOCOL_ERROR", "@CRIU_PEER@ broke the protocol");

    bed.ok(Host::B, &["systemctl", "reload", cache]);
    let subject = "criu-image-cache has another configuration";
    assert_told(&bed, Host::B, "CONFIG_RELOADED", subject);
    bed.configure(Host::B, "max-bytes", "\"1Q\"");
    bed.ok(Host::B, &["systemctl", "reload", cache]);
    let subject = "The new configuration of criu-image-cache is refused";
    assert_told(&bed, Host::B, "CONFIG_REFUSED", subject);

    assert!(!bed.run(Host::B, &["systemctl", "restart", cache]).status.success());
    assert_told(&bed, Host::B, "DAEMON_STOPPING", "criu-image-cache stops");
    assert_told(&bed, Host::B, "SNAPSHOT_LEFT", "Snapshot web is left to systemd");
    assert_told(&bed, Host::B, "DAEMON_STOPPED", "criu-image-cache has stopped");
    let failed = assert_told(&bed, Host::B, "DAEMON_FAILED", "criu-image-cache cannot start");
    assert!(failed["CRIU_REASON"].as_str().unwrap().contains("store.max-bytes"), "{failed}");
    assert_each_field_once(&bed);
}
