//! A typed reference to one message of an actor, here or in another process.

use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use futures::FutureExt;

use crate::clock;
use crate::codec::{self, EncodeError};
use crate::failure::{AskError, Failure, Lost, LostReason, TellError, Unanswered};
use crate::frame::{self, Call, CallKind};
use crate::link::{Link, RefusedAsk};
use crate::message::{Arrival, RemoteMessage};
use crate::name::ActorPath;
use crate::outbox::PushError;
use crate::peer::Peer;
use crate::system::Shared;
use crate::trace::TraceContext;

/// A reference to the message `M` of one actor. Cheap to clone; it stays good over restarts of the
/// other process, since every call uses the link of its own time.
pub struct Remote<M> {
    target: Arc<Target>,
    message: PhantomData<fn(M)>,
}

impl<M: RemoteMessage> Remote<M> {
    pub(crate) fn new(shared: Arc<Shared>, path: ActorPath) -> Self {
        Self {
            target: Arc::new(Target::new(shared, path)),
            message: PhantomData,
        }
    }

    /// The actor that this refers to.
    pub fn path(&self) -> &ActorPath {
        &self.target.path
    }

    /// Sends the message and waits for the reply, no longer than `deadline`. The deadline travels:
    /// an actor that has not begun by then never will. Dropping the future cancels likewise.
    ///
    /// Must be awaited within a tokio runtime.
    ///
    /// # Errors
    /// [`AskError`] says whose fault it is and whether the message may have been handled.
    pub async fn ask(&self, message: M, deadline: Duration) -> Result<M::Reply, AskError> {
        let asked = self.ask_or_return(message, deadline).await;
        asked.map_err(|unanswered| unanswered.reason)
    }

    /// The same, and the message comes back with the error when it is certain that no actor has seen it:
    /// when the mailbox or the link was full, above all.
    ///
    /// # Errors
    /// [`Unanswered`], with the reason and perhaps the message.
    pub async fn ask_or_return(
        &self,
        message: M,
        deadline: Duration,
    ) -> Result<M::Reply, Unanswered<M>> {
        let asking = async {
            let Some(peer) = &self.target.peer else {
                return self.ask_here(message, deadline).await;
            };
            let asked = self.ask_there(peer, &message, deadline).await;
            asked.map_err(|reason| {
                let unseen = reason.was_not_handled(&self.target.shared.process);
                Unanswered {
                    message: unseen.then_some(message),
                    reason,
                }
            })
        };
        let asked = tokio::time::timeout(deadline, asking).await;
        asked.unwrap_or_else(|_| {
            Err(Unanswered {
                message: None,
                reason: self.failed(Failure::DeadlinePassed),
            })
        })
    }

    async fn ask_here(
        &self,
        mut message: M,
        deadline: Duration,
    ) -> Result<M::Reply, Unanswered<M>> {
        let target = &self.target;
        let refused = |message, reason| Unanswered { message, reason };
        if let Err(reason) = target.check_open() {
            return Err(refused(Some(message), reason));
        }
        let handler = match target.shared.registry.local::<M>(&target.path.actor) {
            Ok(handler) => handler,
            Err(failure) => return Err(refused(Some(message), self.failed(failure))),
        };
        message.arrived(&target.local_arrival(Some(deadline)));
        match handler.send(message) {
            Ok(asked) => asked
                .await
                .map_err(|failure| refused(None, self.failed(failure))),
            Err((message, failure)) => Err(refused(Some(message), self.failed(failure))),
        }
    }

    async fn ask_there(
        &self,
        peer: &Arc<Peer>,
        message: &M,
        deadline: Duration,
    ) -> Result<M::Reply, AskError> {
        let target = &self.target;
        let link = target.link(peer)?;
        let pending = link
            .ask(|id| {
                target
                    .frame(CallKind::Ask, id, deadline, message)
                    .map_err(Refused::Frame)
            })
            .map_err(|refused| match refused {
                Refused::Frame(error) => target.unencodable(M::NAME, error),
                Refused::Link(RefusedAsk::Full) => target.link_full(),
                Refused::Link(RefusedAsk::Lost) => target.gone(&link),
            })?;
        match pending.answer().await {
            Ok(Ok(reply)) => codec::decode(&reply).map_err(|error| AskError::ReplyNotUnderstood {
                message: M::NAME,
                cause: error.to_string(),
            }),
            Ok(Err(failure)) => Err(self.failed(failure)),
            Err(lost) => Err(target.lost(lost)),
        }
    }

    /// Sends the message without waiting for anything. Success means that it was queued, no more:
    /// it is delivered at most once, in order with other messages from here.
    ///
    /// A mailbox of this process that is full hands the message back. One of another process cannot: there
    /// the message is dropped, counted, and logged (the first, the second, the fourth and so on). The
    /// sender can read how many were: [`System::tells_refused`](crate::System::tells_refused). Who must
    /// know of each one asks, with `()` for a reply.
    ///
    /// # Errors
    /// [`TellError`] hands the message back when it could not be queued.
    pub fn try_tell(&self, message: M) -> Result<(), TellError<M>> {
        match &self.target.peer {
            Some(peer) => match self.tell_there(peer, &message) {
                Ok(()) => Ok(()),
                Err(reason) => Err(TellError { message, reason }),
            },
            None => self.tell_here(message),
        }
    }

