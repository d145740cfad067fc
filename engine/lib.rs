//! One shard of one model on one device. The engine knows nothing about text, actors or sockets.
//!
//! Who owns what is decided by pure files (`config`, `partition`, `budget`, `planner`); `checkpoint` and
//! `weights` bring a rank's share to its device. `step_loop` is the life of a shard: `batch` says
//! which rows a step has and what `prefix_cache` keeps of ended sequences, `step` builds it from `models`,
//! `kernels`, `kv_cache`, `reshaping` and `sampler`. `window` says how many layers may be in flight, `memory` what MLX
//! holds.
//! `trial` runs the same loop on random weights, to measure it.

mod precision;
pub mod config;
pub mod partition;
pub mod budget;
mod planner;
pub mod checkpoint;
mod regular_file;
pub mod weights;
pub mod memory;
mod window;
mod engine;
pub mod step_loop;
mod trial;
pub mod batch;
mod prefix_cache;
mod plan_inbox;
mod prefill_pace;
mod step;
mod step_log;
mod models;
mod kernels;
mod kv_cache;
mod host;
mod reshaping;
mod sampler;

pub use budget::{Budget, DoesNotFit, Place, Workload};
pub use checkpoint::{Checkpoint, CheckpointError};
pub use config::{ConfigError, ModelConfig};
pub use engine::{Engine, EngineError};
pub use host::CPU_THREADS;
pub use partition::{Collectives, Partition, PartitionError, PlanReport, RankPlan, RankShare};
pub use plan_inbox::{PlanGap, PlanInbox};
pub use planner::{Basis, Candidate, Estimate, Machine, Misfit, Network, candidates};
pub use precision::{KvFormat, Precision};
pub use step_log::StepTiming;
pub use step_loop::{
    Command, EndReason, LoopEnd, LoopOptions, Report, StepError, run as run_steps,
};
pub use trial::{TRIAL_CHUNK_TOKENS, Trial, TrialShare};
pub use weights::{
    AttentionWeights, ExpertWeights, FeedForwardWeights, LayerWeights, Linear, LoadError,
    ShardWeights, SwigluWeights,
};
pub use window::{CHUNK_AS_CONFIGURED, Window, WorkKind};
