//! The package's life on hosts with Debian 13: installed, configured, upgraded, removed, purged.

use std::collections::BTreeSet;

use crate::bed::{BOTH, Bed, Host};
use crate::built::{
    NAME, fresh_hosts, higher_version, install, package, package_passes_its_tests, state,
};

/// The sockets of a host's daemon that its users enable.
fn sockets(host: Host) -> Vec<String> {
    let names = match host {
        Host::A => &["stream", "remote", "pages", "control"][..],
        Host::B => &["link", "stream", "remote", "pages", "control"],
    };
    names.iter().map(|name| format!("{}-{name}.socket", host.daemon())).collect()
}

/// Two hosts on which the package is installed, configured and enabled: what an administrator does.
fn hosts_in_service() -> Bed {
    let bed = fresh_hosts(None);
    for host in BOTH {
        install(&bed, host, package());
    }
    bed.trust();
    for host in BOTH {
        let mut enable = vec!["systemctl".to_owned(), "enable".to_owned(), "--now".to_owned()];
        enable.extend(sockets(host));
        bed.ok(host, &enable);
    }
    bed
}

#[track_caller]
fn migrate(bed: &Bed, name: &str) {
    let pid = bed.workload(Host::A, name, 16);
    let before = bed.ask(Host::A, name, &pid);
    bed.ok(Host::A, &Bed::hooked_dump(&pid, Host::A.work_dir()));
    assert!(!bed.lives(Host::A, &pid));
    bed.ok(Host::B, &Bed::restore(Host::B.work_dir()));
    let after = bed.ask(Host::B, name, &pid);
    assert_eq!((after.pid, &after.checksum), (before.pid, &before.checksum));
    assert!(after.counter >= before.counter);
}

#[track_caller]
fn assert_nothing_failed(bed: &Bed, host: Host) {
    let failed = bed.ok(host, &["systemctl", "list-units", "--failed", "--plain", "--no-legend"]);
    assert_eq!(failed, "");
}

/// Addresses and paths on which somebody listens.
fn listening(bed: &Bed, host: Host) -> String {
    bed.ok(host, &["ss", "--listening", "--tcp", "--udp", "--unix", "--numeric", "--no-header"])
}

/// The package's own units that are loaded in whatever state but inactive.
fn active(bed: &Bed, host: Host) -> String {
    let list = ["systemctl", "list-units", "--plain", "--no-legend", "--state=active,activating"];
    bed.ok(host, &[&list[..], &["criu-image-*"]].concat())
}

#[test]
fn nothing_is_started_enabled_or_opened_by_the_installation() {
    let bed = fresh_hosts(None);
    let before = listening(&bed, Host::B);
    install(&bed, Host::B, package());
    assert_eq!(state(&bed, Host::B), "installed");
    assert_nothing_failed(&bed, Host::B);
    assert_eq!(active(&bed, Host::B), "");
    assert_eq!(listening(&bed, Host::B), before);

    let list = ["systemctl", "list-unit-files", "--plain", "--no-legend", "criu-image-*"];
    let units = bed.ok(Host::B, &list);
    assert!(units.lines().count() >= 12, "{units}");
    for unit in units.lines() {
        let state = unit.split_whitespace().nth(1).unwrap();
        assert!(state == "disabled" || state == "static", "{unit}");
    }
    // What the units need is there.
    bed.ok(Host::B, &["getent", "passwd", "criu-image"]);
    bed.ok(Host::B, &["test", "-d", "/run/criu-image/cache"]);
    bed.ok(Host::B, &["criu-image-cache", "--check-config"]);
}

#[test]
fn one_file_on_each_host_and_enabled_sockets_are_all_that_a_migration_needs() {
    let bed = hosts_in_service();
    migrate(&bed, "web");
    for host in BOTH {
        assert_nothing_failed(&bed, host);
    }
}

