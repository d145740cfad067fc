//! The device side on CUDA: kernels compiled at run time, and memory that both sides see.
//!
//! A kernel of ours is a node of MLX's own graph, like any of MLX's. What differs between two steps
//! (the number of the operation, the addresses of arrays) are parameters of the kernel, so that MLX
//! updates the graph it has instead of instantiating another.
#![allow(unsafe_code)]

use std::{
    collections::HashMap,
    ffi::c_void,
    slice,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use cudarc::{
    driver::{CudaContext, result, sys},
    nvrtc,
};
use mlx_rs::{Array, Dtype};

use super::{
    Control, Device, Fold, Kernel, Memory, Partner, Peers,
    job::Traffic,
    mlx_kernel::{CudaKernel, Launch},
    words,
};
use crate::{error::CollectiveError, reduce::Reduction};

/// One CUDA device, as MLX uses it, and the memory of one group.
pub(super) struct CudaDevice {
    context: sys::CUcontext,
    /// Compiled when they are first wanted.
    kernels: Mutex<HashMap<Variant, Arc<CudaKernel>>>,
    /// Pinned: control, up, down.
    shared: *mut AtomicU64,
    /// On the device: whether the group is dead, time waited.
    state: sys::CUdeviceptr,
    peers: Option<RegisteredPeers>,
}

/// Memory of several processes, made known to the device.
struct RegisteredPeers {
    peers: Peers,
    slots: sys::CUdeviceptr,
    slot_words: usize,
}

/// Which kernel; see kernels.cu.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Variant {
    WithProxy {
        small: bool,
    },
    CopyPeers,
    FoldPeers {
        fold: u32,
        element: u32,
        small: bool,
    },
}

// SAFETY: contexts of CUDA may be used from any thread, and the shared memory is only touched
// through atomics on this side.
unsafe impl Send for CudaDevice {}
// SAFETY: as above; nothing else changes after `open`.
unsafe impl Sync for CudaDevice {}

impl CudaDevice {
    /// The device that MLX runs on: the first that this process sees.
    ///
    /// # Errors
    /// [`CollectiveError::NotDelegated`] without a driver or its run-time compiler;
    /// [`CollectiveError::Local`] when the device refuses memory.
    pub(super) fn open(peers: Option<Peers>) -> Result<Self, CollectiveError> {
        libraries()?;
        // The one that nearly every step needs, and a proof that kernels can be compiled here.
        let small = Variant::WithProxy { small: true };
        let kernels = HashMap::from([(small, Arc::new(small.compile()?))]);
        let failed = |why: result::DriverError| local("preparing the device", why);
        // SAFETY: the primary context is the one that MLX uses; it is kept for as long as the
        // process, and every handle below is used under it.
        unsafe {
            result::init().map_err(failed)?;
            let device = result::device::get(0).map_err(failed)?;
            let context = result::primary_ctx::retain(device).map_err(failed)?;
            result::ctx::set_current(context).map_err(failed)?;
            let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
            let bytes = (CONTROL_WORDS + 2 * AREA_WORDS) * size_of::<AtomicU64>();
            let shared = result::malloc_host(bytes, flags).map_err(failed)?;
            std::ptr::write_bytes(shared.cast::<u8>(), 0, bytes);
            let state = result::malloc_sync(STATE_BYTES).map_err(failed)?;
            result::memset_d8_sync(state, 0, STATE_BYTES).map_err(failed)?;
            let peers = peers.map(|peers| RegisteredPeers::of(peers)).transpose()?;
            Ok(Self {
                context,
                kernels: Mutex::new(kernels),
                shared: shared.cast(),
                state,
                peers,
            })
        }
    }

    fn words(&self, start: usize, count: usize) -> &[AtomicU64] {
        // SAFETY: within the allocation of `open`, zeroed there, alive as long as `self`, and only
        // ever seen as atomics on this side.
        unsafe { slice::from_raw_parts(self.shared.add(start), count) }
    }

    /// Addresses are the same on the device: memory is unified on every 64-bit platform.
    fn address(&self, start: usize) -> u64 {
        self.words(start, 1).as_ptr() as u64
    }

    fn kernel(&self, variant: Variant) -> Result<Arc<CudaKernel>, CollectiveError> {
        let mut kernels = self.kernels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernel) = kernels.get(&variant) {
            return Ok(kernel.clone());
        }
        let kernel = Arc::new(variant.compile()?);
        kernels.insert(variant, kernel.clone());
        Ok(kernel)
    }
}

impl Memory for CudaDevice {
    fn up(&self) -> &[AtomicU64] {
        self.words(CONTROL_WORDS, AREA_WORDS)
    }

