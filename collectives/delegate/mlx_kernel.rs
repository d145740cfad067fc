//! The border to MLX's graph of arrays: kernels of ours as nodes of it, by way of the C++ shim.
#![allow(unsafe_code)]

use std::{
    ffi::{CString, c_char, c_void},
    fmt, ptr, slice,
    sync::atomic::AtomicU64,
};

use mlx_rs::{Array, Dtype, Stream};
use mlx_sys::mlx_array;

use crate::error::CollectiveError;

/// What MLX computes on by default.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum MlxDevice {
    Cpu,
    Cuda,
    Metal,
}

impl MlxDevice {
    /// The device of MLX's default stream.
    pub(super) fn default() -> Self {
        // SAFETY: takes nothing, asks MLX.
        match unsafe { offbook_default_device() } {
            1 => Self::Cuda,
            2 => Self::Metal,
            _ => Self::Cpu,
        }
    }
}

impl fmt::Display for MlxDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cpu => "the CPU",
            Self::Cuda => "CUDA",
            Self::Metal => "Metal",
        })
    }
}

/// A compiled kernel of CUDA. It takes the addresses of operand, token, result and next token, then
/// scalars.
pub(super) struct CudaKernel {
    kernel: *mut c_void,
}

// SAFETY: it is never changed after it was made, and may be freed on any thread.
unsafe impl Send for CudaKernel {}
// SAFETY: as above.
unsafe impl Sync for CudaKernel {}

/// One launch of a kernel.
pub(super) struct Launch<'a> {
    pub(super) scalars: &'a [u32],
    pub(super) shape: &'a [i32],
    pub(super) dtype: Dtype,
    pub(super) item_bytes: usize,
    pub(super) blocks: usize,
    pub(super) threads: usize,
}

impl CudaKernel {
    /// `ptx` must have an entry called `name`; that is looked up when it first runs.
    pub(super) fn new(name: &str, ptx: &str) -> Result<Self, CollectiveError> {
        let doing = "preparing a kernel";
        let name = CString::new(name).map_err(|why| CollectiveError::local(doing, why))?;
        let ptx = CString::new(ptx).map_err(|why| CollectiveError::local(doing, why))?;
        // SAFETY: two C strings, which the shim copies.
        let kernel = unsafe { offbook_cuda_kernel_new(name.as_ptr(), ptx.as_ptr()) };
        match kernel.is_null() {
            true => Err(CollectiveError::local(doing, "out of memory")),
            false => Ok(Self { kernel }),
        }
    }

    /// The result and the next token, still to be evaluated. The kernel runs behind whatever made
    /// `token`.
    ///
    /// # Safety
    /// The scalars make the kernel touch nothing but its arrays and memory that outlives its run.
    pub(super) unsafe fn launch(
        &self,
        launch: &Launch<'_>,
        operand: &Array,
        token: &Array,
    ) -> Result<(Array, Array), CollectiveError> {
        let stream = Stream::thread_local_or_default();
        let raw = RawLaunch::of(launch);
        let (mut result, mut next) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: all handles are alive during the call; the shim copies what it keeps, and fills
        // both places on success.
        let status = unsafe {
            offbook_cuda_launch(
                self.kernel,
                &raw,
                operand.as_ptr().ctx,
                token.as_ptr().ctx,
                stream.as_ptr().ctx,
                &mut result,
                &mut next,
            )
        };
        // SAFETY: as the shim promises.
        unsafe { launched(status, result, next) }
    }
}

/// A kernel of Metal. It takes operand, token, an array of scalars, shared memory, result and next
/// token.
pub(super) struct MetalKernel {
    kernel: *mut c_void,
}

// SAFETY: as for `CudaKernel`.
unsafe impl Send for MetalKernel {}
// SAFETY: as for `CudaKernel`.
unsafe impl Sync for MetalKernel {}

impl MetalKernel {
    /// MLX compiles it when it first runs.
    pub(super) fn new(name: &str, header: &str, body: &str) -> Result<Self, CollectiveError> {
        let doing = "preparing a kernel";
        let text =
            |text: &str| CString::new(text).map_err(|why| CollectiveError::local(doing, why));
        let (name, header, body) = (text(name)?, text(header)?, text(body)?);
        // SAFETY: three C strings, which the shim copies.
        let kernel =
            unsafe { offbook_metal_kernel_new(name.as_ptr(), header.as_ptr(), body.as_ptr()) };
        match kernel.is_null() {
            true => Err(CollectiveError::local(doing, "MLX has no Metal")),
            false => Ok(Self { kernel }),
        }
    }

