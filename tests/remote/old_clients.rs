//! CRIU's old `--remote` clients in their two forms, where `remote.historical-endings` is set; and
//! what their endings are where it is not.

use std::time::{Duration, Instant};

use criu_image_relay::control::model::SnapshotState;
use criu_image_relay::criu::images::INVENTORY;
use criu_image_relay::criu::remote::{CACHE_SOCKET, PROXY_SOCKET, Reply, encode_id};
use rustix::io::Errno;

use crate::client::{Connection, append_id, assert_refused, finish, ids, read, write};
use crate::criu::RECORDS;
use crate::daemons::{Daemon, unused_address};
use crate::historical::{APPEND, Form, OldClient, READ, WRITE, another_process, header, hosts};
use crate::hosts::Hosts;

const IDS: [&str; 3] = ["/srv/ckpt/1", "/srv/ckpt/2", "/srv/ckpt/3"];

/// What a run writes: records, more pages than a pipe holds, nothing at all.
fn images(run: u8, inventory: bool) -> Vec<(&'static str, Vec<u8>)> {
    let mut images = vec![
        ("pagemap-7.img", RECORDS.to_vec()),
        ("pages-1.img", vec![run; 300_000 + usize::from(run)]),
        ("tmpfs-dev-52.tar.gz.img", Vec::new()),
    ];
    if inventory {
        images.push((INVENTORY, RECORDS.to_vec()));
    }
    images
}

/// Two pre-dumps, which have no ending, and a dump, which has one.
#[track_caller]
fn dump_all(client: &OldClient<'_>, succeeds: bool) {
    client.dump(IDS[0], None, &images(0, false));
    client.dump(IDS[1], Some(IDS[0]), &images(1, false));
    client.dump(IDS[2], Some(IDS[1]), &images(2, succeeds));
    client.end_dump();
}

#[track_caller]
fn assert_moves(form: Form) {
    let hosts = hosts(form);
    let client = OldClient { form, hosts: &hosts };
    std::thread::scope(|scope| {
        // The restore comes first, and waits.
        let restore = scope.spawn(|| {
            assert_eq!(client.ids_at_cache(), IDS);
            for (run, id) in (0..).zip(IDS) {
                for (name, bytes) in images(run, run == 2) {
                    let read = client.read_at_cache(id, name).unwrap();
                    assert!(read == bytes, "{name} of {id} has changed");
                }
                assert_eq!(client.read_at_cache(id, "cgroup.img").unwrap_err().error, 2);
                hosts.cache.assert_state(id, SnapshotState::Whole);
            }
            assert_eq!(client.end_restore(), Reply::done());
        });
        dump_all(&client, true);
        restore.join().unwrap();
    });
    for id in IDS {
        hosts.cache.assert_state(id, SnapshotState::Taken);
    }
    // The next dump has no parent any more, and may use an id again.
    client.dump(IDS[0], None, &images(0, true));
    client.end_dump();
    assert_eq!(client.ids_at_cache(), [IDS[0]]);
    hosts.cache.assert_state(IDS[0], SnapshotState::Whole);
}

#[test]
fn clients_of_the_patches_move_a_dump_with_its_parents() {
    assert_moves(Form::Patches);
}

#[test]
fn the_last_old_clients_move_a_dump_with_its_parents() {
    assert_moves(Form::Last);
}

/// Old CRIU says the ending after a failed dump, too.
#[track_caller]
fn assert_failure_is_seen(form: Form) {
    let hosts = hosts(form);
    let client = OldClient { form, hosts: &hosts };
    dump_all(&client, false);
    let reason = hosts.cache.assert_state(IDS[2], SnapshotState::Damaged);
    assert!(reason.contains("there is no inventory.img"), "{reason}");
    for name in ["pages-1.img", "cgroup.img"] {
        let refusal = client.read_at_cache(IDS[2], name).unwrap_err();
        assert_refused(&refusal, Errno::IO, "there is no inventory.img");
    }
    // The pre-dumps succeeded; the next dump finds them.
    for id in &IDS[..2] {
        hosts.cache.assert_state(id, SnapshotState::Whole);
    }
    // An ending that comes without a restore having read anything takes nothing.
    assert_eq!(client.end_restore(), Reply::done());
    hosts.cache.assert_state(IDS[0], SnapshotState::Whole);
}

