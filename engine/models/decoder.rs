//! The layers of a decoder that one rank owns, over the rows of any number of sequences at once: what
//! all architectures share. How they differ is in the model's configuration.
//!
//! Everything but attention works row by row, so all rows go through it together; attention runs
//! per segment, against the segment's own cache. A row is therefore computed as it would be alone.
//!
//! Shapes: `rows` is the number of rows of the step, `hidden` the model's width. On a rank that
//! holds no heads, or no columns of the networks, the part is absent and adds zeros.

mod proof;

use std::ops::Range;

use mlx_rs::error::Exception;
use mlx_rs::fast::rms_norm;
use mlx_rs::ops::indexing::TryIndexOp;
use mlx_rs::{Array, Dtype};
use offbook_collectives::Group;
use offbook_protocol::{Layout, SequenceId};

use crate::batch::{Segment, StepBatch};
use crate::config::ModelConfig;
use crate::host;
use crate::kernels::Kernels;
use crate::kv_cache::{Caches, Coding, LayerCache, Placement, SequenceCache};
use crate::models::Fault;
use crate::models::attention::Attention;
use crate::models::experts::Experts;
use crate::models::linear::{self, embed};
use crate::models::mlp::Mlp;
use crate::models::rotary::{Rotary, Turn};
use crate::partition::RankShare;
use crate::weights::{FeedForwardWeights, LayerWeights, Linear, ShardWeights};

/// One rank's share of the model, ready to run.
pub(crate) struct Decoder {
    embedding: Option<Linear>,
    blocks: Vec<Block>,
    final_norm: Option<Array>,
    head: Option<Linear>,
    rotary: Rotary,
    /// Of a GPU for which they can be compiled, and on which they compute what MLX does.
    kernels: Option<Kernels>,
    pub(crate) numerics: Numerics,
}

/// What flows from layer to layer.
pub(crate) struct Hidden {
    /// The residual stream, `[rows, hidden]`, and what the layer before has still to add to it.
    stream: Array,
    pending: Option<Array>,
}

impl Hidden {
    pub(crate) fn new(stream: Array) -> Self {
        Self {
            stream,
            pending: None,
        }
    }

    /// What was computed last: with it, all of it is.
    pub(crate) fn last(&self) -> &Array {
        self.pending.as_ref().unwrap_or(&self.stream)
    }

    /// `[rows, hidden]`.
    pub(crate) fn whole(self) -> Result<Array, Exception> {
        match self.pending {
            Some(pending) => self.stream.add(pending),
            None => Ok(self.stream),
        }
    }
}

/// What holds for every layer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Numerics {
    pub(crate) hidden: i32,
    pub(crate) norm_eps: f32,
    /// Of activations and caches.
    pub(crate) dtype: Dtype,
    pub(crate) device: DeviceKind,
    /// Of caches.
    pub(crate) placement: Placement,
    /// Of what is in them, if it is coded.
    pub(crate) coding: Option<Coding>,
}

/// Whether the device has kernels for whole blocks, or composes them from plain operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DeviceKind {
    Cpu,
    Gpu,
}

impl Placement {
    /// Where a model's caches lie on such a device.
    pub(crate) fn of(config: &ModelConfig, device: DeviceKind, dtype: Dtype) -> Self {
        match device {
            DeviceKind::Cpu if host::attends(config.head_dim, dtype) => Self::Blocks,
            DeviceKind::Cpu | DeviceKind::Gpu => Self::OneBuffer,
        }
    }
}

/// What all layers of one step share.
pub(crate) struct Rows<'a> {
    pub(crate) segments: &'a [Segment],
    /// The rows of each segment.
    pub(crate) ranges: Vec<Range<i32>>,
    pub(crate) count: i32,
    pub(crate) turn: Turn,
    pub(crate) own: Option<Own<'a>>,
    pub(crate) group: &'a Group,
    pub(crate) divided: Divided,
}

/// Kernels of our own, and what they take of a step.
pub(crate) struct Own<'a> {
    pub(crate) kernels: &'a Kernels,
    /// Of each row: `[rows]`.
    pub(crate) positions: Array,
}

/// What ranks hold parts of, so that its sums have to be made whole.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Divided {
    pub(crate) heads: bool,
    pub(crate) columns: bool,
}

impl Divided {
    /// `ranks` counts those that work on the model together.
    pub(crate) fn by(layout: Layout, ranks: usize) -> Self {
        match layout {
            _ if ranks == 1 => Self::default(),
            Layout::Tensor => Self {
                heads: true,
                columns: true,
            },
            Layout::Expert => Self {
                heads: false,
                columns: true,
            },
            Layout::Pipeline => Self::default(),
        }
    }
}

struct Block {
    input_norm: Array,
    attention: Attention,
    post_norm: Array,
    feed_forward: FeedForward,
}

