//! The connections to caches, one for each destination, made when there is something to send.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use tokio::net::{TcpStream, lookup_host};
use tokio::sync::Mutex;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use crate::config::ProxySettings;
use crate::control::model::LinkStatus;
use crate::daemon::journal;
use crate::wire::lane::{self, DEFAULT_CAPACITY, LaneError, Pipes, Reader, Writer};
use crate::wire::message::{Hello, Message};

use super::connection::Connection;

/// The first pause between two attempts to connect; it doubles up to the last.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LAST_PAUSE: Duration = Duration::from_secs(5);

/// Every link of the proxy.
#[derive(Debug)]
pub struct Links {
    name: String,
    by_destination: RefCell<BTreeMap<String, Rc<Link>>>,
}

/// The link to one cache.
#[derive(Debug)]
struct Link {
    destination: String,
    state: RefCell<State>,
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
    pub fn new(name: String) -> Links {
        Links { name, by_destination: RefCell::default() }
    }

    /// The connection to a cache; makes it if need be, trying again until `give_up_after` is over.
    /// The error says why there is none.
    pub async fn connect(
        &self,
        destination: &str,
        settings: &ProxySettings,
    ) -> Result<Rc<Connection>, String> {
        let link = self.link(destination);
        // Each dump waits that long, also for another that connects.
        let deadline = Instant::now() + settings.link.give_up_after;
        let Ok(_only_one) = timeout_at(deadline, link.connecting.lock()).await else {
            return Err(no_link(destination, settings, &link.status().why));
        };
        if let Some(connection) = link.connection() {
            return Ok(connection);
        }
        let mut pause = FIRST_PAUSE;
        loop {
            let limit = settings.link.connect_timeout.min(deadline - Instant::now());
            let why = match attempt(destination, &self.name, settings, limit).await {
                Ok((reader, writer, cache)) => {
                    tracing::info!(
                        message_id = journal::LINK_UP,
                        criu_peer = destination,
                        "link to {destination} ({cache}) is up"
                    );
                    return Ok(link.up(reader, writer, settings));
                }
                Err(why) => why,
            };
            link.down(&why);
            if Instant::now() + pause >= deadline {
                let waited = settings.link.give_up_after;
                tracing::warn!(
                    message_id = journal::LINK_LOST,
                    criu_peer = destination,
                    "no link to {destination}, given up after {waited:?}: {why}"
                );
                return Err(no_link(destination, settings, &why));
            }
            tracing::debug!("no link to {destination}, trying again in {pause:?}: {why}");
            sleep(pause).await;
            pause = (pause * 2).min(LAST_PAUSE);
        }
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
                state: RefCell::new(State::Down { why: "nothing to send yet".to_owned() }),
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

    /// Puts a new connection into use, until it is over.
    fn up(
        self: &Rc<Link>,
        reader: Reader,
        writer: Writer,
        settings: &ProxySettings,
    ) -> Rc<Connection> {
        let (connection, over) = Connection::start(reader, writer, &settings.link);
        *self.state.borrow_mut() = State::Up(connection.clone());
        let (link, shared) = (self.clone(), connection.clone());
        tokio::task::spawn_local(async move {
            let why = over.await;
            link.down(&why);
            let lost = shared.close(&format!("the link to {} broke: {why}", link.destination));
            let (message_id, criu_peer) = (journal::LINK_LOST, link.destination.as_str());
            if lost > 0 {
                tracing::warn!(
                    message_id,
                    criu_peer,
                    "link to {criu_peer} lost with {lost} snapshots under way: {why}"
                );
            } else {
                tracing::info!(message_id, criu_peer, "idle link to {criu_peer} ended: {why}");
            }
        });
        connection
    }
}

fn no_link(destination: &str, settings: &ProxySettings, why: &str) -> String {
    let waited = settings.link.give_up_after;
    format!("no link to the cache {destination} within {waited:?}: {why}")
}

/// Connects and shakes hands. Returns the cache's name for itself.
async fn attempt(
    destination: &str,
    name: &str,
    settings: &ProxySettings,
    limit: Duration,
) -> Result<(Reader, Writer, String), String> {
    let in_time = async {
        let mut addresses = resolve(destination).await?;
        addresses.retain(|address| settings.insecure || address.ip().is_loopback());
        if addresses.is_empty() {
            return Err(format!(
                "{destination} is not a loopback address and the link is plaintext: set \
                 `insecure = true` to allow it on a network that you trust"
            ));
        }
        let stream = TcpStream::connect(&addresses[..]).await.map_err(|error| error.to_string())?;
        let outgoing = usize::try_from(settings.link.max_chunk).unwrap_or(usize::MAX);
        let pipes = Pipes { incoming: DEFAULT_CAPACITY, outgoing };
        let (mut reader, mut writer) = lane::split(stream, pipes, settings.link.keep_alive)
            .map_err(|error| error.to_string())?;
        let cache = shake_hands(&mut reader, &mut writer, name).await?;
        Ok((reader, writer, cache))
    };
    timeout(limit, in_time).await.unwrap_or_else(|_| Err(format!("no answer within {limit:?}")))
}

async fn resolve(destination: &str) -> Result<Vec<SocketAddr>, String> {
    match lookup_host(destination).await {
        Ok(addresses) => Ok(addresses.collect()),
        Err(error) => Err(format!("{destination} cannot be resolved: {error}")),
    }
}

async fn shake_hands(
    reader: &mut Reader,
    writer: &mut Writer,
    name: &str,
) -> Result<String, String> {
    let hello = Message::Hello(Hello { name: name.to_owned(), features: Vec::new() });
    let greeting = async {
        writer.send_preface().await?;
        writer.send(&hello).await?;
        reader.receive_preface().await?;
        Ok::<_, LaneError>(reader.receive().await?.0)
    };
    match greeting.await.map_err(|error| error.to_string())? {
        Message::Welcome(welcome) => Ok(welcome.name),
        Message::Goodbye(goodbye) => Err(format!("the cache refuses: {}", goodbye.reason)),
        other => Err(format!("a {} instead of a welcome", other.kind().as_str_name())),
    }
}
