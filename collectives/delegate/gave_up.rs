//! The record that a device leaves of a wait that it gave up.

use std::{sync::atomic::Ordering::Relaxed, time::Duration};

use super::{Control, Memory};
use crate::{error::CollectiveError, operation::Operation};

/// A wait that the device gave up by itself. Written as one word, as in kernels.cu: number of the
/// operation (32 bits), operation (16), rank (8), reason (8).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct GaveUp {
    pub(crate) sequence: u32,
    pub(crate) operation: Operation,
    /// Whom it waited for: a peer, or its own rank for its proxy.
    pub(crate) rank: usize,
    pub(crate) reason: Reason,
}

/// Why a wait was given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reason {
    /// The deadline passed by the device's clock.
    Late,
    /// A word of a later operation stood where one of this was expected.
    Overrun,
}

impl GaveUp {
    /// The record in `memory`, if there is one.
    pub(crate) fn of(memory: &(impl Memory + ?Sized)) -> Option<Self> {
        Self::decode(memory.control(Control::GaveUp).load(Relaxed))
    }

    fn decode(word: u64) -> Option<Self> {
        let byte = |at: u32| (word >> (8 * at)) as u8;
        let reason = match byte(0) {
            0 => return None,
            LATE => Reason::Late,
            _ => Reason::Overrun,
        };
        Some(Self {
            sequence: (word >> 32) as u32,
            operation: Operation::of_number(byte(2)),
            rank: usize::from(byte(1)),
            reason,
        })
    }

    #[cfg(test)]
    pub(crate) fn encode(self) -> u64 {
        let reason = match self.reason {
            Reason::Late => LATE,
            Reason::Overrun => OVERRUN,
        };
        u64::from(self.sequence) << 32
            | u64::from(self.operation.number()) << 16
            | (self.rank as u64) << 8
            | u64::from(reason)
    }

    /// In the words of the group's errors; `own` is our rank.
    pub(crate) fn into_error(self, own: usize, deadline: Duration) -> CollectiveError {
        let Self {
            operation, rank, ..
        } = self;
        match self.reason {
            Reason::Late if rank == own => CollectiveError::local(
                "waiting on the device for its proxy",
                format!("{operation} #{} had no answer", self.sequence),
            ),
            Reason::Late => CollectiveError::Late {
                rank,
                operation,
                deadline,
            },
            Reason::Overrun => CollectiveError::Mismatch {
                rank,
                ours: format!("{operation} #{} on the device", self.sequence),
                theirs: "a later operation".to_owned(),
            },
        }
    }
}

// As in kernels.cu; 1 is a wait that the host stopped, which leaves no record.
const LATE: u8 = 2;
#[cfg(test)]
const OVERRUN: u8 = 3;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_comes_back_and_names_the_rank() {
        let record = GaveUp {
            sequence: 0xDEAD_BEEF,
            operation: Operation::GatherTo,
            rank: 2,
            reason: Reason::Late,
        };
        assert_eq!(GaveUp::decode(record.encode()), Some(record));
        assert_eq!(GaveUp::decode(0), None);
        let deadline = Duration::from_secs(1);
        assert_eq!(
            record.into_error(0, deadline).to_string(),
            "rank 2 was late: gather_to waited 1s for it"
        );
        let overrun = GaveUp {
            reason: Reason::Overrun,
            ..record
        };
        assert_eq!(GaveUp::decode(overrun.encode()), Some(overrun));
    }
}
