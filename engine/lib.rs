//! One shard of one model on one device. The engine knows nothing about text, actors or sockets.
//!
//! Who owns what is decided by pure files (`config`, `partition`, `budget`); `checkpoint` and
//! `weights` bring a rank's share to its device.

mod precision;
pub mod config;
pub mod partition;
pub mod budget;
pub mod checkpoint;
pub mod weights;

pub use budget::{Budget, DoesNotFit, Place, Workload};
pub use checkpoint::{Checkpoint, CheckpointError};
pub use config::{ConfigError, ModelConfig};
pub use partition::{Partition, PartitionError, PlanReport, RankShare};
pub use precision::Precision;
pub use weights::{
    AttentionWeights, ExpertWeights, LayerWeights, Linear, LoadError, ShardWeights,
};
