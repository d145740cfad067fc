//! Grouped-query attention, with q and k normalised over the whole projection, all heads together, or
//! each head by itself, or not at all.
//!
//! Under tensor parallelism each rank holds some heads. Norms over the whole projection need sums of
//! squares over all ranks: both travel in one tiny all-reduce. The output projection needs another one.

use mlx_rs::error::Exception;
use mlx_rs::fast::{ScaledDotProductAttentionMask, rms_norm, scaled_dot_product_attention};
use mlx_rs::ops::indexing::{TryIndexOp, take_axis};
use mlx_rs::ops::{broadcast_to, concatenate, matmul, rsqrt};
use mlx_rs::{Array, Dtype};

use crate::batch::Segment;
use crate::config::{ModelConfig, QkNorm};
use crate::host::{self, Reading, Sight};
use crate::kernels::{HeadInputs, HeadsOf};
use crate::kv_cache::{Coding, KeysAndValues, LayerCache, Place, Placement};
use crate::models::Fault;
use crate::models::decoder::{Borrowed, DeviceKind, Numerics, Own, Rows};
use crate::models::fused::{self, NormOfTwo};
use crate::models::linear::{Fused, arrays, fuse};
use crate::models::rotary::Rotary;
use crate::partition::RankShare;
use crate::weights::{AttentionWeights, Linear};

/// The heads that this rank holds, if any.
pub(crate) struct Attention {
    heads: Option<Heads>,
    qk_norm: QkNorm,
    numerics: Numerics,
}

struct Heads {
    /// q, k and v in one matrix, or each by itself when they are stored differently.
    inputs: Vec<Linear>,
    output: Linear,
    /// The norms' weights by head, q's with the attention's scale in them:
    /// `[query + kv heads, head_dim]`, 32 bits.
    gains: Array,
    norm: Norm,
    /// For a device with a kernel for norms, of a model that has them: what it takes when no other rank
    /// has a part in them.
    kernel_gains: Option<KernelGains>,
    of: HeadsOf,
    coding: Option<Coding>,
}

/// What [`QkNorm`] says, with what it takes beside the gains.
enum Norm {
    None,
    Whole(WholeNorm),
    PerHead { eps: f32 },
}

/// What norms over all heads need.
struct WholeNorm {
    /// Which norm each head belongs to: 0 for q, 1 for k.
    of_head: Array,
    /// Takes the squares of this rank's heads to its part of both means: `[(query + kv heads) ×
    /// head_dim, 2]`, 1 / width over all ranks where a channel belongs to the norm, else 0.
    mean: Array,
    /// 1 for the heads of q, and for those of k, else 0: `[query + kv heads, 1]`.
    kinds: [Array; 2],
    eps: Array,
}

/// The norms' weights as they are: `[query heads × head_dim]` and `[kv heads × head_dim]`, or twice
/// `[head_dim]`.
struct KernelGains {
    query: Array,
    key: Array,
}

/// What attention reads for every row of a step.
struct Prepared {
    /// `[rows, query heads, head_dim]`.
    queries: Array,
    /// By which their products with keys have still to be multiplied.
    scale: f32,
    /// `[rows, 2 × kv heads, head_dim]`, or words of codes in place of channels: keys, then values.
    pairs: Array,
}

impl Attention {
    pub(crate) fn new(
        config: &ModelConfig,
        share: &RankShare,
        weights: Option<AttentionWeights>,
        numerics: Numerics,
    ) -> Result<Self, Exception> {
        let heads = match weights {
            Some(weights) => Some(Heads::new(config, share, weights, numerics)?),
            None => None,
        };
        Ok(Self {
            heads,
            qk_norm: config.qk_norm,
            numerics,
        })
    }

    /// `[rows, hidden]` → `[rows, hidden]`, whole on every rank.
    pub(crate) fn forward(
        &self,
        x: &Array,
        rows: &Rows<'_>,
        rotary: &Rotary,
        caches: &mut Borrowed<'_>,
    ) -> Result<Array, Fault> {
        let Some(heads) = &self.heads else {
            return self.nothing(x, rows);
        };
        let mut prepared = heads.prepare(x, rows, rotary, self.numerics)?;
        let coding = self.numerics.coding;
        if let Some(coding) = coding {
            prepared.pairs = coding.pack(&prepared.pairs)?;
        }
        for (segment, range) in rows.segments.iter().zip(&rows.ranges) {
            let place = Place {
                start: segment.start,
                reserve: segment.reserve,
            };
            let pairs = rows.slice(&prepared.pairs, range)?;
            caches.of(segment.sequence)?.append(&pairs, place)?;
        }
        let attended = match self.numerics.placement {
            Placement::Blocks => prepared.attend_together(rows, caches, coding)?,
            Placement::OneBuffer => heads.attend_one_by_one(&prepared, rows, caches)?,
        };
        let part = rows.project(&heads.output, &attended)?;
        rows.whole_of_heads(part)
    }

