//! The first steps, as they are written: every line of the `console` blocks of the README and of
//! `docs/getting-started.md` is run on two fresh hosts, on the one whose prompt it has.

use crate::bed::{BOTH, Bed, Host, wait_until};
use crate::built::{package, repository};

/// The commands of a page, each with the host that it is for: the lines of its `console` blocks that
/// have a prompt. One that ends with a backslash goes on in the next line.
fn commands(page: &str) -> Vec<(Host, String)> {
    let text = std::fs::read_to_string(repository().join(page)).unwrap();
    let mut commands = Vec::new();
    for block in text.split("\n```console\n").skip(1) {
        let block = block.split("\n```").next().unwrap().replace("\\\n", "");
        for line in block.lines() {
            match line.split_once("# ") {
                Some(("host-a", command)) => commands.push((Host::A, command.to_owned())),
                Some(("host-b", command)) => commands.push((Host::B, command.to_owned())),
                _ => assert!(!line.starts_with("host-"), "{page}: what host is that? {line}"),
            }
        }
    }
    commands
}

/// Runs the commands of a page on fresh hosts, each in a shell of root's, in its home. None may wait for
/// long.
fn follow(page: &str) -> Bed {
    let bed = Bed::bare(None);
    for host in BOTH {
        bed.copy(host, package(), "/root/");
    }
    for (host, command) in commands(page) {
        eprintln!("{page}: {host:?}# {command}");
        let shell = ["timeout", "2m", "bash", "-c", "cd && eval \"$1\"", "-"];
        let said = bed.ok(host, &[&shell[..], &[command.as_str()]].concat());
        eprint!("{said}");
    }
    bed
}

/// The only process that counts into the file, on the host where it has to be.
fn assert_counts_on_b_only(bed: &Bed, file: &str) {
    let pids = |host| {
        let found = bed.run(host, &["pgrep", "-f", &format!("sh -c .*{file}")]);
        String::from_utf8(found.stdout).unwrap().lines().count()
    };
    assert_eq!((pids(Host::A), pids(Host::B)), (0, 1), "{file}");
    let count = || bed.ok(Host::B, &["cat", file]).trim().parse::<u64>().unwrap_or(0);
    let now = count();
    wait_until("the counter goes on", || count() > now);
}

#[test]
fn the_readme_moves_a_process_on_fresh_hosts() {
    let bed = follow("README.md");
    assert_counts_on_b_only(&bed, "/run/counter");
}

#[test]
fn the_chapter_moves_processes_on_fresh_hosts() {
    let bed = follow("docs/getting-started.md");
    assert_counts_on_b_only(&bed, "/run/counter");
    assert_counts_on_b_only(&bed, "/run/another");
}

#[test]
fn both_pages_install_configure_and_migrate() {
    for page in ["README.md", "docs/getting-started.md"] {
        let commands = commands(page);
        for host in BOTH {
            let has = |word| commands.iter().any(|(on, line)| *on == host && line.contains(word));
            assert!(has("apt install ./criu-image-relay_*.deb"), "{page}: {host:?}");
            assert!(has("/etc/criu-image-relay/"), "{page}: {host:?}");
            assert!(has("systemctl enable --now"), "{page}: {host:?}");
        }
        assert!(commands.iter().any(|(_, line)| line.starts_with("criu-imagectl migrate")));
    }
}