#[test]
fn a_failed_dump_of_the_patches_that_says_its_ending_is_never_served() {
    assert_failure_is_seen(Form::Patches);
}

#[test]
fn a_failed_dump_of_the_last_old_clients_that_says_its_ending_is_never_served() {
    assert_failure_is_seen(Form::Last);
}

/// The rest of a dump that was given up must not look like one.
#[track_caller]
fn assert_unlisted_is_damaged(form: Form) {
    let hosts = hosts(form);
    let client = OldClient { form, hosts: &hosts };
    client.create("unlisted", "pages-1.img").say(b"pages");
    client.create("unlisted", INVENTORY).say(RECORDS);
    client.dump("listed", None, &images(0, true));
    client.end_dump();
    let reason = hosts.cache.assert_state("unlisted", SnapshotState::Damaged);
    assert!(reason.contains("its id was not appended to a list"), "{reason}");
    hosts.cache.assert_state("listed", SnapshotState::Whole);
    let refusal = client.read_at_cache("unlisted", "pages-1.img").unwrap_err();
    assert_refused(&refusal, Errno::IO, "its id was not appended to a list");
    assert_eq!(client.read_at_cache("listed", "pages-1.img").unwrap().len(), 300_000);
}

#[test]
fn what_was_never_listed_is_damaged_at_an_ending_of_the_patches() {
    assert_unlisted_is_damaged(Form::Patches);
}

#[test]
fn what_was_never_listed_is_damaged_at_an_ending_of_the_last_old_clients() {
    assert_unlisted_is_damaged(Form::Last);
}

#[test]
fn old_clients_and_new_ones_read_what_the_others_wrote() {
    let hosts = hosts(Form::Last);
    let client = OldClient { form: Form::Last, hosts: &hosts };
    append_id(&hosts.proxy, "", IDS[0]);
    write(&hosts.proxy, IDS[0], "pagemap-7.img", RECORDS);
    assert_eq!(finish(&hosts.proxy, IDS[0], 1), Reply::done());
    client.dump(IDS[1], Some(IDS[0]), &images(1, true));
    client.end_dump();
    assert_eq!(ids(Connection::to_cache(&hosts.cache), ""), IDS[..2]);
    assert_eq!(client.read_at_cache(IDS[0], "pagemap-7.img").unwrap(), RECORDS);
    let pages = read(Connection::to_cache(&hosts.cache), IDS[1], "pages-1.img").unwrap();
    assert!(pages == vec![1; 300_001]);
}

#[test]
fn where_old_endings_are_not_understood_their_names_are_ordinary() {
    let hosts = Hosts::start();
    write(&hosts.proxy, "web", "pages-1.img", b"pages");
    for (name, mode) in [("DUMP_FINISH", WRITE), ("RESTORE_FINISH", WRITE)] {
        let mut writer = Connection::to_proxy(&hosts.proxy);
        writer.say(&header(name, "null", mode));
        writer.say(name.as_bytes());
    }
    assert_eq!(finish(&hosts.proxy, "null", 2), Reply::done());
    for name in ["DUMP_FINISH", "RESTORE_FINISH"] {
        let mut reader = Connection::to_cache(&hosts.cache);
        reader.say(&header(name, "null", READ));
        assert_eq!(reader.image(false).unwrap(), name.as_bytes());
    }
    // They have ended nothing.
    hosts.cache.assert_state("web", SnapshotState::Receiving);
    hosts.cache.assert_state("null", SnapshotState::Whole);
}

