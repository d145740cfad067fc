//! The mixture of experts: a router that picks a few of many SwiGLU networks for each row.
//!
//! In the tensor and expert layouts each rank holds some columns of every expert's inner width, so that all
//! ranks work on every row whoever is picked; one all-reduce makes the sum whole.

use mlx_rs::error::Exception;
use mlx_rs::ops::indexing::{Ellipsis, TryIndexOp, take_along_axis, take_axis};
use mlx_rs::ops::{argpartition_axis, argsort, floor_divide, matmul, sigmoid, softmax_axis};
use mlx_rs::{Array, Dtype};

use crate::config::{ModelConfig, Router};
use crate::kernels::{ExpertInputs, Kernels, RouteOf};
use crate::models::Fault;
use crate::models::decoder::{DeviceKind, Numerics, Rows};
use crate::models::fused;
use crate::models::linear::{Fused, Order, arrays, fuse, project, project_experts};
use crate::partition::RankShare;
use crate::weights::{ExpertWeights, Linear, SwigluWeights};

/// Router and experts of one layer.
pub(crate) struct Experts {
    router: Linear,
    scoring: Scoring,
    columns: Option<Columns>,
    of: RouteOf,
    numerics: Numerics,
}

/// What [`Router`] says, with what it takes.
enum Scoring {
    CorrectedSigmoid {
        /// Added to the scores to choose by, not to weigh by: `[experts]`, 32 bits.
        correction: Array,
        tiny: Array,
    },
    Softmax,
    SoftmaxOfChosen,
}

/// This rank's columns of the experts.
struct Columns {
    /// gate and up in one stack, or each by itself when they are stored differently.
    inputs: Vec<Linear>,
    output: Linear,
    width: i32,
}

/// Which experts a row goes to, and how much each counts. Both `[rows, top]`.
struct Routes {
    experts: Array,
    weights: Array,
}

impl Experts {
    pub(crate) fn new(
        config: &ModelConfig,
        share: &RankShare,
        layer: ExpertWeights,
        numerics: Numerics,
    ) -> Result<Self, Exception> {
        let columns = match layer.experts {
            Some(experts) => Some(Columns::new(share, experts)?),
            None => None,
        };
        Ok(Self {
            router: layer.router,
            scoring: Scoring::new(config, layer.router_bias)?,
            columns,
            of: RouteOf {
                experts: config.experts as i32,
                top: config.experts_per_token as i32,
                scoring: config.router,
            },
            numerics,
        })
    }

    /// `[rows, hidden]` → `[rows, hidden]`, whole on every rank.
    pub(crate) fn forward(&self, x: &Array, rows: &Rows<'_>) -> Result<Array, Fault> {
        let part = match &self.columns {
            Some(columns) => {
                let routes = self.route(x, rows)?;
                let at_once = |kernels| columns.at_once(x, &routes, kernels);
                let sum = rows.kernels().map_or(Ok(None), at_once)?;
                match (sum, self.numerics.device) {
                    (Some(sum), _) => sum,
                    (None, DeviceKind::Gpu) if rows.count * self.of.top < SORT_ROUTES_MIN => {
                        columns.weighted(x, &routes)?
                    }
                    (None, DeviceKind::Gpu) => {
                        self.combine(&routes, &columns.sorted(x, &routes.experts)?)?
                    }
                    (None, DeviceKind::Cpu) => {
                        self.combine(&routes, &columns.as_they_come(x, &routes.experts)?)?
                    }
                }
            }
            // Zeros, made from what came before, so that no sum overtakes another.
            None => x.multiply(Array::from_f32(0.0).as_dtype(self.numerics.dtype)?)?,
        };
        rows.whole_of_columns(part)
    }