enum FeedForward {
    Dense(Mlp),
    Experts(Experts),
}

impl Decoder {
    /// Fuses what multiplies the same input. `share` says what of the model they are.
    pub(crate) fn new(
        config: &ModelConfig,
        share: &RankShare,
        weights: ShardWeights,
        numerics: Numerics,
    ) -> Result<Self, Exception> {
        let mut blocks = Vec::with_capacity(weights.layers.len());
        for layer in weights.layers {
            let block = Block::new(config, share, layer, numerics)?;
            // One layer at a time: the parts are freed before the next layer is fused.
            mlx_rs::transforms::eval(block.arrays())?;
            blocks.push(block);
        }
        let kernels = match numerics.device {
            DeviceKind::Cpu => None,
            DeviceKind::Gpu => Kernels::for_device(numerics.dtype),
        };
        let mut decoder = Self {
            embedding: weights.embedding,
            blocks,
            final_norm: weights.final_norm,
            head: weights.head,
            rotary: Rotary::new(config.rotary_dim, config.head_dim, config.rope_theta),
            kernels,
            numerics,
        };
        let usable = match &decoder.kernels {
            Some(kernels) if kernels.in_doubt() => proof::prove(&mut decoder),
            Some(kernels) => kernels.try_out(numerics.hidden, numerics.norm_eps),
            None => Ok(()),
        };
        if let Err(why) = usable {
            tracing::warn!(%why, "kernels of our own are not used, and steps take longer");
            decoder.kernels = None;
        }
        Ok(decoder)
    }

    /// Whether steps take kernels of our own.
    pub(crate) fn has_kernels(&self) -> bool {
        self.kernels.is_some()
    }

    /// Layers on this rank.
    pub(crate) fn layers(&self) -> usize {
        self.blocks.len()
    }

    /// An empty cache for one sequence.
    pub(crate) fn cache(&self) -> SequenceCache {
        SequenceCache::new(self.layers(), self.numerics.placement)
    }

    /// What the layers of a step share.
    pub(crate) fn rows<'a>(
        &'a self,
        batch: &'a StepBatch,
        group: &'a Group,
        divided: Divided,
    ) -> Rows<'a> {
        let mut ranges = Vec::with_capacity(batch.segments.len());
        let mut positions = Vec::with_capacity(batch.rows());
        for segment in &batch.segments {
            let first = positions.len() as i32;
            let start = segment.start as i32;
            positions.extend(start..start + segment.rows() as i32);
            ranges.push(first..positions.len() as i32);
        }
        let turn = match self.numerics.device {
            DeviceKind::Cpu => self.rotary.tables(&positions),
            DeviceKind::Gpu => self.rotary.kernel(&positions),
        };
        let own = self.kernels.as_ref().map(|kernels| Own {
            kernels,
            positions: match &turn {
                Turn::Kernel { offsets } => offsets.clone(),
                Turn::Tables { .. } => Array::from_slice(&positions, &[positions.len() as i32]),
            },
        });
        Rows {
            segments: &batch.segments,
            ranges,
            count: positions.len() as i32,
            turn,
            own,
            group,
            divided,
        }
    }

    /// `ids` (`[rows]`) → `[rows, hidden]`; `None` on a rank without the embedding.
    pub(crate) fn embed(&self, ids: &Array) -> Result<Option<Array>, Exception> {
        let Some(table) = &self.embedding else {
            return Ok(None);
        };
        embed(table, ids)?.as_dtype(self.numerics.dtype).map(Some)
    }

    /// One of this rank's layers.
    pub(crate) fn layer(
        &self,
        index: usize,
        hidden: Hidden,
        rows: &Rows<'_>,
        caches: &mut Caches,
    ) -> Result<Hidden, Fault> {
        let block = &self.blocks[index];
        let mut caches = Borrowed { caches, index };
        let (stream, normed) = self.add_and_norm(hidden, &block.input_norm, rows)?;
        let attention = &block.attention;
        let attended = attention.forward(&normed, rows, &self.rotary, &mut caches)?;
        let hidden = Hidden {
            stream,
            pending: Some(attended),
        };
        let (stream, normed) = self.add_and_norm(hidden, &block.post_norm, rows)?;
        let pending = Some(block.feed_forward.forward(&normed, rows)?);
        Ok(Hidden { stream, pending })
    }

    /// The stream with what was pending, and its norm.
    fn add_and_norm(
        &self,
        hidden: Hidden,
        gain: &Array,
        rows: &Rows<'_>,
    ) -> Result<(Array, Array), Exception> {
        let eps = self.numerics.norm_eps;
        if let (Some(kernels), Some(pending)) = (rows.kernels(), &hidden.pending) {
            let [stream, normed] = kernels.add_norm(&hidden.stream, pending, gain, eps)?;
            return Ok((stream, normed));
        }
        let stream = hidden.whole()?;
        let normed = rms_norm(&stream, Some(gain), eps)?;
        Ok((stream, normed))
    }

    /// Logits of the given rows over this rank's part of the vocabulary: `[rows, hidden]` →
    /// `[draws, vocabulary rows]` in 32 bits; `None` on a rank without a part.
    pub(crate) fn logits(&self, x: &Array, draws: &[i32]) -> Result<Option<Array>, Exception> {
        let (Some(norm), Some(head)) = (&self.final_norm, &self.head) else {
            return Ok(None);
        };
        let picked = if draws.len() as i32 == x.dim(0) {
            x.clone()
        } else {
            x.take_axis(Array::from_slice(draws, &[draws.len() as i32]), 0)?
        };
        let normed = rms_norm(&picked, Some(norm), self.numerics.norm_eps)?;
        project(self.kernels.as_ref(), head, &normed)?
            .as_dtype(Dtype::Float32)
            .map(Some)
    }
}