#[test]
fn an_upgrade_keeps_the_configuration_and_what_the_cache_holds() {
    let bed = hosts_in_service();
    bed.ok(Host::A, &["criu-imagectl", "put", "--list", "--finish", "kept", "/etc/hostname"]);
    let settings: Vec<_> = BOTH.map(|host| configuration(&bed, host)).into();
    let daemons: Vec<_> = BOTH.map(|host| bed.daemon_pid(host)).into();

    let higher = higher_version();
    for host in BOTH {
        install(&bed, host, &higher.path().join("higher.deb"));
        let version = ["dpkg-query", "--show", "--showformat=${Version}", NAME];
        assert_eq!(bed.ok(host, &version), "99.0-1");
    }
    assert_eq!(BOTH.map(|host| configuration(&bed, host)).as_slice(), settings);
    assert_eq!(BOTH.map(|host| bed.daemon_pid(host)).as_slice(), daemons, "none was restarted");
    assert_eq!(bed.ok(Host::B, &["criu-imagectl", "get", "kept", "hostname"]), "host-a\n");
    migrate(&bed, "before");

    // When it suits; systemd knows the new units already.
    for host in BOTH {
        let reload = ["systemctl", "show", "-P", "NeedDaemonReload", host.daemon()];
        assert_eq!(bed.ok(host, &reload).trim(), "no");
        bed.ok(host, &["systemctl", "restart", host.daemon()]);
        for socket in sockets(host) {
            bed.ok(host, &["systemctl", "is-enabled", &socket]);
        }
    }
    migrate(&bed, "after");
    for host in BOTH {
        assert_nothing_failed(&bed, host);
    }
}

fn configuration(bed: &Bed, host: Host) -> String {
    bed.ok(host, &["sh", "-c", "cd /etc/criu-image-relay && grep -H '' *"])
}

#[test]
fn nothing_is_left_after_a_purge() {
    let bed = fresh_hosts(None);
    let before = all_files(&bed);
    install(&bed, Host::B, package());
    bed.configure(Host::B, "insecure", "true");
    let mut enable = vec!["systemctl".to_owned(), "enable".to_owned(), "--now".to_owned()];
    enable.extend(sockets(Host::B));
    bed.ok(Host::B, &enable);
    bed.ok(Host::B, &["criu-imagectl", "status"]);
    // An instance too, whose configuration is the administrator's own.
    let (plain, own) = ("cache.toml", "cache@rack7.toml");
    let copy = format!("cd /etc/criu-image-relay && cp {plain} {own}");
    bed.ok(Host::B, &["sh", "-c", &copy]);
    let control = "criu-image-cache-control@rack7.socket";
    bed.ok(Host::B, &["systemctl", "enable", "--now", control]);
    bed.ok(Host::B, &["criu-imagectl", "--instance", "rack7", "status"]);
    assert!(active(&bed, Host::B).contains("criu-image-cache@rack7.service"));

    bed.ok(Host::B, &["apt-get", "remove", "-q", "-y", NAME]);
    assert_eq!(state(&bed, Host::B), "config-files");
    assert_eq!(active(&bed, Host::B), "");
    bed.ok(Host::B, &["grep", "^insecure = true", "/etc/criu-image-relay/cache.toml"]);

    bed.ok(Host::B, &["rm", &format!("/etc/criu-image-relay/{own}")]);
    bed.ok(Host::B, &["apt-get", "purge", "-q", "-y", NAME]);
    assert_eq!(state(&bed, Host::B), "");
    assert_nothing_failed(&bed, Host::B);
    assert!(!bed.run(Host::B, &["test", "-e", "/run/criu-image"]).status.success());
    let after = all_files(&bed);
    let left: Vec<_> = after.difference(&before).filter(|path| !is_everybodys(path)).collect();
    let missing: Vec<_> = before.difference(&after).collect();
    assert_eq!((left, missing), (vec![], vec![]));
}

/// Everything on host B's disk; what is in /run and /tmp is in memory.
fn all_files(bed: &Bed) -> BTreeSet<String> {
    let list = bed.ok(Host::B, &["find", "/", "-xdev"]);
    list.lines().map(ToOwned::to_owned).collect()
}

/// What dpkg, apt and systemd write about whatever they do, with any package.
fn is_everybodys(path: &str) -> bool {
    let logs = ["/var/log/", "/var/cache/apt/", "/var/cache/debconf/", "/var/lib/apt/"];
    logs.iter().any(|dir| path.starts_with(dir))
}

#[test]
fn the_packages_own_tests_pass_where_it_is_installed() {
    let bed = fresh_hosts(None);
    install(&bed, Host::A, package());
    package_passes_its_tests(&bed, Host::A);
}