    /// This rank's part of the other ranks' sums: zeros. Each is made from what came before it, so
    /// that no sum overtakes another.
    fn nothing(&self, x: &Array, rows: &Rows<'_>) -> Result<Array, Fault> {
        let zero = Array::from_f32(0.0).as_dtype(self.numerics.dtype)?;
        let mut part = x.multiply(&zero)?;
        if self.qk_norm == QkNorm::Whole {
            let sums = part.try_index((.., ..2))?.as_dtype(Dtype::Float32)?;
            let sums = rows.whole_of_heads(sums)?.try_index((.., ..1))?;
            part = part.add(sums.as_dtype(self.numerics.dtype)?.multiply(&zero)?)?;
        }
        rows.whole_of_heads(part)
    }

    pub(crate) fn arrays(&self) -> Vec<&Array> {
        let Some(heads) = &self.heads else {
            return Vec::new();
        };
        let linears = heads.inputs.iter().chain([&heads.output]);
        let mut all: Vec<&Array> = linears.flat_map(arrays).collect();
        all.push(&heads.gains);
        if let Some(gains) = &heads.kernel_gains {
            all.extend([&gains.query, &gains.key]);
        }
        all
    }
}

impl Heads {
    fn new(
        config: &ModelConfig,
        share: &RankShare,
        weights: AttentionWeights,
        numerics: Numerics,
    ) -> Result<Self, Exception> {
        let (query, kv) = (share.query_heads.len() as i32, share.kv_heads.len() as i32);
        let width = config.head_dim as i32;
        let gain = |norm: Option<Array>, heads: i32| match norm {
            // Weights for each head, or one head's for all of them.
            Some(norm) => broadcast_to(
                &norm.as_dtype(Dtype::Float32)?.reshape(&[-1, width])?,
                &[heads, width],
            ),
            None => Array::ones::<f32>(&[heads, width]),
        };
        let scale = Array::from_f32((config.head_dim as f32).powf(-0.5));
        let kernel_gains = match (numerics.device, &weights.q_norm, &weights.k_norm) {
            (DeviceKind::Gpu, Some(query), Some(key)) => Some(KernelGains {
                query: query.as_dtype(numerics.dtype)?,
                key: key.as_dtype(numerics.dtype)?,
            }),
            _ => None,
        };
        let gains = [
            gain(weights.q_norm, query)?.multiply(scale)?,
            gain(weights.k_norm, kv)?,
        ];
        Ok(Self {
            inputs: match fuse(vec![weights.q, weights.k, weights.v])? {
                Fused::Whole(whole) => vec![whole],
                Fused::Apart(parts) => parts,
            },
            output: weights.o,
            gains: concatenate(&gains, 0)?,
            norm: match config.qk_norm {
                QkNorm::None => Norm::None,
                QkNorm::Whole => Norm::Whole(WholeNorm::new(config, query, kv)),
                QkNorm::PerHead => Norm::PerHead {
                    eps: config.rms_norm_eps,
                },
            },
            kernel_gains,
            of: HeadsOf {
                query,
                kv,
                width,
                turned: config.rotary_dim as i32,
                norm: config.qk_norm,
                eps: config.rms_norm_eps.to_bits(),
                theta: config.rope_theta.to_bits(),
            },
            coding: numerics.coding,
        })
    }

