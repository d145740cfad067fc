//! Keeping child processes and actors alive, and knowing when to stop trying.
//!
//! [`RestartPolicy`] decides and knows nothing of what it decides about. A [`Supervisor`] has children
//! of both kinds, and one loop keeps them all. An [`ActorRef`] stays good over the restarts of its
//! actor. [`lifeline`] is what a child process calls first, so that it never outlives its parent.
//!
//! ```no_run
//! # use std::time::Duration;
//! # use actix::{Actor, Context, Handler, Message};
//! use offbook_runtime::supervise::{ActorSpec, RestartPolicy, Supervisor};
//! # #[derive(Message)] #[rtype(result = "u64")] struct Add(u64);
//! # #[derive(Default)] struct Counter(u64);
//! # impl Actor for Counter { type Context = Context<Self>; }
//! # impl Handler<Add> for Counter { type Result = u64;
//! #   fn handle(&mut self, add: Add, _: &mut Context<Self>) -> u64 { self.0 += add.0; self.0 } }
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let (supervisor, _news) = Supervisor::new(RestartPolicy::default());
//! let counter = supervisor.start_actor(ActorSpec::new("counter"), |_| Counter::default())?;
//! let total = counter.ask(Add(3), Duration::from_secs(1)).await?;
//! # Ok(()) }
//! ```

mod policy;
mod supervisor;
mod status;
mod inbox;
mod keeper;
mod kept;
mod child;
mod actor;
pub(crate) mod fate;
mod lifeline;

pub use actor::{ActorRef, ActorSpec, CallError, Fresh, Refused, once};
pub use child::ChildSpec;
pub use kept::{End, Kept, Life};
pub use lifeline::lifeline;
pub use policy::{RestartHistory, RestartPolicy, Verdict};
pub use status::{ChildState, ChildStatus, DeadLetter, Event, Exit, Restart};
pub use supervisor::{Roster, Strategy, Supervisor, SupervisorError};
