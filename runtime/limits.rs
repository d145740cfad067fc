//! Every bound of a [`System`](crate::System), in one place.

use std::time::Duration;

use crate::codec::FRAME_BYTES_LIMIT;
use crate::detector::Patience;

/// The bounds of one system. Both ends of a link hold to their own; `frame_bytes_max` should agree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The longest frame, that is, one message with its header. Checked before anything is allocated.
    pub frame_bytes_max: usize,
    /// How many asks may wait for a reply on one link, in each direction.
    pub asks_in_flight_max: usize,
    /// How many messages may wait to be written to one link.
    pub outbox_frames_max: usize,
    /// How many bytes may wait to be written to one link.
    pub outbox_bytes_max: usize,
    /// How many messages from elsewhere one handler may hold that it has not finished.
    pub mailbox_max: usize,
    /// How many items of one subscription may wait on the producer's side.
    pub items_queued_max: usize,
    /// How many bytes of one subscription may wait on the subscriber's side.
    pub items_bytes_max: u32,
    /// How many subscriptions one link may carry in each direction.
    pub subscriptions_max: u32,
    /// How long the other process may send no heartbeat before the link counts as lost.
    pub patience: Patience,
    /// How often a silent link is probed.
    pub keep_alive: Duration,
    /// How long a link may carry nothing at all before it counts as lost, heartbeats or not.
    pub idle_timeout: Duration,
    /// How long a connection may take until both sides have said hello.
    pub connect_timeout: Duration,
    /// The first pause after a connection could not be made; it doubles with each failure. Up to a half of
    /// each is left out, by chance.
    pub backoff_min: Duration,
    /// The longest such pause.
    pub backoff_max: Duration,
    /// How long the links' thread goes on looking for the next packet after each before it sleeps.
    /// Zero saves the processor; 50 to 100 µs saves four wake-ups per ask. An idle link never spins,
    /// and a spinning thread steps aside for any other. By default 50 µs where there are at least
    /// four cores, else zero.
    pub spin: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            frame_bytes_max: 1 << 20,
            asks_in_flight_max: 1024,
            outbox_frames_max: 16 * 1024,
            outbox_bytes_max: 8 << 20,
            mailbox_max: 1024,
            items_queued_max: 256,
            // What is on the way to one subscriber delays every ask behind it: at the speed of
            // loopback this is a third of a millisecond. A longer item takes several rounds of credit.
            items_bytes_max: 256 << 10,
            subscriptions_max: 1024,
            patience: Patience::default(),
            keep_alive: Duration::from_millis(100),
            idle_timeout: Duration::from_secs(1),
            connect_timeout: Duration::from_secs(2),
            backoff_min: Duration::from_millis(20),
            backoff_max: Duration::from_secs(1),
            spin: usual_spin(),
        }
    }
}

/// Spinning takes a core from somebody where there are few.
fn usual_spin() -> Duration {
    match std::thread::available_parallelism() {
        Ok(cores) if cores.get() >= 4 => Duration::from_micros(50),
        _ => Duration::ZERO,
    }
}

impl Limits {
    /// What is wrong with these limits, if anything is.
    pub(crate) fn fault(&self) -> Option<&'static str> {
        if self.frame_bytes_max > FRAME_BYTES_LIMIT {
            return Some("frame_bytes_max is above 8 MiB");
        }
        if self.frame_bytes_max < 512 {
            return Some("frame_bytes_max is below 512 bytes, too short for a header");
        }
        if self.frame_bytes_max > self.outbox_bytes_max {
            return Some("outbox_bytes_max is below frame_bytes_max");
        }
        if self.keep_alive * 2 > self.idle_timeout {
            return Some("idle_timeout is below two keep-alive intervals");
        }
        if self.patience.heartbeat.is_zero()
            || self.patience.heartbeat * 4 > self.patience.lose_min
            || self.patience.lose_min > self.patience.lose_max
        {
            return Some("patience.lose_min is not between four heartbeats and patience.lose_max");
        }
        let bounds = [
            self.asks_in_flight_max,
            self.outbox_frames_max,
            self.mailbox_max,
            self.items_queued_max,
            self.items_bytes_max as usize,
        ];
        if bounds.contains(&0) {
            return Some("a bound is zero, so that nothing could ever pass");
        }
        None
    }
}
