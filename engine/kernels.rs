//! Kernels of our own for the steps of a GPU, where MLX's would be several or slow. What is in them is written
//! once, in the names that cuda.h and metal.h give to either language; products with quantised weights are for
//! CUDA alone, for MLX has good ones for Metal.
//!
//! | kernel | in place of |
//! | --- | --- |
//! | `add_norm` | an addition and a norm |
//! | `heads` | norms of q and k, rotations, and bringing keys and values together |
//! | `route` | scores, a partition of them, and the weights of those chosen |
//! | `product` | a product of few rows with quantised weights |
//! | `experts_in`, `experts_out` | products with each route's expert, the activation, weights, and their sum |
//!
//! They have run on CUDA. Nobody is to trust a kernel that never ran on his device: on Metal `Decoder::new` compares
//! what a layer computes with them and without, and does without them where that differs; on CUDA it does so when it
//! is told to ([`OWN_KERNELS`]), for MLX takes many seconds to compile what they are compared with.
#![allow(unsafe_code)]

mod device;
mod variant;

use std::collections::HashMap;
use std::env;
use std::sync::{Arc, Mutex, PoisonError};

use mlx_rs::error::Exception;
use mlx_rs::{Array, Dtype};

use self::device::{Grid, Kernel, Language};
use self::variant::{CodesOf, HEAD_THREADS, LANES, NORM_THREADS, OUTS, Variant, threads_for};
pub(crate) use self::variant::{HeadsOf, RouteOf};
use crate::weights::Linear;

/// The kernels of one model on one device; each is compiled when it is first wanted.
#[derive(Debug)]
pub(crate) struct Kernels {
    language: Language,
    /// Of activations.
    dtype: Dtype,
    in_doubt: bool,
    made: Mutex<HashMap<Variant, Arc<Kernel>>>,
}

/// A quantised matrix, or a stack of them.
struct Packed<'a> {
    weight: &'a Array,
    scales: &'a Array,
    biases: &'a Array,
    codes: CodesOf,
}

/// The norms' weights of q's and k's heads, and each row's position.
pub(crate) struct HeadInputs<'a> {
    /// `[rows, (query + 2 kv) × width]`.
    pub(crate) projected: &'a Array,
    /// `[rows]`.
    pub(crate) positions: &'a Array,
    pub(crate) query_gain: &'a Array,
    pub(crate) key_gain: &'a Array,
}

/// The matrices of all experts, and who goes where.
pub(crate) struct ExpertInputs<'a> {
    /// gate's columns and then up's: `[experts, 2 × inner, hidden]`.
    pub(crate) inputs: &'a Linear,
    /// `[experts, hidden, inner]`.
    pub(crate) output: &'a Linear,
    pub(crate) inner: i32,
    /// Both `[rows, top]`.
    pub(crate) experts: &'a Array,
    pub(crate) weights: &'a Array,
}

impl Kernels {
    /// For activations of this type on MLX's default device. `None` where there is no language for it, or where
    /// the user wants none ([`OWN_KERNELS`]).
    pub(crate) fn for_device(dtype: Dtype) -> Option<Self> {
        let wish = env::var(OWN_KERNELS).unwrap_or_default();
        let language = Language::of_default_device().filter(|_| wish != "0")?;
        Some(Self {
            language,
            dtype,
            in_doubt: language == Language::Metal || wish == "prove",
            made: Mutex::default(),
        })
    }

    /// Whether they are to be compared with MLX's own operations before they are used.
    pub(crate) fn in_doubt(&self) -> bool {
        self.in_doubt
    }

    /// Compiles the kernel that every layer takes, so that a device for which none can be compiled is known before
    /// a step needs it.
    ///
    /// # Errors
    /// Why none can.
    pub(crate) fn try_out(&self, width: i32, eps: f32) -> Result<(), Exception> {
        let eps = eps.to_bits();
        self.kernel(Variant::AddNorm { width, eps }).map(drop)
    }

