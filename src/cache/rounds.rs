//! Rounds of pages on a link: each page goes from the socket to its place in a layer.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::time::Instant;

use super::incoming::DROPPED;
use super::link::Over;
use super::waits::Waits;
use crate::criu::pages::{Contents, Run, Space};
use crate::daemon::sessions::Session;
use crate::store::pages::{PAGE, Place};
use crate::store::{ComingRound, Store};
use crate::wire::lane::{LaneError, Reader};

/// How many pages are charged and given a place at once: a peer that announces more than it sends holds no
/// more than that.
const PIECE: u64 = (1 << 20) / PAGE;

/// The rounds under way on a link, by their numbers.
pub(super) type Rounds = HashMap<u32, ArrivingRound>;

/// A round under way.
pub(super) struct ArrivingRound {
    pub(super) id: String,
    pub(super) coming: ComingRound,
    pub(super) started: Instant,
    /// Which page space is coming.
    space: Option<Space>,
    /// What of the pages that were announced last has no place yet.
    rest: Option<Run>,
    /// Where the next bytes go.
    filling: Option<Filling>,
    _busy: [Session; 2],
}

/// A piece of pages that has a place.
struct Filling {
    place: Place,
    /// How many bytes of it have come.
    written: u64,
}

impl ArrivingRound {
    /// A round that has begun.
    pub(super) fn new(id: String, coming: ComingRound, busy: [Session; 2]) -> ArrivingRound {
        let started = Instant::now();
        let (space, rest, filling) = (None, None, None);
        ArrivingRound { id, coming, started, space, rest, filling, _busy: busy }
    }

    /// A page space begins. The error is why the round has failed.
    pub(super) fn space(&mut self, space: Space) -> Result<(), String> {
        self.space = Some(space);
        self.coming.round.open(&space).map_err(|refused| refused.to_string())
    }

    /// Pages are as in the parent, or follow. The error is why the round has failed.
    pub(super) fn pages(&mut self, run: Run) -> Result<(), String> {
        if run.contents() == Contents::Parent {
            let space = self.current()?;
            let inherited = self.coming.round.inherit(&space, run.range());
            return inherited.map_err(|refused| refused.to_string());
        }
        self.rest = Some(run);
        Ok(())
    }

    /// Takes `len` bytes of the pages that were announced. The inner error is why the round has failed;
    /// all of the payload has been taken then, too.
    pub(super) async fn receive(
        &mut self,
        store: &Store,
        waits: &Waits,
        reader: &mut Reader,
        mut len: u64,
    ) -> Result<Result<(), String>, Over> {
        while len > 0 {
            let mut filling = match self.filling.take() {
                Some(filling) => filling,
                None => match self.next_place(store, waits, reader).await? {
                    Ok(place) => Filling { place, written: 0 },
                    Err(reason) => {
                        reader.discard(usize::try_from(len).unwrap_or(usize::MAX)).await?;
                        return Ok(Err(reason));
                    }
                },
            };
            let part = len.min(filling.place.bytes() - filling.written);
            let mut offset = filling.place.offset() + filling.written;
            let part_len = usize::try_from(part).unwrap_or(usize::MAX);
            reader.payload_to_file(filling.place.as_fd(), &mut offset, part_len).await?;
            len -= part;
            filling.written += part;
            store.received(part);
            if filling.written == filling.place.bytes() {
                self.coming.round.filled(filling.place);
            } else {
                self.filling = Some(filling);
            }
        }
        Ok(Ok(()))
    }

    /// A place for the next piece of the pages that were announced. While it waits for room, nobody else
    /// looks whether the round is still wanted, and still comes.
    async fn next_place(
        &mut self,
        store: &Store,
        waits: &Waits,
        reader: &Reader,
    ) -> Result<Result<Place, String>, Over> {
        if !store.is_paging(&self.coming) {
            return Ok(Err(DROPPED.to_owned()));
        }
        let (space, piece) = match self.current().and_then(|space| Ok((space, self.take_piece()?)))
        {
            Ok(next) => next,
            Err(reason) => return Ok(Err(reason)),
        };
        let range = piece.range();
        let charge = store.charge_pages(&self.coming, range.bytes());
        let charged = tokio::select! {
            biased;
            charged = waits.charge(&self.id, charge) => charged,
            () = store.gone(self.coming.key()) => return Ok(Err(DROPPED.to_owned())),
            () = reader.hung_up() => return Err(LaneError::Torn.into()),
        };
        let charge = match charged {
            Ok(charge) => charge,
            Err(exhausted) => return Ok(Err(format!("pages of {space}: {exhausted}"))),
        };
        let place = self.coming.round.accept(&space, range, piece.contents().flags(), charge);
        Ok(place.map_err(|refused| refused.to_string()))
    }

    /// Cuts a piece off what has no place yet.
    fn take_piece(&mut self) -> Result<Run, String> {
        // The receiver lets no bytes pass that were not announced.
        let Some((Some(piece), rest)) = self.rest.take().map(|rest| rest.split(PIECE)) else {
            return Err("pages that were not announced".to_owned());
        };
        self.rest = rest;
        Ok(piece)
    }

    fn current(&self) -> Result<Space, String> {
        self.space.ok_or_else(|| "pages before any page space".to_owned())
    }
}
