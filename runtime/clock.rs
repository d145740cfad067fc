//! The clock that links and actors live by. It is tokio's, the one that the timers go by, so that a simulation
//! can turn both.

use std::time::Instant;

/// The time now.
pub fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}
