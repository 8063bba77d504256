//! What comes on a link: snapshots and rounds in any interleaving, into the store.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::rc::Rc;
use std::time::Instant;

use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::Cache;
use super::answers::Answer;
use super::link::Over;
use super::link_places::Activity;
use super::regions;
use super::rounds::{ArrivingRound, Rounds};
use super::waits::Waits;
use crate::criu::names::check_id;
use crate::criu::pages::{Run, Space};
use crate::daemon::journal;
use crate::daemon::sessions::Session;
use crate::metrics::refusals::Reason;
use crate::store::{Image, Key, Memory, Refused, Sender, Store, Withdrawn, one_more};
use crate::wire::lane::{LaneError, Reader};
use crate::wire::message::{
    ImageAck, ImageReady, Message, Outcome, REGIONS_MAX, SnapshotAck, SnapshotReady,
    SnapshotWithdraw, SnapshotWithdrawn,
};
use crate::wire::receiver::{Action, Limits, Receiver};
use crate::wire::spaces::all_spaces;

/// Why a snapshot ends that is not listed any more.
pub(super) const DROPPED: &str = "it was dropped by the operator";

/// The incoming direction.
pub(super) struct Incoming<'a> {
    cache: &'a Cache,
    store: &'a Store,
    sender: &'a Sender,
    receiver: Receiver,
    snapshots: HashMap<u32, Arriving>,
    rounds: Rounds,
    replies: mpsc::Sender<Answer>,
    regions: JoinSet<()>,
    /// Whether an answer had to be left out: the peer does not read.
    deaf: bool,
    waits: Waits,
    activity: Rc<Activity>,
}

/// A snapshot under way.
struct Arriving {
    id: String,
    key: Key,
    images: HashMap<u32, Rc<Image>>,
    started: Instant,
    _busy: [Session; 2],
}

