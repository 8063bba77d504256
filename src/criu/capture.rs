//! One dump over the stream protocol, as a state machine: which images CRIU has open, and whether
//! what it handed over is a checkpoint.

use std::collections::HashSet;

use super::images::INVENTORY;

/// What a CRIU run did wrong. Its session ends, and its snapshot is damaged.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The image is being written already.
    #[error("image {0} is opened for writing twice at once")]
    OpenedTwice(String),
}

/// How a dump ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// CRIU wrote everything: the snapshot may be whole.
    Complete,
    /// CRIU gave up or died; the text says what is missing.
    Failed(String),
}

/// The images of one dump.
#[derive(Debug, Default)]
pub struct Capture {
    open: HashSet<String>,
    inventory: bool,
}

impl Capture {
    /// CRIU opens an image.
    pub fn open(&mut self, name: &str) -> Result<(), Fault> {
        if !self.open.insert(name.to_owned()) {
            return Err(Fault::OpenedTwice(name.to_owned()));
        }
        Ok(())
    }

    /// An image's pipe has ended.
    pub fn ended(&mut self, name: &str) {
        if self.open.remove(name) && name == INVENTORY {
            self.inventory = true;
        }
    }

    /// CRIU has closed the socket, and every pipe has ended. A dump that fails half-way closes the
    /// socket exactly like one that succeeded, but only the latter writes inventory.img.
    pub fn outcome(&self) -> Outcome {
        if self.inventory {
            Outcome::Complete
        } else {
            Outcome::Failed(format!("CRIU closed the session without writing {INVENTORY}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dump_is_complete_when_its_inventory_has_ended() {
        let mut capture = Capture::default();
        capture.open("core-7.img").unwrap();
        capture.ended("core-7.img");
        capture.open(INVENTORY).unwrap();
        assert!(matches!(capture.outcome(), Outcome::Failed(_)));
        capture.ended(INVENTORY);
        assert_eq!(capture.outcome(), Outcome::Complete);
    }

    #[test]
    fn a_dump_without_an_inventory_has_failed() {
        let mut capture = Capture::default();
        capture.open("core-7.img").unwrap();
        capture.ended("core-7.img");
        let Outcome::Failed(why) = capture.outcome() else { panic!() };
        assert_eq!(why, "CRIU closed the session without writing inventory.img");
    }

    #[test]
    fn an_image_may_be_written_again_but_not_twice_at_once() {
        let mut capture = Capture::default();
        capture.open("a.img").unwrap();
        assert_eq!(capture.open("a.img"), Err(Fault::OpenedTwice("a.img".into())));
        capture.ended("a.img");
        assert!(capture.open("a.img").is_ok());
    }
}
