//! Keys and values in codes of 8 bits, as MLX quantises: each group of a head's channels has a scale and a bias,
//! and each row is quantised by itself, so that its numbers depend on nobody's company. Codes, scales and
//! biases of a row lie one after the other, as words of 32 bits: to a cache it is a row like any other.

use mlx_rs::error::Exception;
use mlx_rs::ops::indexing::{Ellipsis, TryIndexOp};
use mlx_rs::ops::{concatenate, dequantize, quantize};
use mlx_rs::{Array, Dtype};

use crate::precision::kv_group_size;

/// How rows are coded. Only heads whose width is a multiple of the group can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Coding {
    head_dim: i32,
    group_size: i32,
    /// Of what is coded, and of scales and biases.
    dtype: Dtype,
}

impl Coding {
    /// `None` where heads of this width cannot be coded.
    pub(crate) fn of(head_dim: usize, dtype: Dtype) -> Option<Self> {
        let group_size = kv_group_size(head_dim);
        head_dim.is_multiple_of(group_size).then_some(Self {
            head_dim: head_dim as i32,
            group_size: group_size as i32,
            dtype,
        })
    }

    pub(crate) fn group_size(self) -> usize {
        self.group_size as usize
    }

    /// Words of a row: a head's key, or value, at one position.
    pub(crate) fn words(self) -> usize {
        let pairs_of_parameters = self.groups() as usize;
        let pair_words = match self.dtype {
            Dtype::Float32 => 2,
            _ => 1,
        };
        self.code_words() as usize + pairs_of_parameters * pair_words
    }

    fn groups(self) -> i32 {
        self.head_dim / self.group_size
    }

    fn code_words(self) -> i32 {
        self.head_dim / 4
    }

    /// `[…, head_dim]` → `[…, words]`.
    pub(crate) fn pack(self, rows: &Array) -> Result<Array, Exception> {
        let (codes, scales, biases) = quantize(rows, self.group_size, 8)?;
        // Two of them for each group, so that they fill whole words in 16 bits as well.
        let parameters = concatenate(&[scales, biases], -1)?;
        concatenate(&[codes, parameters.view::<u32>()?], -1)
    }

    /// `[…, words]` → `[…, head_dim]`.
    pub(crate) fn unpack(self, words: &Array) -> Result<Array, Exception> {
        let codes = words.try_index((Ellipsis, ..self.code_words()))?;
        let parameters = words.try_index((Ellipsis, self.code_words()..))?;
        let parameters = parameters.view_dtype(self.dtype)?;
        let scales = parameters.try_index((Ellipsis, ..self.groups()))?;
        let biases = parameters.try_index((Ellipsis, self.groups()..))?;
        dequantize(codes, scales, &biases, self.group_size, 8)
    }
}

#[cfg(test)]
mod tests {
    use mlx_rs::random;

    use super::*;

    #[test]
    fn a_row_comes_back_within_a_step_and_the_same_in_any_company() {
        for (width, dtype, words) in [
            (32, Dtype::Float32, 8 + 2),
            (128, Dtype::Float32, 32 + 4),
            (64, Dtype::Bfloat16, 16 + 1),
        ] {
            let coding = Coding::of(width, dtype).unwrap();
            assert_eq!(coding.words(), words);
            let key = random::key(7).unwrap();
            let rows = random::normal::<f32>(&[5, 6, width as i32], None, None, Some(&key));
            let rows = rows.unwrap().as_dtype(dtype).unwrap();
            let packed = coding.pack(&rows).unwrap();
            assert_eq!(packed.shape(), [5, 6, words as i32]);
            let back = coding.unpack(&packed).unwrap();
            assert_eq!(back.dtype(), dtype);
            // Channels span less than 8 here, in 255 steps, whose end is moved so that 0 is one of them. 16 bits
            // round scales and biases as well.
            let step = 8.0 / 255.0;
            let error_max = match dtype {
                Dtype::Float32 => step,
                _ => 3.0 * step,
            };
            assert!(back.all_close(&rows, 0.0, error_max, None).unwrap());
            let words = |array: &Array| {
                let array = array.contiguous().unwrap();
                array.try_as_slice::<u32>().unwrap().to_vec()
            };
            let alone = coding.pack(&rows.try_index(3..4).unwrap()).unwrap();
            assert_eq!(words(&alone), words(&packed.try_index(3..4).unwrap()));
        }
        assert_eq!(Coding::of(48, Dtype::Float32), None);
    }
}
