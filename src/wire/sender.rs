//! The proxy's side of the link, without I/O: numbers snapshots and images, counts what was sent,
//! and makes the messages in an order that the [receiver](super::receiver) accepts.

use std::collections::HashMap;

use super::message::{
    ImageBegin, ImageData, ImageEnd, Message, Outcome, PageData, Pages, Region, SnapshotBegin,
    SnapshotEnd, SnapshotList,
};
use super::spaces;
use crate::criu::pages::{Run, Space};

/// What the cache said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Said {
    /// Nothing that concerns a snapshot.
    Nothing,
    /// A snapshot's beginning, or its entry in a list, is accepted.
    Ready {
        /// Its number.
        snapshot: u32,
    },
    /// Page spaces that a round's parent has.
    Spaces {
        /// The round's number.
        snapshot: u32,
        /// Which.
        spaces: Vec<Space>,
    },
    /// An image's beginning is accepted.
    ImageReady {
        /// The snapshot's number.
        snapshot: u32,
        /// The image's number.
        image: u32,
    },
    /// The cache holds all of an image.
    ImageAcknowledged {
        /// The snapshot's number.
        snapshot: u32,
        /// The image's number.
        image: u32,
    },
    /// A region that was asked for; its payload follows.
    Region(Region),
    /// The cache asks for a part of an image, or for pages.
    Request {
        /// Its number for the answer.
        request: u32,
    },
    /// The snapshot is whole and kept.
    Acknowledged {
        /// Its number.
        snapshot: u32,
        /// The images that the cache has.
        images: u64,
        /// The bytes that the cache has.
        bytes: u64,
    },
    /// The cache gave the snapshot up.
    Refused {
        /// Its number.
        snapshot: u32,
        /// Why.
        reason: String,
    },
    /// What became of an attempt that was withdrawn.
    Withdrawn {
        /// The request's number.
        request: u32,
        /// What the cache says.
        outcome: Outcome,
    },
    /// The cache ends the link.
    Goodbye(String),
}

