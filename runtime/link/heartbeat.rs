//! The heartbeats of a link: an unreliable datagram, in both directions. A lost one is
//! not sent again, for the next one says more.
//!
//! It is a byte that says nothing, and behind it, if any, how many tells of the other side have reached no
//! mailbox over this link so far, `u64`: whoever tells is told nothing else of that.

use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use quinn::{Connection, SendDatagramError};
use tokio::time::sleep_until;

use crate::clock;
use crate::detector::{Detector, OwnTimer, Patience, Pulse, Standing};
use crate::failure::LostReason;
use crate::name::ProcessName;

/// What both sides count of the tells that reached no mailbox.
pub(super) struct Dropped<'a> {
    /// Those that came here over this link.
    pub(super) here: &'a AtomicU64,
    /// Those that went from here, over all links to that process.
    pub(super) there: &'a AtomicU64,
}

/// Sends our heartbeats and listens for the other side's, until those have been missing for too long
/// or the connection ends.
pub(super) async fn keep(
    connection: &Connection,
    peer: &ProcessName,
    dropped: Dropped<'_>,
    patience: &Patience,
) -> LostReason {
    let mut dropped_there = 0;
    let now = clock::now();
    let mut detector = Detector::new(patience.clone(), now);
    let mut timer = OwnTimer::new(now);
    let mut pulse = Pulse::new(patience, now);
    let mut standing = Standing::Alive;
    loop {
        tokio::select! {
            // First, so that a flood of datagrams cannot keep ours from being sent.
            biased;
            () = sleep_until(timer.due().into()) => {
                let now = clock::now();
                let lateness = timer.ticked(now);
                detector.excuse(lateness);
                if pulse.is_due(now, lateness)
                    && let Err(SendDatagramError::ConnectionLost(error)) = send(connection, dropped.here)
                {
                    return LostReason::of_connection(&error);
                }
                let before = std::mem::replace(&mut standing, detector.standing(now));
                match standing {
                    Standing::Lost => return LostReason::Silent(detector.silence(now)),
                    Standing::Suspected if before == Standing::Alive => {
                        tracing::debug!(%peer, silence = ?detector.silence(now), "a peer is late");
                    }
                    _ => {}
                }
            }
            datagram = connection.read_datagram() => match datagram {
                Ok(beat) => {
                    detector.heard(clock::now());
                    // They may overtake one another.
                    let count = count_of(&beat).max(dropped_there);
                    dropped.there.fetch_add(count - dropped_there, Ordering::Relaxed);
                    dropped_there = count;
                }
                Err(error) => return LostReason::of_connection(&error),
            },
        }
    }
}

/// Any failure but the connection's end is of the kind that a lost packet is.
fn send(connection: &Connection, dropped: &AtomicU64) -> Result<(), SendDatagramError> {
    connection.send_datagram(match dropped.load(Ordering::Relaxed) {
        0 => Bytes::from_static(&[BEAT]),
        count => [&[BEAT][..], &count.to_le_bytes()].concat().into(),
    })
}

/// What a heartbeat of any version says of the tells that were dropped.
fn count_of(beat: &[u8]) -> u64 {
    let count = beat.get(1..).and_then(<[u8]>::first_chunk);
    count.map_or(0, |count| u64::from_le_bytes(*count))
}

/// Its value says nothing; a byte counts against the buffer's bound, and no byte would not.
const BEAT: u8 = 0;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_beat_of_another_version_counts_nothing() {
        assert_eq!(count_of(&[]), 0);
        assert_eq!(count_of(&[BEAT]), 0);
        assert_eq!(count_of(&[BEAT, 1, 2, 3]), 0);
        assert_eq!(count_of(&[9, 5, 1, 0, 0, 0, 0, 0, 0, 77]), 0x105);
    }
}
