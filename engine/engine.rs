//! One rank's share of a model, loaded. Sequences come and go with a [`Group`], in
//! [`step_loop::run`]; the engine outlives both, so that a group can form again without reading the
//! weights again.
//!
//! [`Group`]: offbook_collectives::Group
//! [`step_loop::run`]: crate::step_loop::run

use mlx_rs::error::Exception;
use mlx_rs::{Device, DeviceType, Dtype};
use offbook_protocol::{KvBits, Layout, LoadProgress, Rank, ShardSpec};
use thiserror::Error;

use crate::batch::Limits;
use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::config::{ConfigError, ModelConfig};
use crate::kv_cache::{Coding, Placement};
use crate::models::decoder::{Decoder, DeviceKind, Numerics};
use crate::partition::{Partition, PartitionError, RankShare};
use crate::precision::Precision;
use crate::trial::{TrialShare, random_weights};
use crate::weights::{LoadError, ShardWeights};

/// A share of a model on this thread's default device. It belongs to the thread that loaded it:
/// MLX's default streams are thread-local.
pub struct Engine {
    rank: Rank,
    limits: Limits,
    config: ModelConfig,
    partition: Partition,
    pub(crate) model: Decoder,
}

impl Engine {
    /// Solves the partition and reads this rank's share. `progress` is told after every matrix.
    pub fn load(
        spec: &ShardSpec,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self, EngineError> {
        let config = ModelConfig::open(&spec.model)?;
        let head_dim = config.head_dim;
        if spec.kv_bits == KvBits::Eight && Coding::of(head_dim, Dtype::Float32).is_none() {
            return Err(EngineError::KvBits { head_dim });
        }
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
        let limits = Limits {
            prefill_chunk_tokens: spec.prefill_chunk_tokens as usize,
            context_tokens: spec.context_tokens as usize,
            kv_tokens: spec.kv_tokens() as usize,
            retained_tokens: spec.retained_tokens() as usize,
        };
        let share = Share {
            rank: spec.rank,
            weights,
            precision,
            kv_bits: spec.kv_bits,
            device,
        };
        Self::of(config, partition, share, limits)
    }

    /// A share with random weights: to measure, not to serve. It reads no file.
    pub fn random(spec: &TrialShare, seed: u64) -> Result<Self, EngineError> {
        let partition = Partition::solve(&spec.config, spec.layout, &spec.weights)?;
        let device = device()?;
        let precision = match device {
            DeviceKind::Cpu => Precision::Float32,
            DeviceKind::Gpu => Precision::BFloat16,
        };
        let own = share(&partition, spec.rank)?;
        let share = Share {
            rank: spec.rank,
            weights: random_weights(&spec.config, own, precision, seed)?,
            precision,
            kv_bits: KvBits::AsComputed,
            device,
        };
        let limits = Limits {
            prefill_chunk_tokens: spec.prefill_chunk_tokens,
            context_tokens: spec.context_tokens,
            // As many as its batch asks for: the trial says itself how large that is.
            kv_tokens: usize::MAX,
            // Every prompt is to be read.
            retained_tokens: 0,
        };
        Self::of(spec.config.clone(), partition, share, limits)
    }

    fn of(
        config: ModelConfig,
        partition: Partition,
        own: Share,
        limits: Limits,
    ) -> Result<Self, EngineError> {
        let numerics = Numerics {
            hidden: config.hidden_size as i32,
            norm_eps: config.rms_norm_eps,
            dtype: own.precision.dtype(),
            device: own.device,
            placement: Placement::of(&config, own.device, own.precision.dtype()),
            coding: match own.kv_bits {
                KvBits::Eight => Coding::of(config.head_dim, own.precision.dtype()),
                KvBits::AsComputed => None,
            },
        };
        let model = Decoder::new(&config, share(&partition, own.rank)?, own.weights, numerics)?;
        Ok(Self {
            rank: own.rank,
            limits,
            model,
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

    /// Whether steps take kernels of our own: on a GPU, unless it cannot have them.
    pub fn has_kernels(&self) -> bool {
        self.model.has_kernels()
    }

    pub fn partition(&self) -> &Partition {
        &self.partition
    }

    /// What the caches of all sequences may hold together from the next group on, in positions, and no
    /// sequence may be longer. All ranks must be given the same.
    pub fn bound_caches(&mut self, kv_tokens: u32) {
        let kv_tokens = kv_tokens as usize;
        self.limits.kv_tokens = kv_tokens;
        self.limits.context_tokens = self.limits.context_tokens.min(kv_tokens);
    }

    pub(crate) fn limits(&self) -> Limits {
        self.limits
    }

    pub(crate) fn layout(&self) -> Layout {
        self.partition.layout
    }
}

/// What one rank computes with, and on what.
struct Share {
    rank: Rank,
    weights: ShardWeights,
    precision: Precision,
    kv_bits: KvBits,
    device: DeviceKind,
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
    #[error(
        "keys and values cannot be kept in 8 bits: heads are {head_dim} channels wide, which is no \
         multiple of 32"
    )]
    KvBits { head_dim: usize },
    #[error("rank {rank} is outside a group of {ranks}")]
    NoSuchRank { rank: Rank, ranks: usize },
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error(transparent)]
    Weights(#[from] LoadError),
    #[error("the device refused the model: {0}")]
    Device(#[from] Exception),
}