    /// Scores are computed in 32 bits.
    fn route(&self, x: &Array, rows: &Rows<'_>) -> Result<Routes, Exception> {
        // A kernel of ours takes `x` to 32 bits by itself.
        let logits = |kernels: &Kernels| kernels.project(&self.router, x, Dtype::Float32);
        let logits = match rows.kernels().map_or(Ok(None), logits)? {
            Some(logits) => logits,
            None => project(&self.router, &x.as_dtype(Dtype::Float32)?)?,
        };
        if let Some(kernels) = rows.kernels()
            && let Some([experts, weights]) =
                kernels.route(self.of, &logits, self.correction(&logits))?
        {
            return Ok(Routes { experts, weights });
        }
        match &self.scoring {
            Scoring::CorrectedSigmoid { correction, tiny } => {
                self.route_by_sigmoid(&logits, correction, tiny)
            }
            Scoring::Softmax => {
                let experts = self.highest(&logits)?;
                let scores = softmax_axis(&logits, -1, true)?;
                let weights = take_along_axis(&scores, &experts, -1)?;
                Ok(Routes { experts, weights })
            }
            Scoring::SoftmaxOfChosen => {
                let experts = self.highest(&logits)?;
                let chosen = take_along_axis(&logits, &experts, -1)?;
                let weights = softmax_axis(&chosen, -1, true)?;
                Ok(Routes { experts, weights })
            }
        }
    }

    /// What is added to the scores to choose by, if anything is: else nobody looks at it.
    fn correction<'a>(&'a self, logits: &'a Array) -> &'a Array {
        match &self.scoring {
            Scoring::CorrectedSigmoid { correction, .. } => correction,
            Scoring::Softmax | Scoring::SoftmaxOfChosen => logits,
        }
    }

    /// The weights are the chosen scores without the correction, scaled to a sum of one.
    fn route_by_sigmoid(
        &self,
        logits: &Array,
        correction: &Array,
        tiny: &Array,
    ) -> Result<Routes, Exception> {
        let gpu = self.numerics.device == DeviceKind::Gpu;
        let [scores, corrected] = if gpu {
            fused::scores(logits, correction)?
        } else {
            let scores = sigmoid(logits)?;
            let corrected = scores.add(correction)?;
            [scores, corrected]
        };
        let experts = self.highest(&corrected)?;
        let chosen = take_along_axis(&scores, &experts, -1)?;
        let sum = chosen.sum_axis(-1, true)?;
        let weights = if gpu {
            fused::share_of_sum(&chosen, &sum, tiny)?
        } else {
            chosen.divide(sum.add(tiny)?)?
        };
        Ok(Routes { experts, weights })
    }

    /// Which experts have the highest scores: `[rows, experts]` → `[rows, top]`.
    fn highest(&self, scores: &Array) -> Result<Array, Exception> {
        let first = self.of.experts - self.of.top;
        argpartition_axis(scores, first, -1)?.try_index((.., first..))
    }

    /// `per_expert` `[rows, top, hidden]`, each by its weight, summed: `[rows, hidden]`.
    fn combine(&self, routes: &Routes, per_expert: &Array) -> Result<Array, Exception> {
        let weights = routes.weights.as_dtype(self.numerics.dtype)?;
        matmul(weights.expand_dims(1)?, per_expert)?.squeeze_axes(&[1])
    }

    pub(crate) fn arrays(&self) -> Vec<&Array> {
        let mut all = arrays(&self.router);
        if let Scoring::CorrectedSigmoid { correction, .. } = &self.scoring {
            all.push(correction);
        }
        if let Some(columns) = &self.columns {
            let linears = columns.inputs.iter().chain([&columns.output]);
            all.extend(linears.flat_map(arrays));
        }
        all
    }
}

impl Scoring {
    fn new(config: &ModelConfig, router_bias: Option<Array>) -> Result<Self, Exception> {
        Ok(match config.router {
            Router::CorrectedSigmoid => Self::CorrectedSigmoid {
                correction: match router_bias {
                    Some(bias) => bias,
                    None => Array::zeros::<f32>(&[config.experts as i32])?,
                },
                tiny: Array::from_f32(WEIGHT_SUM_MIN),
            },
            Router::Softmax => Self::Softmax,
            Router::SoftmaxOfChosen => Self::SoftmaxOfChosen,
        })
    }
}

impl Columns {
    fn new(share: &RankShare, experts: SwigluWeights) -> Result<Self, Exception> {
        Ok(Self {
            inputs: match fuse(vec![experts.gate, experts.up])? {
                Fused::Whole(whole) => vec![whole],
                Fused::Apart(parts) => parts,
            },
            output: experts.down,
            width: share.expert_columns.len() as i32,
        })
    }

