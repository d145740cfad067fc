//! Multiplying by quantised weights. MLX's own CPU kernel unpacks a matrix anew for every row
//! that it multiplies, so a batch of sixteen, or a prompt, costs as much as so many single tokens; and it
//! unpacks widths that are no power of two code by code. Here a matrix is unpacked once, a few rows of it
//! at a time, and each piece meets all rows that need it. A row's result does not depend on the others:
//! each is summed in the same order, whatever its company.
//!
//! The product is a node of MLX's graph like any other; the shim calls [`run`] when its turn comes.
#![allow(unsafe_code)]

mod kernel;

use std::ffi::c_void;
use std::slice;

use mlx_rs::error::Exception;
use mlx_rs::{Array, Dtype, Stream};

use self::kernel::Matrix;
use crate::host::processor::LANES;
use crate::host::{crew, is_on_cpu};
use crate::weights::Linear;

/// `x · weightᵀ`, `[…, in]` → `[…, out]`, or `None` where MLX is to do it: on another device, and for
/// types other than 32-bit floats.
pub(crate) fn product(linear: &Linear, x: &Array) -> Result<Option<Array>, Exception> {
    let Some(sizes) = sizes(linear, x, None) else {
        return Ok(None);
    };
    let mut shape = x.shape().to_vec();
    if let Some(last) = shape.last_mut() {
        *last = sizes.out as i32;
    }
    build(linear, x, None, &sizes, &shape).map(Some)
}

/// Each row by one matrix of a stack `[matrices, out, in]`: `x` is `[…, 1, in]`, `indices` has the
/// leading axes of the result, `[…, 1, out]`. A row of `x` that meets several matrices stands for as many
/// rows in a row. `None` as for [`product`].
pub(crate) fn product_of_each(
    linear: &Linear,
    x: &Array,
    indices: &Array,
) -> Result<Option<Array>, Exception> {
    let Some(sizes) = sizes(linear, x, Some(indices)) else {
        return Ok(None);
    };
    let shape = [indices.shape(), &[1, sizes.out as i32]].concat();
    build(linear, x, Some(indices), &sizes, &shape).map(Some)
}

fn sizes(linear: &Linear, x: &Array, indices: Option<&Array>) -> Option<RawProduct> {
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
    let floats = [x, scales, biases];
    let numbers = indices.is_none_or(|indices| indices.dtype() == Dtype::Uint32);
    if !is_on_cpu() || !numbers || floats.iter().any(|a| a.dtype() != Dtype::Float32) {
        return None;
    }
    let inner = *x.shape().last()? as usize;
    let [.., out, groups] = scales.shape() else {
        return None;
    };
    let (out, groups, group_size, bits) = (
        *out as usize,
        *groups as usize,
        *group_size as u32,
        *bits as u32,
    );
    let matrices = scales.size() / (out * groups).max(1);
    let x_rows = x.size() / inner.max(1);
    let rows = indices.map_or(x_rows, Array::size);
    let fits = inner == groups * group_size as usize
        && weight.nbytes() == matrices * out * inner * bits as usize / 8
        && (1..=8).contains(&bits)
        && group_size.is_multiple_of(LANES as u32)
        && group_size <= kernel::GROUP_SIZE_MAX
        && (indices.is_some() || matrices == 1)
        && x_rows > 0
        && rows.is_multiple_of(x_rows);
    fits.then_some(RawProduct {
        x_rows,
        rows,
        inner,
        out,
        matrices,
        group_size,
        bits,
        ..RawProduct::default()
    })
}

fn build(
    linear: &Linear,
    x: &Array,
    indices: Option<&Array>,
    sizes: &RawProduct,
    shape: &[i32],
) -> Result<Array, Exception> {
    let Linear::Quantized {
        weight,
        scales,
        biases,
        ..
    } = linear
    else {
        return Err(Exception::custom("only quantised weights have codes"));
    };
    let arrays = [Some(x), Some(weight), Some(scales), Some(biases), indices];
    let inputs: Vec<*const c_void> = arrays
        .iter()
        .flatten()
        .map(|array| array.as_ptr().ctx.cast_const())
        .collect();
    let stream = Stream::thread_local_or_default();
    // SAFETY: all handles are alive during the call, the shim shares what it keeps; the sizes were
    // checked against the arrays, and what comes back is an array of ours alone.
    unsafe {
        let ctx = offbook_product_new(
            sizes,
            run,
            inputs.as_ptr(),
            inputs.len(),
            shape.as_ptr(),
            shape.len(),
            stream.as_ptr().ctx,
        );
        if ctx.is_null() {
            return Err(Exception::custom("no memory for a product"));
        }
        Ok(Array::from_ptr(mlx_sys::mlx_array { ctx }))
    }
}

