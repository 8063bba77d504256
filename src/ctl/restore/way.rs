//! How CRIU gets the images of a snapshot: through the stream, or as files in a view.

use super::args::Restore;
use crate::control::model::Snapshot;

/// How CRIU gets the images.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Way {
    /// `criu restore --stream`
    Stream,
    /// `criu restore -D` on a directory. There may be a reason why the stream will not do.
    View(Option<String>),
}

impl Way {
    /// What was asked for; if nothing was, what the snapshot needs, which the cache has found out.
    pub(super) fn of(args: &Restore, snapshot: &Snapshot) -> Way {
        match snapshot.needs_view.as_str() {
            _ if args.view => Way::View(None),
            "" => Way::Stream,
            _ if args.stream => Way::Stream,
            why => Way::View(Some(why.to_owned())),
        }
    }

    pub(super) fn is_view(&self) -> bool {
        matches!(self, Way::View(_))
    }

    /// Why it is a view although nobody asked for one.
    pub(super) fn why(&self) -> Option<&str> {
        match self {
            Way::View(why) => why.as_deref(),
            Way::Stream => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::control::model::SnapshotState;
    use crate::ctl::cli::{Cli, Command};

    fn way(options: &[&str], needs_view: &str) -> Way {
        let words = ["criu-imagectl", "restore", "web"].iter().chain(options);
        let Command::Restore(args) = Cli::try_parse_from(words).unwrap().command else { panic!() };
        let snapshot = Snapshot {
            id: "web".to_owned(),
            state: SnapshotState::Whole,
            reason: String::new(),
            peer: String::new(),
            images: 1,
            bytes: 1,
            begun_ms: 1,
            ended_ms: 2,
            needs_view: needs_view.to_owned(),
            memory_may_have_changed: None,
        };
        Way::of(&args, &snapshot)
    }

    #[test]
    fn a_snapshot_is_restored_from_a_view_if_it_needs_one_or_it_is_asked_for() {
        assert_eq!(way(&[], ""), Way::Stream);
        assert_eq!(way(&["--view"], ""), Way::View(None));
        assert_eq!(way(&[], "rules"), Way::View(Some("rules".to_owned())));
        assert_eq!(way(&["--view"], "rules"), Way::View(None));
        assert_eq!(way(&["--stream"], "rules"), Way::Stream);
        let both = ["criu-imagectl", "restore", "--stream", "--view", "web"];
        assert!(Cli::try_parse_from(both).is_err());
    }
}
