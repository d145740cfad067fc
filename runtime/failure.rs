//! What can go wrong with a message after it was handed over, as the wire says it and as the
//! caller sees it.

use std::fmt;
use std::time::Duration;

use crate::hello::HandshakeError;
use crate::name::{ActorPath, ProcessName};

/// Why an ask has no reply. Each variant says whose fault it is; the message was handled at most
/// once, and only where noted can the caller know that it was not handled at all.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AskError {
    /// Nobody said where that process is. Not handled: give its address to `System::learn`.
    #[error("no address is known for {process}")]
    UnknownProcess {
        /// The process looked for.
        process: ProcessName,
    },
    /// No link could be made. Not handled: try again after a while.
    #[error("{process} cannot be reached")]
    Unreachable {
        /// The process looked for.
        process: ProcessName,
        /// What stood in the way.
        source: HandshakeError,
    },
    /// The link was lost while the reply was awaited. It may have been handled or not.
    #[error("the link was lost before the reply came")]
    LinkLost(#[source] Lost),
    /// The deadline passed first. It may have been handled or not.
    #[error("{actor} did not reply to `{message}` in time")]
    DeadlinePassed {
        /// The actor that was asked.
        actor: ActorPath,
        /// The message's name.
        message: &'static str,
    },
    /// Too much waits for the link already. Not handled: slow down.
    #[error("too many messages wait for the link to {process}")]
    LinkFull {
        /// The other end of the link.
        process: ProcessName,
    },
    /// The actor's mailbox is full. Not handled: slow down.
    #[error("{actor} has as many messages as it takes")]
    Overloaded {
        /// The actor that was asked.
        actor: ActorPath,
    },
    /// No actor of that name is registered there. Not handled.
    #[error("there is no actor {actor}")]
    NoSuchActor {
        /// The actor looked for.
        actor: ActorPath,
    },
    /// The actor does not take this message. Not handled: a fault in one of the two programs.
    #[error("{actor} does not take `{message}`")]
    NoHandler {
        /// The actor that was asked.
        actor: ActorPath,
        /// The message's name.
        message: &'static str,
    },
    /// The two sides have different versions of the message. Not handled: upgrade the older one.
    #[error("`{message}` has version {ours} here and {theirs} there")]
    Version {
        /// The message's name.
        message: &'static str,
        /// Its version in this process.
        ours: u16,
        /// Its version in the other process.
        theirs: u16,
    },
    /// The message takes more bytes than a frame may have. Not handled: the caller's fault.
    #[error("`{message}` takes more than {bytes_max} bytes")]
    TooLong {
        /// The message's name.
        message: &'static str,
        /// The longest frame.
        bytes_max: usize,
    },
    /// The message's serde implementation failed. Not handled: a fault in the caller's program.
    #[error("`{message}` cannot be encoded: {cause}")]
    Unencodable {
        /// The message's name.
        message: &'static str,
        /// What the encoder said.
        cause: String,
    },
    /// The other side could not decode the message. Not handled: the two types differ although
    /// their version is the same.
    #[error("{actor} cannot decode `{message}`")]
    NotUnderstood {
        /// The actor that was asked.
        actor: ActorPath,
        /// The message's name.
        message: &'static str,
    },
    /// Handled, but the reply cannot be decoded here: the two types differ although their version
    /// is the same.
    #[error("the reply to `{message}` cannot be decoded: {cause}")]
    ReplyNotUnderstood {
        /// The message's name.
        message: &'static str,
        /// What the decoder said.
        cause: String,
    },
    /// Handled, but the reply is too long for a frame or cannot be encoded: the callee's fault.
    #[error("the reply of {actor} to `{message}` cannot be sent: it is too long or unencodable")]
    ReplyNotSendable {
        /// The actor that was asked.
        actor: ActorPath,
        /// The message's name.
        message: &'static str,
    },
    /// The actor stopped, or its handler panicked. It may have been handled in part.
    #[error("{actor} stopped or panicked")]
    Closed {
        /// The actor that was asked.
        actor: ActorPath,
    },
    /// The handler of a supervised actor panicked. The message is put aside there, with the cause, and
    /// is not handled again; the actor is restarted.
    #[error("the handler of {actor} for `{message}` panicked")]
    Panicked {
        /// The actor that was asked.
        actor: ActorPath,
        /// The message's name.
        message: &'static str,
    },
    /// That process, or this one, is shutting down. Not handled.
    #[error("{process} is shutting down")]
    ShuttingDown {
        /// Which of the two.
        process: ProcessName,
    },
}

