//! Actors anywhere.
//!
//! A [`System`] is this process's place among the others: it owns one QUIC endpoint, on a thread of
//! its own, and the names of the local actors that others may reach. A [`Remote`] is a typed
//! reference to one message of one actor, here or in another process:
//!
//! ```no_run
//! # use offbook_runtime::*; use std::time::Duration;
//! # #[derive(serde::Serialize, serde::Deserialize, actix::Message)] #[rtype(result = "u64")]
//! struct Add(u64);
//! impl RemoteMessage for Add {
//!     const NAME: &'static str = "add";
//!     type Reply = u64;
//! }
//! # async fn example(system: System) -> Result<(), Box<dyn std::error::Error>> {
//! let path: ActorPath = "node-2#counter".parse()?;
//! let counter = system.remote::<Add>(&path);
//! let total = counter.ask(Add(3), Duration::from_secs(1)).await?;
//! # Ok(()) }
//! ```
//!
//! What is promised: messages from one process to one actor arrive in order, at most once, and
//! nothing is retried behind the caller's back. Every ask ends in a reply or an error by its
//! deadline; a lost link ends all of them at once. Every queue has a bound, every frame a limit.
//!
//! Any actor can be watched ([`System::watch_actor`]), and so can any process ([`System::watch`]). The
//! trace that a request belongs to travels with all that it causes ([`TraceContext`]).
//!
//! A peer of the same wire version may be newer: what it says beyond what this version knows is
//! skipped. Whatever a peer sends costs its own link at most. `cargo bench -p offbook-runtime` says
//! what messages take; `fuzz/` runs all that reads bytes of a peer.
//!
//! What is deliberately absent: retries, global names, any knowledge of what the messages mean.
//! Only `codec.rs` knows the serialisation format, only `frame.rs` and `hello.rs` the wire layout.

mod name;
mod identity;
mod trust;
mod limits;
mod message;
mod trace;
mod system;
mod remote;
mod stream;
mod watch;
mod failure;
mod registry;
mod peer;
mod link;
mod detector;
mod outbox;
mod endpoint;
mod door;
mod hello;
mod frame;
mod codec;
mod sync;
pub mod clock;
#[cfg(any(test, feature = "simulation"))]
pub mod simulation;
#[doc(hidden)]
pub mod fuzzing;
pub mod supervise;
pub mod free_port;
pub mod measure;

pub use detector::{Detector, OwnTimer, Patience, Pulse, Standing};
pub use failure::{AskError, Lost, LostReason, TellError, Unanswered};
pub use hello::HandshakeError;
pub use identity::{Identity, IdentityError, NodeKey};
pub use limits::Limits;
pub use message::{Arrival, Closed, ItemSender, OlderBody, Open, TrySendError};
pub use message::{RemoteMessage, StreamMessage};
pub use name::{ActorPath, NameError, ProcessName};
pub use remote::Remote;
pub use stream::{RemoteStream, StreamLost, Subscription};
pub use system::{StartError, System, SystemConfig};
pub use trace::{Scope, TraceContext, TraceError, TraceLayer, TracedContext};
pub use trust::{Trust, TrustedNode};
pub use watch::{Gone, GoneReason};
