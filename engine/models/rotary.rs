//! Rotary position embedding for rows of different sequences at once: every row has a position of
//! its own. The first `dimensions` channels of each head are turned in pairs `(i, i + dimensions/2)`
//! by `position × theta^(-2i/dimensions)` (RoFormer, arXiv 2104.09864, in the half-split form of
//! GPT-NeoX), the others pass.

use mlx_rs::Array;
use mlx_rs::error::Exception;
use mlx_rs::fast::rope_dynamic;
use mlx_rs::ops::indexing::take_axis;

/// The turning of one model's heads.
#[derive(Debug)]
pub(crate) struct Rotary {
    dimensions: usize,
    head_dim: usize,
    theta: f32,
    /// Which channel each channel is paired with, itself where it passes: `[head_dim]`.
    partner: Array,
}

/// What one step's positions make of it.
pub(crate) enum Turn {
    /// One kernel does it all.
    Kernel { offsets: Array },
    /// `x ∘ keep + x[partner] ∘ swap`, four plain operations; the CPU has no such kernel. Both are
    /// `[rows, 1, head_dim]`.
    Tables { keep: Array, swap: Array },
}

impl Rotary {
    pub(crate) fn new(dimensions: usize, head_dim: usize, theta: f32) -> Self {
        let half = dimensions / 2;
        let partner: Vec<i32> = (0..head_dim)
            .map(|i| match i {
                i if i < half => i + half,
                i if i < dimensions => i - half,
                i => i,
            } as i32)
            .collect();
        Self {
            dimensions,
            head_dim,
            theta,
            partner: Array::from_slice(&partner, &[head_dim as i32]),
        }
    }

    /// For a device that has the kernel: offsets, as long as the kernel takes so few dimensions for as many
    /// rows as there may be.
    pub(crate) fn kernel(&self, positions: &[i32]) -> Turn {
        if self.dimensions < KERNEL_DIMENSIONS_MIN {
            return self.tables(positions);
        }
        Turn::Kernel {
            offsets: Array::from_slice(positions, &[positions.len() as i32]),
        }
    }

    /// Tables for the CPU. Angles are computed in 64 bits.
    pub(crate) fn tables(&self, positions: &[i32]) -> Turn {
        let half = self.dimensions / 2;
        let mut keep = vec![1f32; positions.len() * self.head_dim];
        let mut swap = vec![0f32; positions.len() * self.head_dim];
        let rows = keep
            .chunks_exact_mut(self.head_dim)
            .zip(swap.chunks_exact_mut(self.head_dim));
        for ((keep, swap), &position) in rows.zip(positions) {
            for i in 0..half {
                let exponent = -(i as f64) / half as f64;
                let angle = f64::from(position) * f64::from(self.theta).powf(exponent);
                let (sin, cos) = angle.sin_cos();
                (keep[i], keep[i + half]) = (cos as f32, cos as f32);
                (swap[i], swap[i + half]) = (-sin as f32, sin as f32);
            }
        }
        let shape = [positions.len() as i32, 1, self.head_dim as i32];
        Turn::Tables {
            keep: Array::from_slice(&keep, &shape),
            swap: Array::from_slice(&swap, &shape),
        }
    }

    /// Turns `x` (`[rows, heads, head_dim]`), each row by its own position.
    pub(crate) fn apply(&self, turn: &Turn, x: &Array) -> Result<Array, Exception> {
        match turn {
            Turn::Kernel { offsets } => rope_dynamic(
                x.expand_dims(2)?,
                self.dimensions as i32,
                false,
                self.theta,
                1.0,
                offsets,
                None,
            )?
            .squeeze_axes(&[2]),
            Turn::Tables { keep, swap } => take_axis(x, &self.partner, 2)?
                .multiply(swap)?
                .add(x.multiply(keep)?)?
                .as_dtype(x.dtype()),
        }
    }
}

/// CUDA's kernel is launched in blocks of 1024 threads, half the dimensions by as many rows as are left. CUDA
/// refuses blocks of more than 64 rows that way, which half of fewer dimensions than these would be.
const KERNEL_DIMENSIONS_MIN: usize = 32;

#[cfg(test)]
mod tests {
    use mlx_rs::random;

    use super::*;

    #[test]
    fn tables_turn_as_the_library_does() {
        let rotary = Rotary::new(32, 48, 5e6);
        let positions = [0, 3, 250];
        let x = random::normal::<f32>(&[3, 2, 48], None, None, None).unwrap();
        let tables = rotary.apply(&rotary.tables(&positions), &x).unwrap();
        let kernel = rotary.apply(&rotary.kernel(&positions), &x).unwrap();
        assert_eq!(tables.shape(), kernel.shape());
        assert!(tables.all_close(&kernel, 1e-4, 1e-4, None).unwrap());
    }

    #[test]
    fn few_dimensions_are_turned_without_the_kernel() {
        let turn = |dimensions| Rotary::new(dimensions, 32, 1e4).kernel(&[0, 1]);
        assert!(matches!(turn(30), Turn::Tables { .. }));
        assert!(matches!(turn(32), Turn::Kernel { .. }));
    }
}
