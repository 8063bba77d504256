//! One conversation on the control socket: calls in, replies out, until the peer goes or errs.

use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, SocketType, sockopt};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::net::UnixStream;
use tokio::time::{sleep, timeout};
use tracing::{Instrument, debug, error_span, warn};
use zlink::varlink_service::{Error as ServiceError, Info};
use zlink::{Call, Connection, Reply};

use super::calls::{
    ById, CallError, ConnectIn, ConnectOut, DescriptionIn, ExpectDumpIn, FinishDumpIn,
    FinishDumpOut, ListOut, OpenIn, OpenPagesIn, ShowOut, StatusOut, TimelineOut, ViewOut, WatchIn,
    WatchOut, WithdrawIn, WithdrawOut, method,
};
use super::guard::Guarded;
use super::model::{Role, SnapshotState};
use super::users::User;
use super::{Backend, DESCRIPTION, INTERFACE, Open, OpenPages, Reading, Refusal, Withdraw};
use crate::criu::names::check_id;
use crate::daemon::idlers::Idler;
use crate::daemon::journal;
use crate::daemon::sessions::Peer;

/// A peer that says nothing for so long is disconnected: its place is wanted.
const IDLE: Duration = Duration::from_secs(60);
/// A peer that does not read its reply for so long is disconnected.
const UNREAD: Duration = Duration::from_secs(10);
/// How often a watched snapshot is looked at.
const LOOK: Duration = Duration::from_millis(50);

/// A call before its method and parameters are looked at, so that a wrong one can be answered.
#[derive(Debug, Deserialize)]
struct Incoming {
    method: String,
    #[serde(default)]
    parameters: Option<Value>,
}

/// Every error that a call can be answered with.
#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Failure {
    Ours(CallError),
    Service(ServiceError<'static>),
}

impl From<CallError> for Failure {
    fn from(error: CallError) -> Failure {
        Failure::Ours(error)
    }
}

impl From<ServiceError<'static>> for Failure {
    fn from(error: ServiceError<'static>) -> Failure {
        Failure::Service(error)
    }
}

/// Why a conversation ended.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error("the peer has gone")]
    Gone,
    #[error("nothing was asked for {IDLE:?}")]
    Idle,
    #[error("of too many of its user's that call nothing it has done so for longest")]
    MadeWay,
    #[error("a reply was not read for {UNREAD:?}")]
    Unread,
    #[error("{0}")]
    Fault(zlink::Error),
}

impl From<zlink::Error> for Ended {
    fn from(error: zlink::Error) -> Ended {
        match error {
            zlink::Error::UnexpectedEof => Ended::Gone,
            error => Ended::Fault(error),
        }
    }
}

/// Answers a peer's calls until it goes. A fault of the peer's ends this conversation only.
/// While it calls nothing, as it does at first, it is an `idler` of its user's.
pub(super) async fn converse<B: Backend>(
    stream: UnixStream,
    peer: Peer,
    backend: Rc<B>,
    user: Rc<User>,
    idler: Idler,
) {
    let serve = async {
        match Conversation::run(stream, peer, &*backend, (&user, idler)).await {
            Ended::Fault(error) => warn!(
                message_id = journal::PROTOCOL_ERROR,
                criu_reason = %error,
                "control: {peer} is disconnected: {error}"
            ),
            ended => debug!("control: {peer} is disconnected: {ended}"),
        }
    };
    serve.instrument(error_span!("control", criu_peer = %peer)).await;
}

struct Conversation<'b, B> {
    connection: Connection<Guarded>,
    peer: Peer,
    backend: &'b B,
    user: &'b User,
}

