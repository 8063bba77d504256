//! A process moves.

use crate::bed::{BOTH, Bed, Host, finish, wait_until};

/// Everything under the daemons' work-dirs is a socket: no image is ever a file there.
fn assert_no_image_files(bed: &Bed) {
    for host in BOTH {
        let files =
            bed.ok(host, &["find", "/run/criu-image", "!", "-type", "d", "!", "-type", "s"]);
        assert_eq!(files, "");
    }
}

#[test]
fn a_live_process_moves_and_goes_on_counting() {
    let bed = Bed::up();
    let pid = bed.workload(Host::A, "web", 64);
    let before = bed.ask(Host::A, "web", &pid);

    bed.ok(Host::A, &Bed::hooked_dump(&pid, Host::A.work_dir()));
    wait_until("the process is gone", || !bed.lives(Host::A, &pid));
    bed.ok(Host::B, &Bed::restore(Host::B.work_dir()));

    let after = bed.ask(Host::B, "web", &pid);
    assert_eq!((after.pid, &after.checksum), (before.pid, &before.checksum));
    assert!(after.counter >= before.counter);
    wait_until("the counter goes on", || bed.ask(Host::B, "web", &pid).counter > after.counter);
    assert_no_image_files(&bed);
}

#[test]
fn a_restore_started_before_the_dump_waits_and_completes() {
    let bed = Bed::up();
    let pid = bed.workload(Host::A, "web", 16);
    let before = bed.ask(Host::A, "web", &pid);
    let restore = bed.spawn(Host::B, &Bed::restore(Host::B.work_dir()));
    wait_until("the restore waits at the cache", || {
        bed.ctl(Host::B, &["status"])[0]["sessions"] == 1
    });
    bed.ok(Host::A, &Bed::hooked_dump(&pid, Host::A.work_dir()));
    finish(restore);
    assert_eq!(bed.ask(Host::B, "web", &pid).checksum, before.checksum);
}

#[test]
fn two_dumps_at_once_share_the_sockets_and_two_restores_get_one_each() {
    let bed = Bed::up();
    let workloads = [("one", 24), ("two", 40)].map(|(name, mib)| {
        let pid = bed.workload(Host::A, name, mib);
        let report = bed.ask(Host::A, name, &pid);
        (name, pid, report)
    });
    let dumps = workloads.each_ref().map(|(name, pid, _)| {
        bed.ok(Host::A, &["mkdir", "-p", &format!("/tmp/{name}")]);
        let mut dump = Bed::hooked_dump(pid, Host::A.work_dir()).map(str::to_owned);
        dump[6] = format!("/tmp/{name}");
        bed.spawn(Host::A, &dump)
    });
    for dump in dumps {
        drop(finish(dump));
    }
    let restores = workloads.each_ref().map(|(name, _, _)| {
        bed.ok(Host::B, &["mkdir", "-p", &format!("/tmp/{name}")]);
        let mut restore = Bed::restore(Host::B.work_dir()).map(str::to_owned);
        restore[7] = format!("/tmp/{name}");
        bed.spawn(Host::B, &restore)
    });
    for restore in restores {
        drop(finish(restore));
    }
    for (name, pid, before) in &workloads {
        assert_eq!(bed.ask(Host::B, name, pid).checksum, before.checksum, "{name}");
    }
    assert_no_image_files(&bed);
}

#[test]
fn twenty_processes_dumped_at_once_each_from_a_directory_of_its_own() {
    let bed = Bed::up();
    let workloads: Vec<_> = (1..=20)
        .map(|number| {
            let name = format!("job{number}");
            let pid = bed.workload(Host::A, &name, 4 + number);
            let report = bed.ask(Host::A, &name, &pid);
            let dir = format!("/tmp/{name}");
            for host in BOTH {
                bed.ok(host, &["mkdir", "-p", &dir]);
                bed.ok(host, &["criu-imagectl", "open", &dir]);
            }
            (name, pid, dir, report)
        })
        .collect();
    let spawn_dump = |(_, pid, dir, _): &(String, String, String, _)| {
        let mut dump = Bed::hooked_dump(pid, dir);
        dump[6] = dir;
        bed.spawn(Host::A, &dump)
    };
    let dumps: Vec<_> = workloads.iter().map(spawn_dump).collect();
    for dump in dumps {
        drop(finish(dump));
    }
    for (name, pid, dir, before) in &workloads {
        let mut restore = Bed::restore(dir);
        restore[7] = dir;
        bed.ok(Host::B, &restore);
        let after = bed.ask(Host::B, name, pid);
        assert_eq!((after.pid, &after.checksum), (before.pid, &before.checksum), "{name}");
    }
    let list = bed.list(Host::B);
    assert_eq!(list.len(), 20);
    assert!(list.iter().all(|snapshot| snapshot["state"] == "taken"), "{list:?}");
    assert_no_image_files(&bed);
}

#[test]
fn a_process_with_a_network_namespace_of_its_own_moves() {
    let bed = Bed::up();
    // Its images are raw dumps of ip and iptables beside the records, and some CRIU closes unread.
    let unit = ["systemd-run", "--unit=netns", "-p", "Type=exec", "-p", "StandardInput=null"];
    let quiet = ["-p", "StandardOutput=null", "-p", "StandardError=null", "unshare", "--net"];
    let workload = ["workload", "--mib", "8", "--out", "/tmp/workload-netns.json"];
    bed.ok(Host::A, &[&unit[..], &quiet, &workload].concat());
    wait_until("the workload is ready", || {
        bed.run(Host::A, &["test", "-e", "/tmp/workload-netns.json"]).status.success()
    });
    let pid = bed.ok(Host::A, &["systemctl", "show", "-P", "MainPID", "netns"]).trim().to_owned();
    let before = bed.ask(Host::A, "netns", &pid);
    bed.ok(Host::A, &Bed::hooked_dump(&pid, Host::A.work_dir()));
    let images = bed.ctl(Host::B, &["show", bed.list(Host::B)[0]["id"].as_str().unwrap()]);
    assert!(images.to_string().contains("route-"), "{images}");
    bed.ok(Host::B, &Bed::restore(Host::B.work_dir()));
    assert_eq!(bed.ask(Host::B, "netns", &pid).checksum, before.checksum);
}
