//! The network of a dense layer: SwiGLU, for every row the same.
//!
//! In the tensor and expert layouts each rank holds some columns of its inner width; one all-reduce makes
//! the sum whole.

use mlx_rs::Array;
use mlx_rs::error::Exception;
use mlx_rs::ops::indexing::TryIndexOp;
use mlx_rs::ops::sigmoid;

use crate::models::Fault;
use crate::models::decoder::{DeviceKind, Numerics, Rows};
use crate::models::fused;
use crate::models::linear::{Fused, arrays, fuse};
use crate::partition::RankShare;
use crate::weights::{Linear, SwigluWeights};

/// The network of one layer.
pub(crate) struct Mlp {
    columns: Option<Columns>,
    numerics: Numerics,
}

/// This rank's columns.
struct Columns {
    /// gate and up in one matrix, or each by itself when they are stored differently.
    inputs: Vec<Linear>,
    output: Linear,
    width: i32,
}

impl Mlp {
    pub(crate) fn new(
        share: &RankShare,
        weights: Option<SwigluWeights>,
        numerics: Numerics,
    ) -> Result<Self, Exception> {
        let columns = match weights {
            Some(weights) => Some(Columns {
                inputs: match fuse(vec![weights.gate, weights.up])? {
                    Fused::Whole(whole) => vec![whole],
                    Fused::Apart(parts) => parts,
                },
                output: weights.down,
                width: share.mlp_columns.len() as i32,
            }),
            None => None,
        };
        Ok(Self { columns, numerics })
    }

    /// `[rows, hidden]` → `[rows, hidden]`, whole on every rank.
    pub(crate) fn forward(&self, x: &Array, rows: &Rows<'_>) -> Result<Array, Fault> {
        let part = match &self.columns {
            Some(columns) => columns.forward(x, rows, self.numerics.device)?,
            // Zeros, made from what came before, so that no sum overtakes another.
            None => x.multiply(Array::from_f32(0.0).as_dtype(self.numerics.dtype)?)?,
        };
        rows.whole_of_columns(part)
    }

    pub(crate) fn arrays(&self) -> Vec<&Array> {
        let columns = self.columns.iter();
        let linears = columns.flat_map(|columns| columns.inputs.iter().chain([&columns.output]));
        linears.flat_map(arrays).collect()
    }
}

impl Columns {
    fn forward(&self, x: &Array, rows: &Rows<'_>, device: DeviceKind) -> Result<Array, Exception> {
        let (gate, up) = match self.inputs.as_slice() {
            [whole] => {
                let both = rows.project(whole, x)?;
                let gate = both.try_index((.., ..self.width))?;
                (gate, both.try_index((.., self.width..))?)
            }
            apart => (rows.project(&apart[0], x)?, rows.project(&apart[1], x)?),
        };
        let inner = match device {
            DeviceKind::Gpu => fused::swiglu(&gate, &up)?,
            DeviceKind::Cpu => sigmoid(&gate)?.multiply(&gate)?.multiply(&up)?,
        };
        rows.project(&self.output, &inner)
    }
}
