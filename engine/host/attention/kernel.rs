//! The arithmetic of attention, on plain memory: what one head of one row sees is summed position by position,
//! from the first on, wherever the positions lie. Codes are never unpacked into memory: with q the query and c
//! the codes of a group, q · (scale · c + bias) is scale · (q · c) + bias · Σq.

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
    let (mut weights, mut totals) = (Vec::new(), Vec::new());
    for look in looks {
        match look.of.group_size {
            0 => look_at::<P, Floats>(look, &[], &mut weights),
            group_size => {
                total::<P>(look.query, group_size / LANES, &mut totals);
                look_at::<P, Codes>(look, &totals, &mut weights);
            }
        }
    }
}

#[inline(always)]
fn look_at<P: Processor, R: Row>(
    look: &mut Look<'_>,
    totals: &[[f32; LANES]],
    weights: &mut Vec<f32>,
) {
    let attention = look.of;
    let kv_head = look.head / (attention.heads / attention.kv_heads);
    let (keys, values) = (kv_head, attention.kv_heads + kv_head);
    let group = attention.group_size / LANES;
    weights.resize(look.positions(), 0.0);
    let mut largest = f32::NEG_INFINITY;
    let blocks = weights.chunks_mut(attention.block_positions);
    for (block, weights) in blocks.enumerate() {
        let rows = attention.rows_of(keys, block, weights.len());
        let rows = rows.chunks_exact(attention.row_words);
        for (weight, key) in weights.iter_mut().zip(rows) {
            let query = Query {
                values: look.query,
                totals,
                group,
            };
            *weight = attention.scale * R::dot::<P>(query, key);
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
            R::add::<P>(
                *weight / sum,
                value,
                Sum {
                    out: look.out,
                    group,
                },
            );
        }
    }
}

/// The sum of each group of a query's channels, lane by lane.
#[inline(always)]
fn total<P: Processor>(query: &[[f32; LANES]], group: usize, totals: &mut Vec<[f32; LANES]>) {
    totals.clear();
    for values in query.chunks_exact(group) {
        let mut sum = P::splat(0.0);
        for value in values {
            sum = P::multiply_add(P::load(value), P::splat(1.0), sum);
        }
        let mut total = [0.0; LANES];
        P::store(sum, &mut total);
        totals.push(total);
    }
}

/// What a key is multiplied with.
#[derive(Clone, Copy)]
struct Query<'a> {
    values: &'a [[f32; LANES]],
    /// Of each group, where there are groups: see [`total`].
    totals: &'a [[f32; LANES]],
    /// Vectors of a group.
    group: usize,
}

/// What values are added to.
struct Sum<'a> {
    out: &'a mut [[f32; LANES]],
    /// Vectors of a group, where there are groups.
    group: usize,
}

/// What the words of a row are.
trait Row {
    /// Query · key.
    fn dot<P: Processor>(query: Query<'_>, key: &[u32]) -> f32;
    /// `sum += weight · value`.
    fn add<P: Processor>(weight: f32, value: &[u32], sum: Sum<'_>);
}

struct Floats;

impl Row for Floats {
    #[inline(always)]
    fn dot<P: Processor>(query: Query<'_>, key: &[u32]) -> f32 {
        let mut sum = P::splat(0.0);
        for (a, b) in query.values.iter().zip(floats(key)) {
            sum = P::multiply_add(P::load(a), P::load(b), sum);
        }
        P::sum(sum)
    }

    #[inline(always)]
    fn add<P: Processor>(weight: f32, value: &[u32], sum: Sum<'_>) {
        let weight = P::splat(weight);
        for (sum, value) in sum.out.iter_mut().zip(floats(value)) {
            P::store(P::multiply_add(weight, P::load(value), P::load(sum)), sum);
        }
    }
}

#[inline(always)]
fn floats(words: &[u32]) -> &[[f32; LANES]] {
    // SAFETY: of the same size and alignment, and all bits are floats.
    let floats = unsafe { std::slice::from_raw_parts(words.as_ptr().cast(), words.len()) };
    floats.as_chunks().0
}

/// Codes of 8 bits, then the groups' scales, then their biases: see `kv_cache/coding.rs`.
struct Codes;

impl Row for Codes {
    #[inline(always)]
    fn dot<P: Processor>(query: Query<'_>, key: &[u32]) -> f32 {
        let (codes, scales, biases) = parts(key, query.values.len(), query.group);
        let mut sum = P::splat(0.0);
        let groups = query.values.chunks_exact(query.group);
        let groups = groups
            .zip(codes.chunks_exact(query.group))
            .zip(query.totals);
        let parameters = scales.iter().zip(biases);
        for (((values, codes), total), (scale, bias)) in groups.zip(parameters) {
            let mut of_group = P::splat(0.0);
            for (value, codes) in values.iter().zip(codes) {
                of_group = P::multiply_add(P::load(value), P::widen(*codes), of_group);
            }
            sum = P::multiply_add(P::splat(f32::from_bits(*scale)), of_group, sum);
            sum = P::multiply_add(P::splat(f32::from_bits(*bias)), P::load(total), sum);
        }
        P::sum(sum)
    }

    #[inline(always)]
    fn add<P: Processor>(weight: f32, value: &[u32], sum: Sum<'_>) {
        let (codes, scales, biases) = parts(value, sum.out.len(), sum.group);
        let groups = sum.out.chunks_exact_mut(sum.group);
        let groups = groups.zip(codes.chunks_exact(sum.group));
        let parameters = scales.iter().zip(biases);
        for ((sums, codes), (scale, bias)) in groups.zip(parameters) {
            let scale = P::splat(weight * f32::from_bits(*scale));
            let bias = P::splat(f32::from_bits(*bias));
            let weight = P::splat(weight);
            for (sum, codes) in sums.iter_mut().zip(codes) {
                let with_bias = P::multiply_add(weight, bias, P::load(sum));
                P::store(P::multiply_add(scale, P::widen(*codes), with_bias), sum);
            }
        }
    }
}

/// The codes of each vector, scales and biases of a row of so many vectors.
#[inline(always)]
fn parts(words: &[u32], vectors: usize, group: usize) -> (&[[u32; 2]], &[u32], &[u32]) {
    let (codes, parameters) = words.split_at(vectors * 2);
    let (scales, biases) = parameters.split_at(vectors / group);
    (codes.as_chunks().0, scales, biases)
}
