//! Which kernels there are, and what each is compiled for: the constants and types that its body names.

use mlx_rs::Dtype;

use super::device::Constant::{self, Float, Int, Type};
use super::device::Source;
use crate::config::{QkNorm, Router};

/// Which kernel for which constants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Variant {
    AddNorm {
        width: i32,
        /// Bits of a float.
        eps: u32,
    },
    Heads(HeadsOf),
    Route(RouteOf),
    Product {
        width: i32,
        outputs: i32,
        codes: CodesOf,
        y: Dtype,
        tile: i32,
    },
    ExpertsIn {
        width: i32,
        inner: i32,
        top: i32,
        codes: CodesOf,
    },
    ExpertsOut {
        inner: i32,
        outputs: i32,
        top: i32,
        codes: CodesOf,
    },
}

/// The heads that a rank holds, and what becomes of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct HeadsOf {
    pub(crate) query: i32,
    pub(crate) kv: i32,
    pub(crate) width: i32,
    /// Dimensions that rotate.
    pub(crate) turned: i32,
    pub(crate) norm: QkNorm,
    /// Bits of a float, as is `theta`.
    pub(crate) eps: u32,
    pub(crate) theta: u32,
}

/// How experts are chosen, and how many of how many.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct RouteOf {
    pub(crate) experts: i32,
    pub(crate) top: i32,
    pub(crate) scoring: Router,
}

/// How weights are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct CodesOf {
    pub(super) bits: i32,
    pub(super) group: i32,
    /// Of scales and biases.
    pub(super) scales: Dtype,
}

impl Variant {
    /// What it is made of, for activations of this type.
    pub(super) fn parts(self, dtype: Dtype) -> (&'static Source, Vec<Constant>) {
        let (source, mut constants) = match self {
            Self::AddNorm { width, eps } => (
                &ADD_NORM,
                vec![
                    Int("WIDTH", width),
                    Int("THREADS", NORM_THREADS),
                    Float("EPS", f32::from_bits(eps)),
                ],
            ),
            Self::Heads(of) => (
                &HEADS,
                vec![
                    Int("QUERY", of.query),
                    Int("KV", of.kv),
                    Int("WIDTH", of.width),
                    Int("TURNED", of.turned),
                    Int("NORM", number_of_norm(of.norm)),
                    Int("THREADS", HEAD_THREADS),
                    Float("EPS", f32::from_bits(of.eps)),
                    Float("LOG2_THETA", f32::from_bits(of.theta).log2()),
                ],
            ),
            Self::Route(of) => (
                &ROUTE,
                vec![
                    Int("EXPERTS", of.experts),
                    Int("TOP", of.top),
                    Int("PER_LANE", (of.experts + LANES - 1) / LANES),
                    Int("SCORING", number_of_scoring(of.scoring)),
                ],
            ),
            Self::Product {
                width,
                outputs,
                codes: _,
                y,
                tile,
            } => (
                &PRODUCT,
                vec![
                    Type("Y", y),
                    Int("WIDTH", width),
                    Int("OUTPUTS", outputs),
                    Int("TILE", tile),
                    Int("OUTS", OUTS),
                    Int("THREADS", threads_for(width)),
                ],
            ),
            Self::ExpertsIn {
                width,
                inner,
                top,
                codes: _,
            } => (
                &EXPERTS_IN,
                vec![
                    Int("WIDTH", width),
                    Int("INNER", inner),
                    Int("TOP", top),
                    Int("THREADS", threads_for(width)),
                ],
            ),
            Self::ExpertsOut {
                inner,
                outputs,
                top,
                codes: _,
            } => (
                &EXPERTS_OUT,
                vec![
                    Int("INNER", inner),
                    Int("OUTPUTS", outputs),
                    Int("TOP", top),
                    Int("OUTS", OUTS),
                    Int("THREADS", threads_for(top * inner)),
                ],
            ),
        };
        constants.push(Type("T", dtype));
        if let Some(codes) = self.codes() {
            constants.extend([
                Type("S", codes.scales),
                Int("BITS", codes.bits),
                Int("GROUP", codes.group),
            ]);
        }
        (source, constants)
    }

