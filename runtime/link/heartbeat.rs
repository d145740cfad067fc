//! The heartbeats of a link: an unreliable datagram, in both directions. A lost one is
//! not sent again, for the next one says more.

use bytes::Bytes;
use quinn::{Connection, SendDatagramError};
use tokio::time::sleep_until;

use crate::clock;
use crate::detector::{Detector, OwnTimer, Patience, Pulse, Standing};
use crate::failure::LostReason;
use crate::name::ProcessName;

/// Sends our heartbeats and listens for the other side's, until those have been missing for too long
/// or the connection ends.
pub(super) async fn keep(
    connection: &Connection,
    peer: &ProcessName,
    patience: &Patience,
) -> LostReason {
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
                    && let Err(SendDatagramError::ConnectionLost(error)) = send(connection)
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
                Ok(_) => detector.heard(clock::now()),
                Err(error) => return LostReason::of_connection(&error),
            },
        }
    }
}

/// Any failure but the connection's end is of the kind that a lost packet is.
fn send(connection: &Connection) -> Result<(), SendDatagramError> {
    connection.send_datagram(Bytes::from_static(&[BEAT]))
}

/// Its value says nothing; a byte counts against the buffer's bound, and no byte would not.
const BEAT: u8 = 0;