    /// Projects, normalises and turns all rows.
    fn prepare(
        &self,
        x: &Array,
        rows: &Rows<'_>,
        rotary: &Rotary,
        numerics: Numerics,
    ) -> Result<Prepared, Fault> {
        let mut projected = Vec::with_capacity(self.inputs.len());
        for input in &self.inputs {
            projected.push(rows.project(input, x)?);
        }
        let projected = match projected.len() {
            1 => projected.remove(0),
            _ => concatenate(&projected, 1)?,
        };
        let others_take_part = matches!(self.norm, Norm::Whole(_)) && rows.divided.heads;
        if let Some(own) = &rows.own
            && !others_take_part
            && rows.count <= KERNEL_ROWS_MAX
        {
            return Ok(self.prepare_at_once(&projected, own)?);
        }
        if let (Some(gains), false) = (&self.kernel_gains, others_take_part) {
            return Ok(self.prepare_by_kernel(&projected, gains, rows, rotary, numerics)?);
        }
        let normed = self.of.query + self.of.kv;
        let heads = projected.reshape(&[rows.count, normed + self.of.kv, self.of.width])?;
        let turned = heads.try_index((.., ..normed, ..))?;
        let turned = match (&self.norm, numerics.device) {
            (Norm::Whole(norm), DeviceKind::Gpu) => {
                self.normalise_in_chains(&turned, norm, rows)?
            }
            _ => {
                let turned = self.normalise(&turned.as_dtype(Dtype::Float32)?, rows)?;
                turned.as_dtype(numerics.dtype)?
            }
        };
        let turned = rotary.apply(&rows.turn, &turned)?;
        let values = heads.try_index((.., normed.., ..))?;
        let keys = turned.try_index((.., self.of.query.., ..))?;
        Ok(Prepared {
            queries: turned.try_index((.., ..self.of.query, ..))?,
            pairs: concatenate(&[keys, values], 1)?,
            // The gains have it in them.
            scale: 1.0,
        })
    }

    /// The same where no other rank has a part in the norms, by one kernel of ours.
    fn prepare_at_once(&self, projected: &Array, own: &Own<'_>) -> Result<Prepared, Exception> {
        // A model without these norms has gains all the same, of q's scale and of ones.
        let (query_gain, key_gain) = match &self.kernel_gains {
            Some(gains) => (&gains.query, &gains.key),
            None => (&self.gains, &self.gains),
        };
        let inputs = HeadInputs {
            projected,
            positions: &own.positions,
            query_gain,
            key_gain,
        };
        let [queries, pairs] = own.kernels.heads(self.of, &inputs)?;
        Ok(Prepared {
            queries,
            pairs,
            scale: (self.of.width as f32).powf(-0.5),
        })
    }

    /// The same by a kernel of MLX's for each of them.
    fn prepare_by_kernel(
        &self,
        projected: &Array,
        gains: &KernelGains,
        rows: &Rows<'_>,
        rotary: &Rotary,
        numerics: Numerics,
    ) -> Result<Prepared, Exception> {
        let (to_keys, to_values) = (
            self.of.query * self.of.width,
            (self.of.query + self.of.kv) * self.of.width,
        );
        let by_head = |x: &Array, heads| x.reshape(&[rows.count, heads, self.of.width]);
        let per_head = matches!(self.norm, Norm::PerHead { .. });
        // The kernel norms the last axis.
        let turned = |x: &Array, gains: &Array, heads| {
            let normed = if per_head {
                rms_norm(&by_head(x, heads)?, Some(gains), numerics.norm_eps)?
            } else {
                by_head(&rms_norm(x, Some(gains), numerics.norm_eps)?, heads)?
            };
            rotary.apply(&rows.turn, &normed)
        };
        let queries = projected.try_index((.., ..to_keys))?;
        let keys = projected.try_index((.., to_keys..to_values))?;
        let keys = turned(&keys, &gains.key, self.of.kv)?;
        let values = by_head(&projected.try_index((.., to_values..))?, self.of.kv)?;
        Ok(Prepared {
            queries: turned(&queries, &gains.query, self.of.query)?,
            pairs: concatenate(&[keys, values], 1)?,
            scale: (self.of.width as f32).powf(-0.5),
        })
    }

    /// RMS norms of q and k (`[rows, query + kv heads, head_dim]`, 32 bits): over all heads of all
    /// ranks, or each head by itself.
    fn normalise(&self, x: &Array, rows: &Rows<'_>) -> Result<Array, Fault> {
        let norm = match &self.norm {
            Norm::None => return Ok(x.multiply(&self.gains)?),
            Norm::PerHead { eps } => return Ok(rms_norm(x, None, *eps)?.multiply(&self.gains)?),
            Norm::Whole(norm) => norm,
        };
        let means = self.means(x.square()?, norm, rows)?;
        let inverse = rsqrt(means.add(&norm.eps)?)?;
        let by_head = take_axis(&inverse, &norm.of_head, 1)?.expand_dims(2)?;
        Ok(x.multiply(by_head)?.multiply(&self.gains)?)
    }

    /// The same over all heads of all ranks, of `x` as it is: what is not a sum is one kernel before it and
    /// one behind.
    fn normalise_in_chains(
        &self,
        x: &Array,
        norm: &WholeNorm,
        rows: &Rows<'_>,
    ) -> Result<Array, Fault> {
        let means = self.means(fused::squares(x)?, norm, rows)?;
        let of_kind = |kind: i32| means.try_index((.., kind..kind + 1))?.expand_dims(2);
        Ok(fused::norm_of_two(NormOfTwo {
            x,
            means: [of_kind(0)?, of_kind(1)?],
            kinds: &norm.kinds,
            eps: &norm.eps,
            gains: &self.gains,
        })?)
    }