impl<B: Backend> Conversation<'_, B> {
    async fn run(
        stream: UnixStream,
        peer: Peer,
        backend: &B,
        (user, mut idler): (&User, Idler),
    ) -> Ended {
        let connection = match zlink::unix::Stream::try_from(stream) {
            Ok(stream) => Connection::new(Guarded(stream)),
            Err(error) => return error.into(),
        };
        let mut conversation = Conversation { connection, peer, backend, user };
        loop {
            if let Err(ended) = conversation.next(idler).await {
                return ended;
            }
            idler = user.idle();
        }
    }

    async fn next(&mut self, mut idler: Idler) -> Result<(), Ended> {
        let (call, descriptors) = tokio::select! {
            // A call that has come is answered.
            biased;
            call = timeout(IDLE, self.connection.receive_call::<Incoming>()) => {
                call.map_err(|_| Ended::Idle)??
            }
            () = idler.turned_out() => return Err(Ended::MadeWay),
        };
        drop(idler);
        let _under_way = match self.user.begin_call() {
            Ok(call) => call,
            Err(_) if call.oneway() => return Ok(()),
            Err(reason) => return self.fail(CallError::Refused { reason }.into()).await,
        };
        let outcome = match call.method().method.as_str() {
            method::WATCH if call.more() => return self.watch(&call).await,
            method::WATCH => Err(ServiceError::ExpectedMore.into()),
            method::DROP => drop_snapshot(self.backend, call.method(), self.peer).await,
            method::ACCEPT_CHANGED_MEMORY => {
                accept_changed_memory(self.backend, call.method(), self.peer)
            }
            method::FINISH_DUMP => self.finish_dump(call.method()).await?,
            _ => answer(self.backend, call.method(), descriptors).await,
        };
        match outcome {
            _ if call.oneway() => Ok(()),
            Ok(reply) => self.reply(reply, false).await,
            Err(failure) => self.fail(failure).await,
        }
    }

    /// Replies with a snapshot whenever it has changed, until it is at its end.
    async fn watch(&mut self, call: &Call<Incoming>) -> Result<(), Ended> {
        let watch: WatchIn = match parameters(call.method()) {
            Ok(watch) => watch,
            Err(failure) => return self.fail(failure).await,
        };
        let mut last = None;
        loop {
            let now = self.backend.snapshot(&watch.id);
            match &now {
                None if last.is_some() || watch.known == Some(true) => {
                    return self.fail(no_such(&watch.id)).await;
                }
                Some(snapshot) if now != last => {
                    let more = match snapshot.state {
                        SnapshotState::Awaited
                        | SnapshotState::Receiving
                        | SnapshotState::Paged => true,
                        SnapshotState::Whole => watch.taken == Some(true),
                        SnapshotState::Damaged | SnapshotState::Taken => false,
                    };
                    self.reply(value(WatchOut { snapshot: snapshot.clone() }), more).await?;
                    if !more {
                        return Ok(());
                    }
                    last = now;
                }
                _ => {}
            }
            sleep(LOOK).await;
            if self.peer_has_gone() {
                return Err(Ended::Gone);
            }
        }
    }

    /// Waits for the end of a dump as long as the peer does.
    async fn finish_dump(&self, call: &Incoming) -> Result<Result<Value, Failure>, Ended> {
        let FinishDumpIn { pid, timeout_ms } = match parameters(call) {
            Ok(parameters) => parameters,
            Err(failure) => return Ok(Err(failure)),
        };
        let mut finished =
            std::pin::pin!(self.backend.finish_dump(pid, Duration::from_millis(timeout_ms)));
        loop {
            tokio::select! {
                finished = &mut finished => {
                    let outcome = finished.map_err(|refusal| refused(refusal, &pid.to_string()));
                    return Ok(outcome.map(|snapshot| value(FinishDumpOut { snapshot })));
                }
                () = sleep(LOOK) => if self.peer_has_gone() {
                    return Err(Ended::Gone);
                }
            }
        }
    }

    /// Whether the peer has closed the connection: nothing is read here while it waits for replies.
    fn peer_has_gone(&self) -> bool {
        let socket = &self.connection.read().read_half().socket;
        let mut socket = [PollFd::from_borrowed_fd(socket.as_fd(), PollFlags::empty())];
        poll(&mut socket, Some(&Timespec::default())).is_ok_and(|events| events > 0)
    }

    async fn reply(&mut self, parameters: Value, more: bool) -> Result<(), Ended> {
        let reply = Reply::new(Some(parameters)).set_continues(Some(more));
        let sent = timeout(UNREAD, self.connection.send_reply(&reply, Vec::new()));
        Ok(sent.await.map_err(|_| Ended::Unread)??)
    }

    async fn fail(&mut self, failure: Failure) -> Result<(), Ended> {
        let sent = timeout(UNREAD, self.connection.send_error(&failure, Vec::new()));
        Ok(sent.await.map_err(|_| Ended::Unread)??)
    }
}