impl<'a> Incoming<'a> {
    /// Nothing has come yet. `replies` takes what the peer is to be told.
    pub(super) fn new(
        cache: &'a Cache,
        sender: &'a Sender,
        limits: Limits,
        replies: mpsc::Sender<Answer>,
        activity: Rc<Activity>,
    ) -> Incoming<'a> {
        let receiver = Receiver::new(limits);
        Incoming {
            cache,
            store: &cache.store,
            sender,
            receiver,
            snapshots: HashMap::new(),
            rounds: Rounds::new(),
            replies,
            regions: JoinSet::new(),
            deaf: false,
            waits: Waits::default(),
            activity,
        }
    }

    /// Receives until the link is over; says why it is.
    pub(super) async fn receive(&mut self, mut reader: Reader) -> Over {
        loop {
            let received = match reader.receive().await {
                Ok(received) => received,
                Err(error) => return error.into(),
            };
            let moves = !matches!(received.0, Message::KeepAlive(_));
            if let Err(over) = self.act(&mut reader, received).await {
                return over;
            }
            if moves {
                self.activity.moves();
            }
            if self.deaf {
                let why = "it leaves too many answers unread".to_owned();
                return Over::Refused(Reason::Stalled, why);
            }
        }
    }

    async fn act(
        &mut self,
        reader: &mut Reader,
        (message, len): (Message, usize),
    ) -> Result<(), Over> {
        match self.receiver.receive(message, len)? {
            Action::Nothing => {}
            Action::Begin { snapshot, id, named, parent, attempt } => {
                self.begin(snapshot, id, named, parent.as_deref(), attempt).await;
            }
            Action::BeginRound { snapshot, id, parent, attempt } => {
                self.begin_round(snapshot, id, parent.as_deref(), attempt).await;
            }
            Action::Space { snapshot, space } => self.space(snapshot, space),
            Action::Pages { snapshot, run } => self.pages(snapshot, run),
            Action::PageData { snapshot } => {
                return self.page_data(reader, snapshot, len).await;
            }
            Action::Forget { id } => self.forget(&id),
            Action::Withdraw(withdraw) => self.withdraw(&withdraw).await,
            Action::CompleteRound { snapshot, spaces, bytes } => {
                self.complete_round(snapshot, spaces, bytes);
            }
            Action::List { snapshot, list } => self.append_to_list(snapshot, &list),
            Action::BeginImage { snapshot, image, name, append } => {
                self.begin_image(reader, snapshot, image, &name, append).await?;
            }
            Action::Append { snapshot, image } => {
                return self.append(reader, snapshot, image, len).await;
            }
            Action::Discard => reader.discard(len).await?,
            Action::EndImage { snapshot, image, size } => {
                let arriving = self.snapshots.get_mut(&snapshot);
                if let Some(ended) = arriving.and_then(|arriving| arriving.images.remove(&image)) {
                    ended.end();
                    self.answer(Message::ImageAck(ImageAck { snapshot, image, size }));
                }
            }
            Action::Region(request) => {
                let (store, host) = (self.cache.store.clone(), self.sender.host);
                self.owe(async move { regions::answer(&store, host, &request).await })?;
            }
            Action::RequestedPages(request) => {
                let (store, host) = (self.cache.store.clone(), self.sender.host);
                self.owe(async move { regions::answer_pages(&store, host, &request).await })?;
            }
            Action::Complete { snapshot, images, bytes, partial, memory_may_have_changed } => {
                if memory_may_have_changed {
                    self.mark_memory(snapshot);
                }
                self.complete(snapshot, (images, bytes), partial).await;
            }
            Action::Damaged { snapshot, reason, by_peer } => {
                self.fail(snapshot, &reason, !by_peer);
            }
            Action::Goodbye(reason) => return Err(Over::Goodbye(reason)),
        }
        Ok(())
    }

    async fn begin(
        &mut self,
        snapshot: u32,
        id: String,
        named: bool,
        parent: Option<&str>,
        attempt: u64,
    ) {
        match self.store.begin(&id, &self.sender_of(attempt)) {
            Ok(key) => {
                if named {
                    self.store.reserve(key);
                }
                let (images, started) = (HashMap::new(), Instant::now());
                let busy = self.begin_transfer();
                let arriving = Arriving { id, key, images, started, _busy: busy };
                self.snapshots.insert(snapshot, arriving);
                let set = match parent {
                    Some(parent) => self.store.set_parent(key, parent).await,
                    None => Ok(()),
                };
                match set {
                    Ok(()) => self.answer(Message::SnapshotReady(SnapshotReady { snapshot })),
                    Err(refused) => self.fail(snapshot, &refused.to_string(), true),
                }
            }
            Err(refused) => self.refuse(snapshot, &id, &refused),
        }
    }

    /// The cache and the link are busy as long as that is there.
    fn begin_transfer(&self) -> [Session; 2] {
        [self.cache.links.busy.enter(), self.activity.begin_transfer()]
    }

    fn refuse(&mut self, snapshot: u32, id: &str, refused: &Refused) {
        one_more(&self.store.tally().refused);
        tracing::warn!(
            message_id = journal::SNAPSHOT_REFUSED,
            criu_snapshot = id,
            criu_reason = %refused,
            "snapshot {id} is refused: {refused}"
        );
        self.give_up(snapshot, &refused.to_string());
    }

    async fn begin_round(&mut self, snapshot: u32, id: String, parent: Option<&str>, attempt: u64) {
        match self.store.begin_round(&id, &self.sender_of(attempt), parent).await {
            Ok((coming, spaces)) => {
                let busy = self.begin_transfer();
                self.rounds.insert(snapshot, ArrivingRound::new(id, coming, busy));
                all_spaces(snapshot, &spaces).for_each(|message| self.answer(message));
                self.answer(Message::SnapshotReady(SnapshotReady { snapshot }));
            }
            Err(refused) => self.refuse(snapshot, &id, &refused),
        }
    }

    fn forget(&self, id: &str) {
        if self.store.forget_pages(id, self.sender.host) {
            let message_id = journal::SNAPSHOT_DROPPED;
            let (criu_snapshot, sender) = (id, &self.sender.name);
            tracing::info!(message_id, criu_snapshot, "the pages of {id} are given up by {sender}");
        }
    }

    /// The sender, of what belongs to an attempt to move a process.
    fn sender_of(&self, attempt: u64) -> Sender {
        Sender { attempt, ..self.sender.clone() }
    }

    /// The source has given up the attempt to move a process, and waits for the answer.
    async fn withdraw(&mut self, withdraw: &SnapshotWithdraw) {
        let SnapshotWithdraw { request, id, attempt, reason } = withdraw;
        let outcome = match check_id(id) {
            Ok(()) => self.store.withdraw(id, self.sender.host, *attempt, reason),
            Err(_) => Withdrawn::Unknown,
        };
        let outcome = match outcome {
            Withdrawn::Withdrawn => {
                self.tell_damaged(id, reason);
                Outcome::Withdrawn
            }
            Withdrawn::Taken => Outcome::Taken,
            Withdrawn::Unknown => Outcome::Unknown,
        };
        // What systemd keeps of it goes, before the source relies on that.
        self.cache.keeping.follow().await;
        let answer = SnapshotWithdrawn { request: *request, outcome: outcome.into() };
        self.answer(Message::SnapshotWithdrawn(answer));
    }

    fn space(&mut self, snapshot: u32, space: Space) {
        let Some(round) = self.rounds.get_mut(&snapshot) else { return };
        if let Err(reason) = round.space(space) {
            self.fail(snapshot, &reason, true);
        }
    }

    fn pages(&mut self, snapshot: u32, run: Run) {
        let Some(round) = self.rounds.get_mut(&snapshot) else { return };
        if let Err(reason) = round.pages(run) {
            self.fail(snapshot, &reason, true);
        }
    }

    /// Payload: charged, then spliced into the layer of its page space.
    async fn page_data(
        &mut self,
        reader: &mut Reader,
        snapshot: u32,
        len: usize,
    ) -> Result<(), Over> {
        let Some(round) = self.rounds.get_mut(&snapshot) else {
            return Ok(reader.discard(len).await?);
        };
        let received = round.receive(self.store, &self.waits, reader, len as u64).await?;
        if let Err(reason) = received {
            self.fail(snapshot, &reason, true);
        }
        Ok(())
    }

    fn complete_round(&mut self, snapshot: u32, images: u64, bytes: u64) {
        let Some(round) = self.rounds.remove(&snapshot) else { return };
        let ArrivingRound { id, coming, started, .. } = round;
        let seconds = started.elapsed().as_secs_f64();
        match self.store.complete_round(coming) {
            Ok(superseded) => {
                self.cache.figures.rounds.observe(started.elapsed());
                tracing::info!(
                    message_id = journal::ROUND_HELD,
                    criu_snapshot = id,
                    criu_bytes = bytes,
                    criu_seconds = seconds,
                    "a round of snapshot {id} is held: {bytes} bytes of pages, {seconds:.2} s"
                );
                if let Some(parent) = superseded {
                    let message_id = journal::SNAPSHOT_DROPPED;
                    let criu_snapshot = parent.as_str();
                    tracing::info!(
                        message_id,
                        criu_snapshot,
                        "the pages of {parent} are superseded by those of {id}"
                    );
                }
                self.answer(Message::SnapshotAck(SnapshotAck { snapshot, images, bytes }));
            }
            Err(reason) => {
                self.tell_round_failed(&id, &reason);
                self.give_up(snapshot, &reason);
            }
        }
    }

    fn append_to_list(&mut self, snapshot: u32, list: &str) {
        let Some(arriving) = self.snapshots.get(&snapshot) else { return };
        match self.store.append_to_list(arriving.key, list) {
            Ok(()) => self.answer(Message::SnapshotReady(SnapshotReady { snapshot })),
            Err(refused) => self.fail(snapshot, &refused.to_string(), true),
        }
    }

    async fn begin_image(
        &mut self,
        reader: &Reader,
        snapshot: u32,
        image: u32,
        name: &str,
        append: bool,
    ) -> Result<(), Over> {
        let Some(arriving) = self.snapshots.get_mut(&snapshot) else { return Ok(()) };
        let (key, id) = (arriving.key, arriving.id.clone());
        let begun = match self.store.begin_image(key, name, append) {
            Ok(begun) => begun,
            Err(refused) => {
                self.fail(snapshot, &refused.to_string(), true);
                return Ok(());
            }
        };
        arriving.images.insert(image, begun.clone());
        match self.charge(reader, (key, &id), &begun, 0).await? {
            Ok(()) => self.answer(Message::ImageReady(ImageReady { snapshot, image })),
            Err(reason) => self.fail(snapshot, &reason, true),
        }
        Ok(())
    }

    /// A region is asked for. That of an image is answered when the image has ended, and by then much else
    /// may have come.
    fn owe(&mut self, answer: impl Future<Output = Answer> + 'static) -> Result<(), Over> {
        while self.regions.try_join_next().is_some() {}
        if self.regions.len() >= REGIONS_MAX {
            let why = format!("it waits for more than {REGIONS_MAX} regions at once");
            return Err(Over::Refused(Reason::Protocol, why));
        }
        let (replies, transfer) = (self.replies.clone(), self.activity.begin_transfer());
        self.regions.spawn_local(async move {
            let _transfer = transfer;
            // Without room in the queue the answer waits: who asked waits, too.
            let _ = replies.send(answer.await).await;
        });
        Ok(())
    }

    /// Charges an image. While it waits for room, nobody else looks whether the snapshot is still
    /// wanted, and still comes. The inner error is why the snapshot is damaged.
    async fn charge(
        &self,
        reader: &Reader,
        (key, id): (Key, &str),
        image: &Image,
        more: u64,
    ) -> Result<Result<(), String>, Over> {
        tokio::select! {
            biased;
            charged = self.waits.charge(id, self.store.charge(key, image, more)) => {
                Ok(charged.map_err(|exhausted| format!("image {}: {exhausted}", image.name())))
            }
            () = self.store.gone(key) => Ok(Err(DROPPED.to_owned())),
            () = reader.hung_up() => Err(LaneError::Torn.into()),
        }
    }

    /// Payload: charged, then spliced into the image's memfd.
    async fn append(
        &mut self,
        reader: &mut Reader,
        snapshot: u32,
        image: u32,
        len: usize,
    ) -> Result<(), Over> {
        let image = self.snapshots.get(&snapshot).and_then(|arriving| {
            self.store.is_receiving(arriving.key).then(|| arriving.images.get(&image)).flatten()
        });
        let (Some(image), Some(arriving)) = (image.cloned(), self.snapshots.get(&snapshot)) else {
            self.fail(snapshot, DROPPED, true);
            return Ok(reader.discard(len).await?);
        };
        let charged = self.charge(reader, (arriving.key, &arriving.id), &image, len as u64);
        if let Err(reason) = charged.await? {
            self.fail(snapshot, &reason, true);
            return Ok(reader.discard(len).await?);
        }
        let mut offset = image.len();
        reader.payload_to_file(image.as_fd(), &mut offset, len).await?;
        image.grown_to(offset);
        self.store.received(len as u64);
        Ok(())
    }

    /// The sender says that the memory in a snapshot may have changed before it was copied.
    fn mark_memory(&self, snapshot: u32) {
        if let Some(arriving) = self.snapshots.get(&snapshot) {
            self.store.mark_memory(arriving.key);
        }
    }

    async fn complete(&mut self, snapshot: u32, (images, bytes): (u64, u64), partial: bool) {
        // It stays known until then: whoever ends the link meanwhile ends it, too.
        let Some(key) = self.snapshots.get(&snapshot).map(|arriving| arriving.key) else { return };
        let completed = self.store.complete(key, partial).await;
        let Some(arriving) = self.snapshots.remove(&snapshot) else { return };
        let Arriving { id, started, .. } = arriving;
        let seconds = started.elapsed().as_secs_f64();
        match completed {
            Ok(()) => {
                // Whoever is told that it is here may end the process.
                self.cache.keeping.follow().await;
                self.cache.figures.received.observe(started.elapsed());
                tracing::info!(
                    message_id = journal::SNAPSHOT_WHOLE,
                    criu_snapshot = id,
                    criu_bytes = bytes,
                    criu_images = images,
                    criu_seconds = seconds,
                    "snapshot {id} is whole: {bytes} bytes in {images} images, {seconds:.2} s"
                );
                if self.store.memory(key) == Some(Memory::MayHaveChanged) {
                    tracing::warn!(
                        message_id = journal::MEMORY_MAY_HAVE_CHANGED,
                        criu_snapshot = id,
                        "the memory in snapshot {id} may have changed before it was copied: no restore gets it \
                         without --accept-changed-memory; give criu dump --action-script criu-imagectl"
                    );
                }
                let ack = SnapshotAck { snapshot, images, bytes };
                self.answer(Message::SnapshotAck(ack));
                // Not before: at the source the process is frozen until the answer has come.
                self.cache.prepare_view(key);
            }
            Err(reason) => {
                self.tell_damaged(&id, &reason);
                self.give_up(snapshot, &reason);
            }
        }
    }

    /// A snapshot under way is damaged; the peer is told unless it said so itself.
    fn fail(&mut self, snapshot: u32, reason: &str, tell: bool) {
        if let Some(arriving) = self.snapshots.remove(&snapshot) {
            self.store.fail(arriving.key, reason);
            self.tell_damaged(&arriving.id, reason);
        } else if let Some(round) = self.rounds.remove(&snapshot) {
            self.store.fail_round(&round.coming, reason);
            self.tell_round_failed(&round.id, reason);
        } else {
            // Its id was refused: it is no name for anything.
            let (message_id, criu_reason) = (journal::PROTOCOL_ERROR, reason);
            tracing::warn!(
                message_id,
                criu_reason,
                "snapshot number {snapshot} from {} is refused: {reason}",
                self.sender.name
            );
        }
        if tell {
            self.give_up(snapshot, reason);
        }
    }

    fn give_up(&mut self, snapshot: u32, reason: &str) {
        self.receiver.give_up(snapshot);
        self.answer(Message::abort(snapshot, reason));
    }

    fn answer(&mut self, answer: Message) {
        self.deaf |= self.replies.try_send(Answer::Message(answer)).is_err();
    }

    fn tell_damaged(&self, id: &str, reason: &str) {
        let message_id = journal::SNAPSHOT_DAMAGED;
        let (criu_snapshot, criu_reason) = (id, reason);
        tracing::warn!(
            message_id,
            criu_snapshot,
            criu_reason,
            "snapshot {id} from {} damaged: {reason}",
            self.sender.name
        );
    }

    fn tell_round_failed(&self, id: &str, reason: &str) {
        let message_id = journal::ROUND_FAILED;
        let (criu_snapshot, criu_reason) = (id, reason);
        tracing::warn!(
            message_id,
            criu_snapshot,
            criu_reason,
            "a round of snapshot {id} from {} failed: {reason}",
            self.sender.name
        );
    }

    /// The link is over: what was under way is damaged. Returns how many snapshots and rounds that were.
    pub(super) fn abandon(&mut self, reason: &str) -> usize {
        let under_way: Vec<u32> =
            self.snapshots.keys().chain(self.rounds.keys()).copied().collect();
        for snapshot in &under_way {
            self.fail(*snapshot, reason, false);
        }
        under_way.len()
    }
}
