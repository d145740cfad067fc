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
    driver::{result, sys},
    nvrtc,
};
use mlx_rs::{Array, Dtype};

use super::{
    Control, Device, Fold, Kernel, Memory, Partner, Peers,
    mlx_kernel::{CudaKernel, Launch},
    words,
};
use crate::{error::CollectiveError, reduce::Reduction};

/// One CUDA device, as MLX uses it, and the memory of one group.
pub(super) struct CudaDevice {
    context: sys::CUcontext,
    with_proxy: CudaKernel,
    /// Those between peers, compiled when they are first wanted.
    between_peers: Mutex<HashMap<Variant, Arc<CudaKernel>>>,
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

/// Which kernel between peers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Variant {
    Copy,
    Fold { fold: u32, element: u32 },
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
        // SAFETY: looks for the libraries, nothing more.
        let present = unsafe { sys::is_culib_present() && nvrtc::sys::is_culib_present() };
        if !present {
            return Err(CollectiveError::NotDelegated {
                why: "CUDA's driver or run-time compiler (NVRTC) is not there".to_owned(),
            });
        }
        let with_proxy = compile("offbook_with_proxy", &["-DWITH_PROXY"])?;
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
                with_proxy,
                between_peers: Mutex::default(),
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

    fn between_peers(&self, variant: Variant) -> Result<Arc<CudaKernel>, CollectiveError> {
        let mut kernels = self
            .between_peers
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(kernel) = kernels.get(&variant) {
            return Ok(kernel.clone());
        }
        let kernel = Arc::new(match variant {
            Variant::Copy => compile("offbook_copy_peers", &["-DWITH_PEERS_COPY"])?,
            Variant::Fold { fold, element } => compile(
                "offbook_fold_peers",
                &[
                    "-DWITH_PEERS_FOLD",
                    &format!("-DFOLD={fold}"),
                    &format!("-DTYPE={element}"),
                ],
            )?,
        });
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
        let mut up = self.address(CONTROL_WORDS);
        let mut down = self.address(CONTROL_WORDS + AREA_WORDS);
        let mut slot_words = 0;
        let mut work = kernel.traffic.up_bytes.max(kernel.traffic.down_bytes);
        let mut more = Vec::new();
        let between_peers;
        let function = match &kernel.partner {
            Partner::Proxy => &self.with_proxy,
            Partner::Peers(fold) => {
                let peers = self.peers.as_ref().expect("asked for only with peers");
                down = peers.slot(kernel.sequence.0, 0);
                up = peers.slot(kernel.sequence.0, peers.peers.rank);
                slot_words = peers.slot_words;
                let variant = Variant::of(fold);
                if let Fold::Copy(parts) = fold {
                    work = parts.iter().map(|&(_, bytes)| bytes).fold(work, usize::max);
                    more = parts
                        .iter()
                        .flat_map(|&(offset, bytes)| [offset, bytes])
                        .collect();
                    more.resize(2 * RANKS_MAX, 0);
                }
                between_peers = self.between_peers(variant)?;
                &between_peers
            }
        };
        let deadline = u64::try_from(kernel.deadline.as_nanos()).unwrap_or(u64::MAX);
        let halves = |wide: u64| [wide as u32, (wide >> 32) as u32];
        let wide = [up, down, self.address(0), self.state];
        let mut scalars: Vec<u32> = wide.into_iter().flat_map(halves).collect();
        let bytes = [
            kernel.traffic.up_bytes,
            kernel.traffic.down_bytes,
            slot_words,
        ];
        scalars.extend(bytes.map(|number| number as u32));
        scalars.extend(halves(deadline));
        scalars.extend([
            kernel.sequence.0,
            u32::from(kernel.operation.number()),
            kernel.rank as u32,
            kernel.size as u32,
        ]);
        scalars.extend(more.into_iter().map(|number| number as u32));
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

    /// Where a rank shows its operand in the operation of that number.
    fn slot(&self, sequence: u32, rank: usize) -> u64 {
        let turn = (sequence % 2) as usize * self.peers.size;
        self.slots + ((turn + rank) * self.slot_words * size_of::<AtomicU64>()) as u64
    }
}

impl Variant {
    fn of(fold: &Fold) -> Self {
        match fold {
            Fold::Copy(_) => Self::Copy,
            Fold::Reduce(reduction, dtype) => Self::Fold {
                fold: match reduction {
                    Reduction::Sum => 0,
                    Reduction::Max => 1,
                    Reduction::Min => 2,
                },
                element: match dtype {
                    Dtype::Float32 => 0,
                    Dtype::Float16 => 1,
                    Dtype::Bfloat16 => 2,
                    Dtype::Int32 => 3,
                    // `Group` lets no other type be reduced.
                    _ => 4,
                },
            },
        }
    }
}

fn compile(name: &str, options: &[&str]) -> Result<CudaKernel, CollectiveError> {
    let options = nvrtc::CompileOptions {
        options: options.iter().map(|&option| option.to_owned()).collect(),
        ..Default::default()
    };
    let ptx = nvrtc::compile_ptx_with_opts(KERNELS, options);
    let ptx = ptx.map_err(|why| CollectiveError::NotDelegated {
        why: format!("the kernel {name} does not compile: {why:?}"),
    })?;
    // MLX hashes the text at every launch.
    let ptx = ptx.to_src();
    let lines = ptx
        .lines()
        .filter(|line| !line.is_empty() && !line.starts_with("//"));
    CudaKernel::new(name, &lines.collect::<Vec<_>>().join("\n"))
}

fn local(doing: &'static str, why: impl std::fmt::Display) -> CollectiveError {
    CollectiveError::local(doing, why)
}

const KERNELS: &str = include_str!("kernels.cu");

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