/// Called by the shim on the stream's thread.
extern "C" fn run(product: *const RawProduct) {
    // SAFETY: the shim passes sizes that `sizes` checked, with the memory of arrays that it keeps alive
    // and in order; nobody else has the output yet.
    let (product, x, y) = unsafe {
        let product = &*product;
        let x = slice::from_raw_parts(product.x, product.x_rows * product.inner);
        let y = slice::from_raw_parts_mut(product.y, product.rows * product.out);
        (product, x, y)
    };
    let repeat = product.rows / product.x_rows;
    let x_of = |row: usize| &x[row / repeat * product.inner..][..product.inner];
    let rows = y.chunks_exact_mut(product.out.max(1)).enumerate();
    let mut rows: Vec<Row<'_>> = rows.map(|(row, y)| (0, x_of(row), y)).collect();
    if !product.matrix_of_row.is_null() {
        // SAFETY: as above.
        let matrices = unsafe { slice::from_raw_parts(product.matrix_of_row, product.rows) };
        for ((of_row, ..), &matrix) in rows.iter_mut().zip(matrices) {
            *of_row = matrix as usize;
        }
        rows.retain(|(matrix, ..)| *matrix < product.matrices);
        rows.sort_by_key(|(matrix, ..)| *matrix);
    }
    crew::share(product.pieces(rows), |mut piece| {
        let matrix = product.matrix(piece.matrix);
        kernel::multiply(&matrix, piece.first, &piece.xs, &mut piece.ys);
    });
}

/// A row of the result with the number of its matrix and what that is multiplied with.
type Row<'a> = (usize, &'a [f32], &'a mut [f32]);

/// Some columns of all rows that meet the same matrix.
struct Piece<'a> {
    matrix: usize,
    /// The first of the columns.
    first: usize,
    xs: Vec<&'a [f32]>,
    ys: Vec<&'a mut [f32]>,
}

impl<'a> Piece<'a> {
    /// Into pieces of at most so many columns.
    fn cut(self, columns: usize) -> Vec<Piece<'a>> {
        let (matrix, xs) = (self.matrix, self.xs);
        let mut pieces: Vec<Piece<'a>> = Vec::new();
        for y in self.ys {
            for (index, part) in y.chunks_mut(columns).enumerate() {
                if index == pieces.len() {
                    pieces.push(Piece {
                        matrix,
                        first: index * columns,
                        xs: xs.clone(),
                        ys: Vec::with_capacity(xs.len()),
                    });
                }
                pieces[index].ys.push(part);
            }
        }
        pieces
    }
}

/// More than one, so that a thread that is held up is not waited for.
const PIECES_PER_HAND: usize = 2;

/// `offbook_product` in host.h.
#[repr(C)]
struct RawProduct {
    x: *const f32,
    codes: *const u8,
    scales: *const f32,
    biases: *const f32,
    matrix_of_row: *const u32,
    y: *mut f32,
    x_rows: usize,
    rows: usize,
    inner: usize,
    out: usize,
    matrices: usize,
    group_size: u32,
    bits: u32,
}

// SAFETY: it points to arrays that nobody changes while a product is computed; the output is handed out in
// slices that do not overlap, and not through these pointers.
unsafe impl Sync for RawProduct {}

impl RawProduct {
    /// The work, sorted by matrix, cut into pieces that take about as long, for as many threads as are worth
    /// it: a matrix is unpacked once, whatever is cut.
    fn pieces<'a>(&self, rows: Vec<Row<'a>>) -> Vec<Piece<'a>> {
        let mut groups: Vec<Piece<'a>> = Vec::new();
        for (matrix, x, y) in rows {
            if groups.last().is_none_or(|group| group.matrix != matrix) {
                let (xs, ys) = (Vec::new(), Vec::new());
                groups.push(Piece {
                    matrix,
                    first: 0,
                    xs,
                    ys,
                });
            }
            let group = groups.last_mut().expect("there is one by now");
            group.xs.push(x);
            group.ys.push(y);
        }
        // To unpack a number takes about as long as to multiply it twice.
        let size = |group: &Piece<'_>| (group.xs.len() + 2) * self.out * self.inner;
        let all: usize = groups.iter().map(size).sum();
        let hands = crew::hands(all);
        if hands == 1 {
            return groups;
        }
        let wanted = all.div_ceil(hands * PIECES_PER_HAND);
        let cut = |group: Piece<'a>| {
            let pieces = size(&group).div_ceil(wanted).max(1);
            let columns = self.out.div_ceil(pieces).next_multiple_of(kernel::COLUMNS);
            group.cut(columns)
        };
        groups.into_iter().flat_map(cut).collect()
    }

    fn matrix(&self, index: usize) -> Matrix<'_> {
        let groups = self.inner / self.group_size as usize;
        let (codes, parameters) = (
            self.out * self.inner * self.bits as usize / 8,
            self.out * groups,
        );
        // SAFETY: `index` is below `matrices`, of which each has so many codes, scales and biases.
        unsafe {
            Matrix {
                codes: slice::from_raw_parts(self.codes.add(index * codes), codes),
                scales: slice::from_raw_parts(self.scales.add(index * parameters), parameters),
                biases: slice::from_raw_parts(self.biases.add(index * parameters), parameters),
                inner: self.inner,
                group_size: self.group_size as usize,
                bits: self.bits,
            }
        }
    }
}

