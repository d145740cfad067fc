//! Actors as children of a supervisor.
//!
//! ```text
//! ActorRef ─┐                       ┌─ keeper: starts, waits for the end, decides
//! Recipient ┴─→ mailbox (kept) ─→ host, on the actor's thread
//!                                    └─ incarnation: a fresh actor in a fresh context
//! ```
//!
//! The mailbox belongs to the host, and so it outlives each incarnation, which takes one message at a
//! time out of it. What an incarnation sends to its own context's address ends with it.

mod reference;
mod front;
mod letter;
mod desk;
mod incarnation;
mod host;

use actix::dev::{AsyncContextParts, ContextFut};
use actix::{Actor, Context};

pub(super) use self::host::open;
pub use self::reference::{ActorRef, CallError, Refused};

/// How an actor is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ActorSpec {
    /// What it is called in records and logs; unique within a supervisor.
    pub name: String,
    /// So many messages may wait, whether the actor runs or is being restarted. Every `Recipient` made
    /// of its reference, and every clone of one, can send one more.
    pub mailbox_max: usize,
}

impl ActorSpec {
    /// An actor called `name` with room for 1024 messages.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            mailbox_max: MAILBOX_MAX,
        }
    }

    /// The same with another bound, of at least 1.
    #[must_use]
    pub fn mailbox_max(mut self, messages: usize) -> Self {
        self.mailbox_max = messages.max(1);
        self
    }
}

/// What makes an actor that is never restarted: it was made before. For a supervisor that gives up at the
/// first end.
pub fn once<A: Actor>(actor: A) -> impl FnMut(&ActorRef<A>) -> A {
    let mut actor = Some(actor);
    move |_| {
        let made = actor.take();
        made.expect("an actor that is not restarted is started once")
    }
}

/// A context that can be made anew for each life of an actor: actix's own, and
/// [`TracedContext`](crate::TracedContext).
pub trait Fresh<A: Actor<Context = Self>>: AsyncContextParts<A> + Unpin {
    /// The actor in a context of its own, not yet started.
    fn fresh(actor: A) -> ContextFut<A, Self>
    where
        Self: Sized;
}

impl<A: Actor<Context = Self>> Fresh<A> for Context<A> {
    fn fresh(actor: A) -> ContextFut<A, Self> {
        Self::new().into_future(actor)
    }
}

/// A restart takes a fraction of a second, in which a busy actor gets about so many.
const MAILBOX_MAX: usize = 1024;
