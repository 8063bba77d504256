//! Writers that break the rules, or die: each costs its own connection, and its own snapshot where
//! nobody can tell any more what is in it.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;

use criu_image_relay::control::model::SnapshotState;
use criu_image_relay::criu::remote::{Reply, Request, encode_id};
use rustix::io::Errno;

use crate::criu::{RECORDS, assert_unread, pipe};
use crate::remote::{
    Remote, Stage, append_to, begin, end, end_of, read_of, unheard_write_of, whole, write, write_of,
};

#[test]
fn an_image_that_is_being_written_is_refused_to_another_writer() {
    let stage = Stage::set();
    let (proxy, cache) = (&stage.hosts.proxy, &stage.hosts.cache);
    let mut first = begin(proxy, "web", "core-7.img");
    first.say(&RECORDS[..5]);
    let mut second = Remote::at_proxy(proxy);
    second.ask(&write_of("web", "core-7.img"));
    second.assert_refused(Errno::BUSY, &["image core-7.img of snapshot web is being written"]);
    second.assert_closed();
    let mut unheard = Remote::at_proxy(proxy);
    unheard.ask(&unheard_write_of("web", "core-7.img"));
    unheard.assert_closed();
    assert!(!unheard.try_say(b"bytes"));
    write(proxy, "web", "mm-7.img", RECORDS);
    first.say(&RECORDS[5..]);
    first.shut();
    first.assert_done();
    let two = Request::EndOfDump { snapshot: "web".into(), images: Some(2), acknowledge: true };
    let mut client = Remote::at_proxy(proxy);
    client.ask(&two);
    client.assert_done();
    assert_eq!(Remote::at_cache(cache).read("web", "core-7.img").unwrap(), RECORDS);
    stage.assert_undisturbed();
}

#[test]
fn what_comes_after_the_end_was_said_is_refused() {
    let stage = Stage::set();
    let (proxy, cache) = (&stage.hosts.proxy, &stage.hosts.cache);
    let mut open = begin(proxy, "web", "core-7.img");
    let mut client = Remote::at_proxy(proxy);
    client.ask(&end_of("web"));
    let mut late = Remote::at_proxy(proxy);
    late.ask(&write_of("web", "mm-7.img"));
    late.assert_refused(Errno::INVAL, &["the dump of web has ended"]);
    late.assert_closed();
    let mut unheard = Remote::at_proxy(proxy);
    unheard.ask(&unheard_write_of("web", "mm-7.img"));
    unheard.assert_closed();
    let mut listing = Remote::at_proxy(proxy);
    listing.ask(&append_to("chain"));
    listing.assert_done();
    listing.say(&encode_id("web"));
    listing.assert_refused(Errno::INVAL, &["the dump of web has ended"]);
    listing.assert_closed();
    let again = end(proxy, "web");
    assert_eq!(again.error, Errno::NOENT.raw_os_error().unsigned_abs(), "{again:?}");
    client.assert_waits();
    open.say(RECORDS);
    open.shut();
    open.assert_done();
    client.assert_done();
    assert_eq!(Remote::at_cache(cache).read("web", "core-7.img").unwrap(), RECORDS);
    stage.assert_undisturbed();
}

#[test]
fn an_end_of_nothing_ends_nothing_and_the_connection_goes_on() {
    let stage = Stage::set();
    let (proxy, cache) = (&stage.hosts.proxy, &stage.hosts.cache);
    let mut client = Remote::at_proxy(proxy);
    client.ask(&end_of("web"));
    client.assert_refused(Errno::NOENT, &["no dump of web is under way"]);
    // One that listens to nothing is told nothing.
    client.ask(&Request::EndOfDump { snapshot: "web".into(), images: None, acknowledge: false });
    client.ask(&write_of("web", "core-7.img"));
    client.assert_done();
    client.say(RECORDS);
    client.shut();
    client.assert_done();
    let mut restore = Remote::at_cache(cache);
    for id in ["web", "nothing"] {
        restore.ask(&Request::EndOfRestore { snapshot: id.to_owned() });
        restore.assert_refused(Errno::NOENT, &["there is no snapshot", id]);
    }
    assert_eq!(end(proxy, "web"), Reply::done());
    restore.ask(&Request::EndOfRestore { snapshot: "web".to_owned() });
    restore.assert_done();
    restore.ask(&read_of("web", "core-7.img", false));
    restore.assert_refused(Errno::STALE, &["a restore has taken snapshot web"]);
    restore.assert_closed();
    stage.assert_undisturbed();
}