#[test]
fn where_old_endings_are_not_understood_an_empty_name_is_refused() {
    let hosts = Hosts::start();
    write(&hosts.proxy, "web", "pages-1.img", b"pages");
    for (mut connection, mode) in
        [(Connection::to_proxy(&hosts.proxy), WRITE), (Connection::to_cache(&hosts.cache), READ)]
    {
        connection.say(&header("", "", mode));
        let reply = connection.reply();
        assert_refused(&reply, Errno::INVAL, "a bad image name");
        assert_refused(&reply, Errno::INVAL, "remote.historical-endings = true");
        assert_eq!(connection.rest(), b"");
    }
    hosts.cache.assert_state("web", SnapshotState::Receiving);
    assert_eq!(finish(&hosts.proxy, "web", 1), Reply::done());
}

/// The request with which an old client appends its id.
fn appends(id: &str) -> (Vec<u8>, bool) {
    ([header("parent", "null", APPEND), encode_id(id)].concat(), false)
}

/// The request with which it writes an image.
fn writes(id: &str, name: &str) -> (Vec<u8>, bool) {
    ([&header(name, id, WRITE), RECORDS].concat(), false)
}

/// The request with which it reads the list, before its first image.
fn reads_list() -> (Vec<u8>, bool) {
    (header("parent", "null", READ), true)
}

#[test]
fn a_restore_takes_its_own_chain_and_no_other_snapshot() {
    let hosts = hosts(Form::Patches);
    let client = OldClient { form: Form::Patches, hosts: &hosts };
    let [a, b1, b2] = IDS;
    client.dump(a, None, &images(0, true));
    client.end_dump();
    hosts.cache.assert_state(a, SnapshotState::Whole);
    // The end of a dump ends its chain: the next one has no parent.
    client.dump(b1, None, &images(1, false));
    client.dump(b2, Some(b1), &images(2, true));
    client.end_dump();

    // Another restore is under way.
    let inventory = (header(INVENTORY, a, READ), true);
    let replies = another_process(&hosts.cache.dir().join(CACHE_SOCKET), &[inventory]);
    assert_eq!(replies[0].error, 0);
    assert_eq!(client.ids_at_cache(), IDS);
    // It may look at what is in the list before it, as at a parent.
    for (id, name) in [(b2, INVENTORY), (b2, "pagemap-7.img"), (a, "pagemap-7.img")] {
        assert_eq!(client.read_at_cache(id, name).unwrap(), RECORDS);
    }
    assert_eq!(client.end_restore(), Reply::done());
    for id in [b1, b2] {
        hosts.cache.assert_state(id, SnapshotState::Taken);
    }
    hosts.cache.assert_state(a, SnapshotState::Whole);
    assert_eq!(client.ids_at_cache(), [a]);
    assert_eq!(client.read_at_cache(a, INVENTORY).unwrap(), RECORDS);
    assert_eq!(client.end_restore(), Reply::done());
    hosts.cache.assert_state(a, SnapshotState::Taken);
}

#[test]
fn a_dump_that_was_killed_is_nobodys_parent_and_spoils_no_other() {
    let hosts = hosts(Form::Patches);
    let client = OldClient { form: Form::Patches, hosts: &hosts };
    let [killed, next, _] = IDS;
    let dump = [
        appends(killed),
        reads_list(),
        writes(killed, "pagemap-7.img"),
        writes(killed, "core-7.img"),
    ];
    another_process(&hosts.proxy.dir().join(PROXY_SOCKET), &dump);
    hosts.cache.assert_image(killed, "core-7.img", RECORDS.len() as u64);

    client.append_own_id(next);
    assert_eq!(client.ids_at_proxy(), [killed, next]);
    assert_eq!(client.read_at_proxy(killed, "pagemap-7.img").unwrap_err().error, 2);
    for (name, bytes) in images(0, true) {
        client.create(next, name).say(&bytes);
    }
    client.end_dump();
    hosts.cache.assert_state(next, SnapshotState::Whole);
    let reason = hosts.cache.assert_state(killed, SnapshotState::Damaged);
    assert!(reason.contains("has not said the end of its dump"), "{reason}");

    assert_eq!(client.ids_at_cache(), [killed, next]);
    assert_eq!(client.read_at_cache(next, INVENTORY).unwrap(), RECORDS);
    assert_eq!(client.read_at_cache(killed, "pagemap-7.img").unwrap_err().error, 2);
    let own = client.read_at_cache(killed, INVENTORY).unwrap_err();
    assert_refused(&own, Errno::IO, "has not said the end of its dump");
    assert_eq!(client.end_restore(), Reply::done());
    hosts.cache.assert_state(next, SnapshotState::Taken);
}

