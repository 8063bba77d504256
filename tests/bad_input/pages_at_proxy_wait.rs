//! Rounds that have to wait for something, and what ends them when it does not come.

use criu_image_relay::criu::page_server::command::Command;
use criu_image_relay::criu::page_server::header::Dialect;

use crate::daemons::eventually;
use crate::hosts::Hosts;
use crate::page_client::{HELD, PageClient};
use crate::pages_at_proxy::{PAGE, TASK, assert_left, round};

/// What a client does after it has opened a space, and before it does nothing.
type Stall = fn(&mut PageClient);

#[test]
fn a_client_that_stalls_within_a_round_is_given_up() {
    let hosts = Hosts::with(&[("sessions.stall-timeout", "\"300ms\"")], &[]);
    let mut between = round(&hosts, "between");
    let nothing = "nothing came for 300ms";
    let stalled: [(&str, Stall, &str); 3] = [
        ("a", |_| {}, nothing),
        (
            "b",
            |client| client.say(&[4; 10]).unwrap(),
            "the rest of a command did not come within 300ms",
        ),
        (
            "c",
            |client| {
                client.announce(TASK, 0x1000, false, 4).unwrap();
                client.say(&[7; 5000]).unwrap();
            },
            nothing,
        ),
    ];
    for (id, stall, cause) in stalled {
        let mut client = round(&hosts, id);
        assert!(client.open(TASK).unwrap());
        stall(&mut client);
        client.assert_failed();
        hosts.proxy.assert_log(&["WARN", &format!("a round of snapshot {id} failed"), cause]);
        assert_left(&hosts, id);
    }
    let mut silent = PageClient::on(hosts.proxy.open_pages("silent"), Dialect::Long);
    silent.assert_failed();
    // Between two rounds its process runs.
    assert!(between.open(TASK).unwrap());
    assert_eq!(between.close().unwrap(), HELD);
}

#[test]
fn a_round_beyond_the_quota_fails_and_leaves_what_was_held() {
    let quota = [("store.max-bytes", "\"64K\""), ("store.quota-wait", "\"300ms\"")];
    for (pages, cause) in [(12, "were held for 300ms"), (300, "more than store.max-bytes")] {
        let hosts = Hosts::with(&[], &quota);
        round(&hosts, "other");
        let mut client = round(&hosts, "web");
        assert!(client.open(TASK).unwrap());
        // The client may be told before it has sent all.
        let _ = client.pages(TASK, 0x1000, false, &PAGE.repeat(pages));
        let _ = client.command(Command::Close);
        client.assert_failed();
        let log = ["WARN", "a round of snapshot web", "pages of task 7: quota exhausted", cause];
        hosts.cache.assert_log(&log);
        hosts.proxy.assert_log(&log);
        hosts.cache.assert_held(6 * 4096);
        assert_left(&hosts, "web");
    }
}

#[test]
fn a_round_whose_snapshot_is_dropped_fails() {
    let mut hosts = Hosts::start();
    let bystander = hosts.bystander();
    for at_cache in [true, false] {
        let mut client = round(&hosts, "web");
        assert!(client.open(TASK).unwrap());
        client.announce(TASK, 0x1000, false, 4).unwrap();
        client.say(PAGE).unwrap();
        let cause = "it was dropped";
        if at_cache {
            hosts.cache.drop_snapshot("web");
            let _ = client.say(&PAGE.repeat(3));
            let _ = client.command(Command::Close);
        } else {
            hosts.proxy.drop_snapshot("web");
        }
        client.assert_failed();
        hosts.proxy.assert_log(&["WARN", "a round of snapshot web failed", cause]);
        assert!(eventually(|| hosts.cache.show("web").is_none()));
        round(&hosts, "web");
        hosts.cache.drop_snapshot("web");
    }
    hosts.assert_undisturbed(bystander);
}
