//! The weights of one rank's share, on the device.
//!
//! Read once by the thread that owns the engine; only the byte ranges of the share are read, and
//! each array is complete before the next one is begun, so that a rank's peak memory is its share
//! and the largest tensor of it once more. Measured: 59.0 MB for a share of 54.6 MB, a quarter of a
//! model of 215.7 MB (`a_rank_takes_little_more_memory_than_its_share`).

mod load;

use mlx_rs::Array;
use mlx_rs::error::Exception;
use thiserror::Error;

use crate::checkpoint::CheckpointError;

/// What a rank computes with. Floats have the precision that they were loaded in, but for the
/// router's, which are f32.
#[derive(Debug)]
pub struct ShardWeights {
    /// `[vocabulary, hidden]`, all rows; `None` when the rank does not embed.
    pub embedding: Option<Linear>,
    /// Those of the share, in order.
    pub layers: Vec<LayerWeights>,
    /// `[hidden]`; `None` when the rank computes no logits.
    pub final_norm: Option<Array>,
    /// `[vocabulary rows of the share, hidden]`; `None` when it holds no rows.
    pub head: Option<Linear>,
    /// What all of it takes in memory.
    pub bytes: u64,
}

/// One layer's part.
#[derive(Debug)]
pub struct LayerWeights {
    /// `[hidden]`
    pub input_norm: Array,
    /// `[hidden]`
    pub post_attention_norm: Array,
    /// `None` when the rank holds no heads.
    pub attention: Option<AttentionWeights>,
    pub feed_forward: FeedForwardWeights,
}

/// What comes after attention. The columns are `None` when the rank holds none of this kind.
#[derive(Debug)]
pub enum FeedForwardWeights {
    Dense(Option<SwigluWeights>),
    Experts(ExpertWeights),
}

/// A layer's router, and the share's part of its experts.
#[derive(Debug)]
pub struct ExpertWeights {
    /// `[experts, hidden]`, f32 (packed: its scales and biases are).
    pub router: Linear,
    /// `[experts]`, f32: added to the scores for choosing, never for weighing; `None` when the router
    /// corrects nothing.
    pub router_bias: Option<Array>,
    /// Stacked: `[experts, …]`.
    pub experts: Option<SwigluWeights>,
}

/// The share's heads: `q` query heads, `kv` KV heads, `d` the head's dimension.
#[derive(Debug)]
pub struct AttentionWeights {
    /// `[q·d, hidden]`
    pub q: Linear,
    /// `[kv·d, hidden]`
    pub k: Linear,
    /// `[kv·d, hidden]`
    pub v: Linear,
    /// `[hidden, q·d]`: its product is a part of the sum over all ranks.
    pub o: Linear,
    /// `[q·d]`: the share's part of the norm over the whole width; or `[d]`, for each head alike; `None`
    /// when the model has none.
    pub q_norm: Option<Array>,
    /// `[kv·d]` or `[d]`
    pub k_norm: Option<Array>,
}

/// The share's columns `c` of a network, or of each network of a stack.
#[derive(Debug)]
pub struct SwigluWeights {
    /// `[…, c, hidden]`
    pub gate: Linear,
    /// `[…, c, hidden]`
    pub up: Linear,
    /// `[…, hidden, c]`: its product is a part of the sum over all ranks.
    pub down: Linear,
}

impl FeedForwardWeights {
    /// What the rank holds of the networks, if anything.
    pub fn columns(&self) -> Option<&SwigluWeights> {
        match self {
            Self::Dense(columns) => columns.as_ref(),
            Self::Experts(layer) => layer.experts.as_ref(),
        }
    }
}

/// A matrix `[out, in]`, or a stack of them, for products with its transpose. No architecture here adds a bias.
#[derive(Clone, Debug)]
pub enum Linear {
    /// MLX's affine packing along the input axis.
    Quantized {
        /// u32, `[…, out, in·bits/32]`
        weight: Array,
        /// `[…, out, in/group_size]`
        scales: Array,
        /// `[…, out, in/group_size]`
        biases: Array,
        group_size: i32,
        bits: i32,
    },
    Dense {
        /// `[…, out, in]`
        weight: Array,
    },
}

/// The share could not be loaded.
#[derive(Debug, Error)]
pub enum LoadError {
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error("the checkpoint holds {module} packed, and config.json names no quantisation for it")]
    NotDeclared { module: String },
    #[error(
        "{module} is packed in groups of {group_size}, which do not divide columns {start}..{end}"
    )]
    SplitGroup {
        module: String,
        group_size: usize,
        start: usize,
        end: usize,
    },
    #[error("the device refused the weights: {0}")]
    Device(#[from] Exception),
}

#[cfg(test)]
mod tests;