    fn codes(self) -> Option<CodesOf> {
        match self {
            Self::Product { codes, .. }
            | Self::ExpertsIn { codes, .. }
            | Self::ExpertsOut { codes, .. } => Some(codes),
            Self::AddNorm { .. } | Self::Heads(_) | Self::Route(_) => None,
        }
    }
}

/// As heads.body has it.
fn number_of_norm(norm: QkNorm) -> i32 {
    match norm {
        QkNorm::None => 0,
        QkNorm::Whole => 1,
        QkNorm::PerHead => 2,
    }
}

/// As route.body has it.
fn number_of_scoring(router: Router) -> i32 {
    match router {
        Router::CorrectedSigmoid => 0,
        Router::Softmax => 1,
        Router::SoftmaxOfChosen => 2,
    }
}

/// Threads that divide a row of codes, in pieces of 32: as many as leave the fewest without one.
pub(super) fn threads_for(width: i32) -> i32 {
    let pieces = width / LANES;
    let idle = |threads: &i32| (threads - pieces % threads) % threads;
    let [most, ..] = THREADS;
    THREADS.into_iter().min_by_key(idle).unwrap_or(most)
}

pub(super) const LANES: i32 = 32;
/// Outputs that a block of a product takes.
pub(super) const OUTS: i32 = 4;
pub(super) const NORM_THREADS: i32 = 512;
pub(super) const HEAD_THREADS: i32 = 128;
/// Of blocks that multiply; the first of equals.
const THREADS: [i32; 4] = [128, 96, 64, 32];

const ADD_NORM: Source = Source {
    name: "add_norm",
    inputs: &[("x", "T"), ("part", "T"), ("gain", "T")],
    outputs: &[("sum", "T"), ("normed", "T")],
    scalars: &[],
    header: "",
    body: include_str!("add_norm.body"),
};

const HEADS: Source = Source {
    name: "heads",
    inputs: &[
        ("projected", "T"),
        ("positions", "int"),
        ("query_gain", "T"),
        ("key_gain", "T"),
    ],
    outputs: &[("queries", "T"), ("pairs", "T")],
    scalars: &[],
    header: "",
    body: include_str!("heads.body"),
};

const ROUTE: Source = Source {
    name: "route",
    inputs: &[("logits", "float"), ("correction", "float")],
    outputs: &[("experts", "unsigned"), ("weights", "float")],
    scalars: &[],
    header: "",
    body: include_str!("route.body"),
};

const PRODUCT: Source = Source {
    name: "product",
    inputs: &[
        ("x", "T"),
        ("weight", "unsigned"),
        ("scales", "S"),
        ("biases", "S"),
    ],
    outputs: &[("y", "Y")],
    scalars: &["ROWS"],
    header: include_str!("codes.cuh"),
    body: include_str!("product.body"),
};

const EXPERTS_IN: Source = Source {
    name: "experts_in",
    inputs: &[
        ("x", "T"),
        ("weight", "unsigned"),
        ("scales", "S"),
        ("biases", "S"),
        ("experts", "unsigned"),
        ("weights", "float"),
    ],
    outputs: &[("y", "T")],
    scalars: &[],
    header: include_str!("codes.cuh"),
    body: include_str!("experts_in.body"),
};

const EXPERTS_OUT: Source = Source {
    name: "experts_out",
    inputs: &[
        ("x", "T"),
        ("weight", "unsigned"),
        ("scales", "S"),
        ("biases", "S"),
        ("experts", "unsigned"),
    ],
    outputs: &[("y", "T")],
    scalars: &[],
    header: include_str!("codes.cuh"),
    body: include_str!("experts_out.body"),
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_divide_a_row_with_as_few_idle_as_can_be() {
        // MiniMax-M2.5's widths: the model's, that of its heads, and eight experts'.
        assert_eq!([3072, 6144, 8 * 1536].map(threads_for), [96, 96, 128]);
        assert_eq!([64, 256, 4096].map(threads_for), [32, 32, 128]);
    }
}
