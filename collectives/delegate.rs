//! Delegated collectives: they stay on the device's own stream, and no host thread stands between
//! one layer and the next.
//!
//! The device writes its operand where the host can see it and waits for the answer; a proxy thread
//! that does nothing else carries the operand over the group's transport and writes the answer back.
//! Between shards of one host the devices can do without the proxy: each reads what the others
//! wrote. The engine only says, in order, what is to be done ([`Delegate::run`]).
//!
//! Never stale, never for ever: every word that crosses carries the number of its operation
//! ([`words`]), and every wait ends with a deadline of the side that waits. Whatever fails poisons
//! the group; from then on its kernels return zeros at once.
//!
//! A device orders its work by data alone. So each operation hands a token to the next, and they run
//! in the order in which the engine asked for them.

#[cfg(target_os = "linux")]
mod cuda;
mod gave_up;
mod job;
mod metal;
mod mlx_kernel;
mod proxy;
mod words;

#[cfg(test)]
mod software;

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use mlx_rs::{
    Array, Dtype,
    error::Exception,
    ops::{concatenate, indexing::TryIndexOp, zeros_dtype},
};

use crate::{
    carrier::Carrier, error::CollectiveError, operation::Operation, reduce::Reduction,
    shared_memory::Segment,
};

pub(crate) use self::job::Job;
use self::{
    gave_up::GaveUp,
    job::{Shape, Traffic},
    mlx_kernel::MlxDevice,
    proxy::{Order, Proxy},
    words::Sequence,
};

/// The device side of a group.
pub(crate) struct Delegate {
    carrier: Arc<Carrier>,
    device: Arc<dyn Device>,
    lane: Mutex<Lane>,
}

/// What only the engine thread touches.
struct Lane {
    proxy: Proxy,
    /// The next operation of each kind of partner.
    with_proxy: Sequence,
    with_peers: Sequence,
    /// What the last operation left for the next one to wait for.
    token: Option<Array>,
}

/// Memory that the device and the host see.
pub(crate) trait Memory: Send + Sync {
    /// Words that the device writes.
    fn up(&self) -> &[AtomicU64];
    /// Words that the host writes.
    fn down(&self) -> &[AtomicU64];
    /// One word for each [`Control`].
    fn control(&self, which: Control) -> &AtomicU64;
}

/// The words beside the operands.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Control {
    /// The host's: not 0 ends every wait of the device.
    Stop = 0,
    /// The device's: the record of a wait that it gave up, see [`GaveUp`]; else 0.
    GaveUp = 1,
    /// The device's: nanoseconds that it has spent in collectives.
    Waited = 2,
}

/// What runs the device's side of the protocol.
pub(crate) trait Device: Memory {
    /// The result of a kernel on `operand`, and the token for the next one; it runs behind whatever
    /// made `token`.
    fn launch(
        &self,
        kernel: &Kernel,
        operand: &Array,
        token: &Array,
    ) -> Result<(Array, Array), CollectiveError>;

    /// How many bytes a rank can show its peers at once, where devices exchange by themselves.
    fn peer_bytes(&self) -> Option<usize>;
}

/// One kernel.
pub(crate) struct Kernel {
    pub(crate) sequence: Sequence,
    pub(crate) operation: Operation,
    pub(crate) rank: usize,
    pub(crate) size: usize,
    pub(crate) deadline: Duration,
    pub(crate) partner: Partner,
    pub(crate) traffic: Traffic,
    /// Of the result.
    pub(crate) shape: Vec<i32>,
    pub(crate) dtype: Dtype,
    pub(crate) item_bytes: usize,
}

/// Whom a kernel exchanges with.
pub(crate) enum Partner {
    Proxy,
    Peers(Fold),
}

/// What becomes of the peers' operands.
pub(crate) enum Fold {
    Reduce(Reduction, Dtype),
    /// The bytes of each rank are laid at `(offset, bytes)` of the result.
    Copy(Vec<(usize, usize)>),
}

/// The memory by which the devices of one host exchange.
pub(crate) struct Peers {
    pub(crate) segment: Segment,
    pub(crate) size: usize,
}

impl Delegate {
    /// Finds a device that can wait on its own stream, and starts its proxy.
    ///
    /// # Errors
    /// [`CollectiveError::NotDelegated`] where there is none.
    pub(crate) fn start(
        carrier: Arc<Carrier>,
        peers: Option<Peers>,
    ) -> Result<Arc<Self>, CollectiveError> {
        let device = find_device(peers)?;
        let proxy = Proxy::start(device.clone(), carrier.clone())?;
        Ok(Arc::new(Self {
            carrier,
            device,
            lane: Mutex::new(Lane {
                proxy,
                with_proxy: Sequence::FIRST,
                with_peers: Sequence::FIRST,
                token: None,
            }),
        }))
    }

