//! Decode steps to measure: a share of a model of any shape with random weights, run by the very loop
//! that serves.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::Duration;

use mlx_rs::error::Exception;
use mlx_rs::random;
use mlx_rs::{Array, Dtype};
use offbook_collectives::Group;
use offbook_protocol::{
    Epoch, Join, NodeWeight, Plan, PlanNumber, Rank, Sampling, SequenceId, StepOutcome,
};
use serde_json::{Value, json};

use crate::config::{ConfigError, ModelConfig};
use crate::engine::Engine;
use crate::partition::{
    AttentionSlices, FeedForwardSlices, LayerSlices, MatrixSlice, RankShare, ShareSlices,
    SwigluSlices, VectorSlice,
};
use crate::precision::Precision;
use crate::step_log::StepTiming;
use crate::step_loop::{self, Command, EndReason, LoopEnd, LoopOptions, Report, StepError};
use crate::weights::{
    AttentionWeights, ExpertWeights, FeedForwardWeights, LayerWeights, Linear, LoadError,
    ShardWeights, SwigluWeights,
};
use crate::window::Window;

impl ModelConfig {
    /// MiniMax-M2.5 at 5 bits, as `config.json` describes it, with so many of its 62 layers.
    ///
    /// # Errors
    /// [`ConfigError`] for no layers.
    pub fn minimax_m2_5(layers: usize) -> Result<Self, ConfigError> {
        let mut quantization = json!({"group_size": 64, "bits": 5});
        for layer in 0..layers {
            let router = format!("model.layers.{layer}.block_sparse_moe.gate");
            quantization[router] = json!({"group_size": 64, "bits": 8});
        }
        let config: Value = json!({
            "model_type": "minimax_m2", "hidden_size": 3072, "num_hidden_layers": layers,
            "num_attention_heads": 48, "num_key_value_heads": 8, "head_dim": 128,
            "rotary_dim": 64, "rope_theta": 5_000_000, "rms_norm_eps": 1e-6,
            "intermediate_size": 1536, "num_local_experts": 256, "num_experts_per_tok": 8,
            "vocab_size": 200_064, "max_position_embeddings": 196_608, "quantization": quantization
        });
        Self::parse(&config, None)
    }

    /// A model whose layers are wide for their weights, so that what they compute from a long prompt
    /// weighs more than they do: 2048 wide, 8 experts of which 2 are chosen, at 4 bits.
    ///
    /// # Errors
    /// [`ConfigError`] for no layers.
    pub fn wide(layers: usize) -> Result<Self, ConfigError> {
        let config: Value = json!({
            "model_type": "minimax_m2", "hidden_size": 2048, "num_hidden_layers": layers,
            "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128,
            "rotary_dim": 64, "rope_theta": 5_000_000, "rms_norm_eps": 1e-6,
            "intermediate_size": 1024, "num_local_experts": 8, "num_experts_per_tok": 2,
            "vocab_size": 4096, "max_position_embeddings": 131_072,
            "quantization": {"group_size": 64, "bits": 4}
        });
        Self::parse(&config, None)
    }

    /// The same shape with its first layers alone.
    #[must_use]
    pub fn with_layers(self, layers: usize) -> Self {
        Self { layers, ..self }
    }
}

/// What a measured step works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trial {
    /// Sequences in a step.
    pub batch: usize,
    /// Positions that each has when the first step is timed.
    pub context_tokens: usize,
    /// Steps that are timed.
    pub steps: usize,
    /// See [`LoopOptions::micro_batches`].
    pub micro_batches: Option<NonZeroU32>,
}

impl Trial {
    /// Positions that a sequence reaches.
    pub fn context_needed(&self) -> usize {
        // Steps are built ahead of what is read, the last ones run beyond the count, and whose prompt is
        // read first goes on while the others' are.
        self.context_tokens * self.batch.max(1) + WARM_UP_STEPS + self.steps + 16
    }

    /// Prefills the sequences, then runs decode steps: the times of the last `steps` of them. Over
    /// [`Group::solo`] a rank computes its share alone: the same work without an exchange.
    ///
    /// # Errors
    /// What ended the steps.
    pub fn run(
        &self,
        engine: Engine,
        group: Group,
    ) -> (Engine, Result<Vec<StepTiming>, StepError>) {
        let window = Arc::new(Window::new(WINDOW_LAYERS, WINDOW_LAYERS));
        let (engine, timings) = self.run_all(engine, group, window);
        let last = timings.map(|mut timings| {
            let first = timings.len().saturating_sub(self.steps);
            timings.split_off(first)
        });
        (engine, last)
    }

