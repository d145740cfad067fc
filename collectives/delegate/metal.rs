//! The device side on Metal: one kernel that MLX compiles and runs between its own, and an array of
//! MLX's as the memory that both sides see.
//!
//! Not yet run: see kernel.metal, and `offbook doctor` for the owner of a Mac.
#![cfg_attr(not(target_os = "macos"), allow(dead_code))]

use std::sync::atomic::AtomicU64;

use mlx_rs::{Array, Dtype, ops::zeros_dtype};

use super::{
    Control, Device, Kernel, Memory,
    job::Traffic,
    mlx_kernel::{Launch, MetalKernel, SharedArray},
    words,
};
use crate::error::CollectiveError;

/// The Metal device that MLX runs on, and the memory of one group.
pub(super) struct MetalDevice {
    kernel: MetalKernel,
    /// Control, up, down.
    memory: SharedArray,
}

impl MetalDevice {
    /// # Errors
    /// [`CollectiveError::NotDelegated`] before macOS 15.
    pub(super) fn open() -> Result<Self, CollectiveError> {
        supported()?;
        let (header, body) = KERNEL
            .split_once(BODY_MARK)
            .expect("the file has both parts");
        let words = (CONTROL_WORDS + 2 * AREA_WORDS) as i32;
        let memory = zeros_dtype(&[words], Dtype::Uint64).map_err(|why| {
            CollectiveError::local("setting memory for the device aside", why.what())
        })?;
        Ok(Self {
            kernel: MetalKernel::new("offbook_with_proxy", header, body)?,
            memory: SharedArray::of(memory)?,
        })
    }

    fn area(&self, start: usize) -> &[AtomicU64] {
        &self.memory.words()[start..start + AREA_WORDS]
    }
}

impl Memory for MetalDevice {
    fn up(&self) -> &[AtomicU64] {
        self.area(CONTROL_WORDS)
    }

    fn down(&self) -> &[AtomicU64] {
        self.area(CONTROL_WORDS + AREA_WORDS)
    }

    fn control(&self, which: Control) -> &AtomicU64 {
        &self.memory.words()[which as usize * CONTROL_STRIDE]
    }
}

impl Device for MetalDevice {
    fn launch(
        &self,
        kernel: &Kernel,
        operand: &Array,
        token: &Array,
    ) -> Result<(Array, Array), CollectiveError> {
        let Traffic {
            up_bytes,
            down_bytes,
            ..
        } = kernel.traffic;
        let looks = kernel
            .deadline
            .as_micros()
            .saturating_mul(LOOKS_PER_MICROSECOND);
        let scalars = [
            up_bytes as u32,
            down_bytes as u32,
            u32::try_from(looks).unwrap_or(u32::MAX),
            kernel.sequence.0,
            u32::from(kernel.operation.number()) << 16 | (kernel.rank << 8 | kernel.size) as u32,
            CONTROL_WORDS as u32,
            (CONTROL_WORDS + AREA_WORDS) as u32,
            0,
        ];
        let pairs = words::words(up_bytes.max(down_bytes)) / 2;
        let threads = pairs.next_multiple_of(32).min(THREADS_MAX);
        let launch = Launch {
            scalars: &scalars,
            shape: &kernel.shape,
            dtype: kernel.dtype,
            item_bytes: kernel.item_bytes,
            blocks: pairs.div_ceil(threads).min(BLOCKS_MAX),
            threads,
        };
        // MLX keeps the memory for as long as a kernel needs it: it is an operand as well.
        self.kernel.launch(&launch, operand, token, &self.memory)
    }

    fn peer_bytes(&self) -> Option<usize> {
        None
    }
}

/// Whether the system's shading language has memory that host and kernel see at the same time.
///
/// # Errors
/// [`CollectiveError::NotDelegated`] when it has not.
pub(super) fn supported() -> Result<(), CollectiveError> {
    let system = rustix::system::uname();
    let release = system.release().to_string_lossy();
    match darwin_is_new_enough(&release) {
        true => Ok(()),
        false => Err(CollectiveError::NotDelegated {
            why: format!("Metal waits for the host from macOS 15 on; this is Darwin {release}"),
        }),
    }
}

/// macOS 15 is Darwin 24.
fn darwin_is_new_enough(release: &str) -> bool {
    let major = release
        .split('.')
        .next()
        .and_then(|major| major.parse().ok());
    major.is_some_and(|major: u32| major >= 24)
}

const KERNEL: &str = include_str!("kernel.metal");
const BODY_MARK: &str = "//---- the body of the kernel, whose signature MLX writes\n";

// As in kernel.metal, where the device's own word follows those of `Control`.
const CONTROL_STRIDE: usize = 8;
const CONTROL_WORDS: usize = 64;
/// 16 MiB of operand each way, as on CUDA.
const AREA_WORDS: usize = 4 << 20;
const THREADS_MAX: usize = 1024;
const BLOCKS_MAX: usize = 16;
/// The device's own bound is a last resort, so that it is generous: a look takes longer than this.
const LOOKS_PER_MICROSECOND: u128 = 4;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn macos_15_is_the_first_that_can() {
        assert!(darwin_is_new_enough("24.0.0"));
        assert!(darwin_is_new_enough("25.1.0"));
        assert!(!darwin_is_new_enough("23.6.0"));
        assert!(!darwin_is_new_enough("unknown"));
    }

    #[test]
    fn the_file_has_a_header_and_a_body() {
        let (header, body) = KERNEL.split_once(BODY_MARK).expect("the mark is there");
        assert!(header.contains("await_pair") && body.contains("thread_position_in_grid"));
    }
}
