//! What `offbook plan` prints: who holds what, how many bytes that is, what a token costs on the
//! network.

use std::ops::Range;

use offbook_protocol::{Layout, Rank};
use serde::{Deserialize, Serialize};

use super::{Partition, RankShare, ShareSlices};
use crate::config::{ModelConfig, QkNorm};
use crate::precision::{KvFormat, Precision};
use crate::step::CONTROL_WORDS;

/// A partition with its numbers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlanReport {
    pub layout: Layout,
    pub sampling_rank: Rank,
    pub ranks: Vec<RankPlan>,
    /// Over all ranks: more than the model's size, because small tensors are replicated.
    pub weight_bytes: u64,
    /// Over all ranks.
    pub kv_bytes_per_token: u64,
    pub collectives: Collectives,
}

/// One rank's line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RankPlan {
    pub rank: Rank,
    pub layers: Range<usize>,
    pub kv_heads: Range<usize>,
    pub query_heads: Range<usize>,
    pub expert_columns: Range<usize>,
    pub mlp_columns: Range<usize>,
    pub vocabulary_rows: Range<usize>,
    pub weight_bytes: u64,
    pub kv_bytes_per_token: u64,
}

/// Exchanges that one decoded token of one sequence takes, whatever the number of ranks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Collectives {
    /// Tensor: the sums of squares of q and k together (when the model norms them over all heads), the
    /// sum after attention, the sum after the experts or the dense network. Expert: the last of these.
    /// Pipeline: none.
    pub per_layer: u64,
    /// Tensor, expert: the logits are brought together and the token is broadcast. Pipeline: every
    /// boundary between ranks hands one activation on, and the token is broadcast.
    pub per_step: u64,
    pub per_token: u64,
    /// Bytes that the rank that samples contributes to all of them, which is the most: operands, and the
    /// message with the token. The logits, which the others send it, are not counted.
    pub bytes_per_rank: u64,
}

impl PlanReport {
    /// `weight_bytes` has one entry per rank: from the checkpoint where there is one, else from
    /// [`PlanReport::estimated_weight_bytes`]. A [`Precision`] is a format of caches as well.
    pub fn new(
        config: &ModelConfig,
        partition: &Partition,
        weight_bytes: &[u64],
        format: impl Into<KvFormat>,
    ) -> Self {
        let format = format.into();
        let line = |(rank, (share, weight_bytes)): (usize, (&RankShare, &u64))| RankPlan {
            rank: Rank(rank as u32),
            layers: share.layers.clone(),
            kv_heads: share.kv_heads.clone(),
            query_heads: share.query_heads.clone(),
            expert_columns: share.expert_columns.clone(),
            mlp_columns: share.mlp_columns.clone(),
            vocabulary_rows: share.vocabulary_rows.clone(),
            weight_bytes: *weight_bytes,
            kv_bytes_per_token: share.kv_bytes_per_token(config, format),
        };
        let ranks: Vec<RankPlan> = (partition.shares.iter().zip(weight_bytes).enumerate())
            .map(line)
            .collect();
        Self {
            layout: partition.layout,
            sampling_rank: partition.sampling_rank(),
            weight_bytes: ranks.iter().map(|rank| rank.weight_bytes).sum(),
            kv_bytes_per_token: ranks.iter().map(|rank| rank.kv_bytes_per_token).sum(),
            ranks,
            collectives: Collectives::of(config, partition, format.precision),
        }
    }

    /// Bytes per rank as the configuration tells, when there is no checkpoint to ask.
    pub fn estimated_weight_bytes(
        config: &ModelConfig,
        partition: &Partition,
        precision: Precision,
    ) -> Vec<u64> {
        let packing = |module: &str| config.packing_of(module);
        let bytes = |share| ShareSlices::of(config, share).bytes(packing, precision.bytes());
        partition.shares.iter().map(bytes).collect()
    }
}

impl RankShare {
    /// Bytes that one position of one sequence takes in this rank's KV cache.
    pub fn kv_bytes_per_token(&self, config: &ModelConfig, format: impl Into<KvFormat>) -> u64 {
        let rows = 2 * self.layers.len() * self.kv_heads.len();
        rows as u64 * format.into().bytes(config.head_dim)
    }
}

impl Collectives {
    fn of(config: &ModelConfig, partition: &Partition, precision: Precision) -> Self {
        let ranks = partition.ranks() as u64;
        if ranks == 1 {
            return Self::default();
        }
        let activation = config.hidden_size as u64 * precision.bytes();
        let message = message_bytes();
        let (per_layer, per_step, bytes_per_rank) = match partition.layout {
            Layout::Tensor => {
                let norms = u64::from(config.qk_norm == QkNorm::Whole);
                // Two sums of squares in f32 for the norms.
                let layer_bytes = norms * 8 + 2 * activation;
                (norms + 2, 2, layer_bytes * config.layers as u64 + message)
            }
            Layout::Expert => (1, 2, activation * config.layers as u64 + message),
            Layout::Pipeline => (0, ranks, activation + message),
        };
        Self {
            per_layer,
            per_step,
            per_token: per_layer * config.layers as u64 + per_step,
            bytes_per_rank,
        }
    }
}

/// What every step ends with: the control words, and here one token.
fn message_bytes() -> u64 {
    let words = CONTROL_WORDS.unsigned_abs() + 1;
    u64::from(words) * size_of::<u32>() as u64
}
