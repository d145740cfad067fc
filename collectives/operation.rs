//! The operations by name, and the envelope in which an operand of one travels.

use std::fmt;

/// What ranks do together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Operation {
    /// Meeting for the first time.
    Join,
    /// Element-wise sum over all ranks, to all.
    AllSum,
    /// Element-wise maximum over all ranks, to all.
    AllMax,
    /// Element-wise minimum over all ranks, to all.
    AllMin,
    /// All operands, one after the other, to all.
    AllGather,
    /// Element-wise sum, each rank keeping its share of the rows.
    SumScatter,
    /// One rank to another.
    Send,
    /// The other end of a send.
    Receive,
    /// One rank's value to all.
    Broadcast,
    /// All rows to one rank.
    GatherTo,
}

impl Operation {
    const ALL: [Self; 10] = [
        Self::Join,
        Self::AllSum,
        Self::AllMax,
        Self::AllMin,
        Self::AllGather,
        Self::SumScatter,
        Self::Send,
        Self::Receive,
        Self::Broadcast,
        Self::GatherTo,
    ];

    /// For records that a device leaves.
    pub(crate) fn number(self) -> u8 {
        self as u8
    }

    /// The operation of that number; what a device cannot have written counts as a join.
    pub(crate) fn of_number(number: u8) -> Self {
        let known = Self::ALL.get(usize::from(number)).copied();
        known.unwrap_or(Self::Join)
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Join => "join",
            Self::AllSum => "all_sum",
            Self::AllMax => "all_max",
            Self::AllMin => "all_min",
            Self::AllGather => "all_gather",
            Self::SumScatter => "sum_scatter",
            Self::Send => "send",
            Self::Receive => "recv",
            Self::Broadcast => "broadcast",
            Self::GatherTo => "gather_to",
        })
    }
}

/// Stands before each operand on the way from one rank to another, so that two ranks that are not
/// doing the same thing find out before they add each other's numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Envelope {
    /// What the sender is in. A send and its receive are the same to the envelope.
    pub operation: Operation,
    /// The element type, as MLX numbers it; 255 for bytes of no type.
    pub dtype: u8,
    /// How many operands went this way before, between these two ranks.
    pub sequence: u64,
    /// How many bytes follow.
    pub bytes: u64,
}

impl Envelope {
    /// Bytes of an envelope on the wire.
    pub const BYTES: usize = 24;

    /// The wire form: mark, operation, type, zeros, then sequence and size in little endian.
    pub fn encode(&self) -> [u8; Self::BYTES] {
        let mut wire = [0; Self::BYTES];
        wire[..4].copy_from_slice(&[ENVELOPE_MARK, self.kind(), self.dtype, 0]);
        wire[8..16].copy_from_slice(&self.sequence.to_le_bytes());
        wire[16..].copy_from_slice(&self.bytes.to_le_bytes());
        wire
    }

    /// Says in words what is inside, when it is not what `self` expects; `wire` may be anything.
    pub fn difference(&self, wire: &[u8; Self::BYTES]) -> Option<(String, String)> {
        let expected = self.encode();
        (expected != *wire).then(|| (describe(&expected), describe(wire)))
    }

    fn kind(&self) -> u8 {
        match self.operation {
            Operation::Join => 0,
            Operation::AllSum => 1,
            Operation::AllMax => 2,
            Operation::AllMin => 3,
            Operation::AllGather => 4,
            Operation::SumScatter => 5,
            Operation::Send | Operation::Receive => 6,
            Operation::Broadcast => 7,
            Operation::GatherTo => 8,
        }
    }
}

fn describe(wire: &[u8; Envelope::BYTES]) -> String {
    const NAMES: [&str; 9] = [
        "join",
        "all_sum",
        "all_max",
        "all_min",
        "all_gather",
        "sum_scatter",
        "send/recv",
        "broadcast",
        "gather_to",
    ];
    let name = NAMES.get(usize::from(wire[1])).copied();
    let (true, Some(name)) = (wire[0] == ENVELOPE_MARK, name) else {
        return "something that is no operation of ours".to_owned();
    };
    let word = |at: usize| {
        let mut word = [0; 8];
        word.copy_from_slice(&wire[at..at + 8]);
        u64::from_le_bytes(word)
    };
    format!(
        "{name} #{} of {} bytes, type {}",
        word(8),
        word(16),
        wire[2]
    )
}

/// Tells an envelope from the middle of an operand. Any rare byte would do.
const ENVELOPE_MARK: u8 = 0xB7;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_names_both_sides() {
        let ours = Envelope {
            operation: Operation::AllSum,
            dtype: 10,
            sequence: 7,
            bytes: 6144,
        };
        let theirs = Envelope {
            operation: Operation::AllMax,
            ..ours
        };
        assert_eq!(ours.difference(&ours.encode()), None);
        let (expected, came) = ours.difference(&theirs.encode()).unwrap();
        assert_eq!(expected, "all_sum #7 of 6144 bytes, type 10");
        assert_eq!(came, "all_max #7 of 6144 bytes, type 10");
        let noise = ours.difference(&[0xFF; Envelope::BYTES]).unwrap().1;
        assert_eq!(noise, "something that is no operation of ours");
    }
}
