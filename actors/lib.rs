//! The actors of Offbook, one per file, each message beside its handler.
//!
//! On the head node: [`Membership`] brings shards together and notices when one is lost;
//! [`Scheduler`] admits requests and sends plans. On every node: [`NodeAgent`] keeps the node's
//! shard process running. In every shard process: [`ShardWorker`] owns the engine's thread,
//! [`Collective`] the group it belongs to, [`Throttle`] the window of work in flight.
//!
//! Decisions are pure functions in files without IO (`membership/formation.rs`,
//! `scheduler/admission.rs`); the actors around them only carry messages. No tensor enters a
//! mailbox, and no message here lies on the path of a token.

mod scheduler;
mod membership;
mod node_agent;
mod roll;
mod shard_worker;
mod collective;
mod throttle;
mod system_memory;
mod process_limit;
mod scripted_shard;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod wire;

pub use membership::{ClusterSettings, Membership, ReportCluster, ReportSteps, SchedulerLinks};
pub use node_agent::{NodeAgent, Reporting, ShardKeeping, ShardLaunch, StopShard};
pub use process_limit::{limit_data, status_bytes};
pub use roll::Roll;
pub use scheduler::{BeginEpoch, Scheduler, SchedulerLimits, Submit};
pub use scripted_shard::{Drawn, ScriptedShard};
pub use shard_worker::{ShardWorker, ShardWorkerConfig, StallLimits};
pub use throttle::WindowSettings;
pub use throttle::controller::Sample;
pub use throttle::keeper::{LOOK_EVERY, WindowKeeper};

/// What a process of this machine that is about to load a model could be given; `None` where the system does not
/// say.
#[must_use]
pub fn loadable_bytes() -> Option<u64> {
    system_memory::SystemMemory::loadable_bytes()
}

/// Under which names the actors are registered with their process.
pub mod names {
    pub const SCHEDULER: &str = "scheduler";
    pub const MEMBERSHIP: &str = "membership";
    pub const NODE_AGENT: &str = "node-agent";
    pub const SHARD_WORKER: &str = "shard-worker";
}
