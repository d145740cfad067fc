//! The arithmetic of attention, on plain memory: what one head of one row sees is summed position by position,
//! from the first on, wherever the positions lie.

#![allow(unsafe_code)]

use super::RawAttention;
#[cfg(target_arch = "x86_64")]
use crate::host::processor::X86V3;
use crate::host::processor::{LANES, Plain, Processor};

/// What one head of one row does.
pub(super) struct Look<'a> {
    pub(super) of: &'a RawAttention,
    pub(super) row: usize,
    pub(super) head: usize,
    pub(super) query: &'a [[f32; LANES]],
    pub(super) out: &'a mut [[f32; LANES]],
}

impl Look<'_> {
    /// As many as it sees.
    #[inline(always)]
    pub(super) fn positions(&self) -> usize {
        self.of.positions - self.of.rows + self.row + 1
    }
}

pub(super) fn attend(looks: &mut [Look<'_>]) {
    #[cfg(target_arch = "x86_64")]
    if X86V3::is_here() {
        // SAFETY: the processor has what the function is compiled for.
        return unsafe { attend_x86_64_v3(looks) };
    }
    attend_with::<Plain>(looks);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,bmi2")]
fn attend_x86_64_v3(looks: &mut [Look<'_>]) {
    attend_with::<X86V3>(looks);
}

#[inline(always)]
fn attend_with<P: Processor>(looks: &mut [Look<'_>]) {
    let mut weights = Vec::new();
    for look in looks {
        let attention = look.of;
        let kv_head = look.head / (attention.heads / attention.kv_heads);
        let (keys, values) = (kv_head, attention.kv_heads + kv_head);
        weights.resize(look.positions(), 0.0);
        let mut largest = f32::NEG_INFINITY;
        let blocks = weights.chunks_mut(attention.block_positions);
        for (block, weights) in blocks.enumerate() {
            let rows = attention.rows_of(keys, block, weights.len());
            let rows = rows.chunks_exact(attention.row_words);
            for (weight, key) in weights.iter_mut().zip(rows) {
                *weight = attention.scale * dot::<P>(look.query, floats(key));
                largest = largest.max(*weight);
            }
        }
        let mut sum = 0.0;
        for weight in weights.iter_mut() {
            *weight = (*weight - largest).exp();
            sum += *weight;
        }
        for out in look.out.iter_mut() {
            *out = [0.0; LANES];
        }
        let blocks = weights.chunks(attention.block_positions);
        for (block, weights) in blocks.enumerate() {
            let rows = attention.rows_of(values, block, weights.len());
            let rows = rows.chunks_exact(attention.row_words);
            for (weight, value) in weights.iter().zip(rows) {
                add::<P>(*weight / sum, floats(value), look.out);
            }
        }
    }
}

#[inline(always)]
fn dot<P: Processor>(a: &[[f32; LANES]], b: &[[f32; LANES]]) -> f32 {
    let mut sum = P::splat(0.0);
    for (a, b) in a.iter().zip(b) {
        sum = P::multiply_add(P::load(a), P::load(b), sum);
    }
    P::sum(sum)
}

/// `sum += weight · values`.
#[inline(always)]
fn add<P: Processor>(weight: f32, values: &[[f32; LANES]], sum: &mut [[f32; LANES]]) {
    let weight = P::splat(weight);
    for (sum, values) in sum.iter_mut().zip(values) {
        P::store(P::multiply_add(weight, P::load(values), P::load(sum)), sum);
    }
}

/// What the words of a row are where they are no codes.
#[inline(always)]
fn floats(words: &[u32]) -> &[[f32; LANES]] {
    // SAFETY: of the same size and alignment, and all bits are floats.
    let floats = unsafe { std::slice::from_raw_parts(words.as_ptr().cast(), words.len()) };
    floats.as_chunks().0
}
