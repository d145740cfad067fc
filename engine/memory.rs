//! What MLX's allocator holds in this process, and the limit that it keeps to. May be asked on any
//! thread.

pub use mlx_rs::error::Exception;
use mlx_rs::{Device, DeviceType, memory};

/// Bytes, of this process alone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceMemory {
    /// In arrays.
    pub active_bytes: u64,
    /// Freed, and kept by the allocator for the next array.
    pub cache_bytes: u64,
    /// The most that was active at once, since the process began or [`forget_peak`].
    pub peak_bytes: u64,
    /// Above this MLX submits no further work before some of that under way is done.
    pub limit_bytes: u64,
}

impl DeviceMemory {
    /// As it is now.
    ///
    /// # Errors
    /// When MLX has no allocator for its device.
    pub fn read() -> Result<Self, Exception> {
        Ok(Self {
            active_bytes: memory::active_memory()? as u64,
            cache_bytes: memory::cache_memory()? as u64,
            peak_bytes: memory::peak_memory()? as u64,
            limit_bytes: memory::memory_limit()? as u64,
        })
    }
}

/// What a GPU with memory of its own has, by MLX's account; `None` where the device computes in the
/// machine's memory. To be asked before [`limit`], which is what MLX says from then on.
///
/// # Errors
/// When MLX has no device.
pub fn device_bytes() -> Result<Option<u64>, Exception> {
    let is_gpu = matches!(Device::try_default()?.get_type()?, DeviceType::Gpu);
    Ok(match is_gpu && !cfg!(target_os = "macos") {
        true => Some(memory::memory_limit()? as u64),
        false => None,
    })
}

/// Has MLX keep to so many bytes, of which freed ones that it keeps for later are an eighth at most:
/// enough for one layer's results to be used again by the next, and no more.
///
/// # Errors
/// When MLX has no allocator for its device.
pub fn limit(bytes: u64) -> Result<(), Exception> {
    let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
    memory::set_memory_limit(bytes)?;
    memory::set_cache_limit(bytes / 8)?;
    Ok(())
}

/// Has MLX keep so many freed bytes for later at most; returns what it was.
///
/// # Errors
/// When MLX has no allocator for its device.
pub fn limit_cache(bytes: u64) -> Result<u64, Exception> {
    let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
    Ok(memory::set_cache_limit(bytes)? as u64)
}

/// Gives what MLX keeps for later back to the system.
///
/// # Errors
/// When MLX has no allocator for its device.
pub fn clear_cache() -> Result<(), Exception> {
    memory::clear_cache()
}

/// Counts the peak from what is active now.
///
/// # Errors
/// When MLX has no allocator for its device.
pub fn forget_peak() -> Result<(), Exception> {
    memory::reset_peak_memory()
}
