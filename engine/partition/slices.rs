//! Which parts of which tensors make a rank's share: what the loader reads and the budget counts.
//! Names are those of MLX checkpoints (mlx-lm's `models/minimax.py`).

use std::ops::Range;

use super::RankShare;
use crate::config::{ModelConfig, Packing};

/// Everything one rank reads.
#[derive(Clone, Debug, PartialEq)]
pub struct ShareSlices {
    pub embedding: Option<MatrixSlice>,
    /// One per layer of the share, in order.
    pub layers: Vec<LayerSlices>,
    pub final_norm: Option<VectorSlice>,
    /// `None` when the rank holds no rows, and when the rows are part of an embedding that the
    /// rank holds anyway.
    pub head: Option<MatrixSlice>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct LayerSlices {
    pub input_norm: VectorSlice,
    pub post_attention_norm: VectorSlice,
    /// `None` when the rank holds no heads.
    pub attention: Option<AttentionSlices>,
    pub router: MatrixSlice,
    pub router_bias: VectorSlice,
    /// `None` when the rank holds no expert columns.
    pub experts: Option<ExpertSlices>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct AttentionSlices {
    pub q: MatrixSlice,
    pub k: MatrixSlice,
    pub v: MatrixSlice,
    pub o: MatrixSlice,
    /// The norms' weights for this rank's heads; `None` when the model has no such norms.
    pub q_norm: Option<VectorSlice>,
    pub k_norm: Option<VectorSlice>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct ExpertSlices {
    pub gate: MatrixSlice,
    pub up: MatrixSlice,
    pub down: MatrixSlice,
}

/// A part of a module's matrix, or of each matrix of a stack.
#[derive(Clone, Debug, PartialEq)]
pub struct MatrixSlice {
    /// Tensors are `module.weight`, and `module.scales` and `module.biases` if it is packed.
    pub module: String,
    /// Matrices in the stack: experts. `None` for a plain matrix.
    pub stack: Option<usize>,
    /// Output rows and input columns of the whole matrix.
    pub shape: [usize; 2],
    pub rows: Range<usize>,
    /// Whole quantisation groups.
    pub columns: Range<usize>,
}

/// A part of a vector.
#[derive(Clone, Debug, PartialEq)]
pub struct VectorSlice {
    pub tensor: String,
    /// Of the whole vector.
    pub length: usize,
    pub range: Range<usize>,
}

impl ShareSlices {
    pub fn of(config: &ModelConfig, share: &RankShare) -> Self {
        let [vocabulary, hidden] = [config.vocabulary_size, config.hidden_size];
        let embedding = "model.embed_tokens";
        let head = if config.tied_embeddings {
            embedding
        } else {
            "lm_head"
        };
        let held_already = config.tied_embeddings && share.embeds;
        Self {
            embedding: share
                .embeds
                .then(|| MatrixSlice::whole(embedding, [vocabulary, hidden])),
            layers: (share.layers.clone())
                .map(|layer| LayerSlices::of(config, share, layer))
                .collect(),
            final_norm: share
                .final_norm
                .then(|| VectorSlice::whole("model.norm.weight", hidden)),
            head: (!share.vocabulary_rows.is_empty() && !held_already).then(|| {
                MatrixSlice::whole(head, [vocabulary, hidden]).rows(&share.vocabulary_rows)
            }),
        }
    }

    /// Bytes that the share takes in memory. `packing` tells how a module is packed;
    /// `float_bytes` is the size of the values of unpacked weights, scales and biases.
    pub fn bytes(&self, packing: impl Fn(&str) -> Option<Packing>, float_bytes: u64) -> u64 {
        let matrix = |slice: &MatrixSlice| slice.bytes(packing(&slice.module), float_bytes);
        let vector = |slice: &VectorSlice| slice.range.len() as u64 * float_bytes;
        let layer = |layer: &LayerSlices| {
            let attention = layer.attention.as_ref().map_or(0, |a| {
                let matrices: u64 = [&a.q, &a.k, &a.v, &a.o].map(matrix).iter().sum();
                let norms =
                    a.q_norm.as_ref().map_or(0, vector) + a.k_norm.as_ref().map_or(0, vector);
                matrices + norms
            });
            let experts = layer
                .experts
                .as_ref()
                .map_or(0, |e| [&e.gate, &e.up, &e.down].map(matrix).iter().sum());
            // Routing is computed in f32 on every device.
            let router = layer.router.bytes(packing(&layer.router.module), 4)
                + layer.router_bias.range.len() as u64 * 4;
            let norms = vector(&layer.input_norm) + vector(&layer.post_attention_norm);
            attention + experts + router + norms
        };
        self.embedding.as_ref().map_or(0, matrix)
            + self.layers.iter().map(layer).sum::<u64>()
            + self.final_norm.as_ref().map_or(0, vector)
            + self.head.as_ref().map_or(0, matrix)
    }
}

impl LayerSlices {
    fn of(config: &ModelConfig, share: &RankShare, layer: usize) -> Self {
        let prefix = format!("model.layers.{layer}");
        let hidden = config.hidden_size;
        let norm = |name: &str| VectorSlice::whole(&format!("{prefix}.{name}.weight"), hidden);
        let moe = format!("{prefix}.block_sparse_moe");
        Self {
            input_norm: norm("input_layernorm"),
            post_attention_norm: norm("post_attention_layernorm"),
            attention: (!share.kv_heads.is_empty())
                .then(|| AttentionSlices::of(config, share, &format!("{prefix}.self_attn"))),
            router: MatrixSlice::whole(&format!("{moe}.gate"), [config.experts, hidden]),
            router_bias: VectorSlice::whole(
                &format!("{moe}.e_score_correction_bias"),
                config.experts,
            ),
            experts: (!share.expert_columns.is_empty())
                .then(|| ExpertSlices::of(config, share, &format!("{moe}.switch_mlp"))),
        }
    }
}

impl AttentionSlices {
    fn of(config: &ModelConfig, share: &RankShare, prefix: &str) -> Self {
        let scaled =
            |heads: &Range<usize>| heads.start * config.head_dim..heads.end * config.head_dim;
        let (queries, keys) = (scaled(&share.query_heads), scaled(&share.kv_heads));
        let (query_width, kv_width) = (config.query_width(), config.kv_width());
        let project = |name: &str, width, rows: &Range<usize>| {
            MatrixSlice::whole(&format!("{prefix}.{name}"), [width, config.hidden_size]).rows(rows)
        };
        let norm = |name: &str, width, range: &Range<usize>| {
            config.qk_norm.then(|| VectorSlice {
                tensor: format!("{prefix}.{name}.weight"),
                length: width,
                range: range.clone(),
            })
        };
        Self {
            q: project("q_proj", query_width, &queries),
            k: project("k_proj", kv_width, &keys),
            v: project("v_proj", kv_width, &keys),
            o: MatrixSlice::whole(
                &format!("{prefix}.o_proj"),
                [config.hidden_size, query_width],
            )
            .columns(&queries),
            q_norm: norm("q_norm", query_width, &queries),
            k_norm: norm("k_norm", kv_width, &keys),
        }
    }
}

impl ExpertSlices {
    fn of(config: &ModelConfig, share: &RankShare, prefix: &str) -> Self {
        let (hidden, width) = (config.hidden_size, config.expert_width);
        let stack = |name: &str, shape| MatrixSlice {
            stack: Some(config.experts),
            ..MatrixSlice::whole(&format!("{prefix}.{name}"), shape)
        };
        let columns = &share.expert_columns;
        Self {
            gate: stack("gate_proj", [width, hidden]).rows(columns),
            up: stack("up_proj", [width, hidden]).rows(columns),
            down: stack("down_proj", [hidden, width]).columns(columns),
        }
    }
}

impl MatrixSlice {
    fn whole(module: &str, shape: [usize; 2]) -> Self {
        Self {
            module: module.to_owned(),
            stack: None,
            shape,
            rows: 0..shape[0],
            columns: 0..shape[1],
        }
    }

    fn rows(self, rows: &Range<usize>) -> Self {
        Self {
            rows: rows.clone(),
            ..self
        }
    }

    fn columns(self, columns: &Range<usize>) -> Self {
        Self {
            columns: columns.clone(),
            ..self
        }
    }

    /// Bytes of the slice in memory.
    pub fn bytes(&self, packing: Option<Packing>, float_bytes: u64) -> u64 {
        let columns = self.columns.len();
        let row_bytes = match packing {
            Some(packing) => {
                packing.words(columns) as u64 * 4 + packing.groups(columns) as u64 * 2 * float_bytes
            }
            None => columns as u64 * float_bytes,
        };
        self.stack.unwrap_or(1) as u64 * self.rows.len() as u64 * row_bytes
    }
}

impl VectorSlice {
    fn whole(tensor: &str, length: usize) -> Self {
        Self {
            tensor: tensor.to_owned(),
            length,
            range: 0..length,
        }
    }
}
