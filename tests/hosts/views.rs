//! What CRIU does not get right from a pipe is restored from a view, without anybody asking for it.

use std::fs;

use serde_json::{Value, json};

use crate::bed::{BOTH, Bed, Host, repository, wait_until};
use crate::journal::assert_told;

const REPORT: &str = "/tmp/held.json";

/// Starts a process that holds `what` on host A, in a network namespace of its own if it has rules; returns its pid.
fn holder(bed: &Bed, what: &[&str]) -> String {
    for host in BOTH {
        bed.copy(host, &repository().join("tests/bed/holder.py"), "/tmp/holder.py");
    }
    // One that was moved away may not have left its unit yet.
    let name = format!("holder-{}", what.join("-"));
    let unit = ["systemd-run", "--quiet", "--collect", "-p", "Type=exec", "--unit", &name];
    bed.ok(Host::A, &["rm", "-f", REPORT]);
    let nothing =
        ["-p", "StandardInput=null", "-p", "StandardOutput=null", "-p", "StandardError=null"];
    let namespace = if what.contains(&"rules") { &["unshare", "--net"][..] } else { &[] };
    let program = ["python3", "/tmp/holder.py", REPORT];
    bed.ok(Host::A, &[&unit[..], &nothing, namespace, &program, what].concat());
    let _ = report(bed, Host::A);
    bed.ok(Host::A, &["systemctl", "show", "-P", "MainPID", &name]).trim().to_owned()
}

/// The report that the process writes next.
fn report(bed: &Bed, host: Host) -> Value {
    wait_until("it reports", || bed.run(host, &["test", "-e", REPORT]).status.success());
    serde_json::from_str(&bed.ok(host, &["cat", REPORT])).unwrap()
}

/// What the process says on a host now.
#[track_caller]
fn ask(bed: &Bed, host: Host, pid: &str) -> Value {
    bed.ok(host, &["rm", "-f", REPORT]);
    bed.ok(host, &["kill", "-USR1", pid]);
    report(bed, host)
}

#[track_caller]
fn migrate(bed: &Bed, pid: &str, criu: &str, options: &[&str]) {
    let command =
        ["migrate", "-t", pid, "--snapshot", "web", "--max-downtime", "1min", "--criu", criu];
    let migrated = bed.ctl(Host::A, &[&command[..], &["--"], options].concat());
    assert_eq!(migrated["outcome"], "migrated");
}

/// Puts a CRIU into both hosts that can dump TCP sockets under this kernel, whichever it is: since Linux 6.16 they have no `SO_PASSCRED`,
/// which CRIU 4.1 asks for.
fn newer_criu(bed: &Bed) -> &'static str {
    let tree = std::process::Command::new(repository().join("tests/bed/criu42")).output().unwrap();
    assert!(tree.status.success(), "{tree:?}");
    let tree = String::from_utf8(tree.stdout).unwrap();
    for host in BOTH {
        bed.copy(host, tree.trim().as_ref(), "/opt/criu-4.2");
    }
    "/opt/criu-4.2/bin/criu-4.2"
}

#[test]
fn the_rules_of_a_network_namespace_and_its_connections_move_with_their_process() {
    let bed = Bed::up();
    let criu = newer_criu(&bed);
    let pid = holder(&bed, &["rules", "connection"]);
    assert_eq!(ask(&bed, Host::A, &pid), json!({ "rules": true, "connection": true }));
    migrate(&bed, &pid, criu, &["--tcp-established"]);

    let restore =
        ["criu-imagectl", "--json", "restore", "--criu", criu, "web", "--", "--tcp-established"];
    let restored = bed.run(Host::B, &restore);
    let told = String::from_utf8_lossy(&restored.stderr).into_owned();
    assert!(restored.status.success(), "{told}");
    for _ in 0..2 {
        assert_eq!(ask(&bed, Host::B, &pid), json!({ "rules": true, "connection": true }));
    }
    assert!(told.contains("snapshot web is restored from a view: nftables-"), "{told}");
    let result: Value = serde_json::from_slice(&restored.stdout).unwrap();
    assert_eq!(result["view"], true, "{result}");
    assert!(result["needs-view"].as_str().unwrap().contains("firewall rules"), "{result}");
}