    /// `x + part`, and its RMS norm: all `[rows, width]`.
    pub(crate) fn add_norm(
        &self,
        x: &Array,
        part: &Array,
        gain: &Array,
        eps: f32,
    ) -> Result<[Array; 2], Exception> {
        let (rows, width) = (x.dim(0), x.dim(1));
        let eps = eps.to_bits();
        let kernel = self.kernel(Variant::AddNorm { width, eps })?;
        let out = (x.shape(), self.dtype);
        let grid = Grid {
            blocks: [rows, 1],
            threads: NORM_THREADS,
        };
        // SAFETY: x, part and both outputs have rows × width numbers, the gain has width.
        unsafe { kernel.run(&[x, part, gain], [out, out], &[], grid) }
    }

    /// What attention reads: queries `[rows, query heads, width]`, and keys beside values
    /// `[rows, 2 × kv heads, width]`.
    pub(crate) fn heads(
        &self,
        of: HeadsOf,
        of_rows: &HeadInputs<'_>,
    ) -> Result<[Array; 2], Exception> {
        let rows = of_rows.projected.dim(0);
        let kernel = self.kernel(Variant::Heads(of))?;
        let inputs = [
            of_rows.projected,
            of_rows.positions,
            of_rows.query_gain,
            of_rows.key_gain,
        ];
        let queries: &[i32] = &[rows, of.query, of.width];
        let pairs: &[i32] = &[rows, 2 * of.kv, of.width];
        let grid = Grid {
            blocks: [of.query + 2 * of.kv, rows],
            threads: HEAD_THREADS,
        };
        // SAFETY: the shapes are those above; the gains have a width, or one for each head.
        unsafe {
            kernel.run(
                &inputs,
                [(queries, self.dtype), (pairs, self.dtype)],
                &[],
                grid,
            )
        }
    }

    /// Which experts each row goes to, and how much each counts: `[rows, experts]` → twice `[rows, top]`.
    /// `None` where there are more than a warp can hold.
    pub(crate) fn route(
        &self,
        of: RouteOf,
        logits: &Array,
        correction: &Array,
    ) -> Result<Option<[Array; 2]>, Exception> {
        if of.experts > EXPERTS_MAX || of.top > LANES {
            return Ok(None);
        }
        let rows = logits.dim(0);
        let kernel = self.kernel(Variant::Route(of))?;
        let out: &[i32] = &[rows, of.top];
        let grid = Grid {
            blocks: [rows, 1],
            threads: LANES,
        };
        let outputs = [(out, Dtype::Uint32), (out, Dtype::Float32)];
        // SAFETY: the logits are rows × experts, the correction has as many as there are experts.
        unsafe {
            kernel
                .run(&[logits, correction], outputs, &[], grid)
                .map(Some)
        }
    }

