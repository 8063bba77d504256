//! The events that an operator acts on, by `MESSAGE_ID` (journald's `sd_journal_send(3)`,
//! `journalctl MESSAGE_ID=…`). An id never changes its meaning. What each means and what to do next stands in
//! `systemd/catalog/criu-image-relay.catalog`, which `journalctl -x` shows.
//!
//! The fields that go with them stand in `docs/operations.md`. In the code they are `criu_snapshot`,
//! `criu_peer` and so on. A field is in the event or in its span, never in both: journald would keep it twice. So
//! a span has `criu_peer` and nothing else, and an event within it what it is about. Spans are of the level
//! error, because a level that leaves out a span leaves out its fields, too.

/// A proxy has sent a snapshot, and the cache has acknowledged it.
pub const SNAPSHOT_SENT: &str = "3f2a7d4be1d84c6f9a0c5e7b21d6f801";
/// A cache holds a whole snapshot.
pub const SNAPSHOT_WHOLE: &str = "3f2a7d4be1d84c6f9a0c5e7b21d6f802";
/// A snapshot has failed on its way.
pub const SNAPSHOT_DAMAGED: &str = "3f2a7d4be1d84c6f9a0c5e7b21d6f803";
/// A snapshot, or a round of one, is not accepted: nothing of it has come.
pub const SNAPSHOT_REFUSED: &str = "f679072806f04004ba55473f233c48e9";
/// A restore has read a snapshot.
pub const SNAPSHOT_TAKEN: &str = "3f2a7d4be1d84c6f9a0c5e7b21d6f804";
/// A snapshot is no longer held, because somebody said so.
pub const SNAPSHOT_DROPPED: &str = "3f2a7d4be1d84c6f9a0c5e7b21d6f805";
/// A snapshot is no longer held, because its time is over.
pub const SNAPSHOT_EXPIRED: &str = "34684c7e310a4968a1976c589df68e63";
/// The cache has ended, and with it a snapshot that nobody had taken.
pub const SNAPSHOT_LOST: &str = "2048f6e7ddb84483ba47e8fc626bcc68";
/// The cache has ended, and a snapshot that nobody had taken is with systemd.
pub const SNAPSHOT_LEFT: &str = "1ea9dfe619d54d54870f80bd1f57e852";
/// A snapshot that systemd kept while the cache did not run is held again.
pub const SNAPSHOT_HELD_AGAIN: &str = "84a7d697ee804504b53bd681f6f74efb";
/// A snapshot is held, but systemd does not keep it as well.
pub const SNAPSHOT_NOT_KEPT: &str = "043a7686e460426396d0a0b998087290";
/// The memory in a snapshot may have changed before it was copied.
pub const MEMORY_MAY_HAVE_CHANGED: &str = "28c8701b10e040f18933be523bf1f2d3";
/// A cache holds a snapshot as any other from now on whose memory may have changed: somebody said so.
pub const MEMORY_ACCEPTED: &str = "02126c1eea434805aabe75233bdec5d4";
/// A cache holds a round of a snapshot's pages.
pub const ROUND_HELD: &str = "3f2a7d4be1d84c6f9a0c5e7b21d6f809";
/// A round of a snapshot's pages has failed. What was held before still is.
pub const ROUND_FAILED: &str = "afefde9ee9864cdca7a37dc607575d36";
/// Who wanted to read a snapshot did not get it.
pub const RESTORE_FAILED: &str = "9ab14614267343639cb98ff70da1f252";
/// Who wants to read a snapshot waits for it, and nothing has come for some time.
pub const RESTORE_WAITS: &str = "7c66c03721f84841ae8425e941b4e8af";
/// A restore reads through the stream what CRIU does not get right from a pipe.
pub const VIEW_NEEDED: &str = "37e311816da14663bcf6cfeb3fe4a6c9";
/// Somebody has asked for pages of a snapshot, and has gone.
pub const PAGES_SERVED: &str = "658f96f5e56f4570bb3a1225c6784b8c";
/// A link is up.
pub const LINK_UP: &str = "3f2a7d4be1d84c6f9a0c5e7b21d6f806";
/// A link is lost, and with it what was under way.
pub const LINK_LOST: &str = "3f2a7d4be1d84c6f9a0c5e7b21d6f807";
/// A link is up again that was lost, or could not be had.
pub const LINK_BACK: &str = "1cc6da47be174ec18e91ca744e17698c";
/// A link has ended with nothing under way.
pub const LINK_ENDED: &str = "d056181e431949e9a133b1a6ec176c0b";
/// A link could not be had.
pub const NO_LINK: &str = "c48fbf7cd9c440bfad107937bd711b3c";
/// The quota is reached, and a sender waits.
pub const QUOTA_REACHED: &str = "1b5f908dc1774cb9b653ee8c5cd06b1e";
/// There is no room for a snapshot, and none became free in time.
pub const QUOTA_EXHAUSTED: &str = "f300ba40d86443199a0979573fd178de";
/// A peer may not connect.
pub const PEER_REFUSED: &str = "3f2a7d4be1d84c6f9a0c5e7b21d6f808";
/// A peer broke a protocol, or stopped in the middle of what it said.
pub const PROTOCOL_ERROR: &str = "778e4311de7b41d484f2f0beffb8c042";
/// The machine is short of what a connection needs.
pub const CANNOT_SERVE: &str = "c780afa7270a4315874743490c60ce72";
/// A daemon serves.
pub const DAEMON_STARTED: &str = "bff949a711e14c82a76d1230dbca0cf2";
/// A daemon begins to end.
pub const DAEMON_STOPPING: &str = "0e49f023a2114522b06fdbc2580f3828";
/// Sessions that were under way at the end of a daemon are cut off.
pub const SESSIONS_CUT: &str = "946ff9884898435f97adc9bfde1232a8";
/// A daemon has ended in order.
pub const DAEMON_STOPPED: &str = "794cdc5a788d42df9a05dcb463c44be4";
/// A daemon cannot start.
pub const DAEMON_FAILED: &str = "6467e31cda844dcda14ffff421982033";
/// Another configuration is in force.
pub const CONFIG_RELOADED: &str = "460ab075ef1543e8b3d94cb9482bb961";
/// The configuration is wrong, and the old one stays in force.
pub const CONFIG_REFUSED: &str = "bfb2113b8fe840fbb9da4b5e70c6c265";
/// The log file cannot be opened anew.
pub const LOG_NOT_REOPENED: &str = "1c437429c6be48b082ff8e7d06bcd8fe";
/// Messages were left out, because a peer had the daemon say too many of them.
pub const MESSAGES_LEFT_OUT: &str = "a92307bcd7b64b20839b91e6d6f5c74c";
