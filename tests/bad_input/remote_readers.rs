//! Readers that go away, never read or hand over something that cannot be written to: each ends its
//! own read, and the snapshot stays.

use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;

use crate::criu::{Criu, RECORDS, pipe};
use crate::daemons::{Daemon, Settings, eventually};
use crate::hosts::Hosts;
use crate::remote::{Connect, Remote, Stage, begin, end, read_of, whole};

/// More than the buffers on the way hold.
fn large() -> Vec<u8> {
    (0..3_000_000u32).map(|i| (i % 249).to_le_bytes()[0]).collect()
}

/// A client of each daemon.
fn both(hosts: &Hosts) -> [(&Daemon, Connect); 2] {
    [(&hosts.proxy, Remote::at_proxy), (&hosts.cache, Remote::at_cache)]
}

fn stage(proxy: Settings<'_>, cache: Settings<'_>) -> Stage {
    let stage = Stage::with(proxy, cache);
    whole(&stage.hosts.proxy, "web", "pages-1.img", &large());
    stage
}

#[track_caller]
fn assert_served(hosts: &Hosts) {
    for (daemon, connect) in both(hosts) {
        let read = connect(daemon).read("web", "pages-1.img").unwrap();
        assert!(read == large(), "{} bytes were read", read.len());
    }
}

#[test]
fn a_reader_that_goes_away_ends_its_own_read_only() {
    let stage = stage(&[], &[]);
    for (daemon, connect) in both(&stage.hosts) {
        let mut gone = connect(daemon);
        gone.ask(&read_of("web", "pages-1.img", false));
        assert_eq!(gone.reply().size, Some(3_000_000));
        drop(gone);
        // A pipe that is closed early ends that read; the next comes on the same connection.
        let mut client = connect(daemon);
        for _ in 0..2 {
            client.ask(&read_of("web", "pages-1.img", true));
            assert_eq!(client.reply().size, Some(3_000_000));
            client.take().read_exact(&mut [0; 1000]).unwrap();
        }
        client.ask(&read_of("web", "pages-1.img", true));
        assert_eq!(client.reply().size, Some(3_000_000));
        let mut bytes = Vec::new();
        client.take().read_to_end(&mut bytes).unwrap();
        assert!(bytes == large(), "{} bytes were read", bytes.len());
        // One that has said where to does not have to stay.
        client.ask(&read_of("web", "pages-1.img", true));
        assert_eq!(client.reply().size, Some(3_000_000));
        let mut pages = client.take();
        drop(client);
        assert_eq!(pages.read_to_end(&mut bytes).unwrap(), 3_000_000);
        assert_eq!(daemon.count_log("ended"), 0);
    }
    assert_served(&stage.hosts);
    stage.assert_undisturbed();
}

#[test]
fn a_reader_that_never_reads_is_given_up() {
    let stall = [("sessions.stall-timeout", "\"300ms\"")];
    let hosts = Hosts::with(&stall, &stall);
    whole(&hosts.proxy, "web", "pages-1.img", &large());
    for (daemon, connect) in both(&hosts) {
        let mut on_socket = connect(daemon);
        on_socket.ask(&read_of("web", "pages-1.img", false));
        on_socket.reply();
        let mut through_pipe = connect(daemon);
        through_pipe.ask(&read_of("web", "pages-1.img", true));
        through_pipe.reply();
        let mut pages = through_pipe.take();
        through_pipe.assert_closed();
        let given_up = || daemon.count_log("images pages-1.img were not read for 300ms");
        assert!(eventually(|| given_up() == 2), "{} of 2 are given up", given_up());
        daemon.assert_log(&["WARN", &Criu::peer(), "pages-1.img were not read for 300ms"]);
        // What it was told, and what it gets.
        assert!(on_socket.rest().len() < 3_000_000);
        let mut bytes = Vec::new();
        assert!(pages.read_to_end(&mut bytes).unwrap() < 3_000_000);
    }
    assert_served(&hosts);
}

