//! What CRIU complained of in its log, for people: the cause first, with a word on what it means where it is one
//! that many meet; what is harmless is left out.

use super::print::clean;

/// So many lines are told.
const LINES: usize = 8;

/// Errors and warnings that say nothing about why a run failed.
const HARMLESS: [&str; 2] = [
    // Not even root may raise it in most containers and services.
    "rlimit: Can't setup RLIMIT_NOFILE",
    // The page server is reached by a unix socket.
    "Unable to set TCP_CORK",
];

/// What messages of CRIU mean. Each has all of the first, and none is met in a run that succeeds.
const CAUSES: [(&[&str], &str); 17] = [
    (&["io_uring"], "it uses io_uring, which CRIU cannot dump (node: UV_USE_IO_URING=0)"),
    (
        &["Unknown shit"],
        "it has memory mapped of a kind that CRIU cannot dump; the name is in brackets",
    ),
    (
        &["Can't dump file", "of that type"],
        "it has a file open of a kind that CRIU cannot dump; its name comes last",
    ),
    (
        &["is not a session leader"],
        "it was started by a shell: give criu --shell-job for the dump and the restore",
    ),
    (
        &["Found dangling tty"],
        "it is attached to a terminal: give criu --shell-job for the dump and the restore",
    ),
    (
        &["Connected TCP socket"],
        "it has a TCP connection: give criu --tcp-established for the dump and the restore",
    ),
    (
        &["External socket is used"],
        "it is connected to a unix socket of a process that is not dumped",
    ),
    (
        &["Can't dump half of stream unix connection"],
        "it is connected to a unix socket of a process that is not dumped",
    ),
    (
        &["file locks are hold"],
        "it holds file locks: give criu --file-locks for the dump and the restore",
    ),
    (
        &["Can't dump ghost file"],
        "it has a file open that was removed, and is too big: see criu's --ghost-limit",
    ),
    (
        &["Can't create link remap"],
        "it has a file open whose name was removed: give criu --link-remap, which makes one",
    ),
    (&["FS mnt", "unsupported"], "a file system is mounted in its namespace that CRIU cannot dump"),
    (
        &["Can't fork for", "File exists"],
        "its pid is taken on this host, perhaps by what a failed restore has left",
    ),
    (
        &["Can't open file", "No such file"],
        "this host lacks that file, which the process had open or mapped",
    ),
    (
        &["has bad size"],
        "this host has another file of that name than the one that the process had mapped",
    ),
    (
        &["has bad build-ID"],
        "this host has another file of that name than the one that the process had mapped",
    ),
    (
        &["Unable to mount", "No such device"],
        "this host's kernel lacks a file system that the process had mounted",
    ),
];

/// What is told of a log: its errors, or else its last words.
pub(super) fn told(log: &str) -> Vec<String> {
    let is_harmless = |line: &str| HARMLESS.iter().any(|harmless| line.contains(harmless));
    let lines: Vec<_> = log.lines().map(clean).filter(|line| !line.trim().is_empty()).collect();
    let is_error = |line: &String| {
        line.contains("Error") || line.contains("criu-imagectl") || meaning(line).is_some()
    };
    let lines: Vec<_> = lines.into_iter().filter(|line| !is_harmless(line)).collect();
    let errors: Vec<_> = lines.iter().filter(|line| is_error(line)).cloned().collect();
    if errors.is_empty() {
        return last(lines, LINES);
    }
    // What fails first makes others fail, and what is known is no mere consequence.
    let cause = errors.iter().position(|line| meaning(line).is_some()).unwrap_or(0);
    let mut told = vec![errors[cause].clone()];
    told.extend(meaning(&told[0]).map(|meaning| format!("({meaning})")));
    let others = errors.into_iter().enumerate().filter(|(at, _)| *at != cause);
    told.extend(last(others.map(|(_, line)| line).collect(), LINES - 1));
    told
}

/// What a line means to somebody who does not know CRIU's insides.
fn meaning(line: &str) -> Option<&'static str> {
    let is_that = |(parts, _): &&(&[&str], _)| parts.iter().all(|part| line.contains(part));
    CAUSES.iter().find(is_that).map(|(_, meaning)| *meaning)
}