impl AskError {
    /// Is it certain that no actor has seen the message? `own` is the process that asked.
    pub(crate) fn was_not_handled(&self, own: &ProcessName) -> bool {
        match self {
            Self::UnknownProcess { .. }
            | Self::Unreachable { .. }
            | Self::LinkFull { .. }
            | Self::Overloaded { .. }
            | Self::NoSuchActor { .. }
            | Self::NoHandler { .. }
            | Self::Version { .. }
            | Self::TooLong { .. }
            | Self::Unencodable { .. }
            | Self::NotUnderstood { .. } => true,
            // An ask of a process that shuts down itself may have been under way.
            Self::ShuttingDown { process } => process != own,
            Self::LinkLost(_)
            | Self::DeadlinePassed { .. }
            | Self::ReplyNotUnderstood { .. }
            | Self::ReplyNotSendable { .. }
            | Self::Closed { .. }
            | Self::Panicked { .. } => false,
        }
    }
}

/// An ask without a reply, with the message if it is certain that nobody has seen it.
pub struct Unanswered<M> {
    /// The message, handed back: it may be asked again, here or elsewhere. `None` when it may have been
    /// handled, or was being handled when the deadline passed.
    pub message: Option<M>,
    /// Why there is no reply.
    pub reason: AskError,
}

impl<M> fmt::Debug for Unanswered<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Unanswered")
            .field("reason", &self.reason)
            .field("handed_back", &self.message.is_some())
            .finish_non_exhaustive()
    }
}

impl<M> fmt::Display for Unanswered<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.reason.fmt(f)
    }
}

impl<M> std::error::Error for Unanswered<M> {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.reason.source()
    }
}

/// A tell that did not leave, with the message.
pub struct TellError<M> {
    /// The message, handed back.
    pub message: M,
    /// Why it did not leave; the reasons are those of an ask.
    pub reason: AskError,
}

impl<M> fmt::Debug for TellError<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TellError")
            .field("reason", &self.reason)
            .finish_non_exhaustive()
    }
}

impl<M> fmt::Display for TellError<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the message did not leave: {}", self.reason)
    }
}

impl<M> std::error::Error for TellError<M> {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.reason)
    }
}

/// The end of a link, or that there never was one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the link to {process} ended: {reason}")]
pub struct Lost {
    /// The other end.
    pub process: ProcessName,
    /// Why.
    pub reason: LostReason,
}

/// Why a link ended.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LostReason {
    /// The other process shut down in order.
    #[error("the other side shut down")]
    Closed,
    /// Nothing came from it for the idle time: cut off, asleep, or killed.
    #[error("nothing came for too long")]
    TimedOut,
    /// It sent no heartbeat for so long: frozen, cut off, or killed.
    #[error("it was silent for {} ms", .0.as_millis())]
    Silent(Duration),
    /// It does not know this link any more: it was killed and started again.
    #[error("the other side does not know the link any more")]
    Reset,
    /// A newer incarnation of it has said hello.
    #[error("it was restarted and is now in boot {boot}")]
    Restarted {
        /// The new incarnation.
        boot: u64,
    },
    /// It sent what no process of this software sends.
    #[error("the other side broke the protocol: {0}")]
    PeerMisbehaved(String),
    /// There was no link and none could be made.
    #[error("no link could be made: {0}")]
    Unreachable(HandshakeError),
    /// There was no link, and nobody said where the process is.
    #[error("no address is known for it")]
    UnknownProcess,
    /// This process shut its own system down.
    #[error("this process shut down")]
    ShutDown,
}

