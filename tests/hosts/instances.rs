//! More than one proxy or cache on a host.

use crate::bed::{BOTH, Bed, Host, wait_until};
use crate::handbook::{blocks, done};

fn start(bed: &Bed, host: Host, kinds: &[&str]) {
    for kind in kinds {
        let socket = format!("{}-{kind}@rack7.socket", host.daemon());
        bed.ok(host, &["systemctl", "start", &socket]);
    }
}

/// Does what the page says, with the configuration that it leaves to be edited.
fn set_up(bed: &Bed) {
    let [by_port] = <[_; 1]>::try_from(blocks("### Several on a host")).unwrap();
    done(bed, &by_port[..1]);
    let mut at_the_proxy = by_port[1].clone();
    let edit = "sed -i 's|^cache = .*|cache = \"10.77.0.2:19996\"|' /etc/criu-image-relay/proxy@rack7.toml\n";
    let copied = at_the_proxy.1.find("systemctl").unwrap();
    at_the_proxy.1.insert_str(copied, edit);
    done(bed, &[at_the_proxy]);
}

#[test]
fn a_process_moves_from_an_instance_to_an_instance() {
    let bed = Bed::up();
    set_up(&bed);
    bed.ok(Host::B, &["bash", "-c", "mkdir -p /etc/systemd/system/criu-image-restore@.service.d &&
        printf '[Service]\\nEnvironment=\"RESTORE_OPTIONS=--instance rack7\"\\n' \\
            >/etc/systemd/system/criu-image-restore@.service.d/instance.conf && systemctl daemon-reload"]);
    bed.ok(Host::B, &["systemctl", "start", "--no-block", "criu-image-restore@web"]);
    let pid = bed.workload(Host::A, "web", 16);
    let before = bed.ask(Host::A, "web", &pid);
    bed.ctl(
        Host::A,
        &[
            "--instance",
            "rack7",
            "migrate",
            "-t",
            &pid,
            "--snapshot",
            "web",
            "--max-downtime",
            "1min",
        ],
    );
    wait_until("the restore ends", || {
        let state = ["systemctl", "show", "-P", "Result,ActiveState", "criu-image-restore@web"];
        bed.ok(Host::B, &state) == "success\ninactive\n"
            || bed.ok(Host::B, &state) == "inactive\nsuccess\n"
    });
    assert_eq!(bed.ask(Host::B, "web", &pid).checksum, before.checksum);

    // By CRIU's own means, too; and by name.
    let pid = bed.workload(Host::A, "db", 16);
    let before = bed.ask(Host::A, "db", &pid);
    bed.ok(Host::A, &Bed::hooked_dump(&pid, "/run/criu-image/proxy@rack7"));
    bed.ok(Host::B, &Bed::restore("/run/criu-image/cache@rack7"));
    assert_eq!(bed.ask(Host::B, "db", &pid).checksum, before.checksum);
    let ctl = ["criu-imagectl", "--instance", "rack7"];
    bed.ok(Host::A, &[&ctl[..], &["put", "--list", "--finish", "job", "/etc/hostname"]].concat());
    assert_eq!(bed.ok(Host::B, &[&ctl[..], &["get", "job", "hostname"]].concat()), "host-a\n");

    // Nothing of it was the plain daemons'.
    for host in BOTH {
        assert_eq!(bed.ctl(host, &["list"]).as_array().unwrap().len(), 0);
    }
    let instances = bed.ctl(Host::B, &["--instance", "rack7", "list"]);
    assert_eq!(instances.as_array().unwrap().len(), 3, "{instances}");
}

/// A tunnel between the hosts, made as the page says, with the key that it leaves to be pasted.
fn tunnel(bed: &Bed) {
    let [at_the_cache, at_the_proxy, mut paste] =
        <[_; 3]>::try_from(blocks("### Through ssh")).unwrap();
    bed.ok(Host::B, &["systemctl", "start", "ssh"]);
    done(bed, &[at_the_cache, at_the_proxy].concat());
    let key = bed.ok(Host::A, &["cat", "/etc/criu-image-relay/tunnel/key.pub"]);
    paste[0].1 = paste[0].1.replace("KEY'", &format!("{}'", key.trim()));
    done(bed, &paste);
    wait_until("the tunnel is there", || {
        bed.run(Host::A, &["test", "-S", "/run/criu-image-tunnel/rack7.sock"]).status.success()
    });
}

#[test]
fn a_process_moves_through_ssh_and_nobody_else_on_either_host_gets_anything() {
    let bed = Bed::up();
    tunnel(&bed);
    // The key of the metrics' own, which has the same name, is as it was.
    let at_the_cache = "/etc/criu-image-relay/cache@rack7.toml";
    let check = bed.ok(Host::B, &["criu-image-cache", "--check-config", "-c", at_the_cache]);
    let uids: Vec<_> = check.lines().filter(|line| line.starts_with("allow-uids = ")).collect();
    assert!(uids.len() == 2 && uids[0] != "allow-uids = []", "{check}");
    assert_eq!(uids[1], "allow-uids = []", "{check}");
    let (cache, pid) = (["--cache", "--instance", "rack7"], bed.workload(Host::A, "web", 16));
    let before = bed.ask(Host::A, "web", &pid);
    bed.ctl(Host::A, &["migrate", "-t", &pid, "--snapshot", "web", "--max-downtime", "1min"]);
    assert!(!bed.lives(Host::A, &pid));
    let id = ["restore", "web"];
    bed.ok(Host::B, &[&["criu-imagectl"][..], &cache, &id].concat());
    assert_eq!(bed.ask(Host::B, "web", &pid).checksum, before.checksum);
    assert_eq!(bed.ctl(Host::B, &[&cache[..], &["list"]].concat())[0]["state"], "taken");

    // A user of host A cannot get at the tunnel's end.
    let connect = "import socket
socket.socket(socket.AF_UNIX).connect('/run/criu-image-tunnel/rack7.sock')";
    let user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"];
    let tried = bed.run(Host::A, &[&user[..], &["python3", "-c", connect]].concat());
    assert!(String::from_utf8_lossy(&tried.stderr).contains("PermissionError"), "{tried:?}");

    // The tunnel's user is one that the cache was told of.
    bed.ok(
        Host::B,
        &[
            "sed",
            "-i",
            "s/^allow-uids = .*/allow-uids = []/",
            "/etc/criu-image-relay/cache@rack7.toml",
        ],
    );
    bed.ok(Host::B, &["systemctl", "restart", "criu-image-cache@rack7"]);
    let put = ["criu-imagectl", "put", "--list", "--finish", "job", "/etc/hostname"];
    let refused = String::from_utf8(bed.run(Host::A, &put).stderr).unwrap();
    assert!(refused.contains("is not in allow-uids"), "{refused}");
}

#[test]
fn the_socket_of_a_link_is_not_for_everybody_on_the_machine() {
    let bed = Bed::up();
    bed.ok(
        Host::B,
        &["cp", "/etc/criu-image-relay/cache.toml", "/etc/criu-image-relay/cache@rack7.toml"],
    );
    start(&bed, Host::B, &["link"]);
    let connect = "import socket, sys
link = socket.socket(socket.AF_UNIX)
link.settimeout(5)
link.connect('/run/criu-image/cache@rack7/link.sock')
print(link.makefile('rb').read())";
    let stranger = |group: &str| {
        let user = [
            "setpriv",
            "--reuid=65534",
            "--regid",
            group,
            "--clear-groups",
            "python3",
            "-c",
            connect,
        ];
        bed.run(Host::B, &user)
    };
    assert!(!stranger("65534").status.success());
    let told = stranger("criu-image").stdout;
    assert!(String::from_utf8_lossy(&told).contains("its uid, 65534, is not in allow-uids"));
    wait_until("the refusal is in the journal", || {
        let refused = bed.journal(Host::B, &["-u", "criu-image-cache@rack7", "PRIORITY=4"]);
        let told = |entry: &serde_json::Value| {
            let message = entry["MESSAGE"].as_str().unwrap();
            message.contains(
                "a link from unix socket is refused: its uid, 65534, is not in allow-uids",
            )
        };
        refused.iter().any(told)
    });
}

#[test]
fn an_instance_without_configuration_says_so() {
    let bed = Bed::up();
    for host in BOTH {
        start(&bed, host, &["stream", "control"]);
        let asked = bed.run(host, &["criu-imagectl", "--instance", "rack7", "status"]);
        assert_eq!(asked.status.code(), Some(3), "{asked:?}");
        let unit = format!("{}@rack7.service", host.daemon());
        let words = format!("it cannot start, or stands still: journalctl -u {unit} says why");
        assert!(String::from_utf8_lossy(&asked.stderr).contains(&words), "{asked:?}");
        wait_until("the journal says why", || {
            let journal = bed.ok(host, &["journalctl", "-u", &unit, "-o", "cat"]);
            let file = format!("{}@rack7.toml", &host.daemon()["criu-image-".len()..]);
            journal.contains(&format!("/etc/criu-image-relay/{file}: no such file"))
        });
        let status = ["systemctl", "show", "-P", "ExecMainStatus", &unit];
        assert_eq!(bed.ok(host, &status), "78\n");
    }
    let gone = bed.run(Host::A, &["criu-imagectl", "--instance", "other", "status"]);
    let said = String::from_utf8(gone.stderr).unwrap();
    assert_eq!(gone.status.code(), Some(3), "{said}");
    assert!(said.contains("systemctl start criu-image-proxy-control@other.socket"), "{said}");
}