fn last(mut lines: Vec<String>, count: usize) -> Vec<String> {
    lines.split_off(lines.len().saturating_sub(count))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_told_or_else_the_end() {
        assert!(told("").is_empty());
        assert_eq!(told("usage\n\n"), ["usage"]);
        let log: Vec<_> =
            (0..20).map(|n| format!("({n}) Error (criu/x.c:{n}): no\x1b\nWarn\n")).collect();
        let told = told(&log.concat());
        assert_eq!(told.len(), LINES);
        assert_eq!(
            (told[0].as_str(), told[7].as_str()),
            ("(0) Error (criu/x.c:0): no ", "(19) Error (criu/x.c:19): no ")
        );
    }

    #[test]
    fn what_is_harmless_is_left_out() {
        let harmless = "Error (criu/util.c:1534): rlimit: Can't setup RLIMIT_NOFILE for self: Operation not permitted\n\
                        (00.01) Warn  (criu/page-xfer.c:165): Unable to set TCP_CORK=1: Operation not supported\n";
        let log = format!("{harmless}(00.02) Error (criu/cr-dump.c:2111): Dumping FAILED.\n");
        assert_eq!(told(&log), ["(00.02) Error (criu/cr-dump.c:2111): Dumping FAILED."]);
        assert!(told(harmless).is_empty());
    }

    /// Lines as CRIU 4.1.1 writes them, and a part of what is said of them.
    #[test]
    fn the_cause_comes_first_and_is_explained() {
        for (line, meaning) in [
            (
                "Error (criu/proc_parse.c:502): Unknown shit 600 (anon_inode:[io_uring])",
                "io_uring, which CRIU cannot dump",
            ),
            (
                "Error (criu/proc_parse.c:502): Unknown shit 20600 (/dev/x)",
                "mapped of a kind that CRIU cannot dump",
            ),
            (
                "Error (criu/files-ext.c:98): Can't dump file 7 of that type [600] (unknown anon_inode:[fscontext])",
                "a kind that CRIU cannot dump",
            ),
            (
                "Error (criu/files-ext.c:98): Can't dump file 7 of that type [600] (unknown anon_inode:[io_uring])",
                "io_uring",
            ),
            (
                "Error (criu/pstree.c:304): The root process 7 is not a session leader. Consider using --shell-job option",
                "--shell-job",
            ),
            (
                "Error (criu/tty.c:1830): Found dangling tty with sid 5 pgid 7 (pts) on peer fd 0.",
                "--shell-job",
            ),
            (
                "Error (criu/sk-inet.c:200): inet: Connected TCP socket, consider using --tcp-established option.",
                "--tcp-established",
            ),
            (
                "Error (criu/sk-unix.c:877): unix: External socket is used. Consider using --ext-unix-sk option.",
                "is not dumped",
            ),
            (
                "Error (criu/sk-unix.c:881): unix: Can't dump half of stream unix connection. name: (null); peer name: /x",
                "is not dumped",
            ),
            (
                "Error (criu/file-lock.c:110): Some file locks are hold by dumping tasks! You can try --file-locks to dump them.",
                "--file-locks",
            ),
            (
                "Error (criu/files-reg.c:1031): Can't dump ghost file /tmp/x of 2097152 size, increase limit",
                "--ghost-limit",
            ),
            (
                "Error (criu/files-reg.c:1122): Can't create link remap for /tmp/x. Use link-remap option.",
                "--link-remap",
            ),
            (
                "Error (criu/mount.c:724): mnt: FS mnt /mnt dev 0x2f root / unsupported id 120",
                "a file system",
            ),
            (
                "Error (criu/cr-restore.c:1230): Can't fork for 4711: File exists",
                "its pid is taken",
            ),
            (
                "Error (criu/files-reg.c:2267): Can't open file tmp/hsperfdata_root/7 on restore: No such file or directory",
                "this host lacks that file",
            ),
            (
                "Error (criu/files-reg.c:2175): File usr/bin/x has bad size 10 (expect 12)",
                "another file of that name",
            ),
            (
                "Error (criu/mount.c:2236): mnt: Unable to mount fuse /mnt (id=7): No such device",
                "this host's kernel lacks",
            ),
        ] {
            let log = format!(
                "(00.01) Error (criu/a.c:1): a consequence, or nothing\n(00.02) {line}\n(00.03) Error (criu/cr-dump.c:2111): \
                 Dumping FAILED.\n"
            );
            let told = told(&log);
            assert!(told[0].ends_with(line), "{told:?}");
            assert!(told[1].starts_with('(') && told[1].contains(meaning), "{told:?}");
            assert_eq!(told.len(), 4);
        }
    }

    #[test]
    fn a_cause_is_told_however_much_follows_it() {
        let cause = "(1) Error (criu/cr-restore.c:1230): Can't fork for 7: File exists\n";
        let mut log = vec![cause.to_owned()];
        log.extend((0..50).map(|n| format!("({n}) Error (criu/x.c:{n}): fails for it\n")));
        let told = told(&log.concat());
        assert_eq!(told.len(), LINES + 1);
        assert!(told[0].contains("Can't fork for 7") && told[8].starts_with("(49)"), "{told:?}");
    }
}
