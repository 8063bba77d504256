//! A descriptor table that is full: the daemon says so once, keeps what it has, and serves again
//! when there is room.

use std::io::{Read, Write};
use std::net::TcpStream;

use crate::criu::{Criu, RECORDS};
use crate::daemons::{Daemon, eventually};
use crate::hosts::Bystander;
use crate::proxy_standin::ProxyStandin;

/// What the daemons of these tests may have open, and what they are asked to.
const FILES: u32 = 48;
const TOO_MANY: u32 = 80;

const FULL: &str = "cannot accept connections now";

/// A snapshot whose images are all open: it needs no descriptor more.
fn begin_all_images(proxy: &mut ProxyStandin) {
    proxy.begin(0, "open");
    proxy.begin_image(0, 0, "inventory.img");
    proxy.begin_image(0, 1, "core-7.img");
    proxy.data(0, 0, 0, RECORDS);
}

#[track_caller]
fn end_all_images(proxy: &mut ProxyStandin) {
    proxy.data(0, 1, 0, RECORDS);
    proxy.end_image(0, 0, RECORDS.len());
    proxy.end_image(0, 1, RECORDS.len());
    proxy.end(0, 2, 2 * RECORDS.len());
    proxy.assert_acknowledged(0);
}

#[test]
fn a_cache_full_of_restores_serves_on() {
    let (mut cache, address) = Daemon::cache_with_files(FILES, &[]);
    let mut proxy = ProxyStandin::connect(address);
    begin_all_images(&mut proxy);
    cache.assert_receiving("open", 12);
    let mut restores: Vec<_> = (0..TOO_MANY).map(|_| Criu::restore(&cache)).collect();
    cache.assert_log(&["WARN", FULL, "Too many open files"]);
    end_all_images(&mut proxy);
    restores[0].request("cgroup.img");
    assert!(!restores[0].reply().unwrap());
    // Ten attempts to accept, and no more said about them.
    restores[1].assert_waits();
    cache.assert_logged(FULL, 1);
    drop(restores);
    cache.assert_alive();
    // The last of all that wait to be accepted.
    assert!(!Criu::restore(&cache).ask("cgroup.img"));
    assert!(eventually(|| cache.sessions() == 0));
    ProxyStandin::connect(address).whole(0, "fresh", "core-7.img", RECORDS);
    assert_eq!(Criu::in_dir_of("fresh", &cache).read("core-7.img"), RECORDS);
}

#[test]
fn a_cache_full_of_links_serves_on() {
    let (mut cache, address) = Daemon::cache_with_files(FILES, &[]);
    let mut proxy = ProxyStandin::connect(address);
    begin_all_images(&mut proxy);
    cache.assert_receiving("open", 12);
    let links: Vec<_> = (0..TOO_MANY).map(|_| TcpStream::connect(address).unwrap()).collect();
    cache.assert_log(&["WARN", "Too many open files"]);
    end_all_images(&mut proxy);
    drop(links);
    cache.assert_alive();
    let mut proxy = ProxyStandin::connect_when_there_is_room(address);
    proxy.whole(0, "fresh", "core-7.img", RECORDS);
}

#[test]
fn a_snapshot_with_more_images_than_descriptors_is_damaged() {
    let (mut cache, address) = Daemon::cache_with_files(FILES, &[]);
    let (mut other, mut proxy) = (ProxyStandin::connect(address), ProxyStandin::connect(address));
    begin_all_images(&mut other);
    cache.assert_receiving("open", 12);
    proxy.begin(0, "web");
    (0..TOO_MANY).for_each(|i| proxy.begin_image(0, i, &format!("core-{i}.img")));
    let cause = "cannot be held: Too many open files";
    proxy.assert_aborted(0, cause);
    let peer = proxy.link.address();
    cache.assert_log(&["WARN", "snapshot web from", &peer, "damaged: image core-", cause]);
    end_all_images(&mut other);
    proxy.whole(1, "fresh", "core-7.img", RECORDS);
    cache.assert_alive();
}

#[test]
fn a_dump_with_more_images_than_descriptors_fails() {
    let (cache, address) = Daemon::cache(&[]);
    let mut proxy = Daemon::proxy_with_files(Some(FILES), address, &[]);
    let bystander = Bystander::begin(&proxy, &cache, address);
    let mut dump = Criu::in_dir_of("web", &proxy);
    let open: Vec<_> =
        (0..TOO_MANY).map_while(|i| dump.try_create(&format!("core-{i}.img"))).collect();
    dump.assert_closed();
    let cause = "no room for the descriptor passed: too many open files (LimitNOFILE=)";
    proxy.assert_log(&["WARN", "snapshot web damaged", &Criu::peer(), "core-", cause]);
    drop(open);
    proxy.assert_alive();
    bystander.finish();
}

#[test]
fn a_proxy_full_of_dumps_serves_on() {
    let (cache, address) = Daemon::cache(&[]);
    let mut proxy = Daemon::proxy_with_files(Some(FILES), address, &[]);
    let mut dump = Criu::in_dir_of("web", &proxy);
    let open = dump.create("inventory.img");
    cache.assert_receiving("web", 0);
    let idle: Vec<_> = (0..TOO_MANY).map(|_| Criu::dump(&proxy)).collect();
    proxy.assert_log(&["WARN", FULL, "Too many open files"]);
    (&open).write_all(RECORDS).unwrap();
    drop((open, dump));
    cache.assert_log(&["snapshot web is whole"]);
    proxy.assert_logged(FULL, 1);
    drop(idle);
    proxy.assert_alive();
    Bystander::begin(&proxy, &cache, address).finish();
}

/// Nobody can tell an image that is closed early from one that has ended.
#[test]
fn an_image_that_there_is_no_descriptor_for_ends_its_restore() {
    // Whichever descriptor of those that an image needs is the one too many.
    for files in FILES..FILES + 3 {
        let (mut cache, address) = Daemon::cache_with_files(files, &[]);
        ProxyStandin::connect(address).whole(0, "web", "pages-1.img", &vec![7; 3_000_000]);
        let mut restore = Criu::restore(&cache);
        let mut open = Vec::new();
        while open.len() < TOO_MANY as usize {
            restore.request("pages-1.img");
            assert!(restore.reply().unwrap());
            let mut pipe = restore.take();
            if pipe.read(&mut [0; 10]).unwrap() == 0 {
                break;
            }
            open.push(pipe);
        }
        restore.assert_closed();
        cache.assert_log(&["WARN", "\"web\"", &Criu::peer(), "pages-1.img", "oo many open files"]);
        drop(open);
        cache.assert_alive();
        assert_eq!(Criu::in_dir_of("web", &cache).read("inventory.img"), RECORDS);
    }
}
