//! From a checkpoint's bytes to a rank's arrays.

use super::{
    AttentionWeights, ExpertWeights, FeedForwardWeights, LayerWeights, Linear, LoadError,
    ShardWeights, SwigluWeights,
};
use crate::checkpoint::Checkpoint;
use crate::config::ModelConfig;
use crate::partition::{
    AttentionSlices, FeedForwardSlices, LayerSlices, MatrixSlice, RankShare, ShareSlices,
    SwigluSlices, VectorSlice,
};
use crate::precision::Precision;

use mlx_rs::Array;
use mlx_rs::ops::indexing::IndexOp;

impl ShardWeights {
    /// Reads what belongs to `share`. `precision` is what floats are loaded in: `Float32` on the
    /// CPU back-end, elsewhere [`Checkpoint::precision`]. `progress` is told bytes done and bytes
    /// in all, as they lie in memory, first at 0 and then as every array is complete.
    pub fn load(
        checkpoint: &Checkpoint,
        config: &ModelConfig,
        share: &RankShare,
        precision: Precision,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self, LoadError> {
        checkpoint.expect_nothing_else(config)?;
        let slices = ShareSlices::of(config, share);
        let bytes_total = checkpoint.share_bytes(config, share, precision);
        progress(0, bytes_total);
        let mut reader = Reader {
            checkpoint,
            config,
            precision,
            progress,
            bytes: 0,
            bytes_total,
        };
        let embedding = slices
            .embedding
            .as_ref()
            .map(|slice| reader.matrix(slice))
            .transpose()?;
        let layers = slices.layers.iter().map(|layer| reader.layer(layer));
        let layers = layers.collect::<Result<_, _>>()?;
        let final_norm = slices
            .final_norm
            .as_ref()
            .map(|slice| reader.vector(slice))
            .transpose()?;
        let head = match (&slices.head, &embedding) {
            (Some(slice), _) => Some(reader.matrix(slice)?),
            (None, Some(embedding)) if !share.vocabulary_rows.is_empty() => {
                Some(embedding.rows(share.vocabulary_rows.start, share.vocabulary_rows.end)?)
            }
            _ => None,
        };
        Ok(Self {
            embedding,
            layers,
            final_norm,
            head,
            bytes: reader.bytes,
        })
    }
}

/// Reads arrays one after the other and counts them.
struct Reader<'a> {
    checkpoint: &'a Checkpoint,
    config: &'a ModelConfig,
    precision: Precision,
    progress: &'a mut dyn FnMut(u64, u64),
    bytes: u64,
    bytes_total: u64,
}