impl LostReason {
    pub(crate) fn of_connection(error: &quinn::ConnectionError) -> Self {
        use quinn::ConnectionError;
        match error {
            ConnectionError::ApplicationClosed(close) if close.error_code == MISBEHAVED => {
                let text = String::from_utf8_lossy(&close.reason);
                Self::PeerMisbehaved(format!("it says so of us: {text}"))
            }
            ConnectionError::ApplicationClosed(close) if close.error_code == SILENT => Self::Reset,
            ConnectionError::ApplicationClosed(_) => Self::Closed,
            ConnectionError::LocallyClosed => Self::ShutDown,
            ConnectionError::TimedOut => Self::TimedOut,
            ConnectionError::Reset => Self::Reset,
            other => Self::PeerMisbehaved(other.to_string()),
        }
    }
}

/// Closes a link whose other end sent what it must not.
pub(crate) const MISBEHAVED: quinn::VarInt = quinn::VarInt::from_u32(0x20);

/// A link that is no longer wanted: its process shuts down, or it was replaced.
pub(crate) const CLOSED: quinn::VarInt = quinn::VarInt::from_u32(0x01);

/// Closes a link whose other end was silent for too long: should it be there after all, it learns that
/// the link is gone.
pub(crate) const SILENT: quinn::VarInt = quinn::VarInt::from_u32(0x02);

/// Why the callee did not answer, as it says on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    NoSuchActor,
    NoHandler,
    Version { theirs: u16 },
    NotUnderstood,
    Overloaded,
    Closed,
    DeadlinePassed,
    ReplyNotSendable,
    ShuttingDown,
    Panicked,
}

impl Failure {
    pub(crate) fn to_wire(self) -> (u8, u16) {
        match self {
            Self::NoSuchActor => (1, 0),
            Self::NoHandler => (2, 0),
            Self::Version { theirs } => (3, theirs),
            Self::NotUnderstood => (4, 0),
            Self::Overloaded => (5, 0),
            Self::Closed => (6, 0),
            Self::DeadlinePassed => (7, 0),
            Self::ReplyNotSendable => (8, 0),
            Self::ShuttingDown => (9, 0),
            Self::Panicked => (10, 0),
        }
    }

    /// An unknown code is one of a later version: all that is certain is that no reply comes.
    pub(crate) fn from_wire(code: u8, detail: u16) -> Self {
        match code {
            1 => Self::NoSuchActor,
            2 => Self::NoHandler,
            3 => Self::Version { theirs: detail },
            4 => Self::NotUnderstood,
            5 => Self::Overloaded,
            7 => Self::DeadlinePassed,
            8 => Self::ReplyNotSendable,
            9 => Self::ShuttingDown,
            10 => Self::Panicked,
            _ => Self::Closed,
        }
    }

    /// The same, for the caller that knows what it asked.
    pub(crate) fn of_ask(self, actor: &ActorPath, message: &'static str, ours: u16) -> AskError {
        let actor = actor.clone();
        match self {
            Self::NoSuchActor => AskError::NoSuchActor { actor },
            Self::NoHandler => AskError::NoHandler { actor, message },
            Self::Version { theirs } => AskError::Version {
                message,
                ours,
                theirs,
            },
            Self::NotUnderstood => AskError::NotUnderstood { actor, message },
            Self::Overloaded => AskError::Overloaded { actor },
            Self::Closed => AskError::Closed { actor },
            Self::Panicked => AskError::Panicked { actor, message },
            Self::DeadlinePassed => AskError::DeadlinePassed { actor, message },
            Self::ReplyNotSendable => AskError::ReplyNotSendable { actor, message },
            Self::ShuttingDown => AskError::ShuttingDown {
                process: actor.process,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_failure_survives_the_wire() {
        for failure in [
            Failure::NoSuchActor,
            Failure::NoHandler,
            Failure::Version { theirs: 300 },
            Failure::NotUnderstood,
            Failure::Overloaded,
            Failure::Closed,
            Failure::DeadlinePassed,
            Failure::ReplyNotSendable,
            Failure::ShuttingDown,
            Failure::Panicked,
        ] {
            let (code, detail) = failure.to_wire();
            assert_eq!(Failure::from_wire(code, detail), failure);
        }
    }
}