    /// The same with the times of all steps, those of the prompts first, and with a window that others
    /// may move meanwhile.
    ///
    /// # Errors
    /// What ended the steps.
    pub fn run_all(
        &self,
        engine: Engine,
        group: Group,
        window: Arc<Window>,
    ) -> (Engine, Result<Vec<StepTiming>, StepError>) {
        let (commands, commanded) = sync_channel(2);
        let plan = self.plan(engine.config());
        // The channel has room for it.
        let _ = commands.try_send(Command::Plan(plan));
        let mut watch = Watch {
            commands,
            steps: WARM_UP_STEPS + self.steps,
            decoded: 0,
            timings: Vec::new(),
        };
        let options = LoopOptions {
            epoch: EPOCH,
            window,
            step_log_every: 0,
            micro_batches: self.micro_batches,
            plan_deadline: PLAN_DEADLINE,
        };
        let LoopEnd { engine, reason } =
            step_loop::run(engine, group, commanded, &mut watch, options);
        let outcome = match reason {
            EndReason::Failed(error) => Err(error),
            EndReason::Shutdown => Ok(watch.timings),
        };
        (engine, outcome)
    }

    fn plan(&self, config: &ModelConfig) -> Plan {
        let vocabulary = config.vocabulary_size as u32;
        let join = |sequence: usize| Join {
            sequence: SequenceId(sequence as u64),
            prompt: (0..self.context_tokens.max(1) as u32)
                .map(|position| (position * 7 + sequence as u32) % vocabulary)
                .collect(),
            delivered: 0,
            sampling: Sampling::greedy(),
            max_tokens: u32::MAX,
            stop_tokens: Vec::new(),
        };
        Plan {
            epoch: EPOCH,
            number: PlanNumber(1),
            joins: (0..self.batch).map(join).collect(),
            leaves: Vec::new(),
        }
    }
}

/// Counts the steps behind the last one that reads a prompt, and ends the loop when there are enough.
struct Watch {
    commands: SyncSender<Command>,
    steps: usize,
    decoded: usize,
    timings: Vec<StepTiming>,
}

impl Report for &mut Watch {
    fn outcome(&mut self, _: StepOutcome) {}

    fn timing(&mut self, timing: StepTiming) {
        self.timings.push(timing);
        self.decoded = match timing.prefill_tokens {
            0 => self.decoded + 1,
            _ => 0,
        };
        if self.decoded == self.steps {
            let _ = self.commands.try_send(Command::Shutdown);
        }
    }

    fn failed(&mut self, _: &StepError) {}
}

/// Random weights of a share, made on the device: packed words of any bits under small scales, so
/// that activations stay finite. The same seed makes the same share.
pub(crate) fn random_weights(
    config: &ModelConfig,
    share: &RankShare,
    precision: Precision,
    seed: u64,
) -> Result<ShardWeights, LoadError> {
    let slices = ShareSlices::of(config, share);
    let mut maker = Maker {
        config,
        precision,
        seed,
        bytes: 0,
    };
    let embedding = match &slices.embedding {
        Some(slice) => Some(maker.matrix(slice, precision)?),
        None => None,
    };
    let mut layers = Vec::with_capacity(slices.layers.len());
    for layer in &slices.layers {
        layers.push(maker.layer(layer)?);
    }
    let final_norm = match &slices.final_norm {
        Some(slice) => Some(maker.ones(slice, precision)?),
        None => None,
    };
    let head = match (&slices.head, &embedding) {
        (Some(slice), _) => Some(maker.matrix(slice, precision)?),
        (None, Some(embedding)) if !share.vocabulary_rows.is_empty() => {
            Some(embedding.rows(share.vocabulary_rows.start, share.vocabulary_rows.end)?)
        }
        _ => None,
    };
    Ok(ShardWeights {
        embedding,
        layers,
        final_norm,
        head,
        bytes: maker.bytes,
    })
}

struct Maker<'a> {
    config: &'a ModelConfig,
    precision: Precision,
    seed: u64,
    bytes: u64,
}