    /// The result of one operation, still to be evaluated. Operations run in the order in which they
    /// were asked for, whether their results are used or not, as soon as a later one is evaluated.
    ///
    /// # Errors
    /// [`CollectiveError::Unsupported`] for an operand that is too big and cannot be cut;
    /// [`CollectiveError::Mlx`] when MLX refuses.
    pub(crate) fn run(&self, job: Job, x: &Array) -> Result<Array, CollectiveError> {
        let operation = job.operation();
        let refused = |why: Exception| CollectiveError::Mlx {
            operation,
            why: why.what().to_owned(),
        };
        if x.size() == 0 && !matches!(job, Job::GatherTo { .. }) {
            // Nothing to carry, on every rank alike.
            return Ok(match job {
                Job::AllGather => {
                    let rows = x.shape()[0] * self.carrier.size() as i32;
                    let shape = [&[rows], &x.shape()[1..]].concat();
                    zeros_dtype(&shape, x.dtype()).map_err(refused)?
                }
                _ => x.clone(),
            });
        }
        let peer_room = self.device.peer_bytes().filter(|_| job.is_of_all());
        let (room, peers) = match peer_room {
            Some(room) if job.goes_in_pieces() => (room, true),
            Some(room) => (self.proxy_room(), job.shown_bytes(x) <= room),
            None => (self.proxy_room(), false),
        };
        if job.goes_in_pieces() && x.nbytes() > room {
            let flat = x.reshape(&[-1]).map_err(refused)?;
            let (all, step) = (x.size() as i32, (room / x.item_size()) as i32);
            let pieces = (0..all).step_by(step as usize).map(|start| {
                let piece = flat.try_index(start..all.min(start + step));
                self.run_one(&job, &piece.map_err(refused)?, peers)
            });
            let pieces = pieces.collect::<Result<Vec<_>, _>>()?;
            let whole = concatenate(&pieces, 0).map_err(refused)?;
            return whole.reshape(x.shape()).map_err(refused);
        }
        self.run_one(&job, x, peers)
    }

    fn run_one(&self, job: &Job, x: &Array, peers: bool) -> Result<Array, CollectiveError> {
        let operation = job.operation();
        let (rank, size) = (self.carrier.rank(), self.carrier.size());
        let traffic = job.traffic(x, rank, size);
        let most = traffic.up_bytes.max(traffic.down_bytes);
        if !peers && most > self.proxy_room() {
            let why = format!("{most} bytes at once are more than {}", self.proxy_room());
            return Err(CollectiveError::unsupported(operation, why));
        }
        let mut lane = self.lane();
        let token = match lane.token.take() {
            Some(token) => token,
            None => zeros_dtype(&[1], Dtype::Uint32).map_err(|why| CollectiveError::Mlx {
                operation,
                why: why.what().to_owned(),
            })?,
        };
        let (sequence, deadline, partner) = if peers {
            let sequence = lane.with_peers;
            lane.with_peers = sequence.next();
            self.carrier.health().count(Duration::ZERO);
            let fold = Partner::Peers(fold(job, x, rank, size));
            (sequence, self.carrier.deadline(), fold)
        } else {
            let sequence = lane.with_proxy;
            lane.with_proxy = sequence.next();
            lane.proxy.order(Order {
                sequence,
                job: job.clone(),
                dtype: x.dtype(),
                traffic,
            });
            let deadline = self.carrier.deadline() + PROXY_MARGIN;
            (sequence, deadline, Partner::Proxy)
        };
        let (shape, dtype, item_bytes) = match traffic.result {
            Shape::LikeOperand => (x.shape().to_vec(), x.dtype(), x.item_size()),
            Shape::Word => (vec![1], Dtype::Uint32, 4),
            Shape::Rows(rows) => {
                let mut shape = x.shape().to_vec();
                match shape.first_mut() {
                    Some(first) => *first = rows,
                    None => shape.push(rows),
                }
                (shape, x.dtype(), x.item_size())
            }
        };
        let kernel = Kernel {
            sequence,
            operation,
            rank,
            size,
            deadline,
            partner,
            traffic,
            shape,
            dtype,
            item_bytes,
        };
        // An array without elements has no memory to hand to a kernel.
        let operand = if x.size() == 0 { &token } else { x };
        let (result, next) = self.device.launch(&kernel, operand, &token)?;
        lane.token = Some(next);
        Ok(result)
    }