async fn drop_snapshot(
    backend: &impl Backend,
    call: &Incoming,
    peer: Peer,
) -> Result<Value, Failure> {
    let ById { id } = parameters(call)?;
    backend.drop_snapshot(&id, peer).await.map_err(|refusal| refused(refusal, &id))?;
    Ok(nothing())
}

fn accept_changed_memory(
    backend: &impl Backend,
    call: &Incoming,
    peer: Peer,
) -> Result<Value, Failure> {
    let ById { id } = parameters(call)?;
    backend.accept_changed_memory(&id, peer).map_err(|refusal| refused(refusal, &id))?;
    Ok(nothing())
}

/// Answers a call that has one reply.
async fn answer(
    backend: &impl Backend,
    call: &Incoming,
    descriptors: Vec<OwnedFd>,
) -> Result<Value, Failure> {
    match call.method.as_str() {
        method::STATUS => Ok(value(StatusOut { status: backend.status() })),
        method::LIST => Ok(value(ListOut { snapshots: backend.list() })),
        method::SHOW => {
            let ById { id } = parameters(call)?;
            let (snapshot, images) = backend.show(&id).ok_or_else(|| no_such(&id))?;
            Ok(value(ShowOut { snapshot, images }))
        }
        method::TIMELINE => {
            let ById { id } = parameters(call)?;
            let phases = backend.timeline(&id).ok_or_else(|| no_such(&id))?;
            Ok(value(TimelineOut { phases }))
        }
        method::OPEN => {
            open(backend, parameters(call)?, descriptors)?;
            Ok(nothing())
        }
        method::OPEN_PAGES => {
            open_pages(backend, parameters(call)?, descriptors)?;
            Ok(nothing())
        }
        method::WITHDRAW => {
            let WithdrawIn { id, attempt, reason, to } = parameters(call)?;
            must_be_id(&id)?;
            let request = Withdraw { id: id.clone(), attempt, reason, to };
            let withdrawn = backend.withdraw(request).await;
            let outcome = withdrawn.map_err(|refusal| refused(refusal, &id))?;
            Ok(value(WithdrawOut { outcome }))
        }
        method::CONNECT => {
            let ConnectIn { to, timeout_ms } = parameters(call)?;
            let link = backend.connect(to.as_deref(), Duration::from_millis(timeout_ms)).await;
            let link = link.map_err(|refusal| refused(refusal, ""))?;
            Ok(value(ConnectOut { link }))
        }
        method::VIEW => {
            let ById { id } = parameters(call)?;
            let prepared = backend.prepare_view(&id).await;
            let images = prepared.and_then(|()| backend.view(&id));
            let images = images.map_err(|refusal| refused(refusal, &id))?;
            Ok(value(ViewOut { images }))
        }
        method::EXPECT_DUMP => {
            let ExpectDumpIn { pid } = parameters(call)?;
            backend.expect_dump(pid).map_err(|refusal| refused(refusal, &pid.to_string()))?;
            Ok(nothing())
        }
        method::GET_INFO => Ok(value(info(backend.status().role))),
        method::GET_DESCRIPTION => match parameters(call)? {
            DescriptionIn { interface } if interface == INTERFACE => {
                Ok(serde_json::json!({ "description": DESCRIPTION }))
            }
            DescriptionIn { interface } => {
                Err(ServiceError::InterfaceNotFound { interface: interface.into() }.into())
            }
        },
        other => Err(ServiceError::MethodNotFound { method: other.to_owned().into() }.into()),
    }
}

