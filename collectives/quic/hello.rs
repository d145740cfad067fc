//! The first bytes in each direction of a pair: who we are, and which group we mean.

use crate::error::CollectiveError;

/// One side of a greeting. The caller speaks first, the called one answers with its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Hello {
    pub epoch: u64,
    pub from: u32,
    pub to: u32,
    pub size: u32,
}

impl Hello {
    pub(super) const BYTES: usize = 28;

    pub(super) fn encode(&self) -> [u8; Self::BYTES] {
        let mut wire = [0; Self::BYTES];
        wire[..8].copy_from_slice(MAGIC);
        wire[8..16].copy_from_slice(&self.epoch.to_le_bytes());
        wire[16..20].copy_from_slice(&self.from.to_le_bytes());
        wire[20..24].copy_from_slice(&self.to.to_le_bytes());
        wire[24..].copy_from_slice(&self.size.to_le_bytes());
        wire
    }

    /// What the peer says, unless it speaks another language.
    pub(super) fn decode(wire: &[u8; Self::BYTES]) -> Option<Self> {
        let word =
            |at: usize| u32::from_le_bytes([wire[at], wire[at + 1], wire[at + 2], wire[at + 3]]);
        (wire[..8] == *MAGIC).then(|| Self {
            epoch: u64::from(word(8)) | u64::from(word(12)) << 32,
            from: word(16),
            to: word(20),
            size: word(24),
        })
    }

    /// Whether `theirs` is the answer to, or the question for, this greeting of ours.
    pub(super) fn check(&self, theirs: &Self) -> Result<(), CollectiveError> {
        let rank = theirs.from as usize;
        if theirs.epoch != self.epoch {
            let (ours, theirs) = (self.epoch, theirs.epoch);
            return Err(CollectiveError::WrongEpoch { rank, ours, theirs });
        }
        let refused = |why| Err(CollectiveError::Refused { rank, why });
        if theirs.size != self.size {
            return refused(format!(
                "it counts {} ranks, we count {}",
                theirs.size, self.size
            ));
        }
        if theirs.to != self.from {
            return refused(format!(
                "it means rank {}, we are rank {}",
                theirs.to, self.from
            ));
        }
        if theirs.from != self.to {
            return refused(format!(
                "we mean rank {}, it is rank {}",
                self.to, theirs.from
            ));
        }
        Ok(())
    }
}

/// Names the protocol and its version; the ALPN has named it before.
const MAGIC: &[u8; 8] = b"offbktn1";

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: Hello = Hello {
        epoch: 1 << 40,
        from: 2,
        to: 0,
        size: 3,
    };

    #[test]
    fn a_greeting_survives_the_wire_and_noise_does_not() {
        assert_eq!(Hello::decode(&OURS.encode()), Some(OURS));
        assert_eq!(Hello::decode(&[7; Hello::BYTES]), None);
    }

    #[test]
    fn the_bytes_do_not_change() {
        // A change here needs another magic and another ALPN.
        let expected = b"offbktn1\0\0\0\0\0\x01\0\0\x02\0\0\0\0\0\0\0\x03\0\0\0";
        assert_eq!(&OURS.encode(), expected);
    }

    #[test]
    fn any_bytes_are_a_greeting_or_none() {
        let mut state = 7u64;
        for round in 0..100_000 {
            let mut wire = [0; Hello::BYTES];
            for byte in &mut wire {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                *byte = (state >> 56) as u8;
            }
            if round % 2 == 0 {
                wire[..8].copy_from_slice(MAGIC);
            }
            let Some(heard) = Hello::decode(&wire) else {
                assert_ne!(&wire[..8], MAGIC);
                continue;
            };
            assert_eq!(heard.encode(), wire);
            let _ = OURS.check(&heard);
        }
    }

    #[test]
    fn each_difference_is_named() {
        let theirs = Hello {
            from: 0,
            to: 2,
            ..OURS
        };
        assert_eq!(OURS.check(&theirs), Ok(()));
        let wrong_epoch = OURS.check(&Hello { epoch: 3, ..theirs });
        assert_eq!(
            wrong_epoch,
            Err(CollectiveError::WrongEpoch {
                rank: 0,
                ours: 1 << 40,
                theirs: 3
            })
        );
        for other in [
            Hello { size: 4, ..theirs },
            Hello { to: 1, ..theirs },
            Hello { from: 1, ..theirs },
        ] {
            assert!(matches!(
                OURS.check(&other),
                Err(CollectiveError::Refused { .. })
            ));
        }
    }
}