    /// The largest operand or result that a proxy carries at once.
    fn proxy_room(&self) -> usize {
        words::bytes(self.device.up().len().min(self.device.down().len()))
    }

    /// Ends every wait of the device, now and later. Whoever calls this has poisoned the group.
    pub(crate) fn stop(&self) {
        self.device.control(Control::Stop).store(1, Relaxed);
    }

    /// Poisons the group when the device gave a wait up by itself. To be asked when the device has
    /// done its work, before its results are used.
    pub(crate) fn note_device(&self) {
        if let Some(gave_up) = GaveUp::of(self.device.as_ref()) {
            let why = gave_up.into_error(self.carrier.rank(), self.carrier.deadline());
            self.carrier.health().poison(why);
            self.stop();
            self.carrier.tell_peers();
        }
    }

    /// Time that the device has spent in collectives; where it has no clock, time that its proxy has.
    pub(crate) fn waited(&self) -> Duration {
        match self.device.control(Control::Waited).load(Relaxed) {
            0 => self.carrier.health().waited(),
            nanoseconds => Duration::from_nanos(nanoseconds),
        }
    }

    fn lane(&self) -> MutexGuard<'_, Lane> {
        self.lane.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Delegate {
    /// Ends the device's waits before the memory that it waits on goes away.
    fn drop(&mut self) {
        self.stop();
    }
}

/// How much memory the devices of `size` ranks need to exchange by themselves; none where they cannot.
pub(crate) fn peer_memory_bytes(size: usize) -> Option<usize> {
    // Two slots for each rank.
    let can = cfg!(target_os = "linux") && MlxDevice::default() == MlxDevice::Cuda;
    can.then(|| 2 * size * words::words(PEER_SLOT_BYTES) * size_of::<AtomicU64>())
}

/// What devices do with each other's operands.
fn fold(job: &Job, x: &Array, rank: usize, size: usize) -> Fold {
    let mut parts = vec![(0, 0); size];
    match job {
        Job::Reduce(reduction) => return Fold::Reduce(*reduction, x.dtype()),
        Job::AllGather => {
            for (from, part) in parts.iter_mut().enumerate() {
                *part = (from * x.nbytes(), x.nbytes());
            }
        }
        Job::Broadcast { root } => parts[*root] = (0, x.nbytes()),
        Job::GatherTo { root, parts: bytes } if *root == rank => {
            let mut offset = 0;
            for (part, &bytes) in parts.iter_mut().zip(bytes) {
                *part = (offset, bytes);
                offset += bytes;
            }
        }
        // Nothing is taken here; the kernel only waits for all to arrive.
        Job::GatherTo { .. } | Job::Send { .. } | Job::Receive { .. } => {}
    }
    Fold::Copy(parts)
}

/// Whether collectives can stay on the stream of MLX's default device.
///
/// # Errors
/// [`CollectiveError::NotDelegated`], with what is missing.
pub fn can_delegate() -> Result<(), CollectiveError> {
    let device = MlxDevice::default();
    #[cfg(target_os = "linux")]
    if device == MlxDevice::Cuda {
        return cuda::libraries();
    }
    if device == MlxDevice::Metal {
        return metal::supported();
    }
    Err(no_kernels(device))
}

/// Bytes of memory of its own that the device of MLX's default stream has free, whichever process has the
/// others; `None` where it computes in the machine's memory, or its driver does not say.
pub fn device_free_bytes() -> Option<u64> {
    #[cfg(target_os = "linux")]
    if MlxDevice::default() == MlxDevice::Cuda {
        return cuda::free_bytes();
    }
    None
}

fn no_kernels(device: MlxDevice) -> CollectiveError {
    CollectiveError::NotDelegated {
        why: format!("{device} has no kernels of ours that wait on its stream"),
    }
}

/// The device of MLX's default stream, if it is one that we have kernels for.
fn find_device(peers: Option<Peers>) -> Result<Arc<dyn Device>, CollectiveError> {
    let device = MlxDevice::default();
    #[cfg(target_os = "linux")]
    if device == MlxDevice::Cuda {
        return Ok(Arc::new(cuda::CudaDevice::open(peers)?));
    }
    let _ = peers;
    if device == MlxDevice::Metal {
        return Ok(Arc::new(metal::MetalDevice::open()?));
    }
    Err(no_kernels(device))
}

/// What a rank shows its peers at once: a decode step of the largest model with 64 sequences.
const PEER_SLOT_BYTES: usize = 1 << 20;

/// The device waits a little longer than the proxy, so that the error is the one that names the
/// peer; well below the 100 ms in which a failure must be known.
const PROXY_MARGIN: Duration = Duration::from_millis(40);
