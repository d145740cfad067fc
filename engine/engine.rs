//! One rank's share of a model, loaded. Sequences come and go with a [`Group`], in
//! [`step_loop::run`]; the engine outlives both, so that a group can form again without reading the
//! weights again.
//!
//! [`Group`]: offbook_collectives::Group
//! [`step_loop::run`]: crate::step_loop::run

use mlx_rs::error::Exception;
use mlx_rs::{Device, DeviceType};
use offbook_protocol::{Layout, LoadProgress, Rank, ShardSpec};
use thiserror::Error;

use crate::batch::Limits;
use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::config::{ConfigError, ModelConfig};
use crate::models::minimax::{DeviceKind, MiniMax, Numerics};
use crate::partition::{Partition, PartitionError, RankShare};
use crate::precision::Precision;
use crate::weights::{LoadError, ShardWeights};

/// A share of a model on this thread's default device. It belongs to the thread that loaded it:
/// MLX's default streams are thread-local.
pub struct Engine {
    rank: Rank,
    limits: Limits,
    config: ModelConfig,
    partition: Partition,
    pub(crate) model: MiniMax,
}

impl Engine {
    /// Solves the partition and reads this rank's share. `progress` is told after every matrix.
    pub fn load(
        spec: &ShardSpec,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self, EngineError> {
        let config = ModelConfig::open(&spec.model)?;
        let partition = Partition::solve(&config, spec.layout, &spec.weights)?;
        let share = share(&partition, spec.rank)?.clone();
        let checkpoint = Checkpoint::open(&spec.model)?;
        let device = device()?;
        let precision = match device {
            DeviceKind::Cpu => Precision::Float32,
            DeviceKind::Gpu => checkpoint.precision(),
        };
        let weights = ShardWeights::load(
            &checkpoint,
            &config,
            &share,
            precision,
            &mut |done, total| {
                progress(LoadProgress {
                    rank: spec.rank,
                    bytes_loaded: done,
                    bytes_total: total,
                });
            },
        )?;
        let numerics = Numerics {
            hidden: config.hidden_size as i32,
            norm_eps: config.rms_norm_eps,
            dtype: precision.dtype(),
            device,
        };
        Ok(Self {
            rank: spec.rank,
            limits: Limits {
                prefill_chunk_tokens: spec.prefill_chunk_tokens as usize,
                context_tokens: spec.context_tokens as usize,
            },
            model: MiniMax::new(&config, &share, weights, numerics)?,
            config,
            partition,
        })
    }

    pub fn rank(&self) -> Rank {
        self.rank
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    pub fn partition(&self) -> &Partition {
        &self.partition
    }

    pub(crate) fn limits(&self) -> Limits {
        self.limits
    }

    pub(crate) fn layout(&self) -> Layout {
        self.partition.layout
    }
}

fn share(partition: &Partition, rank: Rank) -> Result<&RankShare, EngineError> {
    let ranks = partition.ranks();
    partition
        .shares
        .get(rank.index())
        .ok_or(EngineError::NoSuchRank { rank, ranks })
}

fn device() -> Result<DeviceKind, Exception> {
    Ok(match Device::try_default()?.get_type()? {
        DeviceType::Cpu => DeviceKind::Cpu,
        DeviceType::Gpu => DeviceKind::Gpu,
    })
}

/// Why a share of a model could not be loaded. None of these goes away by trying again.
#[derive(Debug, Error)]
pub enum EngineError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Partition(#[from] PartitionError),
    #[error("rank {rank} is outside a group of {ranks}")]
    NoSuchRank { rank: Rank, ranks: usize },
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error(transparent)]
    Weights(#[from] LoadError),
    #[error("the device refused the model: {0}")]
    Device(#[from] Exception),
}
