//! Blocks of docs/operations.md, done as they are written.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use crate::bed::{Bed, Host};

/// The page's addresses of the hosts, and the bed's.
const ADDRESSES: [(&str, &str); 2] = [("192.0.2.7", "10.77.0.1"), ("192.0.2.8", "10.77.0.2")];

/// The blocks below a heading, each as scripts to be run one after the other.
pub(crate) fn blocks(heading: &str) -> Vec<Vec<(Host, String)>> {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/operations.md");
    let page = fs::read_to_string(page).unwrap();
    let begin = page.find(&format!("\n{heading}\n")).unwrap_or_else(|| panic!("no {heading}"));
    let section = &page[begin + heading.len() + 2..];
    let section = section.split("\n#").next().unwrap();
    let paragraphs = section.split("\n\n").filter(|paragraph| paragraph.starts_with("    host-"));
    paragraphs.map(scripts).collect()
}

/// What a block has done on each host. What follows a `systemctl edit` is what the editor is left with.
fn scripts(block: &str) -> Vec<(Host, String)> {
    let mut scripts: Vec<(Host, String)> = Vec::new();
    let mut editing = false;
    for line in block.trim_end().lines() {
        let mut line = line.strip_prefix("    ").unwrap().to_owned();
        for (page, bed) in ADDRESSES {
            line = line.replace(page, bed);
        }
        let (host, command) = match line.split_once("# ") {
            Some(("host-a", command)) => (Host::A, command),
            Some(("host-b", command)) => (Host::B, command),
            _ => {
                assert!(editing, "{line}");
                writeln!(scripts.last_mut().unwrap().1, "{line}").unwrap();
                continue;
            }
        };
        if editing {
            writeln!(scripts.last_mut().unwrap().1, "END").unwrap();
        }
        if scripts.last().is_none_or(|(last, _)| *last != host) {
            scripts.push((host, "set -e\n".to_owned()));
        }
        let script = &mut scripts.last_mut().unwrap().1;
        editing = command.starts_with("systemctl edit ");
        let stdin = if editing { " --stdin <<'END'" } else { "" };
        writeln!(script, "{command}{stdin}").unwrap();
    }
    assert!(!editing, "a command follows");
    scripts
}

/// Does what stands in a block. The units are well-formed after that.
#[track_caller]
pub(crate) fn done(bed: &Bed, block: &[(Host, String)]) {
    for (host, script) in block {
        bed.ok(*host, &["bash", "-c", script]);
        verified(bed, *host);
    }
}

/// Has systemd look at every unit.
#[track_caller]
pub(crate) fn verified(bed: &Bed, host: Host) {
    let verify = "cd /usr/lib/systemd/system && systemd-analyze verify --man=no criu-image-*.{service,socket}";
    let output = bed.run(host, &["bash", "-c", verify]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && said.is_empty(), "{said}");
}