    /// As [`CudaKernel::launch`].
    pub(super) fn launch(
        &self,
        launch: &Launch<'_>,
        operand: &Array,
        token: &Array,
        memory: &SharedArray,
    ) -> Result<(Array, Array), CollectiveError> {
        let stream = Stream::thread_local_or_default();
        let raw = RawLaunch::of(launch);
        let (mut result, mut next) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: all handles are alive during the call; the shim copies what it keeps, and fills
        // both places on success.
        let status = unsafe {
            offbook_metal_launch(
                self.kernel,
                &raw,
                operand.as_ptr().ctx,
                token.as_ptr().ctx,
                memory.array.as_ptr().ctx,
                stream.as_ptr().ctx,
                &mut result,
                &mut next,
            )
        };
        // SAFETY: as the shim promises.
        unsafe { launched(status, result, next) }
    }
}

impl Drop for MetalKernel {
    fn drop(&mut self) {
        // SAFETY: made by `new`, freed once; what runs or waits has its own copy.
        unsafe { offbook_metal_kernel_free(self.kernel) };
    }
}

/// An array of MLX's in memory that host and device see: words, touched through atomics on this side.
pub(super) struct SharedArray {
    array: Array,
    pointer: *const AtomicU64,
    words: usize,
}

// SAFETY: the array is only handed to MLX by the thread that launches; the words are atomics.
unsafe impl Send for SharedArray {}
// SAFETY: as above.
unsafe impl Sync for SharedArray {}

impl SharedArray {
    /// `array` is of `u64`, and nobody else has a hold on it.
    pub(super) fn of(array: Array) -> Result<Self, CollectiveError> {
        let doing = "sharing memory with the device";
        array
            .eval()
            .map_err(|why| CollectiveError::local(doing, why.what()))?;
        // SAFETY: a valid handle of an array that has been evaluated.
        let pointer = unsafe { mlx_sys::mlx_array_data_uint64(array.as_ptr()) };
        if pointer.is_null() {
            return Err(CollectiveError::local(doing, "the array has no memory"));
        }
        let words = array.size();
        Ok(Self {
            array,
            pointer: pointer.cast(),
            words,
        })
    }

    pub(super) fn words(&self) -> &[AtomicU64] {
        // SAFETY: the memory of the array, which lives as long as `self` and never moves; writes of
        // the device are what atomics are for.
        unsafe { slice::from_raw_parts(self.pointer, self.words) }
    }
}

impl Drop for CudaKernel {
    fn drop(&mut self) {
        // SAFETY: made by `new`, freed once; what runs or waits has its own copy.
        unsafe { offbook_cuda_kernel_free(self.kernel) };
    }
}

/// `offbook_launch` in device.h.
#[repr(C)]
struct RawLaunch {
    scalars: *const u32,
    scalar_count: usize,
    shape: *const i32,
    dimensions: usize,
    dtype: u32,
    item_bytes: u32,
    blocks: i32,
    threads: i32,
}

impl RawLaunch {
    /// Borrows what `launch` borrows: for one call.
    fn of(launch: &Launch<'_>) -> Self {
        Self {
            scalars: launch.scalars.as_ptr(),
            scalar_count: launch.scalars.len(),
            shape: launch.shape.as_ptr(),
            dimensions: launch.shape.len(),
            dtype: launch.dtype.into(),
            item_bytes: launch.item_bytes as u32,
            blocks: launch.blocks as i32,
            threads: launch.threads as i32,
        }
    }
}

/// # Safety
/// With a status of 0 both are new arrays that nobody else owns.
unsafe fn launched(
    status: i32,
    result: *mut c_void,
    next_token: *mut c_void,
) -> Result<(Array, Array), CollectiveError> {
    if status != 0 {
        let why = "MLX takes no kernel for this device";
        return Err(CollectiveError::local("launching a collective", why));
    }
    let array = |ctx| {
        // SAFETY: as the caller promises.
        unsafe { Array::from_ptr(mlx_array { ctx }) }
    };
    Ok((array(result), array(next_token)))
}

// SAFETY: the signatures are those of device.h.
unsafe extern "C" {
    fn offbook_default_device() -> i32;
    fn offbook_cuda_kernel_new(name: *const c_char, ptx: *const c_char) -> *mut c_void;
    fn offbook_cuda_kernel_free(kernel: *mut c_void);
    fn offbook_cuda_launch(
        kernel: *const c_void,
        launch: *const RawLaunch,
        operand: *const c_void,
        token: *const c_void,
        stream: *const c_void,
        result: *mut *mut c_void,
        next_token: *mut *mut c_void,
    ) -> i32;
    fn offbook_metal_kernel_new(
        name: *const c_char,
        header: *const c_char,
        body: *const c_char,
    ) -> *mut c_void;
    fn offbook_metal_kernel_free(kernel: *mut c_void);
    fn offbook_metal_launch(
        kernel: *const c_void,
        launch: *const RawLaunch,
        operand: *const c_void,
        token: *const c_void,
        memory: *const c_void,
        stream: *const c_void,
        result: *mut *mut c_void,
        next_token: *mut *mut c_void,
    ) -> i32;
}