    /// The means of the squares of all ranks' heads, q's and k's: `[rows, 2]`.
    fn means(&self, squares: Array, norm: &WholeNorm, rows: &Rows<'_>) -> Result<Array, Fault> {
        let channels = (self.of.query + self.of.kv) * self.of.width;
        let squares = squares.reshape(&[rows.count, channels])?;
        rows.whole_of_heads(matmul(&squares, &norm.mean)?)
    }

    /// Causal attention of all segments, by MLX: `[rows, query heads × head_dim]`.
    fn attend_one_by_one(
        &self,
        prepared: &Prepared,
        rows: &Rows<'_>,
        caches: &mut Borrowed<'_>,
    ) -> Result<Array, Exception> {
        let mut parts = Vec::with_capacity(rows.segments.len());
        for (segment, range) in rows.segments.iter().zip(&rows.ranges) {
            let LayerCache::OneBuffer(cache) = caches.of(segment.sequence)? else {
                return Err(misplaced());
            };
            let past = cache.past(segment.start + segment.rows(), self.coding)?;
            let queries = rows.slice(&prepared.queries, range)?;
            parts.push(self.attend(&queries, prepared.scale, &past)?);
        }
        match parts.len() {
            1 => Ok(parts.remove(0)),
            _ => concatenate(&parts, 0),
        }
    }

    /// Causal attention of one segment: `[n, query heads, head_dim]` → `[n, query heads ×
    /// head_dim]`. The last query sees all of `past`.
    fn attend(
        &self,
        queries: &Array,
        scale: f32,
        past: &KeysAndValues,
    ) -> Result<Array, Exception> {
        let n = queries.dim(0);
        let flat = [n, self.of.query * self.of.width];
        let queries = queries.transpose_axes(&[1, 0, 2])?.expand_dims(0)?;
        let (keys, values) = (past.keys.expand_dims(0)?, past.values.expand_dims(0)?);
        let mask = (n > 1).then_some(ScaledDotProductAttentionMask::Causal);
        scaled_dot_product_attention(&queries, &keys, &values, scale, mask, None)?
            .squeeze_axes(&[0])?
            .transpose_axes(&[1, 0, 2])?
            .reshape(&flat)
    }
}

impl Prepared {
    /// Causal attention of all segments, by our own kernel: `[rows, query heads × head_dim]`.
    fn attend_together(
        &self,
        rows: &Rows<'_>,
        caches: &Borrowed<'_>,
        coding: Option<Coding>,
    ) -> Result<Array, Exception> {
        let sight = |segment: &Segment| match caches.at(segment.sequence)? {
            LayerCache::Blocks(past) => Ok(Sight {
                rows: segment.rows(),
                positions: segment.start + segment.rows(),
                past,
            }),
            LayerCache::OneBuffer(_) => Err(misplaced()),
        };
        let sights: Vec<Sight<'_>> = rows.segments.iter().map(sight).collect::<Result<_, _>>()?;
        let reading = Reading {
            scale: self.scale,
            coding,
        };
        host::attend(&self.queries, &sights, reading)
    }
}

fn misplaced() -> Exception {
    Exception::custom("a cache does not lie where this device looks for it")
}

impl WholeNorm {
    fn new(config: &ModelConfig, query: i32, kv: i32) -> Self {
        let of_head: Vec<i32> = (0..query + kv).map(|head| (head >= query).into()).collect();
        let (of_q, of_k) = (
            [1.0 / config.query_width() as f32, 0.0],
            [0.0, 1.0 / config.kv_width() as f32],
        );
        let mean: Vec<[f32; 2]> = of_head
            .iter()
            .flat_map(|&norm| vec![if norm == 0 { of_q } else { of_k }; config.head_dim])
            .collect();
        let kind = |norm: i32| {
            let of_kind = of_head.iter().map(|of| f32::from(*of == norm));
            Array::from_slice(&of_kind.collect::<Vec<_>>(), &[query + kv, 1])
        };
        Self {
            kinds: [kind(0), kind(1)],
            of_head: Array::from_slice(&of_head, &[query + kv]),
            mean: Array::from_slice(mean.as_flattened(), &[mean.len() as i32, 2]),
            eps: Array::from_f32(config.rms_norm_eps),
        }
    }
}

/// Rows up to which one kernel of ours makes queries and keys: each of its blocks reads a whole row for the norm.
const KERNEL_ROWS_MAX: i32 = 64;