impl Maker<'_> {
    fn layer(&mut self, slices: &LayerSlices) -> Result<LayerWeights, Exception> {
        let precision = self.precision;
        Ok(LayerWeights {
            input_norm: self.ones(&slices.input_norm, precision)?,
            post_attention_norm: self.ones(&slices.post_attention_norm, precision)?,
            attention: match &slices.attention {
                Some(slices) => Some(self.attention(slices)?),
                None => None,
            },
            feed_forward: self.feed_forward(&slices.feed_forward)?,
        })
    }

    fn attention(&mut self, slices: &AttentionSlices) -> Result<AttentionWeights, Exception> {
        let precision = self.precision;
        Ok(AttentionWeights {
            q: self.matrix(&slices.q, precision)?,
            k: self.matrix(&slices.k, precision)?,
            v: self.matrix(&slices.v, precision)?,
            o: self.matrix(&slices.o, precision)?,
            q_norm: match &slices.q_norm {
                Some(slice) => Some(self.ones(slice, precision)?),
                None => None,
            },
            k_norm: match &slices.k_norm {
                Some(slice) => Some(self.ones(slice, precision)?),
                None => None,
            },
        })
    }

    fn feed_forward(
        &mut self,
        slices: &FeedForwardSlices,
    ) -> Result<FeedForwardWeights, Exception> {
        Ok(match slices {
            FeedForwardSlices::Dense(columns) => {
                FeedForwardWeights::Dense(self.columns(columns.as_ref())?)
            }
            FeedForwardSlices::Experts {
                router,
                router_bias,
                experts,
            } => FeedForwardWeights::Experts(ExpertWeights {
                router: self.matrix(router, Precision::Float32)?,
                router_bias: match router_bias {
                    Some(slice) => Some(self.ones(slice, Precision::Float32)?),
                    None => None,
                },
                experts: self.columns(experts.as_ref())?,
            }),
        })
    }

    fn columns(
        &mut self,
        slices: Option<&SwigluSlices>,
    ) -> Result<Option<SwigluWeights>, Exception> {
        let Some(slices) = slices else {
            return Ok(None);
        };
        let precision = self.precision;
        Ok(Some(SwigluWeights {
            gate: self.matrix(&slices.gate, precision)?,
            up: self.matrix(&slices.up, precision)?,
            down: self.matrix(&slices.down, precision)?,
        }))
    }

    /// A product with it keeps the magnitude of a normed vector, within an order.
    fn matrix(&mut self, slice: &MatrixSlice, to: Precision) -> Result<Linear, Exception> {
        let (rows, columns) = (slice.rows.len(), slice.columns.len());
        let stacked = |width: usize| -> Vec<i32> {
            let shape = slice.stack.into_iter().chain([rows, width]);
            shape.map(|length| length as i32).collect()
        };
        self.seed += 1;
        let key = random::key(self.seed)?;
        let deviation = 1.0 / (columns.max(1) as f32).sqrt();
        let linear = match self.config.packing_of(&slice.module) {
            Some(packing) => {
                let words = stacked(packing.words(columns));
                let weight = random::randint::<_, i32>(0, i32::MAX, &words, Some(&key))?
                    .as_dtype(Dtype::Uint32)?;
                let groups = stacked(packing.groups(columns));
                let half = (1_u32 << (packing.bits - 1)) as f32;
                let full = |value: f32| {
                    let value = Array::from_f32(value).as_dtype(to.dtype())?;
                    mlx_rs::ops::zeros_dtype(&groups, to.dtype())?.add(value)
                };
                Linear::Quantized {
                    weight,
                    scales: full(deviation / half)?,
                    biases: full(-deviation)?,
                    group_size: packing.group_size as i32,
                    bits: packing.bits as i32,
                }
            }
            None => Linear::Dense {
                weight: random::normal::<f32>(
                    &stacked(columns),
                    None,
                    Some(deviation),
                    Some(&key),
                )?
                .as_dtype(to.dtype())?,
            },
        };
        match &linear {
            Linear::Quantized {
                weight,
                scales,
                biases,
                ..
            } => self.done(&[weight, scales, biases])?,
            Linear::Dense { weight } => self.done(&[weight])?,
        }
        Ok(linear)
    }

    fn ones(&mut self, slice: &VectorSlice, to: Precision) -> Result<Array, Exception> {
        let ones = Array::ones::<f32>(&[slice.range.len() as i32])?.as_dtype(to.dtype())?;
        self.done(&[&ones])?;
        Ok(ones)
    }

    /// One tensor at a time, so that what it was made of is freed before the next.
    fn done(&mut self, arrays: &[&Array]) -> Result<(), Exception> {
        mlx_rs::transforms::eval(arrays.iter().copied())?;
        self.bytes += arrays
            .iter()
            .map(|array| array.nbytes() as u64)
            .sum::<u64>();
        Ok(())
    }
}

/// Shares of a trial: one rank's engine.
#[derive(Clone, Debug)]
pub struct TrialShare {
    pub config: ModelConfig,
    pub layout: offbook_protocol::Layout,
    /// One per rank.
    pub weights: Vec<NodeWeight>,
    pub rank: Rank,
    /// Positions of all sequences that the trial will reach.
    pub context_tokens: usize,
    /// Tokens of a prompt in one step at most.
    pub prefill_chunk_tokens: usize,
}

/// What a trial prefills in one step where nothing else is wanted.
pub const TRIAL_CHUNK_TOKENS: usize = 512;
const EPOCH: Epoch = Epoch(1);
/// The first decode steps compile kernels and fill caches.
const WARM_UP_STEPS: usize = 8;
/// As in serving.
const WINDOW_LAYERS: u32 = 100;
const PLAN_DEADLINE: Duration = Duration::from_secs(60);
