//! What speaks in the place of CRIU's lazy-pages daemon, at either daemon.

use std::net::SocketAddr;

use criu_image_relay::criu::page_server::command::Command;
use criu_image_relay::criu::page_server::header::{Dialect, Header};
use criu_image_relay::criu::pagemap::Pagemap;
use criu_image_relay::criu::pages::{Contents, PAGE_SIZE, Run};

use crate::daemons::Daemon;
use crate::page_client::PageClient;
use crate::proxy_standin::ProxyStandin;

pub(crate) const DIALECTS: [Dialect; 2] = [Dialect::Short, Dialect::Long];
/// The task whose pages are asked for.
pub(crate) const TASK: u64 = 7;

/// A client of a page server.
pub(crate) struct Lazy(pub(crate) PageClient);

impl Lazy {
    /// On a socket that was opened for a snapshot.
    pub(crate) fn of(id: &str, daemon: &Daemon, dialect: Dialect) -> Lazy {
        Lazy(PageClient::on(daemon.open_pages(id), dialect))
    }

    /// On a port.
    pub(crate) fn at(address: SocketAddr) -> Lazy {
        Lazy(PageClient::at(address, Dialect::Long))
    }

    pub(crate) fn say(&mut self, command: Command) {
        self.say_header(command.header());
    }

    pub(crate) fn say_header(&mut self, header: Header) {
        self.0.header(header).unwrap();
    }

    pub(crate) fn ask(&mut self, address: u64, pages: u64) {
        self.say(Command::Get { id: TASK, address, pages });
    }

    /// Asks for pages, and gives the numbers of those that come.
    #[track_caller]
    pub(crate) fn get(&mut self, address: u64, pages: u64) -> Vec<u8> {
        self.ask(address, pages);
        self.hear(address)
    }

    /// The numbers of the pages that were asked for.
    #[track_caller]
    pub(crate) fn hear(&mut self, address: u64) -> Vec<u8> {
        let bytes = self.0.given(TASK, address).unwrap();
        let number = |page: &[u8]| {
            assert!(page.iter().all(|byte| *byte == page[0]));
            page[0]
        };
        bytes.chunks(4096).map(number).collect()
    }

    /// Asks for the pages of [`images`]: it is given them up to the first that is not there.
    #[track_caller]
    pub(crate) fn assert_given(&mut self) {
        assert_eq!(self.get(0x10000, 5), [16, 17, 18, 19, 20]);
        assert_eq!(self.get(0x11000, 3), [17, 18, 19], "across the border of two entries");
        assert_eq!(self.get(0x13000, 900), [19, 20], "fewer than were asked for");
        assert_eq!(self.get(0x20000, 1), [32]);
    }

    /// Nothing more comes but the end.
    #[track_caller]
    pub(crate) fn assert_ended(&mut self) {
        assert_eq!(self.0.rest(), b"");
    }
}

/// The images of task 7: pages 16 to 18, lazy ones 19 and 20, and page 32, each filled with its number.
pub(crate) fn images() -> [(&'static str, Vec<u8>); 2] {
    let mut pagemap = Pagemap::new(1);
    for (page, pages, lazy) in [(16, 3, false), (19, 2, true), (32, 1, false)] {
        pagemap.push(Run::new(page * PAGE_SIZE, pages, Contents::Present { lazy }).unwrap());
    }
    let pages = [16, 17, 18, 19, 20, 32].map(|number: u8| [number; 4096]);
    [("pagemap-7.img", pagemap.encode()), ("pages-1.img", pages.concat())]
}

/// Sends a whole snapshot.
pub(crate) fn send(proxy: &mut ProxyStandin, snapshot: u32, id: &str, images: &[(&str, Vec<u8>)]) {
    proxy.begin(snapshot, id);
    for (number, (name, bytes)) in (0..).zip(images) {
        proxy.image(snapshot, number, name, bytes);
    }
    let bytes = images.iter().map(|(_, bytes)| bytes.len()).sum();
    proxy.complete(snapshot, 99, images.len() as u64, bytes);
}
