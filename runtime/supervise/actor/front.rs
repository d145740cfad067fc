//! What actix sees of a supervised actor: an address whose messages are sealed until an incarnation
//! opens them. Nothing is ever run under this address.

use actix::dev::{Envelope, EnvelopeProxy, MessageResponse, OneshotSender, ToEnvelope};
use actix::{Actor, ActorContext, ActorState, Handler, Message};

use super::Fresh;
use super::letter::{Asked, Letter};

/// Where the letter lies that was taken out of its envelope last.
pub(super) struct Front<A: Actor> {
    letter: Option<Box<dyn Letter<A> + Send>>,
}

impl<A: Actor> Front<A> {
    pub(super) fn new() -> Self {
        Self { letter: None }
    }

    /// Takes a letter out of its envelope.
    pub(super) fn take(
        &mut self,
        mut envelope: Envelope<Self>,
    ) -> Option<Box<dyn Letter<A> + Send>> {
        envelope.handle(self, &mut FrontContext);
        self.letter.take()
    }
}

/// A context in which nothing runs.
pub(super) struct FrontContext;

impl ActorContext for FrontContext {
    fn stop(&mut self) {}

    fn terminate(&mut self) {}

    fn state(&self) -> ActorState {
        ActorState::Running
    }
}

impl<A: Actor> Actor for Front<A> {
    type Context = FrontContext;
}

impl<A, M> ToEnvelope<Front<A>, M> for FrontContext
where
    A: Handler<M>,
    A::Context: Fresh<A>,
    M: Message + Send + 'static,
    M::Result: Send,
{
    fn pack(message: M, reply: Option<OneshotSender<M::Result>>) -> Envelope<Front<A>> {
        let letter: Box<dyn Letter<A> + Send> = Box::new(Asked::new(message, reply));
        Envelope::with_proxy(Box::new(Sealed {
            letter: Some(letter),
        }))
    }
}

struct Sealed<A: Actor> {
    letter: Option<Box<dyn Letter<A> + Send>>,
}

impl<A: Actor> EnvelopeProxy<Front<A>> for Sealed<A> {
    fn handle(&mut self, front: &mut Front<A>, _: &mut FrontContext) {
        front.letter = self.letter.take();
    }
}

/// actix wants to see a handler for each message that an address takes. This one passes the message on
/// as one that nobody waits for; an envelope of ours never calls it.
impl<A, M> Handler<M> for Front<A>
where
    A: Handler<M>,
    A::Context: Fresh<A>,
    M: Message + Send + 'static,
    M::Result: Send,
{
    type Result = PassedOn;

    fn handle(&mut self, message: M, _: &mut FrontContext) -> PassedOn {
        self.letter = Some(Box::new(Asked::new(message, None)));
        PassedOn
    }
}

/// No reply.
pub(super) struct PassedOn;

impl<A: Actor, M: Message> MessageResponse<Front<A>, M> for PassedOn {
    fn handle(self, _: &mut FrontContext, reply: Option<OneshotSender<M::Result>>) {
        drop(reply);
    }
}