fn open(backend: &impl Backend, call: OpenIn, descriptors: Vec<OwnedFd>) -> Result<(), Failure> {
    let OpenIn { id, to, take, again, parent, copy, view, attempt } = call;
    let attempt = attempt.unwrap_or(0);
    must_be_id(&id)?;
    parent.as_deref().map_or(Ok(()), must_be_id)?;
    let (socket, listening) = stream_socket(descriptors, &[AddressFamily::UNIX])?;
    let reading = match (take.unwrap_or(true), again.unwrap_or(false)) {
        (false, _) => Reading::Look,
        (true, false) => Reading::Take,
        (true, true) => Reading::TakeAgain,
    };
    let (copy, view) = (copy.unwrap_or(false), view.unwrap_or(false));
    let request = Open { id: id.clone(), to, parent, attempt, reading, copy, view, listening };
    backend.open(request, socket).map_err(|refusal| refused(refusal, &id))
}

fn open_pages(
    backend: &impl Backend,
    call: OpenPagesIn,
    descriptors: Vec<OwnedFd>,
) -> Result<(), Failure> {
    let OpenPagesIn { id, parent, to, attempt } = call;
    let attempt = attempt.unwrap_or(0);
    must_be_id(&id)?;
    parent.as_deref().map_or(Ok(()), must_be_id)?;
    let families = [AddressFamily::UNIX, AddressFamily::INET, AddressFamily::INET6];
    let (socket, listening) = stream_socket(descriptors, &families)?;
    let request = OpenPages { id: id.clone(), parent, to, attempt, listening };
    backend.open_pages(request, socket).map_err(|refusal| refused(refusal, &id))
}

fn must_be_id(id: &str) -> Result<(), Failure> {
    check_id(id).map_err(|bad| CallError::Refused { reason: bad.to_string() }.into())
}

/// The descriptor of a call, and whether it listens.
fn stream_socket(
    descriptors: Vec<OwnedFd>,
    families: &[AddressFamily],
) -> Result<(OwnedFd, bool), Failure> {
    let socket = descriptors.into_iter().next().ok_or(CallError::NoDescriptor)?;
    let listening = prepare(&socket, families).map_err(|_| CallError::NotASocket)?;
    Ok((socket, listening))
}

/// Makes sure that a descriptor is a stream socket of one of these families, and tells whether it listens.
fn prepare(socket: &OwnedFd, families: &[AddressFamily]) -> rustix::io::Result<bool> {
    let stream = families.contains(&sockopt::socket_domain(socket)?)
        && sockopt::socket_type(socket)? == SocketType::STREAM;
    if !stream {
        return Err(rustix::io::Errno::PROTOTYPE);
    }
    // zlink receives without MSG_CMSG_CLOEXEC.
    rustix::io::fcntl_setfd(socket, rustix::io::FdFlags::CLOEXEC)?;
    rustix::io::ioctl_fionbio(socket, true)?;
    sockopt::socket_acceptconn(socket)
}

fn info(role: Role) -> Info<'static> {
    let product = match role {
        Role::Proxy => "criu-image-proxy",
        Role::Cache => "criu-image-cache",
    };
    let interfaces = ["org.varlink.service", INTERFACE];
    Info::new(
        env!("CARGO_PKG_NAME"),
        product,
        env!("CARGO_PKG_VERSION"),
        "https://criu.org",
        interfaces,
    )
}

/// The parameters of a call; a wrong one is named, as Varlink has it.
fn parameters<P: DeserializeOwned>(call: &Incoming) -> Result<P, Failure> {
    let given = call.parameters.clone().unwrap_or_else(nothing);
    serde_json::from_value(given).map_err(|error| {
        ServiceError::InvalidParameter { parameter: error.to_string().into() }.into()
    })
}

fn no_such(id: &str) -> Failure {
    CallError::NoSuchSnapshot { id: id.to_owned() }.into()
}

fn refused(refusal: Refusal, id: &str) -> Failure {
    match refusal {
        Refusal::NoSuchSnapshot => no_such(id),
        Refusal::Refused(reason) => CallError::Refused { reason }.into(),
    }
}

fn nothing() -> Value {
    Value::Object(serde_json::Map::new())
}

fn value(reply: impl Serialize) -> Value {
    // Strings, numbers and arrays of them: there is nothing in a reply that JSON has not.
    serde_json::to_value(reply).unwrap_or_default()
}