    fn down(&self) -> &[AtomicU64] {
        self.words(CONTROL_WORDS + AREA_WORDS, AREA_WORDS)
    }

    fn control(&self, which: Control) -> &AtomicU64 {
        &self.words(0, CONTROL_WORDS)[which as usize * CONTROL_STRIDE]
    }
}

impl Device for CudaDevice {
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
        let halves = |wide: u64| [wide as u32, (wide >> 32) as u32];
        let mut scalars = Vec::with_capacity(SCALARS_MAX);
        scalars.extend(halves(self.address(0)));
        scalars.extend(halves(self.state));
        let deadline = u32::try_from(kernel.deadline.as_micros()).unwrap_or(u32::MAX);
        let who =
            u32::from(kernel.operation.number()) << 16 | (kernel.rank << 8 | kernel.size) as u32;
        scalars.extend([
            up_bytes as u32,
            down_bytes as u32,
            deadline,
            kernel.sequence.0,
            who,
        ]);
        let mut work = up_bytes.max(down_bytes);
        let small = up_bytes == down_bytes
            && up_bytes > 0
            && up_bytes.is_multiple_of(8)
            && up_bytes <= 8 * THREADS_MAX * BLOCKS_MAX;
        let variant = match &kernel.partner {
            Partner::Proxy => Variant::WithProxy { small },
            Partner::Peers(fold) => {
                let peers = self.peers.as_ref().expect("asked for only with peers");
                scalars.extend(halves(peers.slots_of(kernel.sequence.0)));
                scalars.push(peers.slot_words as u32);
                match fold {
                    Fold::Reduce(reduction, dtype) => Variant::FoldPeers {
                        fold: fold_number(*reduction),
                        element: element_number(*dtype),
                        small,
                    },
                    Fold::Copy(parts) => {
                        let none = [(0, 0)].iter().cycle();
                        for &(offset, bytes) in parts.iter().chain(none).take(RANKS_MAX) {
                            work = work.max(bytes);
                            scalars.extend([offset as u32, bytes as u32]);
                        }
                        Variant::CopyPeers
                    }
                }
            }
        };
        let pairs = words::words(work) / 2;
        let threads = pairs.next_multiple_of(32).min(THREADS_MAX);
        let launch = Launch {
            scalars: &scalars,
            shape: &kernel.shape,
            dtype: kernel.dtype,
            item_bytes: kernel.item_bytes,
            blocks: pairs.div_ceil(threads).min(BLOCKS_MAX),
            threads,
        };
        let function = self.kernel(variant)?;
        // SAFETY: the numbers are those of this device's memory, which is not freed before the
        // device is idle (see `drop`), and of areas that hold `work` bytes.
        unsafe { function.launch(&launch, operand, token) }
    }

    fn peer_bytes(&self) -> Option<usize> {
        let peers = self.peers.as_ref()?;
        Some(words::bytes(peers.slot_words))
    }
}

impl Drop for CudaDevice {
    fn drop(&mut self) {
        self.control(Control::Stop).store(1, Relaxed);
        // SAFETY: every handle came from `open`. The device is idle before its memory goes: `Stop`
        // ends what kernels of ours still wait for. Failures here have nobody to be told to.
        unsafe {
            let _ = result::ctx::set_current(self.context);
            let _ = result::ctx::synchronize();
            if let Some(peers) = &self.peers {
                let _ = sys::cuMemHostUnregister(peers.peers.segment.pointer().cast());
            }
            let _ = result::free_sync(self.state);
            let _ = result::free_host(self.shared.cast());
        }
    }
}

impl RegisteredPeers {
    /// # Errors
    /// [`CollectiveError::Local`] when the device cannot map the segment.
    ///
    /// # Safety
    /// A context is current.
    unsafe fn of(peers: Peers) -> Result<Self, CollectiveError> {
        if peers.size > RANKS_MAX {
            let why = format!("{} ranks, at most {RANKS_MAX} can", peers.size);
            return Err(local("sharing memory between devices", why));
        }
        let pointer = peers.segment.pointer().cast::<c_void>();
        let flags = sys::CU_MEMHOSTREGISTER_PORTABLE | sys::CU_MEMHOSTREGISTER_DEVICEMAP;
        let mut slots = 0;
        // SAFETY: the segment is mapped for as long as `peers` lives, and unregistered before.
        let mapped = unsafe {
            sys::cuMemHostRegister_v2(pointer, peers.segment.len(), flags)
                .result()
                .and_then(|()| sys::cuMemHostGetDevicePointer_v2(&mut slots, pointer, 0).result())
        };
        mapped.map_err(|why| local("sharing memory with the device", why))?;
        // Two slots for each rank, in whole cache lines.
        let words = peers.segment.len() / size_of::<AtomicU64>() / (2 * peers.size);
        Ok(Self {
            peers,
            slots,
            slot_words: words / CONTROL_STRIDE * CONTROL_STRIDE,
        })
    }

