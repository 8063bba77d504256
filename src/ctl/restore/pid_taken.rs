//! A restore that fails because a pid is not free: who has it.

use std::fmt;
use std::fs;
use std::path::Path;

use crate::ctl::print::clean;

/// A pid that CRIU wanted, and who has it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct PidTaken {
    pub(super) pid: u32,
    /// `None` if there is no such process, as this command sees it.
    holder: Option<Holder>,
}

#[derive(Debug, PartialEq, Eq)]
struct Holder {
    /// Its command line, or its name.
    command: String,
    parent: u32,
    /// As proc(5) has it.
    state: String,
    /// Whether it is what a CRIU has left behind that was killed while it restored.
    remnant: bool,
}

impl PidTaken {
    /// Finds in CRIU's log that a pid was not free, and who has it.
    pub(super) fn find(log: &str) -> Option<PidTaken> {
        let pid = wanted_pid(log)?;
        Some(PidTaken { pid, holder: Holder::look(&Path::new("/proc").join(pid.to_string())) })
    }

    /// What to do about it, before the restore is tried once more.
    pub(super) fn cure(&self) -> String {
        let PidTaken { pid, holder } = self;
        match holder {
            Some(Holder { remnant: true, .. }) => format!("kill -9 {pid}"),
            Some(_) => format!(
                "look what it is: ps -fp {pid}. If it is what was to be restored, it runs already. If not, end it or wait for its end"
            ),
            None => "look for it where CRIU restores, in another pid namespace".to_owned(),
        }
    }
}

impl fmt::Display for PidTaken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pid {} is not free", self.pid)?;
        let Some(Holder { command, parent, state, remnant }) = &self.holder else { return Ok(()) };
        write!(f, ": {command} has it (state {state}, parent {parent})")?;
        if *remnant {
            write!(
                f,
                ", which is left of a restore that was killed: it waits in CRIU's code, and never runs"
            )?;
        }
        Ok(())
    }
}

impl Holder {
    /// Looks at a process in its directory of /proc.
    fn look(dir: &Path) -> Option<Holder> {
        let status = fs::read_to_string(dir.join("status")).ok()?;
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.map_or("", str::trim)
        };
        let line = fs::read(dir.join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        let command = if line.trim().is_empty() { field("Name") } else { line.trim() };
        let program = fs::read_link(dir.join("exe")).unwrap_or_default();
        let read = |name| fs::read_to_string(dir.join(name)).unwrap_or_default();
        // Before CRIU has given it its own program, or after that and before it was let go.
        let remnant = program.file_name().is_some_and(|name| name == "criu")
            || is_in_restorer(&read("syscall"), &read("maps"));
        Some(Holder {
            command: clean(command),
            parent: field("PPid").parse().unwrap_or(0),
            state: field("State").to_owned(),
            remnant,
        })
    }
}

/// The pid for which CRIU's log says that it is not free.
fn wanted_pid(log: &str) -> Option<u32> {
    let (_, rest) = log.rsplit_once("Can't fork for ")?;
    let (pid, why) = rest.split_once(':')?;
    why.trim_start().starts_with("File exists").then(|| pid.trim().parse().ok())?
}

/// Whether a process waits in a system call of CRIU's restorer: that is code in memory of no file, which may also be
/// written to. `syscall` and `maps` are files of its directory in /proc.
fn is_in_restorer(syscall: &str, maps: &str) -> bool {
    let Some(at) = syscall.split_whitespace().last().and_then(hex) else { return false };
    maps.lines().any(|line| {
        let mut words = line.split_whitespace();
        let range = words.next().and_then(|range| range.split_once('-'));
        let Some((begin, end)) = range.and_then(|(begin, end)| Some((hex(begin)?, hex(end)?)))
        else {
            return false;
        };
        let writable_code = words.next().is_some_and(|flags| flags.starts_with("rwx"));
        // After its offset and its device: the inode and the file.
        let of_no_file = words.nth(2) == Some("0");
        (begin..end).contains(&at) && writable_code && of_no_file
    })
}

fn hex(text: &str) -> Option<u64> {
    u64::from_str_radix(text.trim_start_matches("0x"), 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "Error (criu/util.c:1533): rlimit: Can't setup RLIMIT_NOFILE for self: Operation not permitted\n\
                       Error (criu/cr-restore.c:1230): Can't fork for 4711: File exists\n\
                       Error (criu/cr-restore.c:2320): Restoring FAILED.\n";

    #[test]
    fn the_pid_that_is_not_free_is_in_crius_log() {
        assert_eq!(wanted_pid(LOG), Some(4711));
        assert_eq!(wanted_pid("Can't fork for 4711: Cannot allocate memory"), None);
        assert_eq!(wanted_pid("Restoring FAILED."), None);
    }

    #[test]
    fn what_waits_in_crius_restorer_is_told_from_what_runs() {
        let maps = "00010000-0001d000 rwxp 00000000 00:00 0 \n\
                    0001d000-0002a000 rw-p 00000000 00:00 0 \n\
                    7f0000000000-7f0000001000 r-xp 00000000 08:01 77 /usr/lib/libc.so.6\n";
        let waits_at = |pc: &str| format!("202 0x2d010 0x0 0x4 0x0 0x0 0x0 0x24ec8 {pc}\n");
        assert!(is_in_restorer(&waits_at("0x18269"), maps));
        for pc in ["0x1d000", "0x7f0000000010", "0x9", "x"] {
            assert!(!is_in_restorer(&waits_at(pc), maps), "{pc}");
        }
        assert!(!is_in_restorer("running\n", maps));
        assert!(!is_in_restorer("", ""));
    }

    #[test]
    fn who_has_a_pid_is_named_with_what_to_do() {
        let own = std::process::id();
        let log = LOG.replace("4711", &own.to_string());
        let taken = PidTaken::find(&log).unwrap();
        let told = taken.to_string();
        assert!(told.starts_with(&format!("pid {own} is not free: ")), "{told}");
        assert!(!told.contains("left of a restore") && taken.cure().contains("ps -fp"), "{told}");

        let mut remnant = taken;
        remnant.holder.as_mut().unwrap().remnant = true;
        assert!(remnant.to_string().contains("left of a restore that was killed"));
        assert_eq!(remnant.cure(), format!("kill -9 {own}"));
        let nobody = PidTaken { pid: 4711, holder: None };
        assert_eq!(nobody.to_string(), "pid 4711 is not free");
    }
}