    /// `x` `[rows, hidden]`, `experts` `[rows, top]` → `[rows, top, hidden]`.
    fn as_they_come(&self, x: &Array, experts: &Array) -> Result<Array, Exception> {
        let (rows, hidden) = (x.dim(0), x.dim(1));
        let x = x.reshape(&[rows, 1, 1, hidden])?;
        let (gate, up) = self.gate_and_up(&x, experts, Order::AsTheyCome)?;
        let inner = sigmoid(&gate)?.multiply(&gate)?.multiply(&up)?;
        project_experts(&self.output, &inner, experts, Order::AsTheyCome)?.squeeze_axes(&[2])
    }

    /// The same, each expert by its weight and all of a row summed, by kernels of ours: `[rows, hidden]`. `None`
    /// where they cannot.
    fn at_once(
        &self,
        x: &Array,
        routes: &Routes,
        kernels: &Kernels,
    ) -> Result<Option<Array>, Exception> {
        let [inputs] = self.inputs.as_slice() else {
            return Ok(None);
        };
        let of = ExpertInputs {
            inputs,
            output: &self.output,
            inner: self.width,
            experts: &routes.experts,
            weights: &routes.weights,
        };
        kernels.experts(x, &of)
    }

    /// The same, each expert by its weight and all of a row summed: `[rows, hidden]`. Down is linear,
    /// so the weight can be taken in before it, where it costs no kernel.
    fn weighted(&self, x: &Array, routes: &Routes) -> Result<Array, Exception> {
        let (rows, hidden) = (x.dim(0), x.dim(1));
        let x = x.reshape(&[rows, 1, 1, hidden])?;
        let (gate, up) = self.gate_and_up(&x, &routes.experts, Order::AsTheyCome)?;
        let weights = routes.weights.reshape(&[rows, -1, 1, 1])?;
        let inner = fused::weighted_swiglu(&gate, &up, &weights)?;
        project_experts(&self.output, &inner, &routes.experts, Order::AsTheyCome)?
            .sum_axes(&[1, 2], false)
    }

    /// The same as [`as_they_come`](Self::as_they_come) with rows brought together by expert, so that a matrix is read once for all of its
    /// rows.
    fn sorted(&self, x: &Array, experts: &Array) -> Result<Array, Exception> {
        let (rows, top, hidden) = (x.dim(0), experts.dim(1), x.dim(1));
        let experts = experts.reshape(&[-1])?;
        let order = argsort(&experts)?;
        let back = argsort(&order)?;
        let row_of_route = floor_divide(&order, Array::from_int(top).as_dtype(order.dtype())?)?;
        let x = take_axis(x, row_of_route, 0)?.expand_dims(1)?;
        let experts = take_axis(&experts, &order, 0)?;
        let (gate, up) = self.gate_and_up(&x, &experts, Order::Sorted)?;
        let inner = fused::swiglu(&gate, &up)?;
        let y = project_experts(&self.output, &inner, &experts, Order::Sorted)?;
        take_axis(&y, back, 0)?.reshape(&[rows, top, hidden])
    }

    /// `[…, 1, hidden]` → twice `[…, 1, columns]`.
    fn gate_and_up(
        &self,
        x: &Array,
        experts: &Array,
        order: Order,
    ) -> Result<(Array, Array), Exception> {
        Ok(match self.inputs.as_slice() {
            [whole] => {
                let both = project_experts(whole, x, experts, order)?;
                let gate = both.try_index((Ellipsis, ..self.width))?;
                let up = both.try_index((Ellipsis, self.width..))?;
                (gate, up)
            }
            apart => (
                project_experts(&apart[0], x, experts, order)?,
                project_experts(&apart[1], x, experts, order)?,
            ),
        })
    }
}

/// Keeps the weights finite when all scores vanish. From the reference implementation.
const WEIGHT_SUM_MIN: f32 = 1e-20;

/// Routes from which sorting pays on a GPU; mlx-lm's figure.
const SORT_ROUTES_MIN: i32 = 64;
