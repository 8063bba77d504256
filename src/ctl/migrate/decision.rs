//! What `migrate` and CRIU's action script agree on, in files of the work directory: whether the process is handed
//! over or stays.
//!
//! Whoever comes first decides. A symbolic link is made with what it says in one step, which fails if there is one.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::time::sleep;

/// The link that says how it was decided.
const DECISION: &str = "decision";
/// A file that says that the script may have sent images.
const SENDING: &str = "sending";
/// How often the script looks whether it was called off.
const LOOK: Duration = Duration::from_millis(20);

/// How it was decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Decided {
    /// The script has said yes to CRIU, which ends the process now.
    HandedOver,
    /// `migrate` was asked to stop before.
    CalledOff,
}

impl Decided {
    fn as_str(self) -> &'static str {
        match self {
            Decided::HandedOver => "handed-over",
            Decided::CalledOff => "called-off",
        }
    }
}

/// Where the decision about one migration stands.
#[derive(Debug)]
pub(super) struct Decision {
    dir: PathBuf,
}

impl Decision {
    /// The one in this work directory.
    pub(super) fn at(work_dir: &Path) -> Decision {
        Decision { dir: work_dir.to_owned() }
    }

    /// Decides, if nobody has yet. Returns how it is decided.
    pub(super) fn decide(&self, how: Decided) -> io::Result<Decided> {
        match symlink(how.as_str(), self.dir.join(DECISION)) {
            Ok(()) => Ok(how),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                self.decided().ok_or(error)
            }
            Err(error) => Err(error),
        }
    }

    /// How it is decided, if it is.
    pub(super) fn decided(&self) -> Option<Decided> {
        let said = fs::read_link(self.dir.join(DECISION)).ok()?;
        [Decided::HandedOver, Decided::CalledOff]
            .into_iter()
            .find(|how| said == Path::new(how.as_str()))
    }

    /// Resolves when the migration is called off.
    pub(super) async fn called_off(&self) {
        while self.decided() != Some(Decided::CalledOff) {
            sleep(LOOK).await;
        }
    }

    /// From now on images may be at the cache.
    pub(super) fn begin_sending(&self) -> io::Result<()> {
        File::create(self.dir.join(SENDING)).map(drop)
    }

    /// Whether images may be at the cache.
    pub(super) fn may_have_sent(&self) -> bool {
        self.dir.join(SENDING).exists()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_comes_first_decides() {
        for [first, second] in
            [[Decided::HandedOver, Decided::CalledOff], [Decided::CalledOff, Decided::HandedOver]]
        {
            let dir = tempfile::tempdir().unwrap();
            let (script, command) = (Decision::at(dir.path()), Decision::at(dir.path()));
            assert_eq!(script.decided(), None);
            assert_eq!(script.decide(first).unwrap(), first);
            assert_eq!(command.decide(second).unwrap(), first);
            assert_eq!(command.decided(), Some(first));
        }
        assert!(Decision::at(Path::new("/nonexistent")).decide(Decided::CalledOff).is_err());
    }
}
