//! `criu-imagectl status --watch`.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use criu_image_relay::daemon::CONTROL_SOCKET;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::criu::{Criu, RECORDS};
use crate::daemons::{Daemon, SOON};
use crate::hosts::Hosts;

const CTL: &str = env!("CARGO_BIN_EXE_criu-imagectl");

fn watch(dir: &Path, arguments: &[&str]) -> Command {
    let mut ctl = Command::new(CTL);
    ctl.arg("--socket").arg(dir.join(CONTROL_SOCKET)).args(["status", "--watch"]).args(arguments);
    ctl.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    ctl
}

fn signal(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).unwrap();
}

#[test]
fn each_line_is_a_document_until_it_is_interrupted() {
    let hosts = Hosts::start();
    for end in [Signal::INT, Signal::TERM] {
        let mut ctl = watch(hosts.cache.dir(), &["200ms", "--json"]).spawn().unwrap();
        let mut lines = BufReader::new(ctl.stdout.take().unwrap()).lines();
        let mut next =
            || -> Value { serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap() };
        let first = next();
        assert_eq!((&first[0]["role"], &first[0]["whole"]), (&"cache".into(), &0.into()));
        let mut dump = Criu::in_dir_of("web", &hosts.proxy);
        dump.write("core-7.img", RECORDS);
        dump.complete();
        let deadline = Instant::now() + SOON;
        while next()[0]["whole"] != 1 {
            assert!(Instant::now() < deadline, "it is not seen");
        }
        signal(&ctl, end);
        assert_eq!(ctl.wait().unwrap().code(), Some(0));
        hosts.cache.drop_snapshot("web");
    }
}

#[test]
fn it_looks_as_often_as_it_is_told() {
    let hosts = Hosts::start();
    let begun = Instant::now();
    let mut ctl = watch(hosts.cache.dir(), &["0.3", "--json"]).spawn().unwrap();
    let lines = BufReader::new(ctl.stdout.take().unwrap()).lines();
    assert_eq!(lines.take(4).filter_map(Result::ok).count(), 4);
    assert!(begun.elapsed() >= Duration::from_millis(900));
    // Nobody reads any more.
    assert_eq!(ctl.wait().unwrap().code(), Some(0));
}

#[test]
fn a_daemon_that_goes_and_comes_is_waited_for_and_one_that_is_not_there_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let output = watch(dir.path(), &["200ms"]).output().unwrap();
    assert_eq!(output.status.code(), Some(3));

    let (cache, _) = Daemon::cache(&[]);
    let mut ctl = watch(cache.dir(), &["200ms", "--json"]).spawn().unwrap();
    let mut lines = BufReader::new(ctl.stdout.take().unwrap()).lines();
    let mut next = || -> Value { serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap() };
    assert_eq!(next()[0]["role"], "cache");
    cache.stop();
    let deadline = Instant::now() + SOON;
    while next() != Value::Array(Vec::new()) {
        assert!(Instant::now() < deadline, "its end is not seen");
    }
    signal(&ctl, Signal::INT);
    assert_eq!(ctl.wait().unwrap().code(), Some(0));
    let mut said = String::new();
    ctl.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert!(said.contains("cannot be reached"), "{said}");
}

#[test]
fn on_a_terminal_it_is_drawn_over_and_ctrl_c_ends_it() {
    let hosts = Hosts::start();
    let socket = hosts.cache.dir().join(CONTROL_SOCKET);
    let command = format!("exec {CTL} --socket {} status --watch 200ms", socket.display());
    // script(1) gives it a terminal, and says the exit status: of the shell, which Ctrl-C would end as well.
    let mut script = Command::new("script")
        .args(["--quiet", "--return", "--command", &command, "/dev/null"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut drawn = String::new();
    let mut stdout = script.stdout.take().unwrap();
    let deadline = Instant::now() + SOON;
    while drawn.matches("criu-image-cache").count() < 3 {
        assert!(Instant::now() < deadline, "{drawn:?}");
        let mut room = [0; 4096];
        let len = stdout.read(&mut room).unwrap();
        assert!(len > 0, "{drawn:?}");
        drawn.push_str(std::str::from_utf8(&room[..len]).unwrap());
    }
    script.stdin.take().unwrap().write_all(b"\x03").unwrap();
    assert_eq!(script.wait().unwrap().code(), Some(0));
    let pictures: Vec<_> = drawn.split("\x1b[H").collect();
    assert!(pictures.len() >= 4, "{drawn:?}");
    for picture in &pictures[1..3] {
        assert!(picture.contains("snapshots  0 receiving, 0 whole"), "{picture:?}");
    }
}

#[test]
fn an_interval_that_is_none_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    for wrong in ["0", "10ms", "soon", "-1"] {
        let output = watch(dir.path(), &[wrong]).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{wrong}");
    }
}
