//! Element-wise sums, maxima and minima of the ranks' operands, in rank order: the same operands
//! give the same bits on every rank. It knows bytes and element types, nothing of ranks' whereabouts.

use half::{bf16, f16};
use mlx_rs::Dtype;

/// How two elements become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reduction {
    Sum,
    Max,
    Min,
}

/// Whether `reduce` knows the type.
pub(crate) fn reduces(dtype: Dtype) -> bool {
    use Dtype::{Bfloat16, Float16, Float32, Int32, Uint32};
    matches!(dtype, Float32 | Float16 | Bfloat16 | Int32 | Uint32)
}

/// Folds the operands of all ranks into `own`, which holds the operand of `rank` before and the
/// result after. `others` has the operands of the other ranks in rank order, each as long as `own`.
///
/// f16 and bf16 are added in f32 and rounded once; integers wrap; a NaN anywhere makes a NaN.
/// Types that [`reduces`] denies are left alone.
pub(crate) fn reduce(
    reduction: Reduction,
    dtype: Dtype,
    own: &mut [u8],
    rank: usize,
    others: &[&[u8]],
) {
    match dtype {
        Dtype::Float32 => reduce_as::<f32>(reduction, own, rank, others),
        Dtype::Float16 => reduce_as::<f16>(reduction, own, rank, others),
        Dtype::Bfloat16 => reduce_as::<bf16>(reduction, own, rank, others),
        Dtype::Int32 => reduce_as::<i32>(reduction, own, rank, others),
        Dtype::Uint32 => reduce_as::<u32>(reduction, own, rank, others),
        _ => {}
    }
}

fn reduce_as<E: Element>(reduction: Reduction, own: &mut [u8], rank: usize, others: &[&[u8]]) {
    match reduction {
        Reduction::Sum => fold::<E>(own, rank, others, E::sum),
        Reduction::Max => fold::<E>(own, rank, others, E::max),
        Reduction::Min => fold::<E>(own, rank, others, E::min),
    }
}

/// Block by block, so that the accumulators stay in the first-level cache and the inner loops are
/// plain slices that the compiler turns into vector instructions.
fn fold<E: Element>(
    own: &mut [u8],
    rank: usize,
    others: &[&[u8]],
    combine: impl Fn(E::Wide, E::Wide) -> E::Wide,
) {
    let mut wide = [E::Wide::default(); BLOCK_ELEMENTS];
    for (index, block) in own.chunks_mut(BLOCK_ELEMENTS * E::BYTES).enumerate() {
        let start = index * BLOCK_ELEMENTS * E::BYTES;
        let range = start..start + block.len();
        let wide = &mut wide[..block.len() / E::BYTES];
        // Rank order: the ranks below ours, our own, the ranks above.
        let mut first = true;
        let mut take = |operand: &[u8]| {
            let elements = operand.chunks_exact(E::BYTES).map(E::load);
            if first {
                wide.iter_mut()
                    .zip(elements)
                    .for_each(|(sum, element)| *sum = element);
            } else {
                wide.iter_mut()
                    .zip(elements)
                    .for_each(|(sum, element)| *sum = combine(*sum, element));
            }
            first = false;
        };
        let (below, above) = others.split_at(rank);
        below.iter().for_each(|other| take(&other[range.clone()]));
        take(block);
        above.iter().for_each(|other| take(&other[range.clone()]));
        block
            .chunks_exact_mut(E::BYTES)
            .zip(wide.iter())
            .for_each(|(to, &sum)| E::store(sum, to));
    }
}

/// An element type as bytes in memory (`BYTES` of them, native order) and as what it is added in.
trait Element {
    type Wide: Copy + Default;
    const BYTES: usize;
    fn load(bytes: &[u8]) -> Self::Wide;
    fn store(wide: Self::Wide, bytes: &mut [u8]);
    fn sum(a: Self::Wide, b: Self::Wide) -> Self::Wide;
    fn max(a: Self::Wide, b: Self::Wide) -> Self::Wide;
    fn min(a: Self::Wide, b: Self::Wide) -> Self::Wide;
}

macro_rules! float_element {
    ($element:ty, $bytes:literal, $load:expr, $store:expr) => {
        impl Element for $element {
            type Wide = f32;
            const BYTES: usize = $bytes;
            #[inline(always)]
            fn load(bytes: &[u8]) -> f32 {
                let mut array = [0; $bytes];
                array.copy_from_slice(bytes);
                $load(<$element>::from_ne_bytes(array))
            }
            #[inline(always)]
            fn store(wide: f32, bytes: &mut [u8]) {
                bytes.copy_from_slice(&$store(wide).to_ne_bytes());
            }
            #[inline(always)]
            fn sum(a: f32, b: f32) -> f32 {
                a + b
            }
            // Unlike `f32::max`, a NaN on either side stays: that is what MLX does.
            #[inline(always)]
            fn max(a: f32, b: f32) -> f32 {
                if a > b || a.is_nan() { a } else { b }
            }
            #[inline(always)]
            fn min(a: f32, b: f32) -> f32 {
                if a < b || a.is_nan() { a } else { b }
            }
        }
    };
}

