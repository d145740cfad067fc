//! Owns the window of evaluation tasks that a shard keeps in flight. One per shard process.
//!
//! A task is a layer of a step, submitted and not finished. The engine's thread reads the window before
//! each submission, without asking anybody. Prefill builds large results, so few of its layers may
//! wait; decode builds small ones, and a long queue keeps the device busy. Where the settings are
//! adaptive, the window gives way when memory is short, and so does the chunk of a prompt that a step reads.

pub(crate) mod controller;
pub(crate) mod keeper;

use std::sync::Arc;

use actix::{Actor, AsyncContext, Context, Handler, Message, MessageResult};
use offbook_engine::{Window, WorkKind};
use offbook_protocol::ThrottleFigures;

use self::keeper::{LOOK_EVERY, WindowKeeper};

/// The set points of the window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WindowSettings {
    /// Layers in flight at most in steps with rows of prompts.
    pub prefill: u32,
    /// And in others.
    pub decode: u32,
    /// Whether the window shrinks when memory is short.
    pub adaptive: bool,
}

impl Default for WindowSettings {
    /// What kept the reference cluster both out of trouble in prefill and busy in decode.
    fn default() -> Self {
        Self {
            prefill: 30,
            decode: 100,
            adaptive: false,
        }
    }
}

/// See the module's own words.
pub(crate) struct Throttle {
    keeper: WindowKeeper,
    adaptive: bool,
}

impl Throttle {
    /// A throttle, and the window that the engine's thread reads.
    pub(crate) fn new(settings: WindowSettings) -> (Self, Arc<Window>) {
        let (keeper, window) = WindowKeeper::new(settings);
        let adaptive = settings.adaptive;
        (Self { keeper, adaptive }, window)
    }
}

impl Actor for Throttle {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Context<Self>) {
        if self.adaptive {
            ctx.run_interval(LOOK_EVERY, |this, _| {
                this.keeper.look();
            });
        }
    }
}

/// How large is the window, and what has become of it?
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "ThrottleFigures")]
pub(crate) struct ReadThrottle;

impl Handler<ReadThrottle> for Throttle {
    type Result = MessageResult<ReadThrottle>;

    fn handle(&mut self, _: ReadThrottle, _: &mut Context<Self>) -> Self::Result {
        let window = self.keeper.window();
        MessageResult(ThrottleFigures {
            prefill_window: window.layers(WorkKind::Prefill),
            decode_window: window.layers(WorkKind::Decode),
            chunk_permille: window.chunk_permille(),
            shrinks: self.keeper.shrinks(),
            cache_clears: self.keeper.cache_clears(),
        })
    }
}
