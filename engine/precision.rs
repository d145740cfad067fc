//! The float types that a shard computes in.

use mlx_rs::Dtype;
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
