//! A reference to an actor that stays good over its restarts.

use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use actix::dev::channel::AddressSender;
use actix::prelude::SendError;
use actix::{Actor, Addr, Handler, Message, Recipient};

use super::super::fate;
use super::super::status::{ChildStatus, DeadLetter};
use super::Fresh;
use super::front::Front;
use crate::sync::lock;

/// A supervised actor, in whatever life. Clones are the same reference and share its bound.
pub struct ActorRef<A: Actor> {
    shared: Arc<Shared<A>>,
}

struct Shared<A: Actor> {
    mailbox: AddressSender<Front<A>>,
    status: Arc<Mutex<ChildStatus>>,
}

impl<A: Actor> ActorRef<A> {
    pub(super) fn new(mailbox: AddressSender<Front<A>>, status: Arc<Mutex<ChildStatus>>) -> Self {
        Self {
            shared: Arc::new(Shared { mailbox, status }),
        }
    }

    /// Its name in the supervisor.
    pub fn name(&self) -> String {
        lock(&self.shared.status).name.clone()
    }

    /// Which life it is in, from 1 on. It grows with each restart.
    pub fn generation(&self) -> u64 {
        lock(&self.shared.status).generation
    }

    /// Was it stopped or given up? Then it takes no messages any more.
    pub fn is_gone(&self) -> bool {
        !self.shared.mailbox.connected()
    }

    /// The messages whose handlers panicked: the last 64, the oldest first.
    pub fn dead_letters(&self) -> Vec<DeadLetter> {
        let status = lock(&self.shared.status);
        status.dead_letters.iter().cloned().collect()
    }

    /// All that its supervisor knows about it.
    pub fn status(&self) -> ChildStatus {
        lock(&self.shared.status).clone()
    }
}

impl<A: Actor> ActorRef<A>
where
    A::Context: Fresh<A>,
{
    /// Sends the message and waits for the reply, no longer than `deadline`. While the actor is being
    /// restarted the message waits. Dropping the future withdraws a message that was not begun.
    ///
    /// Must be awaited within a tokio runtime.
    ///
    /// # Errors
    /// [`CallError`] hands the message back if it was not taken, and else says what became of it.
    pub async fn ask<M>(&self, message: M, deadline: Duration) -> Result<M::Result, CallError<M>>
    where
        A: Handler<M>,
        M: Message + Send + 'static,
        M::Result: Send,
    {
        let (sent, fate) = fate::collect(|| self.shared.mailbox.send(message));
        let reply = sent.map_err(Refused::from)?;
        match tokio::time::timeout(deadline, reply).await {
            Ok(Ok(reply)) => Ok(reply),
            Ok(Err(_)) => match fate.as_ref().and_then(|fate| fate.panicked()) {
                Some(cause) => Err(CallError::Panicked(cause.to_owned())),
                None => Err(CallError::Ended),
            },
            Err(_) => Err(CallError::DeadlinePassed),
        }
    }

    /// Sends the message without waiting for anything.
    ///
    /// # Errors
    /// [`Refused`] hands the message back.
    pub fn try_tell<M>(&self, message: M) -> Result<(), Refused<M>>
    where
        A: Handler<M>,
        M: Message + Send + 'static,
        M::Result: Send,
    {
        Ok(self.shared.mailbox.try_send(message, true)?)
    }

    /// The same reference for one message alone, without the actor's type: what
    /// [`System::register`](crate::System::register) takes, so that a name outlives restarts.
    pub fn recipient<M>(&self) -> Recipient<M>
    where
        A: Handler<M>,
        M: Message + Send + 'static,
        M::Result: Send,
    {
        Addr::new(self.shared.mailbox.clone()).recipient()
    }
}

impl<A: Actor> Clone for ActorRef<A> {
    fn clone(&self) -> Self {
        Self {
            shared: Arc::clone(&self.shared),
        }
    }
}

impl<A: Actor> fmt::Debug for ActorRef<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let status = lock(&self.shared.status);
        write!(f, "ActorRef({} in life {})", status.name, status.generation)
    }
}

/// A message that was not taken, handed back.
#[derive(Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused<M> {
    /// As many messages wait as may: slow down.
    #[error("the actor has as many messages as it takes")]
    Overloaded(M),
    /// The actor was stopped, or given up after too many failures.
    #[error("the actor is gone")]
    Gone(M),
}

impl<M> Refused<M> {
    /// The message.
    pub fn into_inner(self) -> M {
        match self {
            Self::Overloaded(message) | Self::Gone(message) => message,
        }
    }
}

impl<M> From<SendError<M>> for Refused<M> {
    fn from(error: SendError<M>) -> Self {
        match error {
            SendError::Full(message) => Self::Overloaded(message),
            SendError::Closed(message) => Self::Gone(message),
        }
    }
}

impl<M> fmt::Debug for Refused<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Overloaded(_) => "Overloaded(..)",
            Self::Gone(_) => "Gone(..)",
        })
    }
}

/// Why an ask of a supervised actor has no reply.
#[derive(Clone, PartialEq, Eq, thiserror::Error)]
pub enum CallError<M> {
    /// Not handled: the message was not taken.
    #[error("{0}")]
    Refused(Refused<M>),
    /// Its handler panicked, with these words. It was put aside and is not handled again.
    #[error("the handler panicked: {0}")]
    Panicked(String),
    /// The actor ended for another reason before it replied. It may have been handled in part.
    #[error("the actor ended before it replied")]
    Ended,
    /// The deadline passed first. It may have been handled or not.
    #[error("the actor did not reply in time")]
    DeadlinePassed,
}

impl<M> From<Refused<M>> for CallError<M> {
    fn from(refused: Refused<M>) -> Self {
        Self::Refused(refused)
    }
}

impl<M> fmt::Debug for CallError<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(refused) => refused.fmt(f),
            Self::Panicked(cause) => f.debug_tuple("Panicked").field(cause).finish(),
            Self::Ended => f.write_str("Ended"),
            Self::DeadlinePassed => f.write_str("DeadlinePassed"),
        }
    }
}
