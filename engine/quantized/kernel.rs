//! The arithmetic of a product with quantised weights, on plain memory.
//!
//! A code q of group g stands for `scale[g] · q + bias[g]`; the codes of a row lie one after the other,
//! lowest bits first. Products are summed in [`LANES`] lanes, the lanes in one fixed order. Processors
//! without fused multiply-add round once more, and so differ in the last bits.

/// The matrix that rows are multiplied by, transposed.
pub(super) struct Matrix<'a> {
    /// `[out, inner]`, `bits` each.
    pub(super) codes: &'a [u8],
    /// `[out, inner / group_size]`.
    pub(super) scales: &'a [f32],
    pub(super) biases: &'a [f32],
    /// A multiple of `group_size`.
    pub(super) inner: usize,
    /// A multiple of [`LANES`].
    pub(super) group_size: usize,
    /// From 1 to 8.
    pub(super) bits: u32,
}

/// `ys[i] = xs[i] · matrixᵀ`.
pub(super) fn multiply(matrix: &Matrix<'_>, xs: &[&[f32]], ys: &mut [&mut [f32]]) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_64_v3() {
        // SAFETY: the processor has what the function is compiled for.
        return unsafe { multiply_x86_64_v3(matrix, xs, ys) };
    }
    multiply_with::<Shifts>(matrix, xs, ys);
}

#[cfg(target_arch = "x86_64")]
fn is_x86_64_v3() -> bool {
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("bmi2")
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,bmi2")]
fn multiply_x86_64_v3(matrix: &Matrix<'_>, xs: &[&[f32]], ys: &mut [&mut [f32]]) {
    multiply_with::<Bmi2AndFma>(matrix, xs, ys);
}

/// What processors do differently.
trait Processor {
    /// Eight codes, the first in the lowest bits, one to a byte.
    fn spread(codes: u64, bits: u32) -> u64;
    /// `a · b + c`.
    fn multiply_add(a: f32, b: f32, c: f32) -> f32;
}

struct Shifts;

impl Processor for Shifts {
    #[inline(always)]
    fn spread(codes: u64, bits: u32) -> u64 {
        let mask = (1 << bits) - 1;
        (0..8).fold(0, |spread, i| {
            spread | ((codes >> (i * bits)) & mask) << (8 * i)
        })
    }

    #[inline(always)]
    fn multiply_add(a: f32, b: f32, c: f32) -> f32 {
        // Fused everywhere on Arm; elsewhere it would be a function call.
        match cfg!(target_arch = "aarch64") {
            true => a.mul_add(b, c),
            false => a * b + c,
        }
    }
}

#[cfg(target_arch = "x86_64")]
struct Bmi2AndFma;

#[cfg(target_arch = "x86_64")]
impl Processor for Bmi2AndFma {
    #[inline(always)]
    fn spread(codes: u64, bits: u32) -> u64 {
        let mask = 0x0101_0101_0101_0101 * ((1 << bits) - 1);
        // SAFETY: only used from a function that is compiled for BMI2, behind a check for it.
        unsafe { std::arch::x86_64::_pdep_u64(codes, mask) }
    }

    #[inline(always)]
    fn multiply_add(a: f32, b: f32, c: f32) -> f32 {
        a.mul_add(b, c)
    }
}

#[inline(always)]
fn multiply_with<P: Processor>(matrix: &Matrix<'_>, xs: &[&[f32]], ys: &mut [&mut [f32]]) {
    let out = matrix.scales.len() * matrix.group_size / matrix.inner;
    let mut unpacked = vec![0.0; COLUMNS * matrix.inner];
    let mut first = 0;
    while first < out {
        let columns = COLUMNS.min(out - first);
        for (column, row) in unpacked
            .chunks_exact_mut(matrix.inner)
            .take(columns)
            .enumerate()
        {
            unpack::<P>(matrix, first + column, row);
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
                y[first..first + columns].copy_from_slice(&sums[..columns]);
            }
        }
        let whole = xs.len() / ROWS * ROWS;
        for (x, y) in xs[whole..].iter().zip(&mut ys[whole..]) {
            let [sums] = sums::<P, 1>([x], weights);
            y[first..first + columns].copy_from_slice(&sums[..columns]);
        }
        first += columns;
    }
}

/// One row of the matrix, as numbers.
#[inline(always)]
fn unpack<P: Processor>(matrix: &Matrix<'_>, index: usize, numbers: &mut [f32]) {
    let bits = matrix.bits as usize;
    let (bytes, groups) = (matrix.inner * bits / 8, matrix.inner / matrix.group_size);
    // On to the end of the matrix, so that eight bytes can be read at once wherever there are more.
    let codes = &matrix.codes[index * bytes..];
    let scales = &matrix.scales[index * groups..][..groups];
    let biases = &matrix.biases[index * groups..][..groups];
    let group_bytes = matrix.group_size * bits / 8;
    let of_groups = numbers.chunks_exact_mut(matrix.group_size);
    for (group, (numbers, (&scale, &bias))) in of_groups.zip(scales.iter().zip(biases)).enumerate()
    {
        let (numbers, _) = numbers.as_chunks_mut::<LANES>();
        for (place, numbers) in numbers.iter_mut().enumerate() {
            let codes = &codes[group * group_bytes + place * bits..];
            let word = match codes.first_chunk() {
                Some(eight) => u64::from_le_bytes(*eight),
                None => {
                    let mut eight = [0; 8];
                    eight[..codes.len()].copy_from_slice(codes);
                    u64::from_le_bytes(eight)
                }
            };
            let spread = P::spread(word, matrix.bits).to_le_bytes();
            for (number, code) in numbers.iter_mut().zip(spread) {
                *number = P::multiply_add(scale, f32::from(code), bias);
            }
        }
    }
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
    let mut lanes = [[[0.0; LANES]; COLUMNS]; ROWS];
    for place in 0..length {
        for row in 0..ROWS {
            for column in 0..COLUMNS {
                for lane in 0..LANES {
                    let sum = &mut lanes[row][column][lane];
                    *sum =
                        P::multiply_add(xs[row][place][lane], weights[column][place][lane], *sum);
                }
            }
        }
    }
    lanes.map(|columns| columns.map(sum_of))
}

#[inline(always)]
fn sum_of(lanes: [f32; LANES]) -> f32 {
    let [a, b, c, d, e, f, g, h] = lanes;
    ((a + e) + (c + g)) + ((b + f) + (d + h))
}

/// Numbers that are worked on side by side: what a register holds that most processors have.
pub(super) const LANES: usize = 8;
/// Columns of the result, and rows of it, that are computed together: with their operands they fill the
/// registers.
const COLUMNS: usize = 4;
const ROWS: usize = 2;
