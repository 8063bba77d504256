//! Lists of ids that are torn or hold what is none. What was appended before stays.

use criu_image_relay::criu::remote::{ENTRY_MAX, encode_id, encode_ids};
use rustix::io::Errno;

use crate::criu::{Criu, RECORDS};
use crate::daemons::Daemon;
use crate::hosts::Hosts;
use crate::remote::{Remote, Stage, append_to, whole, write_of};

/// Appends a good id, and then what is none.
#[track_caller]
fn assert_bad_entry(proxy: &Daemon, list: &str, said: &[u8], errno: Errno, cause: &str) {
    let mut client = Remote::at_proxy(proxy);
    client.ask(&append_to(list));
    client.assert_done();
    client.say(&encode_id(&format!("good-{list}")));
    client.say(said);
    client.shut();
    client.assert_refused(errno, &[cause]);
    client.assert_closed();
    proxy.assert_log(&["a client", &Criu::peer(), cause]);
    let good = encode_id(&format!("good-{list}"));
    assert_eq!(Remote::at_proxy(proxy).read(list, "parent").unwrap(), good);
}

#[test]
fn entries_that_are_none_end_the_append_and_what_came_before_stays() {
    let stage = Stage::set();
    let proxy = &stage.hosts.proxy;
    let over = u32::try_from(ENTRY_MAX + 1).unwrap().to_le_bytes();
    let long = encode_id(&"n".repeat(4097));
    let refused = [
        (&over[..], "a message of 8193 bytes; at most 8192 are accepted"),
        (&[0xff; 4], "a message of 4294967295 bytes"),
        (b"\x03\0\0\0\xff\xff\xff", "not a protobuf snapshot_id_entry"),
        (b"\0\0\0\0", "a bad snapshot id \"\": it is empty"),
        (b"\x03\0\0\0\x0a\x01\x0a", "a NUL or another control character"),
        (&long, "it is longer than 4096 bytes"),
    ];
    for (index, (said, cause)) in refused.into_iter().enumerate() {
        assert_bad_entry(proxy, &format!("bad-{index}"), said, Errno::INVAL, cause);
    }
    let torn = encode_id("torn");
    for cut in 1..torn.len() {
        let cause = "the socket was closed in the middle of a request";
        assert_bad_entry(proxy, &format!("cut-{cut}"), &torn[..cut], Errno::INVAL, cause);
    }
    assert_eq!(proxy.show("torn"), None);
    stage.assert_undisturbed();
}

#[test]
fn a_list_that_nobody_goes_on_with_is_given_up() {
    let hosts = Hosts::with(&[("sessions.stall-timeout", "\"300ms\"")], &[]);
    let mut client = Remote::at_proxy(&hosts.proxy);
    client.ask(&append_to("chain"));
    client.assert_done();
    let reply = client.reply();
    assert!(reply.reason.contains("did not come within 300ms"), "{reply:?}");
    client.assert_closed();
    whole(&hosts.proxy, "fresh", "core-7.img", RECORDS);
}

#[test]
fn more_ids_than_the_lists_may_hold_damage_the_snapshot_that_is_too_many() {
    let stage = Stage::with(&[], &[("store.max-snapshots", "3")]);
    let proxy = &stage.hosts.proxy;
    // One snapshot may stand in more lists than one, but not in any number of them.
    for list in ["a", "b", "c"] {
        let mut client = Remote::at_proxy(proxy);
        client.ask(&append_to(list));
        client.say(&encode_id("web"));
        client.shut();
        client.assert_done();
        client.assert_done();
    }
    let mut client = Remote::at_proxy(proxy);
    client.ask(&append_to("d"));
    client.say(&encode_id("web"));
    client.assert_done();
    let cause = "the lists of ids hold 3 already, the store's limit (store.max-snapshots)";
    client.assert_refused(Errno::IO, &[cause]);
    stage.assert_damaged("web", cause);
    // With the bystander there is room for one more snapshot.
    for (id, cause) in [("one", None), ("two", Some("the store lists 3 snapshots, its limit"))] {
        let mut writer = Remote::at_proxy(proxy);
        writer.ask(&write_of(id, "core-7.img"));
        match cause {
            None => {
                writer.assert_done();
                writer.shut();
                writer.assert_done();
            }
            Some(cause) => writer.assert_refused(Errno::IO, &[cause]),
        }
    }
    stage.hosts.cache.drop_snapshot("web");
    stage.assert_undisturbed();
}

/// More snapshots than a link may have under way: those that are too many are refused, the link and
/// what else is on it go on.
#[test]
fn more_ids_than_a_link_may_carry_break_no_link() {
    let stage = Stage::with(&[], &[("store.max-snapshots", "20000")]);
    let ids: Vec<_> = (0..5000).map(|id| id.to_string()).collect();
    let mut client = Remote::at_proxy(&stage.hosts.proxy);
    client.say(b"\x12\0\0\0\x0a\x06parent\x12\x05chain\x18\x80\x08");
    client.try_say(&encode_ids(&ids));
    client.shut();
    client.assert_closed();
    let refused = "1024 snapshots are under way, and none has ended";
    stage.hosts.proxy.assert_log(&["a client", refused]);
    assert_eq!(stage.hosts.proxy.count_log("lost with"), 0);
    stage.assert_undisturbed();
}
