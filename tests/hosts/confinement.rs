//! How far the services are confined. That they do their job under it is what every other test here shows.

use crate::bed::{BOTH, Bed};
use crate::handbook::verified;

/// The exposure that `systemd-analyze security` may find, in tenths.
const EXPOSURE: [(&str, &str); 2] = [("criu-image-proxy", "15"), ("criu-image-cache", "10")];

#[test]
fn systemd_finds_nothing_to_complain_about() {
    let bed = Bed::up();
    for host in BOTH {
        verified(&bed, host);
        for (daemon, limit) in EXPOSURE {
            for service in [format!("{daemon}.service"), format!("{daemon}@rack7.service")] {
                let threshold = format!("--threshold={limit}");
                bed.ok(host, &["systemd-analyze", "security", "--no-pager", &threshold, &service]);
            }
        }
    }
}

#[test]
fn a_daemon_has_no_privilege_and_starts_no_program() {
    let bed = Bed::up();
    for host in BOTH {
        bed.ok(host, &["systemctl", "start", host.daemon()]);
        let pid = bed.daemon_pid(host);
        let status = bed.ok(host, &["cat", &format!("/proc/{pid}/status")]);
        let field = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(&format!("{name}:"))).unwrap();
            line.split_whitespace().last().unwrap().to_owned()
        };
        for capabilities in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(field(capabilities), "0".repeat(16), "{capabilities}");
        }
        assert_eq!((field("NoNewPrivs"), field("Seccomp")), ("1".to_owned(), "2".to_owned()));

        // With its eyes.
        let seen = |command: &[&str]| {
            let enter = ["nsenter", "--target", &pid, "--mount", "--wdns=/"];
            bed.run(host, &[&enter[..], command].concat())
        };
        let binary = format!("/usr/bin/{}", host.daemon());
        assert!(seen(&[&binary, "--version"]).status.success());
        let shell = seen(&["/usr/bin/sh", "-c", "true"]);
        assert!(String::from_utf8_lossy(&shell.stderr).contains("Permission denied"), "{shell:?}");
    }
}
