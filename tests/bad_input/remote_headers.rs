//! Headers that are none, or against the rules: each is refused with its cause, and costs its own
//! connection only.

use criu_image_relay::criu::remote::{HEADER_MAX, Reply, Request};
use rustix::io::Errno;

use crate::criu::Criu;
use crate::daemons::{Daemon, eventually};
use crate::remote::{
    Connect, Remote, Stage, append_to, end_of, read_of, unheard_write_of, whole, write, write_of,
};

fn varint(mut value: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value >= 0x80 {
        bytes.push(value.to_le_bytes()[0] | 0x80);
        value >>= 7;
    }
    bytes.push(value.to_le_bytes()[0]);
    bytes
}

fn with_length(message: &[u8]) -> Vec<u8> {
    [&u32::try_from(message.len()).unwrap().to_le_bytes()[..], message].concat()
}

fn string(field: u8, value: &[u8]) -> Vec<u8> {
    [&[field << 3 | 2][..], &varint(value.len() as u64), value].concat()
}

/// A header of these three fields, whatever is in them.
fn header(name: &[u8], id: &[u8], mode: u32) -> Vec<u8> {
    let mode = [&[0x18][..], &varint(mode.into())].concat();
    with_length(&[string(1, name), string(2, id), mode].concat())
}

/// What neither daemon takes for a header.
fn bad_headers() -> Vec<(Vec<u8>, String)> {
    let long = [b'n'; 4097];
    let mode = |mode| (header(b"core-7.img", b"web", mode), format!("open mode {mode} is none of"));
    let name = |name: &[u8], mode, why: &str| (header(name, b"web", mode), why.to_owned());
    let id = |id: &[u8], why: &str| (header(b"core-7.img", id, 0), why.to_owned());
    let lacks = |message: &[Vec<u8>], what: &str| {
        (with_length(&message.concat()), format!("local_image_entry: it has no {what}"))
    };
    let (named, of_web) = (string(1, b"core-7.img"), string(2, b"web"));
    let (read, finish) = (vec![0x18, 0], vec![0x80, 1, 1]);
    let not_one = "not a protobuf local_image_entry".to_owned();
    let mut bad = vec![
        ((16385u32).to_le_bytes().to_vec(), "16385 bytes; at most 16384 are accepted".to_owned()),
        (u32::MAX.to_le_bytes().to_vec(), "a message of 4294967295 bytes".to_owned()),
        (with_length(b"\xff\xff\xff"), not_one.clone()),
        (with_length(&b"\x0a".repeat(HEADER_MAX)), not_one.clone()),
        (header(b"\xff\xfe", b"web", 0), not_one),
        lacks(&[], "name"),
        lacks(&[of_web.clone(), read.clone()], "name"),
        lacks(&[of_web.clone(), read.clone(), finish.clone()], "name"),
        lacks(&[named.clone(), read.clone()], "snapshot_id"),
        lacks(&[string(1, b"parent"), read], "snapshot_id"),
        lacks(&[named, of_web.clone()], "open_mode"),
        lacks(&[string(1, b""), of_web.clone(), finish.clone()], "open_mode"),
        mode(2),
        mode(3),
        mode(1025),
        mode(u32::MAX),
        name(b"", 0, "a bad image name \"\": it is empty"),
        name(b"a/b", 1, "it contains a slash"),
        name(b"..", 0, "two dots"),
        name(b"a..b", 1024, "two dots"),
        name(b".", 1, "it names a directory"),
        name(b"a\0", 0, "control character"),
        name(b"\x1b[2J", 1, "control character"),
        name(&long, 0, "it is longer than 4096 bytes"),
        name(b"parent", 1, "a list of ids can be appended to, not written"),
        id(b"", "a bad snapshot id \"\": it is empty"),
        id(b"a\n", "control character"),
        id(&long, "longer than 4096"),
        (header(b"parent", b"a\n", 0), "a bad name of a list".to_owned()),
        (header(b"parent", &long, 1024), "a bad name of a list".to_owned()),
    ];
    let end = [string(1, b""), of_web, vec![0x18, 0x80, 0x08], finish].concat();
    bad.push((with_length(&end), "the end of a dump has open mode 1".to_owned()));
    bad
}

#[track_caller]
fn assert_bad(daemon: &Daemon, mut client: Remote, header: &[u8], cause: &str) {
    client.say(header);
    client.assert_refused(Errno::INVAL, &[cause]);
    client.assert_closed();
    daemon.assert_log(&["WARN", "the session of a client", &Criu::peer(), "ended", cause]);
}

#[test]
fn headers_against_the_rules_are_refused_by_both_daemons() {
    let stage = Stage::set();
    for (header, cause) in bad_headers() {
        let (proxy, cache) = (&stage.hosts.proxy, &stage.hosts.cache);
        assert_bad(proxy, Remote::at_proxy(proxy), &header, &cause);
        assert_bad(cache, Remote::at_cache(cache), &header, &cause);
        assert_eq!((proxy.show("web"), cache.show("web")), (None, None));
    }
    stage.assert_undisturbed();
}