#[test]
fn an_end_with_another_count_of_images_damages_its_snapshot() {
    let stage = Stage::set();
    for (id, told) in [("none", 0), ("more", 2), ("many", u64::MAX)] {
        write(&stage.hosts.proxy, id, "core-7.img", RECORDS);
        let mut client = Remote::at_proxy(&stage.hosts.proxy);
        let images = Some(told);
        client.ask(&Request::EndOfDump { snapshot: id.to_owned(), images, acknowledge: true });
        let cause = format!("its writer opened {told} images, 1 have come");
        client.assert_refused(Errno::IO, &[&cause]);
        client.assert_closed();
        stage.assert_damaged(id, &cause);
    }
    stage.assert_undisturbed();
}

/// Damages a snapshot by a writer that dies.
fn damage(stage: &Stage, id: &str) {
    let mut writer = begin(&stage.hosts.proxy, id, "core-7.img");
    writer.say(RECORDS);
    drop(writer);
    stage.assert_damaged(id, "image core-7.img: its writer went away in the middle of it");
}

#[test]
fn a_snapshot_that_has_failed_is_refused_until_its_end_is_said() {
    let stage = Stage::set();
    let (proxy, cache) = (&stage.hosts.proxy, &stage.hosts.cache);
    damage(&stage, "web");
    let cause = "snapshot web is damaged: image core-7.img: its writer went away";
    let mut late = Remote::at_proxy(proxy);
    late.ask(&write_of("web", "mm-7.img"));
    late.assert_refused(Errno::IO, &[cause]);
    late.assert_closed();
    let mut unheard = Remote::at_proxy(proxy);
    unheard.ask(&unheard_write_of("web", "mm-7.img"));
    unheard.assert_closed();
    let ended = end(proxy, "web");
    assert_eq!(ended.error, Errno::IO.raw_os_error().unsigned_abs());
    assert!(ended.reason.contains(cause), "{ended:?}");
    whole(proxy, "web", "core-7.img", RECORDS);
    assert_eq!(Remote::at_cache(cache).read("web", "core-7.img").unwrap(), RECORDS);
    stage.assert_undisturbed();
}

#[test]
fn a_snapshot_that_has_failed_begins_anew_when_its_id_is_appended_to_a_list() {
    let stage = Stage::set();
    let (proxy, cache) = (&stage.hosts.proxy, &stage.hosts.cache);
    damage(&stage, "web");
    let mut listing = Remote::at_proxy(proxy);
    listing.ask(&append_to("chain"));
    listing.say(&encode_id("web"));
    listing.shut();
    listing.assert_done();
    listing.assert_done();
    whole(proxy, "web", "mm-7.img", RECORDS);
    assert_eq!(Remote::at_cache(cache).read("web", "mm-7.img").unwrap(), RECORDS);
    let old = Remote::at_cache(cache).read("web", "core-7.img").unwrap_err();
    assert_eq!(old.error, Errno::NOENT.raw_os_error().unsigned_abs());
    stage.assert_undisturbed();
}

#[test]
fn an_id_that_is_whole_at_the_cache_is_refused_and_stays_whole() {
    let stage = Stage::set();
    let (proxy, cache) = (&stage.hosts.proxy, &stage.hosts.cache);
    whole(proxy, "web", "core-7.img", RECORDS);
    let cause = "a snapshot web is held already and no restore has taken it";
    let mut again = Remote::at_proxy(proxy);
    again.ask(&write_of("web", "core-7.img"));
    again.assert_refused(Errno::IO, &[cause]);
    again.assert_closed();
    assert!(proxy.assert_state("web", SnapshotState::Damaged).contains(cause));
    cache.assert_log(&["WARN", "snapshot web is refused", cause]);
    end(proxy, "web");
    let mut unheard = Remote::at_proxy(proxy);
    unheard.ask(&unheard_write_of("web", "core-7.img"));
    let pages = unheard.create();
    assert_unread(&pages);
    unheard.assert_closed();
    cache.assert_state("web", SnapshotState::Whole);
    assert_eq!(Remote::at_cache(cache).read("web", "core-7.img").unwrap(), RECORDS);
    stage.assert_undisturbed();
}