    /// `x · weightᵀ`, `[rows, in]` → `[rows, out]` in the type `y`, of few rows. `None` where MLX is faster, or
    /// the only one that can.
    pub(crate) fn project(
        &self,
        linear: &Linear,
        x: &Array,
        y: Dtype,
    ) -> Result<Option<Array>, Exception> {
        let (rows, width) = (x.dim(0), x.dim(1));
        let faster = |matrix: &Packed<'_>| {
            let few = matrix.weight.dim(0) <= FEW_OUTPUTS && rows <= FEW_OUTPUTS_ROWS_MAX;
            rows < PRODUCT_ROWS_MAX || few
        };
        let Some(matrix) = self.packed(linear, x).filter(faster) else {
            return Ok(None);
        };
        let tile = if rows == 1 { 1 } else { TILE };
        let outputs = matrix.weight.dim(0);
        let kernel = self.kernel(Variant::Product {
            width,
            outputs,
            codes: matrix.codes,
            y,
            tile,
        })?;
        let grid = Grid {
            blocks: [(outputs + OUTS - 1) / OUTS, (rows + tile - 1) / tile],
            threads: threads_for(width),
        };
        let inputs = [x, matrix.weight, matrix.scales, matrix.biases];
        let out: &[i32] = &[rows, outputs];
        // SAFETY: `packed` has looked at the matrix, which is as wide as the rows.
        let [y] = unsafe { kernel.run(&inputs, [(out, y)], &[rows], grid)? };
        Ok(Some(y))
    }

    /// Each row through its experts, by their weights, summed: `[rows, hidden]` → the same. `None` where these
    /// kernels cannot.
    pub(crate) fn experts(
        &self,
        x: &Array,
        of: &ExpertInputs<'_>,
    ) -> Result<Option<Array>, Exception> {
        let (Some(inputs), Some(output)) = (self.packed(of.inputs, x), self.packed(of.output, x))
        else {
            return Ok(None);
        };
        let (rows, width, top, inner) = (x.dim(0), x.dim(1), of.experts.dim(1), of.inner);
        if rows * top > GRID_MAX || inner % 2 != 0 {
            return Ok(None);
        }
        let first = self.kernel(Variant::ExpertsIn {
            width,
            inner,
            top,
            codes: inputs.codes,
        })?;
        let outputs = output.weight.dim(1);
        let second = self.kernel(Variant::ExpertsOut {
            inner,
            outputs,
            top,
            codes: output.codes,
        })?;
        let grid = Grid {
            blocks: [inner / 2, rows * top],
            threads: threads_for(width),
        };
        let shape: &[i32] = &[rows, top, inner];
        let arrays = [
            x,
            inputs.weight,
            inputs.scales,
            inputs.biases,
            of.experts,
            of.weights,
        ];
        // SAFETY: `packed` has looked at the matrices; there are twice `inner` columns of `width`, and routing
        // names only experts that there are.
        let [middle] = unsafe { first.run(&arrays, [(shape, self.dtype)], &[], grid)? };
        let grid = Grid {
            blocks: [(outputs + OUTS - 1) / OUTS, rows],
            threads: threads_for(top * inner),
        };
        let arrays = [
            &middle,
            output.weight,
            output.scales,
            output.biases,
            of.experts,
        ];
        let shape: &[i32] = &[rows, outputs];
        // SAFETY: as above.
        let [y] = unsafe { second.run(&arrays, [(shape, self.dtype)], &[], grid)? };
        Ok(Some(y))
    }

    /// The matrix, if it is quantised as these kernels read it, and what it multiplies is of their type.
    fn packed<'a>(&self, linear: &'a Linear, x: &Array) -> Option<Packed<'a>> {
        let Linear::Quantized {
            weight,
            scales,
            biases,
            group_size,
            bits,
        } = linear
        else {
            return None;
        };
        let (width, groups) = (weight.shape().last()? * 32 / bits, scales.shape().last()?);
        let fits = self.language == Language::Cuda
            && x.dtype() == self.dtype
            && [2, 3, 4, 5, 6, 8].contains(bits)
            && group_size % LANES == 0
            && width == groups * group_size
            && scales.shape() == biases.shape();
        fits.then_some(Packed {
            weight,
            scales,
            biases,
            codes: CodesOf {
                bits: *bits,
                group: *group_size,
                scales: scales.dtype(),
            },
        })
    }

    fn kernel(&self, variant: Variant) -> Result<Arc<Kernel>, Exception> {
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernel) = made.get(&variant) {
            return Ok(kernel.clone());
        }
        let (source, constants) = variant.parts(self.dtype);
        let kernel = Arc::new(Kernel::new(self.language, source, &constants)?);
        made.insert(variant, kernel.clone());
        Ok(kernel)
    }
}

/// In the environment: `0` does without our own kernels, to compare; `prove` compares them with MLX's operations
/// before a model is used.
pub(crate) const OWN_KERNELS: &str = "OFFBOOK_OWN_KERNELS";

/// A lane of `route` holds every 32nd.
const EXPERTS_MAX: i32 = 1024;
/// Rows from which MLX's tensor cores multiply faster, unless a matrix has so few outputs, as a router has, that most
/// of them have nothing to do.
const PRODUCT_ROWS_MAX: i32 = 8;
const FEW_OUTPUTS: i32 = 1024;
const FEW_OUTPUTS_ROWS_MAX: i32 = 256;
/// Rows that a block of `product` takes when there is more than one.
const TILE: i32 = 4;
/// Blocks that a grid may have in its second dimension.
const GRID_MAX: i32 = 65_535;