/// A message that a cache never sends.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a {0} out of order")]
pub struct OutOfOrder(&'static str);

/// Sorts a message from the cache.
pub fn said(message: Message) -> Result<Said, OutOfOrder> {
    match message {
        Message::KeepAlive(_) => Ok(Said::Nothing),
        Message::SnapshotAck(ack) => {
            Ok(Said::Acknowledged { snapshot: ack.snapshot, images: ack.images, bytes: ack.bytes })
        }
        Message::SnapshotReady(ready) => Ok(Said::Ready { snapshot: ready.snapshot }),
        Message::ImageReady(ready) => {
            Ok(Said::ImageReady { snapshot: ready.snapshot, image: ready.image })
        }
        Message::ImageAck(ack) => {
            Ok(Said::ImageAcknowledged { snapshot: ack.snapshot, image: ack.image })
        }
        Message::Spaces(spaces) => Ok(Said::Spaces {
            snapshot: spaces.snapshot,
            spaces: spaces::spaces(&spaces).collect(),
        }),
        Message::Region(region) => Ok(Said::Region(region)),
        Message::RegionRequest(asked) => Ok(Said::Request { request: asked.request }),
        Message::PagesRequest(asked) => Ok(Said::Request { request: asked.request }),
        Message::SnapshotAbort(abort) => {
            Ok(Said::Refused { snapshot: abort.snapshot, reason: abort.reason })
        }
        Message::SnapshotWithdrawn(answer) => {
            Ok(Said::Withdrawn { request: answer.request, outcome: answer.outcome() })
        }
        Message::Goodbye(goodbye) => Ok(Said::Goodbye(goodbye.reason)),
        other => Err(OutOfOrder(other.kind().as_str_name())),
    }
}

/// The snapshots that a link is sending.
#[derive(Debug, Default)]
pub struct Sender {
    snapshots: HashMap<u32, Outgoing>,
}

#[derive(Debug, Default)]
struct Outgoing {
    /// The size so far of each open image.
    open: HashMap<u32, u64>,
    /// Those that have ended; of a round, the page spaces that have begun.
    images: u64,
    bytes: u64,
}

/// The beginning of a snapshot or round that belongs to an attempt to move a process.
pub fn of_attempt(mut begin: Message, of: u64) -> Message {
    if let Message::SnapshotBegin(SnapshotBegin { attempt, .. }) = &mut begin {
        *attempt = of;
    }
    begin
}

/// Messages for a snapshot or an image that this side has already ended or aborted are `None`: what
/// is left of it is dropped.
impl Sender {
    /// A snapshot begins. One that is `named` is kept for those who ask for it by its id.
    pub fn begin(&mut self, snapshot: u32, id: &str, named: bool) -> Message {
        self.begin_child(snapshot, id, None, named)
    }

    /// The same for one whose images have pages in the snapshot `parent`.
    pub fn begin_child(
        &mut self,
        snapshot: u32,
        id: &str,
        parent: Option<&str>,
        named: bool,
    ) -> Message {
        self.snapshots.insert(snapshot, Outgoing::default());
        let (id, parent) = (id.to_owned(), parent.unwrap_or_default().to_owned());
        Message::SnapshotBegin(SnapshotBegin {
            snapshot,
            id,
            named,
            round: false,
            parent,
            attempt: 0,
        })
    }

    /// A round of a snapshot's pages begins. `parent` is the snapshot whose pages they are based on, if it
    /// is not this one itself.
    pub fn begin_round(&mut self, snapshot: u32, id: &str, parent: Option<&str>) -> Message {
        self.snapshots.insert(snapshot, Outgoing::default());
        let (id, parent) = (id.to_owned(), parent.unwrap_or_default().to_owned());
        Message::SnapshotBegin(SnapshotBegin {
            snapshot,
            id,
            named: true,
            round: true,
            parent,
            attempt: 0,
        })
    }

    /// A page space begins: what follows in this round belongs to it.
    pub fn space(&mut self, snapshot: u32, space: Space) -> Option<Message> {
        self.snapshots.get_mut(&snapshot)?.images += 1;
        Some(Message::Space(spaces::space(snapshot, space)))
    }

    /// Pages follow in the space, or are where they say.
    pub fn pages(&mut self, snapshot: u32, run: Run) -> Option<Message> {
        self.snapshots.contains_key(&snapshot).then_some(())?;
        let (address, pages, flags) = (run.address(), run.pages(), run.contents().flags());
        Some(Message::Pages(Pages { snapshot, address, pages, flags }))
    }

    /// The pages go on with `len` bytes.
    pub fn page_data(&mut self, snapshot: u32, len: usize) -> Option<Message> {
        self.snapshots.get_mut(&snapshot)?.bytes += len as u64;
        Some(Message::PageData(PageData { snapshot }))
    }

    /// The snapshot's id is appended to a list.
    pub fn list(&mut self, snapshot: u32, list: &str) -> Option<Message> {
        let list = list.to_owned();
        self.snapshots.contains_key(&snapshot).then_some(())?;
        Some(Message::SnapshotList(SnapshotList { snapshot, list }))
    }

    /// An image begins, or goes on at its end.
    pub fn begin_image(
        &mut self,
        snapshot: u32,
        image: u32,
        name: &str,
        append: bool,
    ) -> Option<Message> {
        self.snapshots.get_mut(&snapshot)?.open.insert(image, 0);
        Some(Message::ImageBegin(ImageBegin { snapshot, image, name: name.to_owned(), append }))
    }

    /// The image goes on with `len` bytes.
    pub fn data(&mut self, snapshot: u32, image: u32, len: usize) -> Option<Message> {
        let outgoing = self.snapshots.get_mut(&snapshot)?;
        let size = outgoing.open.get_mut(&image)?;
        let offset = *size;
        *size += len as u64;
        outgoing.bytes += len as u64;
        Some(Message::ImageData(ImageData { snapshot, image, offset }))
    }

    /// The image has ended.
    pub fn end_image(&mut self, snapshot: u32, image: u32) -> Option<Message> {
        let outgoing = self.snapshots.get_mut(&snapshot)?;
        let size = outgoing.open.remove(&image)?;
        outgoing.images += 1;
        Some(Message::ImageEnd(ImageEnd { snapshot, image, size }))
    }

    /// Everything has been sent. What is `partial` need not be a checkpoint by itself. Of some the memory may have
    /// changed before it was copied.
    pub fn end(
        &mut self,
        snapshot: u32,
        partial: bool,
        memory_may_have_changed: bool,
    ) -> Option<Message> {
        let Outgoing { images, bytes, .. } = self.snapshots.remove(&snapshot)?;
        Some(Message::SnapshotEnd(SnapshotEnd {
            snapshot,
            complete: true,
            images,
            bytes,
            partial,
            memory_may_have_changed,
        }))
    }

    /// The snapshot is given up, by this side or by the cache. Either way one message ends it.
    pub fn abort(&mut self, snapshot: u32, reason: &str) -> Option<Message> {
        self.snapshots.remove(&snapshot)?;
        Some(Message::abort(snapshot, reason))
    }
}

#[cfg(test)]
mod tests {
    use super::super::receiver::{Action, Limits, Receiver, Violation};
    use super::*;
    use proptest::prelude::*;

    fn receiver() -> Receiver {
        Receiver::new(Limits { images: 100, snapshots: 10 })
    }

    /// What a driver does to both ends.
    #[derive(Debug, Clone)]
    enum Step {
        Begin(u32),
        Image(u32, u32),
        Data(u32, u32, usize),
        EndImage(u32, u32),
        End(u32),
    }

    #[test]
    fn two_ends_agree_on_a_snapshot() {
        let (mut sender, mut receiver) = (Sender::default(), receiver());
        let mut pass = |message: Message, len| receiver.receive(message, len).unwrap();
        pass(sender.begin(0, "web", false), 0);
        pass(sender.begin_image(0, 0, "core-7.img", false).unwrap(), 0);
        pass(sender.begin_image(0, 1, "pages-1.img", false).unwrap(), 0);
        pass(sender.data(0, 1, 4096).unwrap(), 4096);
        pass(sender.data(0, 0, 100).unwrap(), 100);
        pass(sender.data(0, 1, 4096).unwrap(), 4096);
        pass(sender.end_image(0, 1).unwrap(), 0);
        pass(sender.end_image(0, 0).unwrap(), 0);
        let end = pass(sender.end(0, false, false).unwrap(), 0);
        let complete = |snapshot, images, bytes| Action::Complete {
            snapshot,
            images,
            bytes,
            partial: false,
            memory_may_have_changed: false,
        };
        assert_eq!(end, complete(0, 2, 8292));
        assert_eq!(sender.end(0, false, false), None);
    }

    #[test]
    fn what_comes_of_a_given_up_snapshot_is_discarded() {
        let (mut sender, mut receiver) = (Sender::default(), receiver());
        receiver.receive(sender.begin(0, "web", false), 0).unwrap();
        receiver.receive(sender.begin_image(0, 0, "pages-1.img", false).unwrap(), 0).unwrap();
        receiver.give_up(0);
        let late = receiver.receive(sender.data(0, 0, 10).unwrap(), 10);
        assert_eq!(late, Ok(Action::Discard));
        let abort = sender.abort(0, "quota").unwrap();
        assert_eq!(receiver.receive(abort, 0), Ok(Action::Nothing));
        // From here on its number is unknown.
        let data = Message::ImageData(ImageData { snapshot: 0, image: 0, offset: 10 });
        assert!(matches!(receiver.receive(data, 1), Err(Violation::NoSuchSnapshot { .. })));
    }

    #[test]
    fn a_count_that_is_not_true_damages_one_snapshot_only() {
        let (mut sender, mut receiver) = (Sender::default(), receiver());
        receiver.receive(sender.begin(0, "one", false), 0).unwrap();
        receiver.receive(sender.begin(1, "two", false), 0).unwrap();
        let end = SnapshotEnd {
            snapshot: 0,
            complete: true,
            images: 1,
            bytes: 5,
            ..SnapshotEnd::default()
        };
        let Action::Damaged { reason, .. } =
            receiver.receive(Message::SnapshotEnd(end), 0).unwrap()
        else {
            panic!()
        };
        assert_eq!(reason, "1 images with 5 bytes were announced, 0 with 0 have come");
        let end = receiver.receive(sender.end(1, false, false).unwrap(), 0);
        assert!(matches!(end, Ok(Action::Complete { snapshot: 1, images: 0, bytes: 0, .. })));
    }

    #[test]
    fn more_bytes_than_announced_damage_the_snapshot() {
        let (mut sender, mut receiver) = (Sender::default(), receiver());
        receiver.receive(sender.begin(0, "web", false), 0).unwrap();
        receiver.receive(sender.begin_image(0, 0, "fs-7.img", false).unwrap(), 0).unwrap();
        receiver.receive(sender.data(0, 0, 10).unwrap(), 10).unwrap();
        let end = Message::ImageEnd(ImageEnd { snapshot: 0, image: 0, size: 9 });
        let Action::Damaged { reason, .. } = receiver.receive(end, 0).unwrap() else { panic!() };
        assert_eq!(reason, "image fs-7.img has 9 bytes as announced, but 10 have come");
    }

    #[test]
    fn bad_names_twice_open_and_too_many_images_damage_the_snapshot() {
        let begin = |image, name: &str| {
            Message::ImageBegin(ImageBegin { snapshot: 0, image, name: name.into(), append: false })
        };
        for (first, second, reason) in [
            ("a.img", "../b", "slash"),
            ("a.img", "a.img", "image a.img is opened for writing twice at once"),
        ] {
            let mut receiver = receiver();
            receiver.receive(Sender::default().begin(0, "web", false), 0).unwrap();
            receiver.receive(begin(0, first), 0).unwrap();
            let Action::Damaged { reason: said, .. } =
                receiver.receive(begin(1, second), 0).unwrap()
            else {
                panic!()
            };
            assert!(said.contains(reason), "{said}");
        }
        let mut receiver = Receiver::new(Limits { images: 1, snapshots: 1 });
        receiver.receive(Sender::default().begin(0, "web", false), 0).unwrap();
        receiver.receive(begin(0, "a.img"), 0).unwrap();
        let many = receiver.receive(begin(1, "b.img"), 0).unwrap();
        assert!(matches!(many, Action::Damaged { .. }));
        let second = receiver.receive(Sender::default().begin(1, "db", false), 0).unwrap();
        assert!(matches!(second, Action::Damaged { snapshot: 1, .. }));
    }

    #[test]
    fn messages_out_of_order_end_the_link() {
        let violation = |messages: Vec<Message>| {
            let mut receiver = receiver();
            let refused =
                messages.into_iter().find_map(|message| receiver.receive(message, 1).err());
            refused.unwrap().to_string()
        };
        let data = |offset| Message::ImageData(ImageData { snapshot: 0, image: 0, offset });
        let begin = || Sender::default().begin(0, "web", false);
        let image = || {
            Message::ImageBegin(ImageBegin {
                snapshot: 0,
                image: 0,
                name: "a.img".into(),
                append: false,
            })
        };
        assert_eq!(
            violation(vec![data(0)]),
            "a IMAGE_DATA for snapshot number 0, which is not under way"
        );
        assert_eq!(
            violation(vec![begin(), data(0)]),
            "a IMAGE_DATA for image number 0 of snapshot web, which is not open"
        );
        assert_eq!(
            violation(vec![begin(), image(), data(7)]),
            "image a.img of snapshot web goes on at byte 7, but 0 have come"
        );
        assert_eq!(violation(vec![begin(), begin()]), "snapshot number 0 begun twice on one link");
        assert_eq!(
            violation(vec![begin(), image(), image()]),
            "image number 0 of snapshot web begun twice"
        );
        let hello = Message::Hello(super::super::message::Hello::default());
        assert_eq!(violation(vec![hello]), "a HELLO out of order");
    }

    proptest! {
        /// Whatever the interleaving, what the sender says the receiver accepts, and both count the
        /// same.
        #[test]
        fn any_interleaving_is_accepted(
            seed in proptest::collection::vec((0u32..3, 0u32..4, 1usize..9999), 0..200)
        ) {
            let (mut sender, mut receiver) = (Sender::default(), receiver());
            let mut open = [[false; 4]; 3];
            let mut steps: Vec<Step> = (0..3).map(Step::Begin).collect();
            let mut next_image = [0; 3];
            let mut numbers = [[0; 4]; 3];
            for (snapshot, slot, len) in seed {
                let (s, i) = (snapshot as usize, slot as usize);
                if !open[s][i] {
                    numbers[s][i] = next_image[s];
                    next_image[s] += 1;
                    steps.push(Step::Image(snapshot, numbers[s][i]));
                    open[s][i] = true;
                } else if len % 5 == 0 {
                    steps.push(Step::EndImage(snapshot, numbers[s][i]));
                    open[s][i] = false;
                } else {
                    steps.push(Step::Data(snapshot, numbers[s][i], len));
                }
            }
            for (s, images) in open.iter().enumerate() {
                for (i, _) in images.iter().enumerate().filter(|(_, open)| **open) {
                    steps.push(Step::EndImage(u32::try_from(s).unwrap(), numbers[s][i]));
                }
                steps.push(Step::End(u32::try_from(s).unwrap()));
            }
            let mut complete = 0;
            for step in steps {
                let (message, len) = match step {
                    Step::Begin(s) => (Some(sender.begin(s, &format!("s{s}"), false)), 0),
                    Step::Image(s, i) => (sender.begin_image(s, i, &format!("i-{i}.img"), false), 0),
                    Step::Data(s, i, len) => (sender.data(s, i, len), len),
                    Step::EndImage(s, i) => (sender.end_image(s, i), 0),
                    Step::End(s) => (sender.end(s, false, false), 0),
                };
                let action = receiver.receive(message.unwrap(), len).unwrap();
                complete += u32::from(matches!(action, Action::Complete { .. }));
                prop_assert!(!matches!(action, Action::Damaged { .. }), "{:?}", action);
            }
            prop_assert_eq!(complete, 3);
        }
    }
}