impl Default for RawProduct {
    fn default() -> Self {
        Self {
            x: std::ptr::null(),
            codes: std::ptr::null(),
            scales: std::ptr::null(),
            biases: std::ptr::null(),
            matrix_of_row: std::ptr::null(),
            y: std::ptr::null_mut(),
            x_rows: 0,
            rows: 0,
            inner: 0,
            out: 0,
            matrices: 0,
            group_size: 0,
            bits: 0,
        }
    }
}

// SAFETY: the signature is that of host.h.
unsafe extern "C" {
    fn offbook_product_new(
        sizes: *const RawProduct,
        multiply: extern "C" fn(*const RawProduct),
        inputs: *const *const c_void,
        input_count: usize,
        shape: *const i32,
        dimensions: usize,
        stream: *const c_void,
    ) -> *mut c_void;
}

#[cfg(test)]
mod tests {
    use mlx_rs::ops::{gather_qmm, quantize, quantized_matmul};
    use mlx_rs::random;

    use super::*;

    fn normal(shape: &[i32], seed: u64) -> Array {
        let key = random::key(seed).unwrap();
        random::normal::<f32>(shape, None, None, Some(&key)).unwrap()
    }

    fn quantized(shape: &[i32], group_size: i32, bits: i32) -> Linear {
        let (weight, scales, biases) =
            quantize(normal(shape, bits as u64), group_size, bits).unwrap();
        Linear::Quantized {
            weight,
            scales,
            biases,
            group_size,
            bits,
        }
    }

    fn parts(linear: &Linear) -> (&Array, &Array, &Array) {
        match linear {
            Linear::Quantized {
                weight,
                scales,
                biases,
                ..
            } => (weight, scales, biases),
            Linear::Dense { .. } => unreachable!(),
        }
    }

    #[test]
    fn products_are_those_of_mlx_for_every_width() {
        for bits in [2, 3, 4, 5, 6, 8] {
            for (group, rows) in [(32, 1), (64, 7), (128, 2)] {
                let linear = quantized(&[35, 256], group, bits);
                let (weight, scales, biases) = parts(&linear);
                let x = normal(&[rows, 256], 9);
                let ours = product(&linear, &x).unwrap().unwrap();
                let theirs = quantized_matmul(&x, weight, scales, biases, true, group, bits);
                let same = ours.all_close(theirs.unwrap(), 1e-4, 1e-4, None).unwrap();
                assert!(same, "{bits} bits in groups of {group}, {rows} rows");
            }
        }
    }

    #[test]
    fn each_row_meets_its_own_matrix() {
        let linear = quantized(&[5, 24, 64], 32, 5);
        let (weight, scales, biases) = parts(&linear);
        let indices = Array::from_slice(&[4u32, 0, 3, 3, 1, 4, 0, 2, 2], &[3, 3]);
        for shape in [[3, 1, 1, 64], [3, 3, 1, 64]] {
            let x = normal(&shape, 4);
            let ours = product_of_each(&linear, &x, &indices).unwrap().unwrap();
            let theirs = gather_qmm(
                &x, weight, scales, biases, None, &indices, true, 32, 5, false,
            );
            assert_eq!(ours.shape(), [3, 3, 1, 24]);
            assert!(ours.all_close(theirs.unwrap(), 1e-4, 1e-4, None).unwrap());
        }
    }

    #[test]
    fn a_row_is_the_same_in_any_company() {
        let linear = quantized(&[70, 192], 64, 5);
        let x = normal(&[9, 192], 2);
        let bits = |array: &Array| -> Vec<u32> {
            array.eval().unwrap();
            let values = array.try_as_slice::<f32>().unwrap();
            values.iter().map(|value| value.to_bits()).collect()
        };
        let together = bits(&product(&linear, &x).unwrap().unwrap());
        for row in 0..9usize {
            let alone =
                mlx_rs::ops::indexing::take_axis(&x, Array::from_slice(&[row as i32], &[1]), 0);
            let alone = bits(&product(&linear, &alone.unwrap()).unwrap().unwrap());
            assert_eq!(alone, together[row * 70..][..70], "row {row}");
        }
    }
}