#[test]
fn a_reader_that_leaves_while_it_waits_is_waited_for_no_longer() {
    let stage = Stage::set();
    let (proxy, cache) = (&stage.hosts.proxy, &stage.hosts.cache);
    let mut writer = begin(proxy, "web", "core-7.img");
    let before = (proxy.sessions(), cache.sessions());
    for (daemon, connect, before) in
        [(proxy, Remote::at_proxy as Connect, before.0), (cache, Remote::at_cache, before.1)]
    {
        for _ in 0..3 {
            let mut reader = connect(daemon);
            reader.ask(&read_of("web", "core-7.img", false));
            assert!(eventually(|| daemon.sessions() == before + 1));
            drop(reader);
            let left = eventually(|| daemon.sessions() == before);
            assert!(left, "{} sessions instead of {before}", daemon.sessions());
        }
        daemon.assert_log(&["a client", &Criu::peer(), "left while it waited"]);
    }
    writer.say(RECORDS);
    writer.shut();
    writer.assert_done();
    assert_eq!(end(proxy, "web").error, 0);
    assert_eq!(Remote::at_cache(cache).read("web", "core-7.img").unwrap(), RECORDS);
    stage.assert_undisturbed();
}

#[test]
fn a_reader_that_says_nothing_more_is_served_when_what_it_waits_for_has_come() {
    let stage = Stage::set();
    let (proxy, cache) = (&stage.hosts.proxy, &stage.hosts.cache);
    let mut writer = begin(proxy, "web", "core-7.img");
    let mut readers = [Remote::at_proxy(proxy), Remote::at_cache(cache)];
    for reader in &mut readers {
        reader.ask(&read_of("web", "core-7.img", false));
        reader.shut();
        reader.assert_waits();
    }
    writer.say(RECORDS);
    writer.shut();
    writer.assert_done();
    assert_eq!(end(proxy, "web").error, 0);
    for mut reader in readers {
        assert_eq!(reader.reply().size, Some(12));
        assert_eq!(reader.rest(), RECORDS);
    }
    stage.assert_undisturbed();
}

#[test]
fn wrong_descriptors_end_the_read_that_they_came_for() {
    let patience = [("sessions.request-timeout", "\"200ms\"")];
    let stage = stage(&patience, &patience);
    let (read_end, write_end) = pipe();
    let file = File::open("/proc/self/exe").unwrap();
    for (daemon, connect) in both(&stage.hosts) {
        for (descriptors, cause) in [
            (&[][..], "no descriptor passed with the request"),
            (&[write_end.as_fd(), write_end.as_fd()], "more than one descriptor passed"),
            (&[read_end.as_fd()], "is the read end of a pipe, not the write end"),
            (&[file.as_fd()], "the descriptor passed is a regular file"),
        ] {
            let mut client = connect(daemon);
            client.ask(&read_of("web", "pages-1.img", true));
            client.reply();
            client.pass(descriptors);
            client.assert_closed();
            daemon.assert_log(&["WARN", &Criu::peer(), "image pages-1.img: ", cause]);
        }
        let mut late = connect(daemon);
        late.ask(&read_of("web", "pages-1.img", true));
        late.reply();
        late.assert_closed();
        daemon.assert_log(&["WARN", &Criu::peer(), "pages-1.img: ", "did not come within 200ms"]);
    }
    assert_served(&stage.hosts);
    stage.assert_undisturbed();
}

#[test]
fn a_client_that_does_not_read_its_replies_is_given_up() {
    let patience = [("sessions.request-timeout", "\"200ms\"")];
    let stage = stage(&patience, &patience);
    for (daemon, connect) in both(&stage.hosts) {
        let mut deaf = connect(daemon);
        let missing = read_of("web", &"n".repeat(4000), false).encode();
        let mut asked = 0;
        while deaf.try_say(&missing) {
            asked += 1;
            assert!(asked < 10_000, "it is served on and on");
        }
        daemon.assert_log(&["WARN", "the session of a client", &Criu::peer(), "within 200ms"]);
    }
    assert_served(&stage.hosts);
    stage.assert_undisturbed();
}
