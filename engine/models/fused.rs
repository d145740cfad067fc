//! Chains of elementwise operations that a GPU runs as one kernel. A step's host time is its number of
//! kernels, and these chains would be every fourth of them. MLX compiles each when it is first used,
//! for any shape; the CPU, for which it would need a C++ compiler at run time, takes them one by one.

use std::cell::RefCell;

use mlx_rs::Array;
use mlx_rs::error::Exception;
use mlx_rs::ops::sigmoid;
use mlx_rs::transforms::compile::compile;

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
    static SHARE_OF_SUM: RefCell<Ternary> = RefCell::new(Box::new(compile(
        |(x, sum, tiny): (&Array, &Array, &Array)| x.divide(sum.add(tiny)?),
        true,
    )));
}