impl Block {
    fn new(
        config: &ModelConfig,
        share: &RankShare,
        layer: LayerWeights,
        numerics: Numerics,
    ) -> Result<Self, Exception> {
        Ok(Self {
            input_norm: layer.input_norm,
            attention: Attention::new(config, share, layer.attention, numerics)?,
            post_norm: layer.post_attention_norm,
            feed_forward: match layer.feed_forward {
                FeedForwardWeights::Dense(columns) => {
                    FeedForward::Dense(Mlp::new(share, columns, numerics)?)
                }
                FeedForwardWeights::Experts(layer) => {
                    FeedForward::Experts(Experts::new(config, share, layer, numerics)?)
                }
            },
        })
    }

    fn arrays(&self) -> Vec<&Array> {
        let mut all = vec![&self.input_norm, &self.post_norm];
        all.extend(self.attention.arrays());
        all.extend(match &self.feed_forward {
            FeedForward::Dense(mlp) => mlp.arrays(),
            FeedForward::Experts(experts) => experts.arrays(),
        });
        all
    }
}

impl FeedForward {
    /// `[rows, hidden]` → `[rows, hidden]`, whole on every rank.
    fn forward(&self, x: &Array, rows: &Rows<'_>) -> Result<Array, Fault> {
        match self {
            Self::Dense(mlp) => mlp.forward(x, rows),
            Self::Experts(experts) => experts.forward(x, rows),
        }
    }
}

/// The caches of one layer.
pub(crate) struct Borrowed<'a> {
    caches: &'a mut Caches,
    index: usize,
}

impl Borrowed<'_> {
    /// The cache of one sequence in this layer.
    pub(crate) fn of(&mut self, sequence: SequenceId) -> Result<&mut LayerCache, Exception> {
        self.caches
            .get_mut(&sequence)
            .and_then(|cache| cache.layers.get_mut(self.index))
            .ok_or_else(|| no_cache(sequence))
    }

    /// The same, to look at together with others.
    pub(crate) fn at(&self, sequence: SequenceId) -> Result<&LayerCache, Exception> {
        self.caches
            .get(&sequence)
            .and_then(|cache| cache.layers.get(self.index))
            .ok_or_else(|| no_cache(sequence))
    }
}

fn no_cache(sequence: SequenceId) -> Exception {
    Exception::custom(format!("sequence {sequence} has no cache"))
}

/// `x · weightᵀ`: `[rows, in]` → `[rows, out]`.
fn project(kernels: Option<&Kernels>, linear: &Linear, x: &Array) -> Result<Array, Exception> {
    if let Some(kernels) = kernels
        && let Some(product) = kernels.project(linear, x, x.dtype())?
    {
        return Ok(product);
    }
    linear::project(linear, x)
}

