//! The connections to caches, one for each destination, made when there is something to send. Or the
//! one that was given to the proxy: then there is no other.

use std::cell::{OnceCell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use tokio::net::{TcpStream, UnixStream, lookup_host};
use tokio::sync::Mutex;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tracing::Span;

use crate::config::ProxySettings;
use crate::control::model::LinkStatus;
use crate::daemon::given::GivenLink;
use crate::daemon::local_peers::admit_stream;
use crate::daemon::outages::Outages;
use crate::daemon::sessions::Sessions;
use crate::sys::connected::{Peer, Stream};
use crate::wire::lane::{Reader, Writer};
use crate::wire::message::Welcome;

use super::connection::Connection;
use super::greeting::greet;

/// The first pause between two attempts to connect; it doubles up to the last.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// Whoever asks meanwhile whether there is a link waits for a few seconds only.
const LAST_PAUSE: Duration = Duration::from_secs(1);

/// Every link of the proxy.
#[derive(Debug)]
pub struct Links {
    name: String,
    by_destination: RefCell<BTreeMap<String, Rc<Link>>>,
    /// The peer of the link that was given, which is the only destination then.
    given: OnceCell<String>,
    given_link: GivenLink,
    /// Dumps that wait for a link.
    waiting: Sessions,
}

/// The link to one cache.
#[derive(Debug)]
struct Link {
    destination: String,
    /// What is told of it is told in here, and not in the span of whoever has it made: that has another peer.
    span: Span,
    state: RefCell<State>,
    outages: Outages,
    /// Held by the one who connects; others wait for the outcome.
    connecting: Mutex<()>,
}

#[derive(Debug, Clone)]
enum State {
    Down { why: String },
    Up(Rc<Connection>),
}

impl Links {
    /// No link yet. `name` is what this proxy calls itself.
    pub fn new(name: String) -> Rc<Links> {
        Rc::new(Links {
            name,
            by_destination: RefCell::default(),
            given: OnceCell::new(),
            given_link: GivenLink::default(),
            waiting: Sessions::default(),
        })
    }

    /// Takes a connection that somebody else made as the only link, and shakes hands on it at once:
    /// its other side waits. The error says why it may not be used.
    pub fn join(
        self: &Rc<Links>,
        stream: Stream,
        settings: Rc<ProxySettings>,
    ) -> Result<(), String> {
        let peer = stream.peer();
        if !settings.insecure && !peer.is_local() {
            return Err(plaintext(&peer.to_string()));
        }
        let destination = self.given.get_or_init(|| peer.to_string());
        let (links, link) = (self.clone(), self.link(destination));
        tokio::task::spawn_local(async move {
            let only_one = link.connecting.lock().await;
            let well = match greet(stream, &links.name, &settings).await {
                Ok((reader, writer, cache)) => {
                    link.tell_up(&cache.name);
                    let (_, over) = link.up(reader, writer, &cache, &settings);
                    drop(only_one);
                    over.await.is_ok_and(|lost| lost == 0)
                }
                Err(error) => {
                    link.down(&error.to_string());
                    let missing = format!("no link to {}", link.destination);
                    link.span.in_scope(|| link.outages.tell_missing(&missing, &error.to_string()));
                    // A peer that has nothing to say may leave.
                    error.is_end() && links.waiting.live() == 0
                }
            };
            links.given_link.ended(well);
        });
        Ok(())
    }

    /// Waits for the end of the link that was given. Returns whether nothing was lost with it.
    pub async fn over(&self) -> bool {
        self.given_link.over().await
    }

    /// Where snapshots go that name no destination.
    pub fn destination(&self, settings: &ProxySettings) -> String {
        self.given.get().unwrap_or(&settings.cache).clone()
    }

    /// Whether snapshots can go there; the error says why not.
    pub fn check(&self, destination: &str) -> Result<(), String> {
        match self.given.get() {
            Some(given) if given != destination => Err(format!(
                "nothing can be sent to {destination}: this proxy was given the only link it \
                 speaks on, that to {given} (--ps-socket)"
            )),
            _ => Ok(()),
        }
    }

    /// The connection to a cache; makes it if need be, trying again until `give_up_after` is over.
    /// The error says why there is none.
    pub async fn connect(
        &self,
        destination: &str,
        settings: &ProxySettings,
    ) -> Result<Rc<Connection>, String> {
        self.connect_within(destination, settings, settings.link.give_up_after).await
    }

    /// The state of the link to a cache, which is made if need be, trying again until `patience` is over.
    pub async fn look_for(
        &self,
        destination: &str,
        settings: &ProxySettings,
        patience: Duration,
    ) -> LinkStatus {
        // The link knows why there is none.
        let _ = self.connect_within(destination, settings, patience).await;
        self.link(destination).status()
    }

    /// The same as [`connect`](Links::connect), with another time until it gives up, unless `give_up_after` is shorter.
    pub async fn connect_within(
        &self,
        destination: &str,
        settings: &ProxySettings,
        patience: Duration,
    ) -> Result<Rc<Connection>, String> {
        self.check(destination)?;
        let _waiting = self.waiting.enter();
        let link = self.link(destination);
        // Each dump waits that long, also for another that connects.
        let patience = patience.min(settings.link.give_up_after);
        let deadline = Instant::now() + patience;
        let Ok(_only_one) = timeout_at(deadline, link.connecting.lock()).await else {
            return Err(no_link(destination, patience, &link.status().why));
        };
        if let Some(connection) = link.connection() {
            return Ok(connection);
        }
        if self.given.get().is_some() {
            return Err(format!("the only link, to {destination}, is over: {}", link.status().why));
        }
        let mut pause = FIRST_PAUSE;
        loop {
            let limit = settings.link.connect_timeout.min(deadline - Instant::now());
            let why = match attempt(destination, &self.name, settings, limit).await {
                Ok((reader, writer, cache)) => {
                    link.tell_up(&cache.name);
                    return Ok(link.up(reader, writer, &cache, settings).0);
                }
                Err(why) => why,
            };
            link.down(&why);
            if Instant::now() + pause >= deadline {
                let missing = format!("no link to {destination}, given up after {patience:?}");
                link.span.in_scope(|| link.outages.tell_missing(&missing, &why));
                return Err(no_link(destination, patience, &why));
            }
            tracing::debug!("no link to {destination}, trying again in {pause:?}: {why}");
            sleep(pause).await;
            pause = (pause * 2).min(LAST_PAUSE);
        }
    }

    /// The connection to a cache, if it is up.
    pub fn connected(&self, destination: &str) -> Option<Rc<Connection>> {
        self.by_destination.borrow().get(destination)?.connection()
    }

    /// Each link's state, for the control interface. The configured cache is always among them.
    pub fn status(&self, configured: &str) -> Vec<LinkStatus> {
        self.link(configured);
        self.by_destination.borrow().values().map(|link| link.status()).collect()
    }

    /// The links in words, for the status line.
    pub fn describe(&self, configured: &str) -> String {
        let describe = |link: LinkStatus| {
            let state = if link.up { "up" } else { "down" };
            format!("link to {} {state} ({})", link.peer, link.why)
        };
        self.status(configured).into_iter().map(describe).collect::<Vec<_>>().join(", ")
    }

    fn link(&self, destination: &str) -> Rc<Link> {
        let new = || {
            Rc::new(Link {
                destination: destination.to_owned(),
                span: tracing::error_span!(parent: None, "link", criu_peer = destination),
                state: RefCell::new(State::Down { why: "nothing to send yet".to_owned() }),
                outages: Outages::default(),
                connecting: Mutex::new(()),
            })
        };
        let mut links = self.by_destination.borrow_mut();
        links.entry(destination.to_owned()).or_insert_with(new).clone()
    }
}

impl Link {
    fn connection(&self) -> Option<Rc<Connection>> {
        match &*self.state.borrow() {
            State::Up(connection) if !connection.is_closed() => Some(connection.clone()),
            _ => None,
        }
    }

    fn status(&self) -> LinkStatus {
        let (up, why) = match &*self.state.borrow() {
            State::Up(_) => (true, "connected".to_owned()),
            State::Down { why } => (false, why.clone()),
        };
        LinkStatus { peer: self.destination.clone(), up, why }
    }

    fn down(&self, why: &str) {
        *self.state.borrow_mut() = State::Down { why: why.to_owned() };
    }

    /// Puts a new connection into use, until it is over; then the task tells how many snapshots were
    /// lost with it.
    fn up(
        self: &Rc<Link>,
        reader: Reader,
        writer: Writer,
        cache: &Welcome,
        settings: &ProxySettings,
    ) -> (Rc<Connection>, JoinHandle<usize>) {
        let (connection, over) = Connection::start(reader, writer, &settings.link);
        connection.heard(cache);
        *self.state.borrow_mut() = State::Up(connection.clone());
        let (link, shared) = (self.clone(), connection.clone());
        let task = tokio::task::spawn_local(async move {
            let over = over.await;
            link.down(&over.why);
            let lost =
                shared.close(&format!("the link to {} broke: {}", link.destination, over.why));
            let told = format!("link to {}", link.destination);
            link.span.in_scope(|| link.outages.tell_over(&told, &over.why, over.fault, lost));
            lost
        });
        (connection, task)
    }

    fn tell_up(&self, cache: &str) {
        let link = format!("link to {} ({cache})", self.destination);
        self.span.in_scope(|| self.outages.tell_up(&link));
    }
}

fn no_link(destination: &str, waited: Duration, why: &str) -> String {
    format!("no link to the cache {destination} within {waited:?}: {why}")
}

fn plaintext(destination: &str) -> String {
    format!(
        "{destination} is not a loopback address and the link is plaintext: set `insecure = true` \
         to allow it on a network that you trust"
    )
}

/// Connects, shakes hands, and checks who that was if it is on this machine. Returns what the cache says of itself.
async fn attempt(
    destination: &str,
    name: &str,
    settings: &ProxySettings,
    limit: Duration,
) -> Result<(Reader, Writer, Welcome), String> {
    let in_time = async {
        let stream = connect(destination, settings).await?;
        let (reader, writer, welcome) =
            greet(stream, name, settings).await.map_err(|error| error.to_string())?;
        // Whose socket it is that answers is known when it has answered: until a program has accepted a connection, the
        // kernel counts it as root's.
        admit_stream(reader.stream(), &settings.allow_uids, true)
            .await
            .map_err(|why| format!("what listens at {destination} gets nothing: {why}"))?;
        Ok((reader, writer, welcome))
    };
    // What is left of a longer time has fractions that nobody wants to read.
    let told = Duration::from_millis(u64::try_from(limit.as_millis()).unwrap_or(u64::MAX));
    timeout(limit, in_time).await.unwrap_or_else(|_| Err(format!("no answer within {told:?}")))
}

async fn connect(destination: &str, settings: &ProxySettings) -> Result<Stream, String> {
    let in_words = |error: io::Error| error.to_string();
    if destination.starts_with('/') {
        return UnixStream::connect(destination).await.map(Stream::from_unix).map_err(in_words);
    }
    let mut addresses = resolve(destination).await?;
    addresses.retain(|address| settings.insecure || Peer::Tcp(*address).is_local());
    if addresses.is_empty() {
        return Err(plaintext(destination));
    }
    let connected = async {
        let stream = TcpStream::connect(&addresses[..]).await?;
        let peer = stream.peer_addr()?;
        Stream::from_tcp(stream, peer)
    };
    connected.await.map_err(in_words)
}

async fn resolve(destination: &str) -> Result<Vec<SocketAddr>, String> {
    match lookup_host(destination).await {
        Ok(addresses) => Ok(addresses.collect()),
        Err(error) => Err(format!("{destination} cannot be resolved: {error}")),
    }
}
