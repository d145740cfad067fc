//! Chains of elementwise operations that a GPU runs as one kernel. A step's host time is its number of
//! kernels, and these chains would be every fourth of them. MLX compiles each when it is first used,
//! for any shape; the CPU, for which it would need a C++ compiler at run time, takes them one by one.

use std::cell::RefCell;

use mlx_rs::error::Exception;
use mlx_rs::ops::{rsqrt, sigmoid};
use mlx_rs::transforms::compile::compile;
use mlx_rs::{Array, Dtype};

/// `silu(gate) ∘ up ∘ weight`, in the type of `gate`.
pub(crate) fn weighted_swiglu(
    gate: &Array,
    up: &Array,
    weight: &Array,
) -> Result<Array, Exception> {
    WEIGHTED_SWIGLU.with_borrow_mut(|fused| fused((gate, up, weight)))
}

/// `silu(gate) ∘ up`.
pub(crate) fn swiglu(gate: &Array, up: &Array) -> Result<Array, Exception> {
    SWIGLU.with_borrow_mut(|fused| fused((gate, up)))
}

/// `sigmoid(logits)`, and that plus `correction`.
pub(crate) fn scores(logits: &Array, correction: &Array) -> Result<[Array; 2], Exception> {
    let both = SCORES.with_borrow_mut(|fused| fused(&[logits.clone(), correction.clone()]))?;
    both.try_into()
        .map_err(|_| Exception::custom("a compiled function lost a result"))
}

/// `x / (sum + tiny)`.
pub(crate) fn share_of_sum(x: &Array, sum: &Array, tiny: &Array) -> Result<Array, Exception> {
    SHARE_OF_SUM.with_borrow_mut(|fused| fused((x, sum, tiny)))
}

/// `x²`, in 32 bits.
pub(crate) fn squares(x: &Array) -> Result<Array, Exception> {
    SQUARES.with_borrow_mut(|fused| fused(x))
}

/// What [`norm_of_two`] takes.
pub(crate) struct NormOfTwo<'a> {
    /// `[rows, heads, width]`.
    pub(crate) x: &'a Array,
    /// The mean of the squares of either kind of heads, for each row: `[rows, 1, 1]`.
    pub(crate) means: [Array; 2],
    /// 1 for the heads of that kind, 0 for the others: `[heads, 1]`.
    pub(crate) kinds: &'a [Array; 2],
    pub(crate) eps: &'a Array,
    /// `[heads, width]`.
    pub(crate) gains: &'a Array,
}

/// `x / sqrt(mean + eps) ∘ gains`, each head by the mean of its kind, in the type of `x`.
pub(crate) fn norm_of_two(norm: NormOfTwo<'_>) -> Result<Array, Exception> {
    let [mean, other_mean] = norm.means;
    let [kind, other_kind] = norm.kinds.clone();
    let (x, eps, gains) = (norm.x.clone(), norm.eps.clone(), norm.gains.clone());
    let inputs = [x, mean, kind, other_mean, other_kind, eps, gains];
    let normed = NORM_OF_TWO.with_borrow_mut(|fused| fused(&inputs))?;
    let normed = normed.into_iter().next();
    normed.ok_or_else(|| Exception::custom("a compiled function lost its result"))
}

type Unary = Box<dyn for<'a> FnMut(&'a Array) -> Result<Array, Exception>>;
type Binary = Box<dyn for<'a> FnMut((&'a Array, &'a Array)) -> Result<Array, Exception>>;
type Ternary =
    Box<dyn for<'a> FnMut((&'a Array, &'a Array, &'a Array)) -> Result<Array, Exception>>;
type Many = Box<dyn FnMut(&[Array]) -> Result<Vec<Array>, Exception>>;

// MLX keeps what it has compiled for each thread.
thread_local! {
    static SWIGLU: RefCell<Binary> = RefCell::new(Box::new(compile(
        |(gate, up): (&Array, &Array)| sigmoid(gate)?.multiply(gate)?.multiply(up),
        true,
    )));
    static WEIGHTED_SWIGLU: RefCell<Ternary> = RefCell::new(Box::new(compile(
        |(gate, up, weight): (&Array, &Array, &Array)| {
            let inner = sigmoid(gate)?.multiply(gate)?.multiply(up)?;
            inner.multiply(weight.as_dtype(gate.dtype())?)
        },
        true,
    )));
    static SCORES: RefCell<Many> = RefCell::new(Box::new(compile(
        |inputs: &[Array]| {
            let scores = sigmoid(&inputs[0])?;
            let corrected = scores.add(&inputs[1])?;
            Ok::<_, Exception>(vec![scores, corrected])
        },
        true,
    )));
    static SQUARES: RefCell<Unary> = RefCell::new(Box::new(compile(
        |x: &Array| x.as_dtype(Dtype::Float32)?.square(),
        true,
    )));
    static NORM_OF_TWO: RefCell<Many> = RefCell::new(Box::new(compile(
        |inputs: &[Array]| {
            let [x, mean, kind, other_mean, other_kind, eps, gains] = inputs else {
                return Err(Exception::custom("a norm of two has seven inputs"));
            };
            let mean = mean.multiply(kind)?.add(other_mean.multiply(other_kind)?)?;
            let inverse = rsqrt(mean.add(eps)?)?;
            let normed = x.as_dtype(Dtype::Float32)?.multiply(inverse)?;
            Ok(vec![normed.multiply(gains)?.as_dtype(x.dtype())?])
        },
        true,
    )));
    static SHARE_OF_SUM: RefCell<Ternary> = RefCell::new(Box::new(compile(
        |(x, sum, tiny): (&Array, &Array, &Array)| x.divide(sum.add(tiny)?),
        true,
    )));
}