macro_rules! integer_element {
    ($element:ty) => {
        impl Element for $element {
            type Wide = $element;
            const BYTES: usize = 4;
            #[inline(always)]
            fn load(bytes: &[u8]) -> $element {
                let mut array = [0; 4];
                array.copy_from_slice(bytes);
                <$element>::from_ne_bytes(array)
            }
            #[inline(always)]
            fn store(wide: $element, bytes: &mut [u8]) {
                bytes.copy_from_slice(&wide.to_ne_bytes());
            }
            #[inline(always)]
            fn sum(a: $element, b: $element) -> $element {
                a.wrapping_add(b)
            }
            #[inline(always)]
            fn max(a: $element, b: $element) -> $element {
                Ord::max(a, b)
            }
            #[inline(always)]
            fn min(a: $element, b: $element) -> $element {
                Ord::min(a, b)
            }
        }
    };
}

float_element!(f32, 4, |x: f32| x, |x: f32| x);
float_element!(f16, 2, f16::to_f32, f16::from_f32);
float_element!(bf16, 2, widened, narrowed);
integer_element!(i32);
integer_element!(u32);

fn widened(narrow: bf16) -> f32 {
    f32::from_bits(u32::from(narrow.to_bits()) << 16)
}

/// What `bf16::from_f32` gives, to the nearest and ties to even, but without a branch: a block of
/// them becomes vector instructions.
fn narrowed(wide: f32) -> bf16 {
    let bits = wide.to_bits();
    let rounded = bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) >> 16;
    let quiet = bits >> 16 | 0x40;
    bf16::from_bits((if wide.is_nan() { quiet } else { rounded }) as u16)
}

/// 4 KiB of accumulators: a small part of any first-level cache.
const BLOCK_ELEMENTS: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(values: &[f32]) -> Vec<u8> {
        values
            .iter()
            .flat_map(|value| value.to_ne_bytes())
            .collect()
    }

    #[test]
    fn every_rank_gets_the_same_bits() {
        // In another order 1e8 + -1e8 + 1 and 1 + 1e8 + -1e8 differ.
        let operands = [
            bytes(&[1.0; 1500]),
            bytes(&[1e8; 1500]),
            bytes(&[-1e8; 1500]),
        ];
        let results: Vec<_> = (0..3)
            .map(|rank| {
                let mut own = operands[rank].clone();
                let others: Vec<_> = (0..3)
                    .filter(|&other| other != rank)
                    .map(|other| &operands[other][..])
                    .collect();
                reduce(Reduction::Sum, Dtype::Float32, &mut own, rank, &others);
                own
            })
            .collect();
        assert!(results.iter().all(|result| *result == results[0]));
        assert_eq!(results[0], bytes(&[(1.0 + 1e8) + -1e8; 1500]));
    }

    #[test]
    fn halves_are_rounded_once() {
        // 2048 + 1 + 1 in f16 steps would stay at 2048.
        let one = f16::from_f32(1.0).to_ne_bytes();
        let mut own = f16::from_f32(2048.0).to_ne_bytes().to_vec();
        reduce(Reduction::Sum, Dtype::Float16, &mut own, 0, &[&one, &one]);
        assert_eq!(own, f16::from_f32(2050.0).to_ne_bytes());
    }

    #[test]
    fn narrowing_is_that_of_the_half_crate() {
        let wide = (0..=u32::MAX).step_by(65_521).map(f32::from_bits);
        for wide in wide.chain([f32::NAN, f32::INFINITY, 1.0 + 1.0 / 256.0]) {
            assert_eq!(
                narrowed(wide).to_bits(),
                bf16::from_f32(wide).to_bits(),
                "{wide}"
            );
        }
    }

    #[test]
    fn a_nan_survives_maximum_and_minimum_on_either_side() {
        for reduction in [Reduction::Max, Reduction::Min] {
            for (own, other) in [(f32::NAN, 1.0), (1.0, f32::NAN)] {
                let mut own = bytes(&[own]);
                reduce(reduction, Dtype::Float32, &mut own, 0, &[&bytes(&[other])]);
                assert!(f32::from_ne_bytes(own.try_into().unwrap()).is_nan());
            }
        }
    }
}
