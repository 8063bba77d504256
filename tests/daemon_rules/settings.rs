//! Options and the configuration say the same things; options win.

use std::fs;

use rustix::process::Signal;

use crate::run::{CACHE, PROXY, Way, command, eventually, read_pid, start};

/// What `--check-config` prints with these settings and options.
fn printed(binary: &str, settings: &str, options: &[&str]) -> toml::Table {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("config.toml");
    fs::write(&config, settings).unwrap();
    let mut command = std::process::Command::new(binary);
    command.current_dir("/tmp").arg("--check-config").arg("-c").arg(config).args(options);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap().parse().unwrap()
}

#[test]
fn what_is_in_force_is_printed() {
    let settings =
        "work-dir = \"/a\"\npidfile = \"/a/pid\"\n[log]\nlevel = \"warn\"\nfile = \"/a/log\"\n";
    for (binary, address) in [(PROXY, "cache"), (CACHE, "listen")] {
        let of_file = printed(binary, settings, &[]);
        assert_eq!(of_file[address].as_str(), Some("127.0.0.1:9996"));
        assert_eq!(of_file["daemon"].as_bool(), Some(false));
        assert_eq!(of_file["pidfile"].as_str(), Some("/a/pid"));
        assert_eq!(of_file["log"]["file"].as_str(), Some("/a/log"));

        let options = ["-d", "-W", "b", "--pidfile", "b/pid", "-o", "b/log", "-v"];
        let both = printed(binary, settings, &options);
        assert_eq!(both["daemon"].as_bool(), Some(true));
        assert_eq!(both["work-dir"].as_str(), Some("/tmp/b"));
        assert_eq!(both["pidfile"].as_str(), Some("/tmp/b/pid"));
        assert_eq!(both["log"]["file"].as_str(), Some("/tmp/b/log"));
        assert_eq!(both["log"]["level"].as_str(), Some("debug"));

        for (options, expected) in [
            (&["--address", "::1"][..], "[::1]:7"),
            (&["--address", "[::1]", "--port", "8"], "[::1]:8"),
            (&["--port", "8"], "host-a:8"),
            (&["--address", "192.0.2.7"], "192.0.2.7:7"),
        ] {
            let merged = printed(binary, &format!("{address} = \"host-a:7\""), options);
            assert_eq!(merged[address].as_str(), Some(expected));
        }
    }
}

#[test]
fn the_configuration_alone_will_do() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path();
    let shown = path.display();
    let settings = format!(
        "daemon = true\npidfile = \"{shown}/pid\"\nlog.file = \"{shown}/log\"\npages.listen = \"\"\n"
    );
    fs::write(path.join("config.toml"), settings).unwrap();
    let (status, said) = crate::run::output(&mut command(PROXY, path), &[]);
    assert_eq!((status, said.as_str()), (0, ""));
    let pid = read_pid(path).unwrap();
    assert!(fs::read_to_string(path.join("log")).unwrap().contains(" serves"));
    rustix::process::kill_process(pid, Signal::TERM).unwrap();
    assert!(eventually(|| !path.join("pid").exists()));
}

#[test]
fn sighup_opens_the_log_anew_and_keeps_the_options() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path();
    let log = path.join("log");
    fs::write(path.join("config.toml"), "log.level = \"error\"\npages.listen = \"\"\n").unwrap();
    for way in [Way::Foreground, Way::Daemon] {
        let daemon = start(way, command(CACHE, path).arg("-v"), path).unwrap();
        fs::rename(&log, path.join("log.1")).unwrap();
        daemon.signal(Signal::HUP);
        // Without -v this would not be told.
        let told =
            || fs::read_to_string(&log).is_ok_and(|log| log.contains("configuration reloaded"));
        assert!(eventually(told), "{way:?}");
        assert!(fs::read_to_string(path.join("log.1")).unwrap().contains(" serves"));
        daemon.signal(Signal::TERM);
        assert!(eventually(|| !path.join("pid").exists()));
        fs::remove_file(&log).unwrap();
    }
}

#[test]
fn a_log_that_cannot_be_opened_anew_is_told_in_the_one_that_is_open() {
    let dir = tempfile::tempdir().unwrap();
    let (path, log) = (dir.path(), dir.path().join("log"));
    fs::write(path.join("config.toml"), "pages.listen = \"\"\n").unwrap();
    let daemon = start(Way::Daemon, &mut command(CACHE, path), path).unwrap();
    fs::rename(&log, path.join("log.1")).unwrap();
    fs::create_dir(&log).unwrap();
    daemon.signal(Signal::HUP);
    let id = criu_image_relay::daemon::journal::LOG_NOT_REOPENED;
    let told = || {
        let log = fs::read_to_string(path.join("log.1")).unwrap();
        log.lines().any(|line| line.contains("ERROR logging goes on") && line.contains(id))
    };
    assert!(eventually(told));
    daemon.signal(Signal::TERM);
    assert!(eventually(|| !path.join("pid").exists()));
}