    /// Where the ranks show their operands in the operation of that number.
    fn slots_of(&self, sequence: u32) -> u64 {
        let turn = (sequence % 2) as usize * self.peers.size * self.slot_words;
        self.slots + (turn * size_of::<AtomicU64>()) as u64
    }
}

/// Whether the driver and its run-time compiler are there.
///
/// # Errors
/// [`CollectiveError::NotDelegated`] when one is not.
pub(super) fn libraries() -> Result<(), CollectiveError> {
    // SAFETY: looks for the libraries, nothing more.
    match unsafe { sys::is_culib_present() && nvrtc::sys::is_culib_present() } {
        true => Ok(()),
        false => Err(CollectiveError::NotDelegated {
            why: "CUDA's driver or run-time compiler (NVRTC) is not there".to_owned(),
        }),
    }
}

/// What is free on the device that MLX runs on; `None` where the driver does not say.
pub(super) fn free_bytes() -> Option<u64> {
    libraries().ok()?;
    // MLX has this context too: it is made once, and ends with its last user.
    let context = CudaContext::new(0).ok()?;
    let (free, _) = context.mem_get_info().ok()?;
    Some(free as u64)
}

impl Variant {
    fn compile(self) -> Result<CudaKernel, CollectiveError> {
        let mut options = vec![
            format!("-DCONTROL_WORDS={CONTROL_WORDS}"),
            format!("-DAREA_WORDS={AREA_WORDS}"),
        ];
        let small = match self {
            Self::WithProxy { small } => {
                options.push("-DWITH_PROXY".to_owned());
                small
            }
            Self::CopyPeers => {
                options.push("-DCOPY_PEERS".to_owned());
                false
            }
            Self::FoldPeers {
                fold,
                element,
                small,
            } => {
                options.push("-DFOLD_PEERS".to_owned());
                options.push(format!("-DFOLD={fold}"));
                options.push(format!("-DTYPE={element}"));
                small
            }
        };
        if small {
            options.push("-DSMALL".to_owned());
        }
        let options = nvrtc::CompileOptions {
            options,
            ..Default::default()
        };
        let ptx = nvrtc::compile_ptx_with_opts(KERNELS, options);
        let ptx = ptx.map_err(|why| CollectiveError::NotDelegated {
            why: format!("the kernel {self:?} does not compile: {why:?}"),
        })?;
        // MLX hashes the text at every launch: the shorter the better.
        let ptx = ptx.to_src();
        let lines = ptx.lines().map(|line| line.trim().replace('\t', " "));
        let lines = lines.filter(|line| !line.is_empty() && !line.starts_with("//"));
        CudaKernel::new(ENTRY, &lines.collect::<Vec<_>>().join("\n"))
    }
}

// The numbers of kernels.cu.
fn fold_number(reduction: Reduction) -> u32 {
    match reduction {
        Reduction::Sum => 0,
        Reduction::Max => 1,
        Reduction::Min => 2,
    }
}

fn element_number(dtype: Dtype) -> u32 {
    match dtype {
        Dtype::Float32 => 0,
        Dtype::Float16 => 1,
        Dtype::Bfloat16 => 2,
        Dtype::Int32 => 3,
        // `Group` lets no other type be reduced.
        _ => 4,
    }
}

fn local(doing: &'static str, why: impl std::fmt::Display) -> CollectiveError {
    CollectiveError::local(doing, why)
}

const KERNELS: &str = include_str!("kernels.cu");
const ENTRY: &str = "offbook";
/// Those of a copy among peers, the most that a kernel takes.
const SCALARS_MAX: usize = 12 + 2 * RANKS_MAX;

/// As in kernels.cu.
const RANKS_MAX: usize = 8;
/// The words of `Control`, each on a cache line of its own: the host polls one that the device
/// writes.
const CONTROL_STRIDE: usize = 8;
const CONTROL_WORDS: usize = 64;
/// 16 MiB of operand each way: a prefill chunk of 1024 positions of the largest model.
const AREA_WORDS: usize = 4 << 20;
const STATE_BYTES: usize = 64;
const THREADS_MAX: usize = 1024;
/// All blocks of a kernel must run at once, beside whatever else the device does.
const BLOCKS_MAX: usize = 16;
