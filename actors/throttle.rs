//! Owns the window of evaluation tasks that a shard keeps in flight. One per shard process.
//!
//! The engine's thread reads the window before each submission, without asking anybody. Its size
//! follows what the shard is doing: prefill builds large activations, so few tasks may wait;
//! decode builds small ones, and a long queue keeps the device busy.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use actix::{Actor, Context, Handler, Message};

/// The set points of the window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WindowSettings {
    pub prefill: u32,
    pub decode: u32,
}

impl Default for WindowSettings {
    /// What kept the reference cluster both out of trouble in prefill and busy in decode.
    fn default() -> Self {
        Self {
            prefill: 30,
            decode: 100,
        }
    }
}

/// See the module's own words.
pub(crate) struct Throttle {
    settings: WindowSettings,
    window: Arc<AtomicU32>,
}

impl Throttle {
    /// A throttle, and the window that the engine's thread reads.
    pub(crate) fn new(settings: WindowSettings) -> (Self, Arc<AtomicU32>) {
        let window = Arc::new(AtomicU32::new(settings.decode));
        (
            Self {
                settings,
                window: Arc::clone(&window),
            },
            window,
        )
    }
}

impl Actor for Throttle {
    type Context = Context<Self>;
}

/// The shard goes over to another kind of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Message)]
#[rtype(result = "()")]
pub(crate) enum Work {
    Prefill,
    Decode,
}

impl Handler<Work> for Throttle {
    type Result = ();

    fn handle(&mut self, work: Work, _: &mut Context<Self>) {
        let window = match work {
            Work::Prefill => self.settings.prefill,
            Work::Decode => self.settings.decode,
        };
        let before = self.window.swap(window.max(1), Ordering::Relaxed);
        if before != window {
            tracing::debug!(?work, window, "the window moves");
        }
    }
}
