//! The smallest pieces that a tensor-parallel rank can hold.

use crate::config::{FeedForward, ModelConfig};

/// Shares are multiples of these. Rows of a packed matrix can be cut anywhere; columns only
/// between quantisation groups, because a group shares its scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Units {
    /// KV heads, with their query heads, whose columns of `o_proj` are whole groups in every layer.
    pub kv_heads: usize,
    /// Expert columns that are whole groups of `down_proj` in every layer.
    pub expert_columns: usize,
    /// The same of dense layers.
    pub mlp_columns: usize,
    pub vocabulary_rows: usize,
}

impl Units {
    /// What the configuration says about packing decides, even for a module that a checkpoint
    /// holds unpacked: then the units are only coarser than they need be.
    pub fn of(config: &ModelConfig) -> Self {
        let columns_per_head = config.query_heads_per_kv_head() * config.head_dim;
        let mut kv_heads = 1;
        let (mut expert_columns, mut mlp_columns) = (1, 1);
        for layer in 0..config.layers {
            let group = |module: String| Some(config.packing_of(&module)?.group_size);
            if let Some(group) = group(format!("model.layers.{layer}.self_attn.o_proj")) {
                kv_heads = lcm(kv_heads, group / gcd(group, columns_per_head));
            }
            let (unit, width) = match config.feed_forward(layer) {
                FeedForward::Dense => (&mut mlp_columns, config.mlp_width),
                FeedForward::Experts => (&mut expert_columns, config.expert_width),
            };
            let columns = group(config.swiglu_module(layer) + ".down_proj");
            *unit = lcm(*unit, columns.unwrap_or(power_of_two(width, COLUMNS_MAX)));
        }
        Self {
            kv_heads: divisor_or_whole(kv_heads, config.kv_heads),
            expert_columns: divisor_or_whole(expert_columns, config.expert_width),
            mlp_columns: divisor_or_whole(mlp_columns, config.mlp_width),
            vocabulary_rows: power_of_two(config.vocabulary_size, VOCABULARY_ROWS_MAX),
        }
    }
}

/// `unit`, or all of it in one piece where the units would not come out even.
fn divisor_or_whole(unit: usize, whole: usize) -> usize {
    if whole.is_multiple_of(unit) {
        unit
    } else {
        whole
    }
}

/// The largest power of two up to `bound` that divides `whole`.
fn power_of_two(whole: usize, bound: usize) -> usize {
    gcd(whole, bound)
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

fn lcm(a: usize, b: usize) -> usize {
    a / gcd(a, b) * b
}

/// Of unpacked networks: one block of MLX's matrix kernels.
const COLUMNS_MAX: usize = 64;
/// MLX's packed matrix-vector kernels write 8 rows at a time.
const VOCABULARY_ROWS_MAX: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_power_of_two_is_found() {
        assert_eq!(power_of_two(200_064, 8), 8);
        assert_eq!(power_of_two(60, 64), 4);
        assert_eq!(power_of_two(33, 64), 1);
    }
}
