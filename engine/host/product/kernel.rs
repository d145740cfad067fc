//! The arithmetic of a product with quantised weights, on plain memory.
//!
//! A code q of group g stands for `scale[g] · q + bias[g]`; the codes of a row lie one after the other,
//! lowest bits first. Products are summed in [`LANES`] lanes, the lanes in one fixed order. Processors
//! without fused multiply-add round once more, and so differ in the last bits.

#![allow(unsafe_code)]

use std::ops::Range;

#[cfg(target_arch = "x86_64")]
use crate::host::processor::X86V3;
use crate::host::processor::{LANES, Plain, Processor};

/// The matrix that rows are multiplied by, transposed.
pub(super) struct Matrix<'a> {
    /// `[out, inner]`, `bits` each.
    pub(super) codes: &'a [u8],
    /// `[out, inner / group_size]`.
    pub(super) scales: &'a [f32],
    pub(super) biases: &'a [f32],
    /// A multiple of `group_size`.
    pub(super) inner: usize,
    /// A multiple of [`LANES`], at most [`GROUP_SIZE_MAX`].
    pub(super) group_size: usize,
    /// From 1 to 8.
    pub(super) bits: u32,
}

/// `ys[i] = xs[i] · matrixᵀ`, the columns of the result from `first` on, as many as each of `ys` has.
pub(super) fn multiply(matrix: &Matrix<'_>, first: usize, xs: &[&[f32]], ys: &mut [&mut [f32]]) {
    #[cfg(target_arch = "x86_64")]
    if X86V3::is_here() {
        // SAFETY: the processor has what the function is compiled for.
        return unsafe { multiply_x86_64_v3(matrix, first, xs, ys) };
    }
    multiply_with::<Plain>(matrix, first, xs, ys);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,bmi2")]
fn multiply_x86_64_v3(matrix: &Matrix<'_>, first: usize, xs: &[&[f32]], ys: &mut [&mut [f32]]) {
    multiply_with::<X86V3>(matrix, first, xs, ys);
}

#[inline(always)]
fn multiply_with<P: Processor>(
    matrix: &Matrix<'_>,
    first: usize,
    xs: &[&[f32]],
    ys: &mut [&mut [f32]],
) {
    match xs.len() {
        1 => straight::<P, 1, 4>(matrix, first, xs, ys),
        2 => straight::<P, 2, 4>(matrix, first, xs, ys),
        3 => straight::<P, 3, 2>(matrix, first, xs, ys),
        4 => straight::<P, 4, 2>(matrix, first, xs, ys),
        5 => straight::<P, 5, 1>(matrix, first, xs, ys),
        6 => straight::<P, 6, 1>(matrix, first, xs, ys),
        _ => {
            let together = (CACHED_NUMBERS / matrix.inner).max(ROWS_TOGETHER_MIN);
            for (xs, ys) in xs.chunks(together).zip(ys.chunks_mut(together)) {
                unpacked::<P>(matrix, first, xs, ys);
            }
        }
    }
}

/// Few rows: the numbers go from the codes straight into the sums.
#[inline(always)]
fn straight<P: Processor, const ROWS: usize, const COLUMNS: usize>(
    matrix: &Matrix<'_>,
    first: usize,
    xs: &[&[f32]],
    ys: &mut [&mut [f32]],
) {
    let xs: [&[f32]; ROWS] = std::array::from_fn(|row| xs[row]);
    let count = ys[0].len();
    for done in (0..count).step_by(COLUMNS) {
        let columns = done..count.min(done + COLUMNS);
        let of_matrix = first + columns.start..first + columns.end;
        let sums = sums_of_codes::<P, ROWS, COLUMNS>(matrix, of_matrix, xs);
        for (y, sums) in ys.iter_mut().zip(sums) {
            y[columns.clone()].copy_from_slice(&sums[..columns.len()]);
        }
    }
}

/// Many rows: some columns at a time become numbers, which all rows then meet.
#[inline(always)]
fn unpacked<P: Processor>(matrix: &Matrix<'_>, first: usize, xs: &[&[f32]], ys: &mut [&mut [f32]]) {
    let count = ys.first().map_or(0, |y| y.len());
    let mut unpacked = vec![0.0; COLUMNS * matrix.inner];
    let mut done = 0;
    while done < count {
        let columns = COLUMNS.min(count - done);
        for (column, row) in unpacked
            .chunks_exact_mut(matrix.inner)
            .take(columns)
            .enumerate()
        {
            unpack::<P>(matrix, first + done + column, row);
        }
        let (unpacked, _) = unpacked.as_chunks::<LANES>();
        let weights = unpacked.chunks_exact(matrix.inner / LANES);
        let weights: [_; COLUMNS] = {
            let mut each = weights;
            std::array::from_fn(|_| each.next().expect("there is room for so many"))
        };
        let mut rows = xs.chunks_exact(ROWS).zip(ys.chunks_exact_mut(ROWS));
        for (xs, ys) in &mut rows {
            let sums = sums::<P, ROWS>(std::array::from_fn(|i| xs[i]), weights);
            for (y, sums) in ys.iter_mut().zip(sums) {
                y[done..done + columns].copy_from_slice(&sums[..columns]);
            }
        }
        let whole = xs.len() / ROWS * ROWS;
        for (x, y) in xs[whole..].iter().zip(&mut ys[whole..]) {
            let [sums] = sums::<P, 1>([x], weights);
            y[done..done + columns].copy_from_slice(&sums[..columns]);
        }
        done += columns;
    }
}

/// One row of the matrix, as numbers.
#[inline(always)]
fn unpack<P: Processor>(matrix: &Matrix<'_>, index: usize, numbers: &mut [f32]) {
    let bits = matrix.bits as usize;
    let groups = matrix.inner / matrix.group_size;
    let scales = &matrix.scales[index * groups..][..groups];
    let biases = &matrix.biases[index * groups..][..groups];
    let mut tail = [0; TAIL_BYTES];
    let of_groups = numbers.chunks_exact_mut(matrix.group_size);
    for (group, (numbers, (&scale, &bias))) in of_groups.zip(scales.iter().zip(biases)).enumerate()
    {
        let (scale, bias) = (P::splat(scale), P::splat(bias));
        let (numbers, _) = numbers.as_chunks_mut::<LANES>();
        let mut from = codes_of(matrix, index, group, &mut tail);
        for numbers in numbers {
            // SAFETY: a word lies at each of the group's places, `bits` bytes apart: see `codes_of`.
            let word = unsafe {
                let word = from.cast::<u64>().read_unaligned();
                from = from.add(bits);
                word
            };
            let spread = P::spread(u64::from_le(word), matrix.bits);
            P::store(P::multiply_add(scale, spread, bias), numbers);
        }
    }
}

/// Where the codes of one group of a row begin. A whole word can be read at each of its places, `bits` bytes
/// apart: at the matrix's end, where there are fewer bytes from the last places on, the codes are copied to `tail`.
#[inline(always)]
fn codes_of(
    matrix: &Matrix<'_>,
    row: usize,
    group: usize,
    tail: &mut [u8; TAIL_BYTES],
) -> *const u8 {
    let bits = matrix.bits as usize;
    let group_bytes = matrix.group_size * bits / 8;
    let codes = &matrix.codes[row * matrix.inner * bits / 8 + group * group_bytes..];
    if codes.len() >= group_bytes - bits + WORD_BYTES {
        return codes.as_ptr();
    }
    tail[..group_bytes].copy_from_slice(&codes[..group_bytes]);
    tail.as_ptr()
}

/// The products of some rows with some columns.
#[inline(always)]
fn sums<P: Processor, const ROWS: usize>(
    xs: [&[f32]; ROWS],
    weights: [&[[f32; LANES]]; COLUMNS],
) -> [[f32; COLUMNS]; ROWS] {
    let length = weights[0].len();
    let xs = xs.map(|x| &x.as_chunks::<LANES>().0[..length]);
    let weights = weights.map(|w| &w[..length]);
    // No closures from here on: they would be compiled without the processor's instructions.
    let mut lanes = [[P::splat(0.0); COLUMNS]; ROWS];
    for place in 0..length {
        let mut column = [P::splat(0.0); COLUMNS];
        for (column, weights) in column.iter_mut().zip(&weights) {
            // SAFETY: all were cut to the same length.
            *column = P::load(unsafe { weights.get_unchecked(place) });
        }
        for (lanes, x) in lanes.iter_mut().zip(&xs) {
            // SAFETY: as above.
            let x = P::load(unsafe { x.get_unchecked(place) });
            for (lanes, &weight) in lanes.iter_mut().zip(&column) {
                *lanes = P::multiply_add(x, weight, *lanes);
            }
        }
    }
    sums_of_lanes::<P, ROWS, COLUMNS>(&lanes)
}

/// The products of some rows with some columns of the result, at most `COLUMNS`: the same sums as those of
/// [`sums`], in the same order.
#[inline(always)]
fn sums_of_codes<P: Processor, const ROWS: usize, const COLUMNS: usize>(
    matrix: &Matrix<'_>,
    columns: Range<usize>,
    xs: [&[f32]; ROWS],
) -> [[f32; COLUMNS]; ROWS] {
    let bits = matrix.bits as usize;
    let groups = matrix.inner / matrix.group_size;
    let places = matrix.group_size / LANES;
    let xs = xs.map(|x| &x.as_chunks::<LANES>().0[..groups * places]);
    // No closures from here on: they would be compiled without the processor's instructions.
    let mut lanes = [[P::splat(0.0); COLUMNS]; ROWS];
    let mut tail = [0; TAIL_BYTES];
    for group in 0..groups {
        let mut scales = [P::splat(0.0); COLUMNS];
        let mut biases = [P::splat(0.0); COLUMNS];
        let mut from = [matrix.codes.as_ptr(); COLUMNS];
        for column in 0..COLUMNS {
            // Where there are fewer columns, the last is computed again.
            let row = columns.start + column.min(columns.len() - 1);
            scales[column] = P::splat(matrix.scales[row * groups + group]);
            biases[column] = P::splat(matrix.biases[row * groups + group]);
            from[column] = codes_of(matrix, row, group, &mut tail);
        }
        for place in group * places..(group + 1) * places {
            let mut x = [P::splat(0.0); ROWS];
            for (x, xs) in x.iter_mut().zip(&xs) {
                // SAFETY: all were cut to the same length.
                *x = P::load(unsafe { xs.get_unchecked(place) });
            }
            for column in 0..COLUMNS {
                // SAFETY: a word lies at each of the group's places, `bits` bytes apart: see `codes_of`.
                let word = unsafe {
                    let word = from[column].cast::<u64>().read_unaligned();
                    from[column] = from[column].add(bits);
                    word
                };
                let spread = P::spread(u64::from_le(word), matrix.bits);
                let weight = P::multiply_add(scales[column], spread, biases[column]);
                for (lanes, &x) in lanes.iter_mut().zip(&x) {
                    lanes[column] = P::multiply_add(x, weight, lanes[column]);
                }
            }
        }
    }
    sums_of_lanes::<P, ROWS, COLUMNS>(&lanes)
}

/// Each vector of lanes as one number.
#[inline(always)]
fn sums_of_lanes<P: Processor, const ROWS: usize, const COLUMNS: usize>(
    lanes: &[[P::Vector; COLUMNS]; ROWS],
) -> [[f32; COLUMNS]; ROWS] {
    let mut sums = [[0.0; COLUMNS]; ROWS];
    for (sums, lanes) in sums.iter_mut().zip(lanes) {
        for (sum, &lanes) in sums.iter_mut().zip(lanes) {
            *sum = P::sum(lanes);
        }
    }
    sums
}

/// What is read at once.
const WORD_BYTES: usize = size_of::<u64>();
/// The largest group that MLX has.
pub(super) const GROUP_SIZE_MAX: u32 = 128;
/// Its codes at 8 bits.
const GROUP_BYTES_MAX: usize = GROUP_SIZE_MAX as usize;
/// The codes of one group, with a whole word from each of its places on.
const TAIL_BYTES: usize = GROUP_BYTES_MAX + WORD_BYTES;

/// What rows may hold together so that a core's own cache has them when the next columns come. To unpack the
/// matrix again for the rows after them costs less than to fetch them for every few columns.
const CACHED_NUMBERS: usize = 64 << 10;
/// For fewer it does not.
const ROWS_TOGETHER_MIN: usize = 16;

/// Columns of the result, and rows of it, that are computed together from numbers: with their operands they
/// fill the registers. Straight from the codes there is room for fewer columns the more rows there are, and from
/// seven rows on it is faster to store the numbers first.
pub(super) const COLUMNS: usize = 4;
const ROWS: usize = 2;

#[cfg(test)]
mod tests {
    use super::*;

    type Multiply = fn(&Matrix<'_>, usize, &[&[f32]], &mut [&mut [f32]]);

    /// The sums of [`multiply`] in double precision, straight from the definition.
    fn expected(matrix: &Matrix<'_>, x: &[f32], column: usize) -> f64 {
        let code = |k: usize| {
            let first = (column * matrix.inner + k) * matrix.bits as usize;
            let bit = |i: usize| u32::from(matrix.codes[i / 8] >> (i % 8) & 1);
            (0..matrix.bits as usize).fold(0, |code, i| code | bit(first + i) << i)
        };
        let group = |k: usize| (column * matrix.inner + k) / matrix.group_size;
        let weight = |k| {
            f64::from(matrix.scales[group(k)]) * f64::from(code(k))
                + f64::from(matrix.biases[group(k)])
        };
        (0..matrix.inner).map(|k| f64::from(x[k]) * weight(k)).sum()
    }

    #[test]
    fn every_processor_sums_what_the_codes_stand_for_in_any_company() {
        let (inner, out, rows) = (96, 7, 9);
        let noise = |i: usize| (i as f32 * 12.9898).sin();
        for bits in 1..=8 {
            let bytes = inner * out * bits / 8;
            let codes: Vec<u8> = (0..bytes).map(|i| (i * 89 + i / 7) as u8).collect();
            let scales: Vec<f32> = (0..inner * out / 32).map(noise).collect();
            let biases: Vec<f32> = scales.iter().map(|scale| -3.0 * scale).collect();
            let matrix = Matrix {
                codes: &codes,
                scales: &scales,
                biases: &biases,
                inner,
                group_size: 32,
                bits: bits as u32,
            };
            let x: Vec<f32> = (0..rows * inner).map(noise).collect();
            let xs: Vec<&[f32]> = x.chunks_exact(inner).collect();
            for processor in [multiply as Multiply, multiply_with::<Plain>] {
                let mut alone = None;
                for company in 1..=rows {
                    let mut y = vec![f32::NAN; rows * out];
                    for [first, end] in [[0, 4], [4, out]] {
                        let ys = y.chunks_exact_mut(out).map(|y| &mut y[first..end]);
                        let mut ys: Vec<_> = ys.collect();
                        for (xs, ys) in xs.chunks(company).zip(ys.chunks_mut(company)) {
                            processor(&matrix, first, xs, ys);
                        }
                    }
                    let alone = alone.get_or_insert_with(|| y.clone());
                    assert_eq!(y, *alone, "{bits} bits, {company} rows at once");
                }
                for (i, y) in alone.unwrap().into_iter().enumerate() {
                    let expected = expected(&matrix, xs[i / out], i % out);
                    let error = (f64::from(y) - expected).abs();
                    assert!(
                        error < 1e-4 * expected.abs().max(10.0),
                        "{bits} bits: {y}, {expected}"
                    );
                }
            }
        }
    }
}