impl Rows<'_> {
    /// `x · weightᵀ`: `[rows, in]` → `[rows, out]`.
    pub(crate) fn project(&self, linear: &Linear, x: &Array) -> Result<Array, Exception> {
        project(self.kernels(), linear, x)
    }

    /// Those of our own, if steps take any.
    pub(crate) fn kernels(&self) -> Option<&Kernels> {
        self.own.as_ref().map(|own| own.kernels)
    }

    /// This rank's part of what comes out of attention, or of its norms, summed over all ranks.
    pub(crate) fn whole_of_heads(&self, part: Array) -> Result<Array, Fault> {
        self.whole(part, self.divided.heads)
    }

    /// This rank's part of what comes out of a network or of experts, summed over all ranks.
    pub(crate) fn whole_of_columns(&self, part: Array) -> Result<Array, Fault> {
        self.whole(part, self.divided.columns)
    }

    fn whole(&self, part: Array, divided: bool) -> Result<Array, Fault> {
        if divided {
            Ok(self.group.all_sum(&part)?)
        } else {
            Ok(part)
        }
    }

    /// One segment's rows of `x`; all of them without a slice when there is only one segment.
    pub(crate) fn slice(&self, x: &Array, range: &Range<i32>) -> Result<Array, Exception> {
        if range.len() as i32 == self.count {
            Ok(x.clone())
        } else {
            x.try_index(range.clone())
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use offbook_protocol::Sampling;
    use serde_json::json;

    use super::*;
    use crate::batch::{Draw, Input};
    use crate::checkpoint::Checkpoint;
    use crate::precision::Precision;
    use crate::trial::random_weights;

    fn minimax() -> ModelConfig {
        let config = json!({
            "model_type": "minimax_m2", "hidden_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 32, "rotary_dim": 16,
            "rope_theta": 1e4, "rms_norm_eps": 1e-6, "intermediate_size": 64, "use_qk_norm": true,
            "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 128,
            "max_position_embeddings": 512,
            "quantization": {"group_size": 32, "bits": 5}
        });
        ModelConfig::parse(&config, None).unwrap()
    }

    fn numerics(config: &ModelConfig, device: DeviceKind) -> Numerics {
        Numerics {
            hidden: config.hidden_size as i32,
            norm_eps: config.rms_norm_eps,
            dtype: Dtype::Float32,
            device,
            placement: Placement::of(config, device, Dtype::Float32),
            coding: None,
        }
    }

    fn random(device: DeviceKind) -> Decoder {
        random_with(numerics(&minimax(), device))
    }

    fn random_with(numerics: Numerics) -> Decoder {
        let config = minimax();
        let share = RankShare::whole(&config);
        let weights = random_weights(&config, &share, Precision::Float32, 3).unwrap();
        Decoder::new(&config, &share, weights, numerics).unwrap()
    }

    fn random_of_eight_bits(device: DeviceKind) -> Decoder {
        let numerics = numerics(&minimax(), device);
        random_with(Numerics {
            coding: Coding::of(32, Dtype::Float32),
            ..numerics
        })
    }

    fn fixture(name: &str, device: DeviceKind) -> Decoder {
        let all = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures");
        let config = ModelConfig::open(&all.join(name)).unwrap();
        let checkpoint = Checkpoint::open(&all.join(name)).unwrap();
        let share = RankShare::whole(&config);
        let precision = Precision::Float32;
        let weights = ShardWeights::load(&checkpoint, &config, &share, precision, &mut |_, _| {});
        Decoder::new(&config, &share, weights.unwrap(), numerics(&config, device)).unwrap()
    }

    fn segment(sequence: u64, start: usize, rows: usize) -> Segment {
        Segment {
            sequence: SequenceId(sequence),
            start,
            input: match rows {
                1 => Input::Drawn(0),
                _ => Input::Prompt((0..rows as u32).collect()),
            },
            draw: Some(Draw {
                position: start + rows,
                sampling: Sampling::greedy().into(),
                reshape: None,
            }),
            reserve: 64,
        }
    }

    /// What all layers make of the steps' rows, one after the other.
    fn outputs(model: &Decoder, steps: &[Vec<Segment>], divided: Divided) -> Vec<Array> {
        proof::outputs(model, model.layers(), steps, divided).unwrap()
    }

    /// On the way of a GPU norms, rotations and elementwise chains are kernels of their own, and the
    /// weights of experts are taken in elsewhere.
    #[test]
    fn the_way_of_a_gpu_computes_the_same() {
        let steps = [
            vec![segment(1, 0, 40), segment(2, 0, 5)],
            vec![segment(1, 40, 1), segment(2, 5, 1)],
            vec![segment(2, 6, 1)],
        ];
        let check = |name: &str, error_max: f64, model: &dyn Fn(DeviceKind) -> Decoder| {
            let cpu = outputs(&model(DeviceKind::Cpu), &steps, Divided::default());
            // Alone, and as one of several ranks, whose sums are those of one here.
            for ranks in [1, 2] {
                let divided = Divided::by(Layout::Tensor, ranks);
                let gpu = outputs(&model(DeviceKind::Gpu), &steps, divided);
                for (step, (cpu, gpu)) in cpu.iter().zip(&gpu).enumerate() {
                    assert_eq!(cpu.shape(), gpu.shape());
                    let same = cpu.all_close(gpu, error_max, error_max, None).unwrap();
                    assert!(same, "{name}, step {step}:\n{cpu}\n{gpu}");
                }
            }
        };
        check("random", 1e-3, &random);
        // A code may be rounded the other way, a step of one channel.
        check("random, coded", 2e-2, &random_of_eight_bits);
        // Norms of all heads together; of each head, in dense layers and with either softmax.
        for name in ["dense-f32", "qwen3-f32", "qwen3-moe-4bit", "qwen3-moe-f32"] {
            check(name, 1e-3, &|device| fixture(name, device));
        }
    }
}
