//! Requests take effect in the order in which they were sent, also on different connections that say
//! nothing to each other.

use std::io::Write;

use criu_image_relay::control::model::SnapshotState;
use criu_image_relay::criu::remote::{Reply, Request, encode_id};
use rustix::io::Errno;

use crate::client::{Connection, assert_refused, decode_ids, finish, ids, read, write_of};
use crate::hosts::Hosts;

const TIMES: usize = 100;

/// Nothing is waited for.
fn append(hosts: &Hosts, id: &str) {
    let mut connection = Connection::to_proxy(&hosts.proxy);
    connection.ask(&Request::AppendToList { list: "web".to_owned(), acknowledge: false });
    connection.say(&encode_id(id));
}

#[test]
fn an_id_that_was_appended_is_in_the_list_that_is_read_next() {
    let hosts = Hosts::start();
    let mut appended = Vec::new();
    for k in 0..TIMES {
        let id = format!("web-{k}");
        append(&hosts, &id);
        appended.push(id);
        assert_eq!(ids(Connection::to_proxy(&hosts.proxy), "web"), appended);
    }
}

#[test]
fn ids_stand_in_the_order_in_which_they_were_appended() {
    let hosts = Hosts::start();
    let appended: Vec<_> = (0..TIMES).map(|k| format!("web-{k}")).collect();
    for id in &appended {
        append(&hosts, id);
    }
    assert_eq!(ids(Connection::to_proxy(&hosts.proxy), "web"), appended);
}

#[test]
fn the_end_of_a_dump_comes_after_the_images_that_were_written_before_it() {
    const IMAGES: u64 = 20;
    let hosts = Hosts::start();
    for k in 0..TIMES {
        let id = format!("web-{k}");
        // All are open at once. Every third waits in a pipe, and its connection has been closed.
        let mut connections = Vec::new();
        let mut pipes = Vec::new();
        for image in 0..IMAGES {
            let mut connection = Connection::to_proxy(&hosts.proxy);
            connection.ask(&write_of(&id, &format!("pages-{image}.img"), false));
            let bytes = vec![7; usize::try_from(image).unwrap() * 1000];
            if image % 3 == 0 {
                let mut pipe = connection.pass_source();
                pipe.write_all(&bytes).unwrap();
                pipes.push(pipe);
            } else {
                connection.say(&bytes);
                connections.push(connection);
            }
        }
        drop((connections, pipes));
        assert_eq!(finish(&hosts.proxy, &id, IMAGES), Reply::done());
        let whole = hosts.cache.show(&id).unwrap();
        let bytes = (0..IMAGES).sum::<u64>() * 1000;
        assert_eq!(whole.state, SnapshotState::Whole);
        assert_eq!((whole.images, whole.bytes), (IMAGES, bytes));
        hosts.cache.drop_snapshot(&id);
    }
}

#[test]
fn a_list_that_is_being_appended_to_is_read_when_that_has_ended() {
    let hosts = Hosts::start();
    let mut appending = Connection::to_proxy(&hosts.proxy);
    appending.ask(&Request::AppendToList { list: "web".to_owned(), acknowledge: false });
    let mut reading = Connection::to_proxy(&hosts.proxy);
    reading.ask(&Request::ReadList { list: "web".to_owned(), pipe: true });
    // Another list is of no concern to it, and what was asked later is answered.
    assert_eq!(ids(Connection::to_proxy(&hosts.proxy), "db"), [""; 0]);
    reading.assert_unanswered();
    appending.say(&encode_id("web-1"));
    hosts.cache.assert_state("web-1", SnapshotState::Receiving);
    reading.assert_unanswered();
    drop(appending);
    assert_eq!(decode_ids(&reading.image(true).unwrap()), ["web-1"]);
}

#[test]
fn the_end_of_a_dump_waits_for_images_that_are_being_written_and_refuses_new_ones() {
    let hosts = Hosts::start();
    let mut writer = Connection::to_proxy(&hosts.proxy);
    writer.ask(&write_of("web", "pages-1.img", false));
    writer.say(b"half");
    hosts.cache.assert_receiving("web", 4);
    let mut ending = Connection::to_proxy(&hosts.proxy);
    let snapshot = "web".to_owned();
    ending.ask(&Request::EndOfDump { snapshot, images: Some(1), acknowledge: true });
    let mut late = Connection::to_proxy(&hosts.proxy);
    late.ask(&write_of("web", "pages-2.img", true));
    assert_refused(&late.reply(), Errno::INVAL, "the dump of web has ended");
    ending.assert_unanswered();
    writer.say(b" and half");
    drop(writer);
    assert_eq!(ending.reply(), Reply::done());
    let whole = read(Connection::to_cache(&hosts.cache), "web", "pages-1.img");
    assert_eq!(whole.unwrap(), b"half and half");
}
