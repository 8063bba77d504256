//! The list of ids: it grows while it is appended to, shrinks when a restore has ended, and each
//! migration has its own.

use criu_image_relay::control::model::SnapshotState;
use criu_image_relay::criu::remote::{Reply, Request, encode_id};
use rustix::io::Errno;

use crate::client::{
    Connection, append_id, assert_refused, decode_ids, finish, finish_restore, ids, read, write,
};
use crate::daemons::Daemon;
use crate::hosts::Hosts;

/// The list as a dump sees it.
fn at_source(hosts: &Hosts, list: &str) -> Vec<String> {
    ids(Connection::to_proxy(&hosts.proxy), list)
}

/// The list as a restore sees it.
fn at_destination(hosts: &Hosts, list: &str) -> Vec<String> {
    ids(Connection::to_cache(&hosts.cache), list)
}

/// A dump of one image, which holds the snapshot's own id.
#[track_caller]
fn dump(proxy: &Daemon, list: &str, id: &str) {
    append_id(proxy, list, id);
    write(proxy, id, "core-7.raw", id.as_bytes());
    assert_eq!(finish(proxy, id, 1), Reply::done());
}

#[test]
fn a_list_is_at_the_cache_while_it_is_appended_to() {
    let hosts = Hosts::start();
    let mut appending = Connection::to_proxy(&hosts.proxy);
    appending.ask(&Request::AppendToList { list: "web".to_owned(), acknowledge: true });
    assert_eq!(appending.reply(), Reply::done());
    for id in ["web-1", "web-2", "web-3"] {
        appending.say(&encode_id(id));
        // The connection is open, the list has not ended.
        hosts.cache.assert_state(id, SnapshotState::Receiving);
    }
    appending.assert_unanswered();
    let mut torn = encode_id("web-4");
    let rest = torn.split_off(6);
    appending.say(&torn);
    appending.say(&rest);
    appending.shut_down();
    assert_eq!(appending.reply(), Reply::done());
    assert_eq!(at_source(&hosts, "web"), ["web-1", "web-2", "web-3", "web-4"]);
}

#[test]
fn each_id_is_in_the_list_when_its_append_is_acknowledged() {
    let hosts = Hosts::start();
    let mut appended = Vec::new();
    for k in 0..20 {
        assert_eq!(at_source(&hosts, "web"), appended);
        let id = format!("web-{k}");
        append_id(&hosts.proxy, "web", &id);
        hosts.cache.show(&id).expect("the cache knows it");
        appended.push(id);
    }
    // One that is appended again stands at the end.
    append_id(&hosts.proxy, "web", "web-0");
    appended.rotate_left(1);
    assert_eq!(at_source(&hosts, "web"), appended);
}

#[test]
fn a_list_is_read_at_the_cache_when_none_of_its_snapshots_is_still_coming() {
    let hosts = Hosts::start();
    let mut reader = Connection::to_cache(&hosts.cache);
    reader.ask(&Request::ReadList { list: "web".to_owned(), pipe: true });
    dump(&hosts.proxy, "db", "db-1");
    append_id(&hosts.proxy, "web", "web-1");
    append_id(&hosts.proxy, "web", "web-2");
    write(&hosts.proxy, "web-1", "core-7.raw", b"core");
    assert_eq!(finish(&hosts.proxy, "web-1", 1), Reply::done());
    assert_eq!(hosts.cache.sessions(), 1);
    reader.assert_unanswered();
    write(&hosts.proxy, "web-2", "core-7.raw", b"core");
    assert_eq!(hosts.cache.sessions(), 1);
    reader.assert_unanswered();
    assert_eq!(finish(&hosts.proxy, "web-2", 1), Reply::done());
    let list = reader.image(true).unwrap();
    assert_eq!(decode_ids(&list), ["web-1", "web-2"]);
}

#[test]
fn ids_leave_the_list_when_a_restore_has_taken_them() {
    let hosts = Hosts::start();
    for id in ["web-1", "web-2", "web-3"] {
        dump(&hosts.proxy, "web", id);
    }
    assert_eq!(finish_restore(&hosts.cache, "web-2"), Reply::done());
    for id in ["web-1", "web-2"] {
        hosts.cache.assert_state(id, SnapshotState::Taken);
        let taken = read(Connection::to_cache(&hosts.cache), id, "core-7.raw").unwrap_err();
        assert_refused(&taken, Errno::STALE, "a restore has taken snapshot");
    }
    assert_eq!(at_source(&hosts, "web"), ["web-3"]);
    assert_eq!(at_destination(&hosts, "web"), ["web-3"]);
    let again = finish_restore(&hosts.cache, "web-2");
    assert_refused(&again, Errno::NOENT, "no snapshot web-2 that could be taken");
    // A dump of the chain goes on with what there is.
    dump(&hosts.proxy, "web", "web-4");
    assert_eq!(at_destination(&hosts, "web"), ["web-3", "web-4"]);
    assert_eq!(finish_restore(&hosts.cache, "web-4"), Reply::done());
    assert_eq!(at_source(&hosts, "web"), [""; 0]);
}

#[test]
fn ids_leave_the_list_when_their_snapshot_is_dropped() {
    let hosts = Hosts::start();
    for id in ["web-1", "web-2"] {
        dump(&hosts.proxy, "web", id);
    }
    hosts.cache.drop_snapshot("web-1");
    assert_eq!(at_source(&hosts, "web"), ["web-2"]);
}

#[test]
fn two_migrations_with_lists_of_their_own_do_not_see_each_other() {
    let hosts = Hosts::start();
    for k in 1..=3 {
        // The image has the same name in all of them.
        dump(&hosts.proxy, "web", &format!("web-{k}"));
        dump(&hosts.proxy, "db", &format!("db-{k}"));
    }
    for (list, expected) in [("web", ["web-1", "web-2", "web-3"]), ("db", ["db-1", "db-2", "db-3"])]
    {
        assert_eq!(at_source(&hosts, list), expected);
        assert_eq!(at_destination(&hosts, list), expected);
        for id in expected {
            let image = read(Connection::to_cache(&hosts.cache), id, "core-7.raw").unwrap();
            assert_eq!(image, id.as_bytes());
        }
    }
    assert_eq!(at_source(&hosts, ""), [""; 0]);
    assert_eq!(finish_restore(&hosts.cache, "web-3"), Reply::done());
    assert_eq!(at_source(&hosts, "web"), [""; 0]);
    assert_eq!(at_destination(&hosts, "db"), ["db-1", "db-2", "db-3"]);
    hosts.cache.assert_state("db-3", SnapshotState::Whole);
}
