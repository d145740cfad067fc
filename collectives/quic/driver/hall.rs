//! Where callers wait that have not greeted: how many may, so that whoever calls without belonging takes
//! neither the memory nor the place of a rank.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use quinn_proto::Incoming;

use crate::quic::link::Link;

/// Who is expected, and how many may wait.
pub(in crate::quic) struct Hall {
    /// Where the ranks are bound; their calls come from there.
    expected: Vec<SocketAddr>,
    open: bool,
}

/// What becomes of a caller.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Enter,
    /// First it must show that it receives what is sent to its address.
    ProveAddress,
    /// There is no place now. A rank's call is sent again and again, so that it gets one when there is; a
    /// refusal would end its meeting.
    ComeAgain,
    /// Nobody is expected.
    GoAway,
}

/// Those in the hall.
#[derive(Clone, Copy, Default)]
struct Waiting {
    expected: usize,
    strangers: usize,
}

impl Hall {
    pub(in crate::quic) fn closed() -> Self {
        Self {
            expected: Vec::new(),
            open: false,
        }
    }

    pub(in crate::quic) fn of_ranks_at(expected: &[SocketAddr]) -> Self {
        Self {
            expected: expected.to_vec(),
            open: true,
        }
    }

    pub(super) fn verdict(&self, links: &[Link], incoming: &Incoming) -> Verdict {
        let mut waiting = Waiting::default();
        for link in links.iter().filter(|link| link.rank.is_none()) {
            match self.expects(link.connection.remote_address()) {
                true => waiting.expected += 1,
                false => waiting.strangers += 1,
            }
        }
        let expected = self.expects(incoming.remote_address());
        self.judge(waiting, expected, incoming.remote_address_validated())
    }

    fn judge(&self, waiting: Waiting, expected: bool, proved: bool) -> Verdict {
        let expected_max = CALLERS_PER_RANK * self.expected.len();
        if !self.open {
            return Verdict::GoAway;
        }
        let (taken, places) = match expected {
            true => (waiting.expected, expected_max),
            false => (waiting.strangers, STRANGERS_MAX),
        };
        // Whoever forges a rank's address takes half of its places at most.
        if !proved && taken >= places / 2 {
            Verdict::ProveAddress
        } else if taken >= places {
            Verdict::ComeAgain
        } else {
            Verdict::Enter
        }
    }

    /// A rank may be slow where it is expected. A stranger may still be one, through another of its
    /// interfaces, but not slow as well.
    pub(super) fn is_out_of_patience(&self, link: &Link, now: Instant) -> bool {
        let waited = now.saturating_duration_since(link.since);
        waited > PATIENCE_WITH_STRANGERS && !self.expects(link.connection.remote_address())
    }

    fn expects(&self, caller: SocketAddr) -> bool {
        let canonical = |at: SocketAddr| (at.ip().to_canonical(), at.port());
        let mut expected = self.expected.iter().copied();
        expected.any(|rank| canonical(rank) == canonical(caller))
    }
}

/// Two connections per rank may be on their way in when a call is repeated, and some that fail.
const CALLERS_PER_RANK: usize = 4;

/// A handshake takes some milliseconds, so that even many ranks behind other addresses than they said do
/// not wait for each other.
const STRANGERS_MAX: usize = 16;

const PATIENCE_WITH_STRANGERS: Duration = Duration::from_secs(2);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strangers_take_no_place_of_a_rank_and_nobody_takes_one_unproved() {
        let hall = Hall::of_ranks_at(&[([10, 0, 0, 1], 1).into(), ([10, 0, 0, 2], 1).into()]);
        assert!(hall.expects(([10, 0, 0, 2], 1).into()));
        assert!(!hall.expects(([10, 0, 0, 2], 2).into()));
        assert!(hall.expects("[::ffff:10.0.0.2]:1".parse().unwrap()));
        let full = |expected, strangers| Waiting {
            expected,
            strangers,
        };
        let judge = |waiting, expected, proved| hall.judge(waiting, expected, proved);
        assert_eq!(judge(full(0, 0), false, false), Verdict::Enter);
        assert_eq!(judge(full(0, 8), false, false), Verdict::ProveAddress);
        assert_eq!(judge(full(0, 8), false, true), Verdict::Enter);
        assert_eq!(judge(full(0, 16), false, true), Verdict::ComeAgain);
        assert_eq!(judge(full(0, 16), true, false), Verdict::Enter);
        assert_eq!(judge(full(4, 16), true, false), Verdict::ProveAddress);
        assert_eq!(judge(full(4, 16), true, true), Verdict::Enter);
        assert_eq!(judge(full(8, 0), true, true), Verdict::ComeAgain);
        let closed = Hall::closed();
        assert_eq!(closed.judge(full(0, 0), true, true), Verdict::GoAway);
    }
}
