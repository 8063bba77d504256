//! What the cache holds is charged to its unit, and what happens where that has a limit. Under systemd, with
//! the units as they are installed.

use serde_json::Value;

use crate::bed::{guest, wait_until};

const MIB: u64 = 1 << 20;

/// Runs a command in the host that has systemd.
#[track_caller]
fn ok(command: &str) -> String {
    guest().ok(&format!("/usr/lib/criu-image-relay-guest/host run {}", quoted(command)))
}

fn quoted(command: &str) -> String {
    format!("'{}'", command.replace('\'', r"'\''"))
}

fn charged(unit: &str) -> u64 {
    ok(&format!("systemctl show -P MemoryCurrent {unit}")).trim().parse().unwrap()
}

fn held() -> u64 {
    let status = ok("criu-imagectl --json --cache status");
    let status: Value = serde_json::from_str(&status).unwrap();
    status[0]["held_bytes"].as_u64().unwrap()
}

fn put(id: &str, mib: u64) {
    ok(&format!(
        "head -c {mib}M /dev/urandom | criu-imagectl put --list --finish --name a.img {id} -"
    ));
}

/// In one test, as they share the host and take turns with its memory.
#[test]
fn what_the_cache_holds_is_charged_to_its_unit_and_a_limit_of_that_kills() {
    guest().ok("/usr/lib/criu-image-relay-guest/host up");
    ok("systemctl start criu-image-cache-{stream,remote,control,link}.socket \
        criu-image-proxy-{stream,remote,control}.socket");
    put("small", 1);
    let (before, proxy_before) = (charged("criu-image-cache"), charged("criu-image-proxy"));
    put("large", 48);
    // And a page for each of the two records that systemd keeps.
    assert_eq!(held(), 49 * MIB + 2 * 4096);
    let cost = charged("criu-image-cache") - before;
    // The kernel's own share is a quarter of a percent; what is on its way is a pipe or two.
    assert!((48 * MIB..50 * MIB).contains(&cost), "{cost}");
    let proxy = charged("criu-image-proxy");
    assert!(proxy < proxy_before + 3 * MIB, "{proxy_before} {proxy}");
    ok("criu-imagectl --cache drop small large");
    wait_until("it is given back", || charged("criu-image-cache") < before);

    // A limit far below the quota, which is half of the guest's memory.
    ok("systemctl set-property criu-image-cache.service MemoryMax=64M");
    let in_force = "cat /sys/fs/cgroup/system.slice/criu-image-cache.service/memory.max";
    assert_eq!(ok(in_force).trim(), (64 * MIB).to_string());
    let pid = ok("systemctl show -P MainPID criu-image-cache");
    put("whole", 32);
    ok("systemd-run --quiet --collect --unit=w -p Type=exec -p StandardInput=null -p StandardOutput=null \
        -p StandardError=null /usr/bin/workload --mib 48 --out /tmp/w.json --seed 7
        until [ -e /tmp/w.json ]; do sleep 0.1; done");
    let process = ok("systemctl show -P MainPID w").trim().to_owned();
    // With the hook: without it CRIU ends the process as soon as the proxy has copied its memory.
    let dump = format!(
        "criu dump --stream -D /run/criu-image/proxy -W /tmp -o dump.log -t {process} \
        --action-script criu-imagectl"
    );
    assert_eq!(ok(&format!("{dump} >&2; echo $?")).trim(), "1");
    // It runs on.
    ok(&format!(
        "rm /tmp/w.json; kill -USR1 {process}; until [ -e /tmp/w.json ]; do sleep 0.1; done"
    ));

    wait_until("the cache is started again", || {
        let now = ok("systemctl show -P MainPID criu-image-cache");
        now != pid
            && now != "0\n"
            && ok("systemctl is-active criu-image-cache || true") == "active\n"
    });
    let journal = ok("journalctl --sync; journalctl -u criu-image-cache -o cat");
    assert!(journal.contains("Failed with result 'oom-kill'"), "{journal}");
    let list: Value = serde_json::from_str(&ok("criu-imagectl --json --cache list")).unwrap();
    let list = list.as_array().unwrap();
    let held: Vec<_> = list.iter().map(|one| (&one["id"], &one["state"])).collect();
    assert_eq!(held, [(&"whole".into(), &"whole".into())], "systemd kept what was whole");
    let list: Value = serde_json::from_str(&ok("criu-imagectl --json --proxy list")).unwrap();
    let newest = list.as_array().unwrap().last().unwrap();
    assert_eq!(newest["state"], "damaged", "{list}");

    // With room it goes well.
    ok("systemctl set-property criu-image-cache.service MemoryMax=infinity");
    ok(&dump);
    assert_eq!(ok(&format!("test -d /proc/{process} || echo gone")).trim(), "gone");
    let id = "criu-imagectl --json --cache list | grep -o 'guest-[0-9-]*' | head -n 1";
    ok(&format!("criu-imagectl --cache wait --timeout 1min $({id})"));
    guest().ok("/usr/lib/criu-image-relay-guest/host down");
}
