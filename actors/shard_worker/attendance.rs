//! Which epoch a shard works for, and which are over for it: pure, without IO or clock.
//!
//! A shard is told to leave an epoch, and is loaded for the next one, while it may still be meeting
//! its peers of the old one. Whatever that meeting comes to then is over before it has begun.

use offbook_protocol::Epoch;

/// `R` is what the shard holds of the epoch that it runs. At most one epoch runs.
#[derive(Debug)]
pub(crate) struct Attendance<R> {
    /// This epoch and those before it are over.
    over: Epoch,
    /// The highest that was to be loaded.
    heard: Epoch,
    running: Option<(Epoch, R)>,
}

impl<R> Attendance<R> {
    pub(crate) fn new() -> Self {
        Self {
            over: Epoch(0),
            heard: Epoch(0),
            running: None,
        }
    }

    /// The share of `epoch` is to be loaded: all earlier epochs are over, also one that is still
    /// meeting. Says which one is to be left. `None` when `epoch` is over itself.
    pub(crate) fn load(&mut self, epoch: Epoch) -> Option<Epoch> {
        if epoch <= self.over {
            return None;
        }
        self.over = Epoch(epoch.0 - 1);
        self.heard = epoch;
        Some(self.over)
    }

    /// The epoch is over, and those before it. What ran stays until [`Attendance::drop_left`].
    pub(crate) fn leave(&mut self, epoch: Epoch) {
        self.over = self.over.max(epoch);
    }

    /// Every epoch that was heard of is over. Says which one to leave, if it was not over before.
    pub(crate) fn leave_all(&mut self) -> Option<Epoch> {
        let heard = self.heard;
        let is_over = heard <= self.over;
        self.leave(heard);
        (!is_over).then_some(heard)
    }

    /// The highest epoch that this shard was to load.
    pub(crate) fn heard(&self) -> Epoch {
        self.heard
    }

    /// All peers have been met, and the engine runs.
    ///
    /// # Errors
    /// The epoch was over before: what runs is to be ended, and is handed back.
    pub(crate) fn begin(&mut self, epoch: Epoch, running: R) -> Result<(), R> {
        if epoch <= self.over {
            return Err(running);
        }
        self.running = Some((epoch, running));
        Ok(())
    }

    /// Hands out what ran in an epoch that is over by now.
    pub(crate) fn drop_left(&mut self) -> Option<(Epoch, R)> {
        let over = self.over;
        self.running.take_if(|(epoch, _)| *epoch <= over)
    }

    /// The engine says that this epoch has ended. `None` when it was left before, or never ran.
    pub(crate) fn ended(&mut self, epoch: Epoch) -> Option<R> {
        self.current_mut(epoch)?;
        self.leave(epoch);
        self.drop_left().map(|(_, running)| running)
    }

    /// What runs in this epoch, unless it is over.
    pub(crate) fn current_mut(&mut self, epoch: Epoch) -> Option<&mut R> {
        let over = self.over;
        let running = self.running.as_mut();
        let running = running.filter(|(running, _)| *running == epoch && epoch > over)?;
        Some(&mut running.1)
    }

    /// The epoch that runs, and what the shard holds of it. It may have been left a moment ago.
    pub(crate) fn running(&self) -> Option<(Epoch, &R)> {
        self.running
            .as_ref()
            .map(|(epoch, running)| (*epoch, running))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_that_was_left_while_it_met_does_not_begin() {
        let mut attendance = Attendance::new();
        assert_eq!(attendance.load(Epoch(5)), Some(Epoch(4)));
        attendance.leave(Epoch(5));
        assert_eq!(attendance.begin(Epoch(5), "five"), Err("five"));
        assert_eq!(attendance.load(Epoch(5)), None, "it is over");
        assert_eq!(attendance.load(Epoch(6)), Some(Epoch(5)));
        assert_eq!(attendance.begin(Epoch(6), "six"), Ok(()));
        assert_eq!(attendance.current_mut(Epoch(6)), Some(&mut "six"));
        assert_eq!(attendance.current_mut(Epoch(5)), None);
    }

    #[test]
    fn the_load_of_the_next_epoch_ends_one_that_still_meets() {
        let mut attendance = Attendance::new();
        attendance.load(Epoch(5));
        attendance.load(Epoch(6));
        assert_eq!(attendance.begin(Epoch(5), "five"), Err("five"));
        assert_eq!(attendance.begin(Epoch(6), "six"), Ok(()));
    }

    #[test]
    fn whoever_leaves_all_leaves_what_it_loads_too() {
        let mut attendance = Attendance::new();
        assert_eq!(attendance.leave_all(), None, "there is nothing to leave");
        attendance.load(Epoch(5));
        assert_eq!(attendance.leave_all(), Some(Epoch(5)));
        assert_eq!(attendance.begin(Epoch(5), "five"), Err("five"));
        assert_eq!(attendance.leave_all(), None);
        assert_eq!(attendance.heard(), Epoch(5));
    }

    #[test]
    fn nothing_is_done_for_an_epoch_that_was_left() {
        let mut attendance = Attendance::new();
        attendance.load(Epoch(5));
        attendance.begin(Epoch(5), "five").unwrap();
        attendance.leave(Epoch(5));
        assert_eq!(attendance.current_mut(Epoch(5)), None);
        assert_eq!(attendance.ended(Epoch(5)), None, "its end is no news");
        assert_eq!(attendance.drop_left(), Some((Epoch(5), "five")));
        assert_eq!(attendance.running(), None);
    }
}