#[test]
fn a_second_dump_at_once_is_refused_and_its_ending_ends_no_other() {
    let hosts = hosts(Form::Patches);
    let client = OldClient { form: Form::Patches, hosts: &hosts };
    let [first, second, _] = IDS;
    // A new client writes, too.
    write(&hosts.proxy, "web", "pages-1.img", b"pages");
    client.append_own_id(first);
    assert_eq!(client.ids_at_proxy(), [first]);
    client.create(first, "pages-1.img").say(b"pages");

    let ending = (header("DUMP_FINISH", "null", WRITE), false);
    let dump = [appends(second), reads_list(), ending.clone()];
    let replies = another_process(&hosts.proxy.dir().join(PROXY_SOCKET), &dump);
    assert_refused(&replies[0], Errno::BUSY, "the dump of snapshot /srv/ckpt/1 by process");
    hosts.proxy.assert_log(&["/srv/ckpt/1", "give each a pair of daemons of its own"]);
    assert!(hosts.proxy.show(second).is_none(), "a dump that was refused is listed");
    hosts.proxy.assert_state(first, SnapshotState::Receiving);

    // A dump fails, and says its ending: no other is called whole for it.
    client.end_dump();
    let reason = hosts.cache.assert_state(first, SnapshotState::Damaged);
    assert!(reason.contains("there is no inventory.img"), "{reason}");
    hosts.proxy.assert_state("web", SnapshotState::Receiving);
    assert_eq!(finish(&hosts.proxy, "web", 1), Reply::done());

    // There is room for the other one now.
    let dump = [appends(second), reads_list(), writes(second, INVENTORY), ending];
    let replies = another_process(&hosts.proxy.dir().join(PROXY_SOCKET), &dump);
    assert_eq!(replies[0].error, 0);
    hosts.cache.assert_state(second, SnapshotState::Whole);
}

#[test]
fn where_old_endings_are_not_understood_an_old_clients_dump_fails_before_its_first_image() {
    let hosts = Hosts::start();
    for (form, id) in [(Form::Patches, IDS[0]), (Form::Last, IDS[1])] {
        let client = OldClient { form, hosts: &hosts };
        client.append_own_id(id);
        let mut list = Connection::to_proxy(&hosts.proxy);
        list.say(&header("parent", client.null(), READ));
        assert_refused(&list.reply(), Errno::INVAL, "remote.historical-endings = true");
        let reason = hosts.proxy.assert_state(id, SnapshotState::Damaged);
        assert!(reason.contains("remote.historical-endings = true"), "{reason}");
        hosts.cache.assert_state(id, SnapshotState::Damaged);
    }
    hosts.proxy.assert_log(&["the session of a client", "remote.historical-endings = true"]);
}

#[test]
fn without_a_cache_an_old_clients_dump_is_given_up_once() {
    const GIVE_UP_AFTER: Duration = Duration::from_secs(2);
    let settings = [("remote.historical-endings", "true"), ("link.give-up-after", "\"2s\"")];
    let proxy = Daemon::proxy(unused_address(), &settings);
    let begun = Instant::now();
    let mut append = Connection::to_proxy(&proxy);
    append.say(&[header("parent", "null", APPEND), encode_id(IDS[0])].concat());
    drop(append);
    let mut list = Connection::to_proxy(&proxy);
    list.say(&header("parent", "null", READ));
    assert_refused(&list.reply(), Errno::IO, "no link to the cache");
    // The proxy stops before a pause that would end too late; two such waits take longer than one may.
    assert!(begun.elapsed() < GIVE_UP_AFTER + GIVE_UP_AFTER / 4, "{:?}", begun.elapsed());
}