#[test]
fn the_unit_restores_rules_too() {
    let bed = Bed::up();
    let pid = holder(&bed, &["rules"]);
    migrate(&bed, &pid, "criu", &[]);
    bed.ok(Host::B, &["systemctl", "start", "criu-image-restore@web"]);
    assert_eq!(ask(&bed, Host::B, &pid), json!({ "rules": true }));
    let told = bed.ok(Host::B, &["journalctl", "-u", "criu-image-restore@web", "-o", "cat"]);
    assert!(told.contains("snapshot web is restored from a view: nftables-"), "{told}");
}

#[test]
fn whoever_restores_by_hand_what_needs_a_view_is_told() {
    let bed = Bed::up();
    let pid = holder(&bed, &["rules"]);
    migrate(&bed, &pid, "criu", &[]);
    let needs_view = || {
        let shown = bed.ctl(Host::B, &["show", "web"]);
        shown["snapshot"]["needs_view"].as_str().unwrap().to_owned()
    };
    assert!(needs_view().contains("firewall rules"), "{}", needs_view());
    // Another run of the cache knows it as well.
    bed.ok(Host::B, &["systemctl", "restart", "criu-image-cache"]);
    wait_until("it is held again", || bed.list(Host::B).len() == 1);
    assert!(needs_view().contains("firewall rules"), "{}", needs_view());
    let shown = bed.ok(Host::B, &["criu-imagectl", "show", "web"]);
    assert!(shown.contains("view     needed: nftables-"), "{shown}");

    bed.ok(Host::B, &Bed::restore(Host::B.work_dir()));
    let subject = "Snapshot web is restored through the stream and needs a view";
    let told = assert_told(&bed, Host::B, "VIEW_NEEDED", subject);
    assert!(told["CRIU_REASON"].as_str().unwrap().contains("firewall rules"), "{told}");
}

/// Huge pages of the machine, which both hosts use; what there was before is put back.
struct HugePages {
    before: String,
}

const NR_HUGEPAGES: &str = "/proc/sys/vm/nr_hugepages";

impl HugePages {
    fn reserve(more: u64) -> HugePages {
        let before = fs::read_to_string(NR_HUGEPAGES).expect("this kernel has no huge pages");
        let wanted = before.trim().parse::<u64>().unwrap() + more;
        let reserved = HugePages { before };
        fs::write(NR_HUGEPAGES, wanted.to_string()).unwrap();
        let there = fs::read_to_string(NR_HUGEPAGES).unwrap();
        assert_eq!(there.trim(), wanted.to_string(), "the kernel finds no room for huge pages");
        reserved
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = fs::write(NR_HUGEPAGES, &self.before);
    }
}

#[test]
fn memory_in_huge_pages_moves() {
    let _pages = HugePages::reserve(16);
    let bed = Bed::up();
    let pid = holder(&bed, &["private", "private-memfd", "shared", "shared-memfd"]);
    migrate(&bed, &pid, "criu", &[]);
    let restored = bed.ctl(Host::B, &["restore", "web"]);
    let all =
        json!({ "private": true, "private-memfd": true, "shared": true, "shared-memfd": true });
    assert_eq!(ask(&bed, Host::B, &pid), all);
    assert_eq!(restored["view"], true, "{restored}");
    assert!(restored["needs-view"].as_str().unwrap().contains("huge pages"), "{restored}");
    bed.ok(Host::B, &["kill", "-KILL", &pid]);
    bed.ok(Host::B, &["criu-imagectl", "drop", "web"]);

    // CRIU fills shared memory in another way, for which a pipe is good enough.
    let pid = holder(&bed, &["shared", "shared-memfd"]);
    migrate(&bed, &pid, "criu", &[]);
    let restored = bed.ctl(Host::B, &["restore", "web"]);
    assert_eq!(ask(&bed, Host::B, &pid), json!({ "shared": true, "shared-memfd": true }));
    assert_eq!(restored["view"], false, "{restored}");
}
