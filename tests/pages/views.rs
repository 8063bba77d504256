//! Pages that came in several rounds are in one file before the restore from a view asks for it.

use std::os::unix::net::UnixStream;

use criu_image_relay::control::Client;
use criu_image_relay::control::model::SnapshotState;
use criu_image_relay::criu::page_server::header::Dialect;
use criu_image_relay::criu::pages::{PAGE_SIZE, Space};

use crate::bench::Bench;
use crate::criu::{Criu, RECORDS};
use crate::daemons::eventually;
use crate::model::{Contained, filled};
use crate::page_client::{HELD, PageClient};

const TASK: Space = Space::Task(7);

/// A snapshot of two rounds, with these images beside its pages.
fn send(bench: &Bench, id: &str, images: &[(&str, &[u8])]) {
    let mut client = PageClient::on(bench.proxy.open_pages_of(id, None), Dialect::Long);
    client.open(TASK).unwrap();
    client.pages(TASK, 16 * PAGE_SIZE, false, &[filled(1), filled(2)].concat()).unwrap();
    assert_eq!(client.force_close().unwrap(), HELD);
    client.open(TASK).unwrap();
    client.pages(TASK, 16 * PAGE_SIZE, false, &filled(3)).unwrap();
    client.hole(TASK, 17 * PAGE_SIZE, 1).unwrap();
    assert_eq!(client.force_close().unwrap(), HELD);

    let mut dump = Criu::in_dir_of(id, &bench.proxy);
    dump.write("core-7.img", RECORDS);
    for (name, bytes) in images {
        dump.write(name, bytes);
    }
    dump.complete();
    bench.cache.assert_state(id, SnapshotState::Whole);
}

fn assert_pages(bench: &Bench, id: &str) {
    let pages = [3, 2].map(|number| (number, false));
    bench.assert_holds(id, &Contained::from([(TASK, (16..).zip(pages).collect())]));
}

#[test]
fn what_needs_a_view_has_its_pages_together_before_a_restore_asks() {
    let bench = Bench::start();
    send(&bench, "usual", &[("nftables-9.img", b"")]);
    assert_eq!(bench.cache.show("usual").unwrap().needs_view, "");
    send(&bench, "web", &[("nftables-9.img", b"table ip t {}")]);
    assert!(bench.cache.show("web").unwrap().needs_view.starts_with("nftables-9.img: "));
    assert!(eventually(|| bench.cache.has_memfd("pages-1.img")));
    assert_pages(&bench, "web");
    bench.cache.drop_snapshot("web");
    assert!(eventually(|| !bench.cache.has_memfd("pages-1.img")), "nobody said that of the other");
    assert_pages(&bench, "usual");
}

#[test]
fn a_restore_that_waits_with_a_view_has_its_pages_together_before_it_asks() {
    let bench = Bench::start();
    let (waits, theirs) = UnixStream::pair().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut client = Client::connect(bench.cache.dir().join("control.sock")).await.unwrap();
        client.hold("web", false, false, true, theirs.into()).await.unwrap();
    });
    send(&bench, "web", &[]);
    assert!(eventually(|| bench.cache.has_memfd("pages-1.img")));
    drop(waits);
    assert!(eventually(|| bench.cache.try_hold("web", false, false).is_ok()));
    assert_pages(&bench, "web");
}