    fn tell_here(&self, mut message: M) -> Result<(), TellError<M>> {
        let target = &self.target;
        if let Err(reason) = target.check_open() {
            return Err(TellError { message, reason });
        }
        let handler = match target.shared.registry.local::<M>(&target.path.actor) {
            Ok(handler) => handler,
            Err(failure) => {
                return Err(TellError {
                    message,
                    reason: self.failed(failure),
                });
            }
        };
        message.arrived(&target.local_arrival(None));
        match handler.tell_local(message) {
            Ok(None) => Ok(()),
            Ok(Some(waiting)) => {
                target.shared.finish(waiting.map(drop));
                Ok(())
            }
            Err((message, failure)) => Err(TellError {
                message,
                reason: self.failed(failure),
            }),
        }
    }

    fn tell_there(&self, peer: &Arc<Peer>, message: &M) -> Result<(), AskError> {
        let target = &self.target;
        let link = target.link(peer)?;
        let frame = target
            .frame(CallKind::Tell, 0, Duration::ZERO, message)
            .map_err(|error| target.unencodable(M::NAME, error))?;
        link.outbox.push(&frame).map_err(|error| match error {
            PushError::Full => target.link_full(),
            PushError::Closed => target.gone(&link),
        })
    }

    fn failed(&self, failure: Failure) -> AskError {
        failure.of_ask(&self.target.path, M::NAME, M::VERSION)
    }
}

impl<M> Clone for Remote<M> {
    fn clone(&self) -> Self {
        Self {
            target: Arc::clone(&self.target),
            message: PhantomData,
        }
    }
}

impl<M> fmt::Debug for Remote<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Remote({})", self.target.path)
    }
}

enum Refused {
    Frame(EncodeError),
    Link(RefusedAsk),
}

impl From<RefusedAsk> for Refused {
    fn from(refused: RefusedAsk) -> Self {
        Self::Link(refused)
    }
}

/// What a reference points to, for asks, tells and subscriptions alike.
pub(crate) struct Target {
    pub(crate) shared: Arc<Shared>,
    pub(crate) path: ActorPath,
    /// `None` for an actor of this process.
    pub(crate) peer: Option<Arc<Peer>>,
}

impl Target {
    pub(crate) fn new(shared: Arc<Shared>, path: ActorPath) -> Self {
        let peer = (path.process != shared.process).then(|| shared.peer(&path.process));
        Self { shared, path, peer }
    }

    pub(crate) fn check_open(&self) -> Result<(), AskError> {
        match self.shared.is_closing() {
            true => Err(AskError::ShuttingDown {
                process: self.shared.process.clone(),
            }),
            false => Ok(()),
        }
    }

    pub(crate) fn link(&self, peer: &Arc<Peer>) -> Result<Arc<Link>, AskError> {
        self.shared.link_of(peer).map_err(|reason| {
            self.lost(Lost {
                process: self.path.process.clone(),
                reason,
            })
        })
    }

    /// A link that was never made is told apart from one that was lost: the message was not handled.
    pub(crate) fn lost(&self, lost: Lost) -> AskError {
        let process = self.path.process.clone();
        match lost.reason {
            LostReason::UnknownProcess => AskError::UnknownProcess { process },
            LostReason::Unreachable(source) => AskError::Unreachable { process, source },
            LostReason::ShutDown => AskError::ShuttingDown {
                process: self.shared.process.clone(),
            },
            reason => AskError::LinkLost(Lost { process, reason }),
        }
    }

    /// The link ended between being found and being used.
    fn gone(&self, link: &Link) -> AskError {
        self.lost(link.lost_or(LostReason::Closed))
    }

    fn link_full(&self) -> AskError {
        AskError::LinkFull {
            process: self.path.process.clone(),
        }
    }

    pub(crate) fn unencodable(&self, message: &'static str, error: EncodeError) -> AskError {
        match error {
            EncodeError::TooLong { bytes_max } => AskError::TooLong { message, bytes_max },
            EncodeError::Unencodable(cause) => AskError::Unencodable { message, cause },
        }
    }

    fn local_arrival(&self, deadline: Option<Duration>) -> Arrival {
        let deadline = deadline.and_then(|deadline| clock::now().checked_add(deadline));
        Arrival {
            from: self.shared.process.clone(),
            deadline,
            trace: TraceContext::current(),
        }
    }

    fn frame<M: RemoteMessage>(
        &self,
        kind: CallKind,
        id: u64,
        deadline: Duration,
        message: &M,
    ) -> Result<BytesMut, EncodeError> {
        let header = self.header(M::NAME, M::VERSION, id, deadline);
        call_frame(kind, &header, message, self.shared.limits.frame_bytes_max)
    }

    pub(crate) fn header(
        &self,
        message: &'static str,
        version: u16,
        id: u64,
        deadline: Duration,
    ) -> Call<'_> {
        Call {
            id,
            deadline,
            trace: TraceContext::current(),
            actor: &self.path.actor,
            message,
            version,
            body: &[],
        }
    }
}

/// One call: the header, then the message.
pub(crate) fn call_frame<T: serde::Serialize>(
    kind: CallKind,
    header: &Call<'_>,
    message: &T,
    bytes_max: usize,
) -> Result<BytesMut, EncodeError> {
    frame::build(bytes_max, |out| {
        frame::put_call(out, kind, header);
        codec::encode(message, out, bytes_max)
    })
}
