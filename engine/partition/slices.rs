//! Which parts of which tensors make a rank's share: what the loader reads and the budget counts.
//! Names are those of MLX checkpoints, as mlx-lm converts them.

use std::ops::Range;

use super::RankShare;
use crate::config::{FeedForward, ModelConfig, Packing, QkNorm, Router};

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
    pub feed_forward: FeedForwardSlices,
}

/// What comes after attention. The columns are `None` when the rank holds none of this kind.
#[derive(Clone, Debug, PartialEq)]
pub enum FeedForwardSlices {
    Dense(Option<SwigluSlices>),
    Experts {
        router: MatrixSlice,
        /// `None` when the router corrects nothing.
        router_bias: Option<VectorSlice>,
        experts: Option<SwigluSlices>,
    },
}

#[derive(Clone, Debug, PartialEq)]
pub struct AttentionSlices {
    pub q: MatrixSlice,
    pub k: MatrixSlice,
    pub v: MatrixSlice,
    pub o: MatrixSlice,
    /// The norms' weights for this rank's heads, or for each of them alike; `None` when the model has
    /// no such norms.
    pub q_norm: Option<VectorSlice>,
    pub k_norm: Option<VectorSlice>,
}

/// Columns of a network's inner width, or of each network's of a stack.
#[derive(Clone, Debug, PartialEq)]
pub struct SwigluSlices {
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

    /// The names of the tensors that belong to it, packed or not.
    pub fn tensors(&self) -> impl Iterator<Item = String> + '_ {
        let layers = || self.layers.iter();
        let attention = || layers().filter_map(|layer| layer.attention.as_ref());
        let columns = || layers().filter_map(|layer| layer.feed_forward.columns());
        let routers = layers().filter_map(|layer| layer.feed_forward.router());
        let matrices = (self.embedding.iter().chain(&self.head))
            .chain(attention().flat_map(|a| [&a.q, &a.k, &a.v, &a.o]))
            .chain(columns().flat_map(|c| [&c.gate, &c.up, &c.down]))
            .chain(routers.clone().map(|(router, _)| router));
        let vectors = (self.final_norm.iter())
            .chain(layers().flat_map(|layer| [&layer.input_norm, &layer.post_attention_norm]))
            .chain(attention().flat_map(|a| a.q_norm.iter().chain(&a.k_norm)))
            .chain(routers.filter_map(|(_, bias)| bias));
        let parts = |matrix: &MatrixSlice| {
            let module = matrix.module.clone();
            ["weight", "scales", "biases"].map(|part| format!("{module}.{part}"))
        };
        let vectors = vectors.map(|vector| vector.tensor.clone());
        matrices.flat_map(parts).chain(vectors)
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
            let columns: u64 = (layer.feed_forward.columns())
                .map_or(0, |c| [&c.gate, &c.up, &c.down].map(matrix).iter().sum());
            // Routing is computed in f32 on every device.
            let router = match &layer.feed_forward {
                FeedForwardSlices::Dense(_) => 0,
                FeedForwardSlices::Experts {
                    router,
                    router_bias,
                    ..
                } => {
                    let bias = router_bias.as_ref().map_or(0, |bias| bias.range.len());
                    router.bytes(packing(&router.module), 4) + bias as u64 * 4
                }
            };
            let norms = vector(&layer.input_norm) + vector(&layer.post_attention_norm);
            attention + columns + router + norms
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
        Self {
            input_norm: norm("input_layernorm"),
            post_attention_norm: norm("post_attention_layernorm"),
            attention: (!share.kv_heads.is_empty())
                .then(|| AttentionSlices::of(config, share, &format!("{prefix}.self_attn"))),
            feed_forward: FeedForwardSlices::of(config, share, layer),
        }
    }
}

impl FeedForwardSlices {
    fn of(config: &ModelConfig, share: &RankShare, layer: usize) -> Self {
        let kind = config.feed_forward(layer);
        let (width, stack, held) = match kind {
            FeedForward::Dense => (config.mlp_width, None, &share.mlp_columns),
            FeedForward::Experts => (
                config.expert_width,
                Some(config.experts),
                &share.expert_columns,
            ),
        };
        let (hidden, prefix) = (config.hidden_size, config.swiglu_module(layer));
        let matrix = |name: &str, shape| MatrixSlice {
            stack,
            ..MatrixSlice::whole(&format!("{prefix}.{name}"), shape)
        };
        let columns = (!held.is_empty()).then(|| SwigluSlices {
            gate: matrix("gate_proj", [width, hidden]).rows(held),
            up: matrix("up_proj", [width, hidden]).rows(held),
            down: matrix("down_proj", [hidden, width]).columns(held),
        });
        let module = config.feed_forward_module(layer);
        match kind {
            FeedForward::Dense => Self::Dense(columns),
            FeedForward::Experts => Self::Experts {
                router: MatrixSlice::whole(&format!("{module}.gate"), [config.experts, hidden]),
                router_bias: (config.router == Router::CorrectedSigmoid).then(|| {
                    let tensor = format!("{module}.e_score_correction_bias");
                    VectorSlice::whole(&tensor, config.experts)
                }),
                experts: columns,
            },
        }
    }

    /// The router of a mixture, with its bias.
    fn router(&self) -> Option<(&MatrixSlice, Option<&VectorSlice>)> {
        match self {
            Self::Dense(_) => None,
            Self::Experts {
                router,
                router_bias,
                ..
            } => Some((router, router_bias.as_ref())),
        }
    }

    /// What the rank holds of the networks, if anything.
    pub fn columns(&self) -> Option<&SwigluSlices> {
        match self {
            Self::Dense(columns) => columns.as_ref(),
            Self::Experts { experts, .. } => experts.as_ref(),
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
            let tensor = format!("{prefix}.{name}.weight");
            match config.qk_norm {
                QkNorm::None => None,
                QkNorm::Whole => Some(VectorSlice {
                    tensor,
                    length: width,
                    range: range.clone(),
                }),
                QkNorm::PerHead => Some(VectorSlice::whole(&tensor, config.head_dim)),
            }
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
