//! A rectangular part of a tensor in a file, read without the rest.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use super::header::Entry;

/// What is read: runs of neighbouring bytes, at equal distances in each outer axis.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Slice {
    /// Of the result.
    shape: Vec<usize>,
    /// Bytes of one value.
    value_bytes: usize,
    /// Where the first run begins in the file.
    start: u64,
    run_bytes: u64,
    /// Outermost first: how many steps, and how far apart.
    steps: Vec<(usize, u64)>,
}

impl Slice {
    /// `None` when the ranges do not fit the tensor, or the result is too large for an array.
    pub(super) fn of(entry: &Entry, ranges: &[Range<usize>]) -> Option<Self> {
        let value_bytes = entry.stored.bytes();
        if ranges.len() != entry.shape.len() || value_bytes == 0 {
            return None;
        }
        let mut slice = Self {
            shape: ranges.iter().map(ExactSizeIterator::len).collect(),
            value_bytes,
            start: entry.offset,
            run_bytes: value_bytes as u64,
            steps: Vec::new(),
        };
        // From the innermost axis out: whole axes lengthen the run until one is cut.
        let mut stride = value_bytes as u64;
        for (range, &size) in ranges.iter().zip(&entry.shape).rev() {
            if range.start > range.end || range.end > size {
                return None;
            }
            let outer_stride = stride.checked_mul(size as u64)?;
            slice.start += range.start as u64 * stride;
            if slice.steps.is_empty() && slice.run_bytes == stride {
                slice.run_bytes = range.len() as u64 * stride;
            } else {
                slice.steps.insert(0, (range.len(), stride));
            }
            stride = outer_stride;
        }
        let values = slice.shape.iter().try_fold(1i32, |product, &size| {
            product.checked_mul(i32::try_from(size).ok()?)
        });
        values.map(|_| slice)
    }

    /// The shape as MLX wants it; `of` has checked that it fits.
    pub(super) fn array_shape(&self) -> Vec<i32> {
        self.shape.iter().map(|&size| size as i32).collect()
    }

    fn values(&self) -> usize {
        self.shape.iter().product()
    }

    /// Start of each run in the file, in order.
    fn runs(&self) -> impl Iterator<Item = u64> {
        let count: usize = self.steps.iter().map(|(count, _)| count).product();
        (0..count).map(|run| {
            let mut rest = run;
            let mut start = self.start;
            for (count, stride) in self.steps.iter().rev() {
                start += (rest % count) as u64 * stride;
                rest /= count;
            }
            start
        })
    }
}

/// Reads the values of a slice in row order, each made from `N` bytes, little end first.
pub(super) fn read_values<T, const N: usize>(
    file: &File,
    slice: &Slice,
    value: impl Fn([u8; N]) -> T,
) -> std::io::Result<Vec<T>> {
    debug_assert_eq!(
        N, slice.value_bytes,
        "the caller chose the type by the entry"
    );
    let mut values = Vec::with_capacity(slice.values());
    if slice.run_bytes == 0 {
        return Ok(values);
    }
    let mut window = Window::default();
    let mut runs = slice.runs().peekable();
    let mut batch = Vec::new();
    while let Some(run) = runs.next() {
        batch.push(run);
        let first = batch[0];
        let joins = |next: &u64| {
            *next - (run + slice.run_bytes) < GAP_BYTES_MAX
                && next + slice.run_bytes - first <= WINDOW_BYTES
        };
        if runs.peek().is_some_and(joins) {
            continue;
        }
        let end = run + slice.run_bytes;
        let mut from = first;
        if batch.len() > 1 {
            let bytes = window.read(file, first..end)?;
            for start in batch.drain(..) {
                let at = (start - first) as usize;
                let run = &bytes[at..at + slice.run_bytes as usize];
                values.extend(run.as_chunks::<N>().0.iter().map(|&bytes| value(bytes)));
            }
            continue;
        }
        while from < end {
            let until = end.min(from + WINDOW_BYTES);
            let bytes = window.read(file, from..until)?;
            values.extend(bytes.as_chunks::<N>().0.iter().map(|&bytes| value(bytes)));
            from = until;
        }
        batch.clear();
    }
    Ok(values)
}

/// The buffer that file bytes pass through.
#[derive(Default)]
struct Window {
    bytes: Vec<u8>,
}

impl Window {
    fn read(&mut self, file: &File, range: Range<u64>) -> std::io::Result<&[u8]> {
        let length = (range.end - range.start) as usize;
        if self.bytes.len() < length {
            self.bytes.resize(length, 0);
        }
        file.read_exact_at(&mut self.bytes[..length], range.start)?;
        Ok(&self.bytes[..length])
    }
}

/// Large enough that a read costs nothing beside its bytes; a multiple of every value's size.
const WINDOW_BYTES: u64 = 4 << 20;
/// Runs closer than a page of Apple's systems are read together: the device reads pages anyway.
const GAP_BYTES_MAX: u64 = 16 << 10;
