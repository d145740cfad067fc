//! The float types that a shard computes in, and what keys and values take of them.

use mlx_rs::Dtype;
use offbook_protocol::KvBits;
use serde::{Deserialize, Serialize};

/// Type of activations, of unpacked weights, of scales and biases, or of the KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// What MLX's CPU back-end is fast in: its packed products are 6 to 9 times slower in `bf16`.
    Float32,
    BFloat16,
    Float16,
}

impl Precision {
    /// Bytes of one value.
    pub fn bytes(self) -> u64 {
        match self {
            Self::Float32 => 4,
            Self::BFloat16 | Self::Float16 => 2,
        }
    }

    pub fn dtype(self) -> Dtype {
        match self {
            Self::Float32 => Dtype::Float32,
            Self::BFloat16 => Dtype::Bfloat16,
            Self::Float16 => Dtype::Float16,
        }
    }
}

/// How keys and values are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvFormat {
    /// In which they are computed.
    pub precision: Precision,
    pub bits: KvBits,
}

impl KvFormat {
    /// Bytes of one head's key, or value, at one position.
    pub fn bytes(self, head_dim: usize) -> u64 {
        let channels = head_dim as u64;
        match self.bits {
            KvBits::AsComputed => channels * self.precision.bytes(),
            KvBits::Eight => {
                let groups = head_dim.div_ceil(kv_group_size(head_dim)) as u64;
                // A scale and a bias of each.
                channels + groups * 2 * self.precision.bytes()
            }
        }
    }
}

impl From<Precision> for KvFormat {
    fn from(precision: Precision) -> Self {
        let bits = KvBits::AsComputed;
        Self { precision, bits }
    }
}

/// Channels of a head that share a scale and a bias where keys and values are codes: MLX knows groups of 32
/// and 64.
pub(crate) fn kv_group_size(head_dim: usize) -> usize {
    match head_dim.is_multiple_of(64) {
        true => 64,
        false => 32,
    }
}