#[test]
fn a_length_over_the_limit_allocates_nothing() {
    let stage = Stage::set();
    let (proxy, cache) = (&stage.hosts.proxy, &stage.hosts.cache);
    let before = (proxy.peak_bytes(), cache.peak_bytes());
    for mut client in [Remote::at_proxy(proxy), Remote::at_cache(cache)] {
        client.say(&u32::MAX.to_le_bytes());
        client.assert_refused(Errno::INVAL, &["4294967295"]);
    }
    let grown = (proxy.peak_bytes() - before.0).max(cache.peak_bytes() - before.1);
    assert!(grown < 1 << 30, "a daemon has asked for {} MiB", grown >> 20);
    stage.assert_undisturbed();
}

#[test]
fn what_belongs_to_the_other_daemon_is_refused() {
    let stage = Stage::set();
    let (proxy, cache) = (&stage.hosts.proxy, &stage.hosts.cache);
    whole(proxy, "web", "pages-1.img", b"");
    let restored = Request::EndOfRestore { snapshot: "web".to_owned() }.encode();
    assert_bad(proxy, Remote::at_proxy(proxy), &restored, "a restore ends at the cache");
    for request in
        [write_of("web", "mm-7.img"), unheard_write_of("db", "a"), append_to(""), end_of("web")]
    {
        let why = "images are written and dumps end at the proxy";
        assert_bad(cache, Remote::at_cache(cache), &request.encode(), why);
    }
    assert_eq!(Remote::at_cache(cache).read("web", "pages-1.img").unwrap(), b"");
    stage.assert_undisturbed();
}

#[test]
fn a_connection_that_ends_within_a_header_is_torn_and_begins_nothing() {
    let stage = Stage::set();
    let (proxy, cache) = (&stage.hosts.proxy, &stage.hosts.cache);
    let whole = unheard_write_of("torn", "core-7.img").encode();
    for cut in 0..whole.len() {
        Remote::at_proxy(proxy).say(&whole[..cut]);
        Remote::at_cache(cache).say(&whole[..cut]);
    }
    // One that has said nothing has done nothing wrong.
    for daemon in [proxy, cache] {
        let torn = || daemon.count_log("the socket was closed in the middle of a request");
        assert!(eventually(|| torn() == whole.len() - 1), "{} are torn", torn());
        assert_eq!(daemon.show("torn"), None);
    }
    stage.assert_undisturbed();
}

#[test]
fn a_client_may_be_idle_between_its_requests_but_not_before_or_within_one() {
    let patience = [("sessions.request-timeout", "\"100ms\"")];
    let stage = Stage::with(&patience, &patience);
    let (proxy, cache) = (&stage.hosts.proxy, &stage.hosts.cache);
    whole(proxy, "web", "pages-1.img", b"bytes");
    let missing = read_of("web", "cgroup.img", true);
    for (daemon, connect) in [(proxy, Remote::at_proxy as Connect), (cache, Remote::at_cache)] {
        let mut idle = connect(daemon);
        idle.ask(&missing);
        idle.assert_refused(Errno::NOENT, &["no image cgroup.img"]);
        for said in [&b""[..], &[0x13], &missing.encode()[..9]] {
            let mut late = connect(daemon);
            late.say(said);
            while let Some(told) = late.try_reply() {
                assert_ne!(told.error, 0);
            }
        }
        let late = || daemon.count_log("the rest of a request did not come within 100ms");
        assert!(eventually(|| late() == 3), "{} of 3 were late", late());
        idle.assert_waits();
        idle.ask(&missing);
        idle.assert_refused(Errno::NOENT, &["no image cgroup.img"]);
        idle.say(&[0x13, 0]);
        idle.try_reply();
        idle.assert_closed();
    }
    stage.assert_undisturbed();
}

#[test]
fn names_of_4096_bytes_work_from_end_to_end() {
    let stage = Stage::set();
    let (proxy, cache) = (&stage.hosts.proxy, &stage.hosts.cache);
    let (id, name, list) = ("s".repeat(4096), "n".repeat(4096), "l".repeat(4096));
    let mut client = Remote::at_proxy(proxy);
    client.ask(&append_to(&list));
    client.say(&criu_image_relay::criu::remote::encode_id(&id));
    client.shut();
    client.assert_done();
    client.assert_done();
    write(proxy, &id, &name, b"bytes");
    assert_eq!(Remote::at_proxy(proxy).read(&id, &name).unwrap(), b"bytes");
    assert_eq!(crate::remote::end(proxy, &id), Reply::done());
    assert_eq!(Remote::at_cache(cache).read(&id, &name).unwrap(), b"bytes");
    for client in [Remote::at_proxy(proxy), Remote::at_cache(cache)] {
        let bytes = criu_image_relay::criu::remote::encode_id(&id);
        assert_eq!(client.read(&list, "parent").unwrap(), bytes);
    }
    stage.assert_undisturbed();
}