impl Reader<'_> {
    fn layer(&mut self, slices: &LayerSlices) -> Result<LayerWeights, LoadError> {
        Ok(LayerWeights {
            input_norm: self.vector(&slices.input_norm)?,
            post_attention_norm: self.vector(&slices.post_attention_norm)?,
            attention: match &slices.attention {
                Some(slices) => Some(self.attention(slices)?),
                None => None,
            },
            feed_forward: self.feed_forward(&slices.feed_forward)?,
        })
    }

    fn attention(&mut self, slices: &AttentionSlices) -> Result<AttentionWeights, LoadError> {
        Ok(AttentionWeights {
            q: self.matrix(&slices.q)?,
            k: self.matrix(&slices.k)?,
            v: self.matrix(&slices.v)?,
            o: self.matrix(&slices.o)?,
            q_norm: slices
                .q_norm
                .as_ref()
                .map(|slice| self.vector(slice))
                .transpose()?,
            k_norm: slices
                .k_norm
                .as_ref()
                .map(|slice| self.vector(slice))
                .transpose()?,
        })
    }

    fn feed_forward(
        &mut self,
        slices: &FeedForwardSlices,
    ) -> Result<FeedForwardWeights, LoadError> {
        Ok(match slices {
            FeedForwardSlices::Dense(columns) => {
                FeedForwardWeights::Dense(self.columns(columns.as_ref())?)
            }
            FeedForwardSlices::Experts {
                router,
                router_bias,
                experts,
            } => FeedForwardWeights::Experts(ExpertWeights {
                router: self.matrix_in(router, Precision::Float32)?,
                router_bias: match router_bias {
                    Some(slice) => Some(self.vector_in(slice, Precision::Float32)?),
                    None => None,
                },
                experts: self.columns(experts.as_ref())?,
            }),
        })
    }

    fn columns(
        &mut self,
        slices: Option<&SwigluSlices>,
    ) -> Result<Option<SwigluWeights>, LoadError> {
        let Some(slices) = slices else {
            return Ok(None);
        };
        Ok(Some(SwigluWeights {
            gate: self.matrix(&slices.gate)?,
            up: self.matrix(&slices.up)?,
            down: self.matrix(&slices.down)?,
        }))
    }

    fn matrix(&mut self, slice: &MatrixSlice) -> Result<Linear, LoadError> {
        self.matrix_in(slice, self.precision)
    }

    fn vector(&mut self, slice: &VectorSlice) -> Result<Array, LoadError> {
        self.vector_in(slice, self.precision)
    }

    fn vector_in(&mut self, slice: &VectorSlice, to: Precision) -> Result<Array, LoadError> {
        let tensor = &slice.tensor;
        self.checkpoint.expect_shape(tensor, &[slice.length])?;
        let array = self
            .checkpoint
            .read_floats(tensor, std::slice::from_ref(&slice.range), to)?;
        self.count(&[&array]);
        Ok(array)
    }

    /// A module is packed if and only if the checkpoint has its scales, as in mlx-lm.
    fn matrix_in(&mut self, slice: &MatrixSlice, to: Precision) -> Result<Linear, LoadError> {
        if self.checkpoint.is_packed(&slice.module) {
            self.packed(slice, to)
        } else {
            let weight = format!("{}.weight", slice.module);
            if self.checkpoint.is_of_words(&weight) {
                return self.packed(slice, to);
            }
            let [rows, columns] = slice.shape;
            self.checkpoint
                .expect_shape(&weight, &slice.stacked([rows, columns]))?;
            let ranges = slice.ranges(slice.columns.clone());
            let weight = self.checkpoint.read_floats(&weight, &ranges, to)?;
            self.count(&[&weight]);
            Ok(Linear::Dense { weight })
        }
    }

    fn packed(&mut self, slice: &MatrixSlice, to: Precision) -> Result<Linear, LoadError> {
        let module = &slice.module;
        let packing = self
            .config
            .packing_of(module)
            .ok_or_else(|| LoadError::NotDeclared {
                module: module.clone(),
            })?;
        let (start, end) = (slice.columns.start, slice.columns.end);
        let [rows, columns] = slice.shape;
        if [start, end, columns]
            .iter()
            .any(|column| !column.is_multiple_of(packing.group_size))
        {
            return Err(LoadError::SplitGroup {
                module: module.clone(),
                group_size: packing.group_size,
                start,
                end,
            });
        }
        let name = |part: &str| format!("{module}.{part}");
        let words = slice.stacked([rows, packing.words(columns)]);
        let groups = slice.stacked([rows, packing.groups(columns)]);
        self.checkpoint.expect_shape(&name("weight"), &words)?;
        self.checkpoint.expect_shape(&name("scales"), &groups)?;
        self.checkpoint.expect_shape(&name("biases"), &groups)?;

        let words = slice.ranges(packing.words(start)..packing.words(end));
        let groups = slice.ranges(packing.groups(start)..packing.groups(end));
        let weight = self.checkpoint.read_words(&name("weight"), &words)?;
        let scales = self.checkpoint.read_floats(&name("scales"), &groups, to)?;
        let biases = self.checkpoint.read_floats(&name("biases"), &groups, to)?;
        self.count(&[&weight, &scales, &biases]);
        Ok(Linear::Quantized {
            weight,
            scales,
            biases,
            group_size: packing.group_size as i32,
            bits: packing.bits as i32,
        })
    }

    fn count(&mut self, arrays: &[&Array]) {
        self.bytes += arrays
            .iter()
            .map(|array| array.nbytes() as u64)
            .sum::<u64>();
        (self.progress)(self.bytes, self.bytes_total);
    }
}

impl MatrixSlice {
    /// The shape of a tensor of this module whose rows have `width` elements.
    fn stacked(&self, [rows, width]: [usize; 2]) -> Vec<usize> {
        self.stack.into_iter().chain([rows, width]).collect()
    }

    /// Ranges of such a tensor, one per axis.
    fn ranges(&self, columns: std::ops::Range<usize>) -> Vec<std::ops::Range<usize>> {
        let stack = self.stack.map(|experts| 0..experts);
        stack
            .into_iter()
            .chain([self.rows.clone(), columns])
            .collect()
    }
}

impl Linear {
    /// Rows `start..end` of a plain matrix, in the same memory.
    pub(crate) fn rows(&self, start: usize, end: usize) -> Result<Self, LoadError> {
        let cut = |array: &Array| array.index(start as i32..end as i32);
        Ok(match self {
            Self::Quantized {
                weight,
                scales,
                biases,
                group_size,
                bits,
            } => Self::Quantized {
                weight: cut(weight),
                scales: cut(scales),
                biases: cut(biases),
                group_size: *group_size,
                bits: *bits,
            },
            Self::Dense { weight } => Self::Dense {
                weight: cut(weight),
            },
        })
    }
}
