//! Keeping child processes alive, and knowing when to stop trying.
//!
//! [`RestartPolicy`] decides and knows nothing of processes, so that a supervisor of actors can use
//! the same one. [`Supervisor`] is the one for child processes. [`lifeline`] is what a child calls
//! first, so that it never outlives its parent.

mod policy;
mod supervisor;
mod child;
mod lifeline;

pub use child::{ChildSpec, Exit};
pub use lifeline::lifeline;
pub use policy::{RestartHistory, RestartPolicy, Verdict};
pub use supervisor::{ChildState, ChildStatus, Event, Restart, Supervisor, SupervisorError};
