//! CRIU's old `--remote` clients in their two forms, where `remote.historical-endings` is set; and
//! what their endings are where it is not.

use criu_image_relay::control::model::SnapshotState;
use criu_image_relay::criu::images::INVENTORY;
use criu_image_relay::criu::remote::Reply;
use rustix::io::Errno;

use crate::client::{Connection, append_id, assert_refused, finish, ids, read, write};
use crate::criu::RECORDS;
use crate::historical::{Form, OldClient, READ, WRITE, header, hosts};
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
        assert_refused(&connection.reply(), Errno::INVAL, "a bad image name");
        assert_eq!(connection.rest(), b"");
    }
    hosts.cache.assert_state("web", SnapshotState::Receiving);
    assert_eq!(finish(&hosts.proxy, "web", 1), Reply::done());
}
