//! The queue in front of a link's writer: frames are appended to one buffer, and the writer takes
//! the whole buffer at once. So a burst becomes one write, and a lone frame waits for nobody.

use std::sync::Mutex;

use bytes::{Bytes, BytesMut};
use tokio::sync::Notify;

use crate::limits::Limits;
use crate::sync::lock;

pub(crate) struct Outbox {
    state: Mutex<State>,
    filled: Notify,
    frames_max: usize,
    owed_frames_max: usize,
    bytes_max: usize,
}

struct State {
    buffer: BytesMut,
    frames: usize,
    stage: Stage,
}

#[derive(PartialEq)]
enum Stage {
    Open,
    /// What is queued is still written; nothing more is taken.
    Finishing,
    Closed,
}

/// Why a frame was not taken.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum PushError {
    Full,
    Closed,
}

impl Outbox {
    pub(crate) fn new(limits: &Limits) -> Self {
        let state = State {
            buffer: BytesMut::new(),
            frames: 0,
            stage: Stage::Open,
        };
        Self {
            state: Mutex::new(state),
            filled: Notify::new(),
            frames_max: limits.outbox_frames_max,
            owed_frames_max: (limits.outbox_frames_max + limits.asks_in_flight_max)
                .saturating_mul(OWED_TIMES),
            bytes_max: limits.outbox_bytes_max,
        }
    }

    /// Appends a frame that its sender can do without: a new ask or tell.
    pub(crate) fn push(&self, frame: &[u8]) -> Result<(), PushError> {
        let mut state = lock(&self.state);
        if state.frames >= self.frames_max || state.buffer.len() + frame.len() > self.bytes_max {
            return Err(PushError::Full);
        }
        self.append(&mut state, frame)
    }

    /// Appends a frame that must not be lost: a reply, a failure or a cancellation. It is refused
    /// only when far more wait than the asks in flight of anybody who reads the answers.
    pub(crate) fn push_owed(&self, frame: &[u8]) -> Result<(), PushError> {
        let mut state = lock(&self.state);
        if state.frames >= self.owed_frames_max {
            return Err(PushError::Full);
        }
        self.append(&mut state, frame)
    }

    /// Whether so much waits that nothing should be begun that will add to it.
    pub(crate) fn is_full(&self) -> bool {
        lock(&self.state).buffer.len() >= self.bytes_max
    }

    fn append(&self, state: &mut State, frame: &[u8]) -> Result<(), PushError> {
        if state.stage != Stage::Open {
            return Err(PushError::Closed);
        }
        // The writer is awake already when there was something to write.
        if state.buffer.is_empty() {
            self.filled.notify_one();
        }
        state.buffer.extend_from_slice(frame);
        state.frames += 1;
        Ok(())
    }

    /// All that waits, as soon as something does. `None` when there will be nothing more.
    /// Only one task, the link's writer, calls this.
    pub(crate) async fn take(&self) -> Option<Bytes> {
        loop {
            {
                let mut state = lock(&self.state);
                if state.stage == Stage::Closed {
                    return None;
                }
                if !state.buffer.is_empty() {
                    state.frames = 0;
                    return Some(state.buffer.split().freeze());
                }
                if state.stage == Stage::Finishing {
                    return None;
                }
            }
            self.filled.notified().await;
        }
    }

    /// No more frames; those that wait are still written.
    pub(crate) fn finish(&self) {
        let mut state = lock(&self.state);
        if state.stage == Stage::Open {
            state.stage = Stage::Finishing;
        }
        self.filled.notify_one();
    }

    /// No more frames, and those that wait are dropped.
    pub(crate) fn close(&self) {
        let mut state = lock(&self.state);
        state.stage = Stage::Closed;
        state.buffer = BytesMut::new();
        self.filled.notify_one();
    }
}

/// Answers beyond the queue's bound and the asks in flight: both sides may have asked as many as they
/// may, and some were refused.
const OWED_TIMES: usize = 2;

#[cfg(test)]
mod tests {
    use super::*;

    fn outbox() -> Outbox {
        Outbox::new(&Limits {
            outbox_frames_max: 3,
            outbox_bytes_max: 10,
            asks_in_flight_max: 2,
            ..Limits::default()
        })
    }

    #[tokio::test]
    async fn a_burst_is_taken_at_once_and_in_order() {
        let outbox = outbox();
        outbox.push(b"ab").unwrap();
        outbox.push(b"cd").unwrap();
        assert_eq!(outbox.take().await.unwrap()[..], b"abcd"[..]);
    }

    #[tokio::test]
    async fn both_bounds_hold_and_are_given_back() {
        let outbox = outbox();
        for _ in 0..3 {
            outbox.push(b"a").unwrap();
        }
        assert_eq!(outbox.push(b"a"), Err(PushError::Full));
        outbox.push_owed(b"r").unwrap();
        assert_eq!(outbox.take().await.unwrap().len(), 4);
        assert_eq!(outbox.push(&[0; 11]), Err(PushError::Full));
        outbox.push(&[0; 10]).unwrap();
    }

    #[test]
    fn what_is_owed_has_a_bound_too() {
        let outbox = outbox();
        for _ in 0..10 {
            assert_eq!(outbox.push_owed(b"r"), Ok(()));
        }
        assert!(outbox.is_full());
        assert_eq!(outbox.push_owed(b"r"), Err(PushError::Full));
    }

    #[tokio::test]
    async fn finishing_writes_what_waits() {
        let outbox = outbox();
        outbox.push(b"a").unwrap();
        outbox.finish();
        assert_eq!(outbox.push(b"b"), Err(PushError::Closed));
        assert!(outbox.take().await.is_some());
        assert!(outbox.take().await.is_none());
    }

    #[tokio::test]
    async fn closing_drops_what_waits() {
        let outbox = outbox();
        outbox.push(b"a").unwrap();
        outbox.close();
        assert!(outbox.take().await.is_none());
    }
}