#[test]
fn a_writer_that_dies_on_the_socket_damages_its_snapshot() {
    let stage = Stage::set();
    let went_away = "image core-7.img: its writer went away in the middle of it";
    // Before it has written anything, and after all: nobody can tell that it was all.
    for (id, bytes) in [("nothing", &b""[..]), ("half", &RECORDS[..5]), ("whole", RECORDS)] {
        let mut writer = begin(&stage.hosts.proxy, id, "core-7.img");
        writer.say(bytes);
        drop(writer);
        stage.assert_damaged(id, went_away);
    }
    stage.assert_undisturbed();
}

#[test]
fn a_writer_that_dies_at_its_pipe_damages_its_snapshot() {
    let stage = Stage::with(&[("sessions.request-timeout", "\"200ms\"")], &[]);
    let proxy = &stage.hosts.proxy;
    let open = |id| {
        let mut writer = begin(proxy, id, "core-7.img");
        let mut pages = writer.create();
        pages.write_all(RECORDS).unwrap();
        (writer, pages)
    };
    let (mut silent, pages) = open("silent");
    drop(pages);
    let cause = "image core-7.img: the rest of a request did not come within 200ms";
    silent.assert_refused(Errno::IO, &[cause]);
    silent.assert_closed();
    stage.assert_damaged("silent", cause);

    let cause = "image core-7.img: its writer went away in the middle of it";
    let (gone, mut pages) = open("gone");
    drop(gone);
    // Another process may still have the pipe.
    pages.write_all(RECORDS).unwrap();
    stage.hosts.cache.assert_receiving("gone", 24);
    drop(pages);
    stage.assert_damaged("gone", cause);

    drop(open("killed"));
    stage.assert_damaged("killed", cause);
    stage.assert_undisturbed();
}

#[test]
fn an_unacknowledged_image_of_records_cut_within_one_is_damaged_at_the_end() {
    let stage = Stage::set();
    let proxy = &stage.hosts.proxy;
    for (id, through_pipe) in [("socket", false), ("pipe", true)] {
        let mut writer = Remote::at_proxy(proxy);
        writer.ask(&unheard_write_of(id, "core-7.img"));
        if through_pipe {
            writer.create().write_all(&RECORDS[..10]).unwrap();
        } else {
            writer.say(&RECORDS[..10]);
        }
        drop(writer);
        let cause = "image core-7.img is cut short";
        let ended = end(proxy, id);
        assert!(ended.reason.contains(cause), "{ended:?}");
        stage.assert_damaged(id, cause);
    }
    stage.assert_undisturbed();
}

#[test]
fn wrong_descriptors_damage_the_snapshot_that_they_were_to_be_written_to() {
    let stage = Stage::set();
    let (read_end, write_end) = pipe();
    let file = File::open("/proc/self/exe").unwrap();
    for (id, descriptors, cause) in [
        ("two", &[read_end.as_fd(), read_end.as_fd()][..], "more than one descriptor passed"),
        ("end", &[write_end.as_fd()], "is the write end of a pipe, not the read end"),
        ("file", &[file.as_fd()], "the descriptor passed is a regular file"),
    ] {
        let mut writer = begin(&stage.hosts.proxy, id, "core-7.img");
        writer.pass(descriptors);
        let reply = writer.reply();
        assert!(reply.reason.starts_with("image core-7.img: "), "{reply:?}");
        assert_eq!(reply.reason.matches("image core-7.img").count(), 1, "{reply:?}");
        writer.assert_closed();
        stage.assert_damaged(id, cause);
        let unheard_id = format!("unheard-{id}");
        let mut unheard = Remote::at_proxy(&stage.hosts.proxy);
        unheard.ask(&unheard_write_of(&unheard_id, "core-7.img"));
        unheard.pass(descriptors);
        unheard.assert_closed();
        stage.assert_damaged(&unheard_id, cause);
    }
    stage.assert_undisturbed();
}
