//! A group of ranks as the engine sees it: lazy arrays in, lazy arrays out. Every rank calls the
//! same operations with the same shapes and types; the network is touched when arrays are evaluated.

use std::{cell::RefCell, marker::PhantomData, sync::Arc, time::Duration};

use mlx_rs::{
    Array, Dtype,
    ops::{concatenate, indexing::TryIndexOp, pad, zeros_dtype},
    with_stream,
};

use crate::{
    carrier::Carrier,
    delegate::{Delegate, Job, Peers},
    error::CollectiveError,
    fast_synch::{FastSynch, Path},
    ffi::{self, MlxGroup, Task, View},
    handle::GroupHandle,
    health::Health,
    jaccl::JacclSpec,
    nccl::NcclSpec,
    one_host::OneHost,
    operation::Operation,
    reduce::{Reduction, reduces},
    ring::RingSpec,
    transport::Transport,
};

/// The ranks that run one model together. Belongs to the engine thread, as MLX's streams do.
///
/// The operations are MLX's own lazy distributed operations, on the device's stream where the device
/// can wait there ([`Path::Delegated`]), else on the CPU stream. An evaluation never fails because of
/// a peer: ask [`GroupHandle::health`] after it, and throw its results away when the group is poisoned
/// (they are zeros then).
///
/// Operations reach the wire in the order in which MLX evaluates them. MLX keeps an operation behind
/// its operand; where two operations do not depend on each other all ranks must build the same graph.
/// A [`recv`](Self::recv) has no operand: it stays behind the sends and receives called before it. On
/// a device's stream operations run in the order in which they were called, whether they depend on
/// each other or not. Nothing built on a group may be evaluated when the group is gone.
pub struct Group {
    backing: Backing,
    health: Arc<Health>,
    rank: usize,
    size: usize,
    path: Path,
    last: RefCell<Option<Array>>,
    /// Arrays and groups of MLX belong to the thread that made them.
    not_send: PhantomData<*const ()>,
}

enum Backing {
    Solo,
    Carried {
        carrier: Arc<Carrier>,
        delegate: Option<Arc<Delegate>>,
        plain: MlxGroup,
    },
    Mlx(MlxGroup),
}

/// What a rank has of a gather to one root. Both must be evaluated, or this rank's part of the
/// operation never happens.
#[derive(Debug, Clone)]
pub enum Gathered {
    /// On the root: all rows, in rank order.
    Root(Array),
    /// Elsewhere: stands for the operation; its value means nothing.
    Elsewhere(Array),
}

impl Gathered {
    /// What must be evaluated for the operation to happen.
    pub fn pending(&self) -> &Array {
        match self {
            Self::Root(array) | Self::Elsewhere(array) => array,
        }
    }

    /// All rows, on the root.
    pub fn into_root(self) -> Option<Array> {
        match self {
            Self::Root(array) => Some(array),
            Self::Elsewhere(_) => None,
        }
    }
}

impl Group {
    /// A group of one: every operation returns its operand.
    pub fn solo() -> Self {
        Self::with(Backing::Solo, Arc::default(), (0, 1), Path::Alone)
    }

    /// A group over a transport of ours. Each operation may take `deadline`, counted on its stream
    /// from its own start. Unless [`FastSynch::Off`] is wished it stays on the device's stream where the device
    /// can; [`path`](Self::path) says what became of it.
    ///
    /// # Errors
    /// [`CollectiveError::NotDelegated`] when that was required and cannot be;
    /// [`CollectiveError::Local`] when MLX has no memory for a group.
    pub fn over(
        transport: Box<dyn Transport>,
        deadline: Duration,
        fast_synch: FastSynch,
    ) -> Result<Self, CollectiveError> {
        Self::carried(transport, deadline, fast_synch, None)
    }

    /// A group of shards of one host, over memory that they share. Where their devices can, these
    /// exchange by themselves; sends and receives go over the transport.
    ///
    /// # Errors
    /// As for [`over`](Self::over).
    pub fn on_one_host(
        host: OneHost,
        deadline: Duration,
        fast_synch: FastSynch,
    ) -> Result<Self, CollectiveError> {
        let size = host.transport.size();
        let peers = host.devices.map(|segment| Peers { segment, size });
        Self::carried(Box::new(host.transport), deadline, fast_synch, peers)
    }

    fn carried(
        transport: Box<dyn Transport>,
        deadline: Duration,
        fast_synch: FastSynch,
        peers: Option<Peers>,
    ) -> Result<Self, CollectiveError> {
        ffi::install_mlx_error_handler();
        let health = Arc::<Health>::default();
        let carrier = Arc::new(Carrier::new(transport, deadline, health.clone()));
        let (rank, size) = (carrier.rank(), carrier.size());
        let delegated = match fast_synch {
            FastSynch::Off => Err(CollectiveError::NotDelegated {
                why: "fast_synch is off".to_owned(),
            }),
            FastSynch::Auto | FastSynch::On | FastSynch::Require => {
                Delegate::start(carrier.clone(), peers)
            }
        };
        let (delegate, path) = match delegated {
            Ok(delegate) => (Some(delegate), Path::Delegated),
            Err(refusal) => (None, fast_synch.settle(refusal)?),
        };
        let plain = MlxGroup::of(View {
            carrier: carrier.clone(),
            task: Task::Reduce,
        })?;
        let backing = Backing::Carried {
            carrier,
            delegate,
            plain,
        };
        Ok(Self::with(backing, health, (rank, size), path))
    }

    /// MLX's own ring, to compare with. It has no deadlines, ends the process when a peer dies, and
    /// there can be one per process. Blocks until all ranks are there.
    ///
    /// MLX reads its configuration from the environment, so this writes `MLX_HOSTFILE` and
    /// `MLX_RANK`: call it early, before any other thread reads or writes the environment.
    ///
    /// # Errors
    /// [`CollectiveError::Local`] when MLX cannot form the ring.
    pub fn ring(spec: &RingSpec) -> Result<Self, CollectiveError> {
        let group = spec.form()?;
        let place = (spec.rank, spec.addresses.len());
        Ok(Self::with(
            Backing::Mlx(group),
            Arc::default(),
            place,
            Path::Mlx,
        ))
    }

    /// MLX over NCCL, to compare with on CUDA: no deadlines, no word of a dead peer, one per process,
    /// no sends. Blocks until all ranks are there. Writes the environment, as
    /// [`ring`](Self::ring) does.
    ///
    /// # Errors
    /// [`CollectiveError::Local`] when MLX has no NCCL or cannot form the group.
    pub fn nccl(spec: &NcclSpec) -> Result<Self, CollectiveError> {
        let group = spec.form()?;
        let place = (spec.rank, spec.size);
        Ok(Self::with(
            Backing::Mlx(group),
            Arc::default(),
            place,
            Path::Mlx,
        ))
    }

    /// MLX over RDMA between Macs, through Thunderbolt: no deadlines, no word of a dead peer. Its ranks meet
    /// over `side`, within `deadline`. Writes the environment, as [`ring`](Self::ring) does.
    ///
    /// # Errors
    /// [`CollectiveError::Local`] when a pair has no device, when the machine has no such RDMA, or when
    /// MLX cannot form the group.
    pub fn jaccl(
        spec: &JacclSpec,
        side: Box<dyn Transport>,
        deadline: Duration,
    ) -> Result<Self, CollectiveError> {
        ffi::install_mlx_error_handler();
        let carrier = Arc::new(Carrier::new(side, deadline, Arc::default()));
        let place = (carrier.rank(), carrier.size());
        let group = spec.form(View {
            carrier,
            task: Task::Reduce,
        })?;
        Ok(Self::with(
            Backing::Mlx(group),
            Arc::default(),
            place,
            Path::Mlx,
        ))
    }

    fn with(
        backing: Backing,
        health: Arc<Health>,
        (rank, size): (usize, usize),
        path: Path,
    ) -> Self {
        Self {
            backing,
            health,
            rank,
            size,
            path,
            last: RefCell::new(None),
            not_send: PhantomData,
        }
    }

    /// Our place, from 0.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// How many ranks there are, ours included.
    pub fn size(&self) -> usize {
        self.size
    }

    /// The way that its operations take.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether a small array can be sent before its receiver asks for it, so that two ranks may each send
    /// to the other first: over our transports, which keep what comes early. MLX's own may hold a sender
    /// until the receiver is there, or have no sends at all.
    pub fn sends_ahead(&self) -> bool {
        matches!(self.backing, Backing::Carried { .. })
    }

    /// For threads that watch over the group.
    pub fn handle(&self) -> GroupHandle {
        let (carrier, delegate) = match &self.backing {
            Backing::Carried {
                carrier, delegate, ..
            } => (Some(carrier.clone()), delegate.clone()),
            Backing::Solo | Backing::Mlx(_) => (None, None),
        };
        GroupHandle::new(self.health.clone(), carrier, delegate)
    }

    /// Element-wise sum over all ranks; `x` and the result have the same shape, any shape. All ranks
    /// get the same bits. f32, f16, bf16 (halves are added in f32 and rounded once), i32, u32.
    ///
    /// # Errors
    /// [`CollectiveError::Unsupported`] for another type.
    pub fn all_sum(&self, x: &Array) -> Result<Array, CollectiveError> {
        self.all_reduce((Operation::AllSum, Reduction::Sum), x, MlxGroup::all_sum)
    }

    /// Element-wise maximum over all ranks; types and shapes as for [`all_sum`](Self::all_sum).
    ///
    /// # Errors
    /// [`CollectiveError::Unsupported`] for another type.
    pub fn all_max(&self, x: &Array) -> Result<Array, CollectiveError> {
        self.all_reduce((Operation::AllMax, Reduction::Max), x, MlxGroup::all_max)
    }

    /// Element-wise minimum over all ranks; types and shapes as for [`all_sum`](Self::all_sum).
    ///
    /// # Errors
    /// [`CollectiveError::Unsupported`] for another type.
    pub fn all_min(&self, x: &Array) -> Result<Array, CollectiveError> {
        self.all_reduce((Operation::AllMin, Reduction::Min), x, MlxGroup::all_min)
    }

    /// The operands of all ranks along axis 0, in rank order: `[n, …]` becomes `[n * size, …]`, a
    /// scalar becomes `[size]`. Any type.
    ///
    /// # Errors
    /// [`CollectiveError::Mlx`] when MLX refuses.
    pub fn all_gather(&self, x: &Array) -> Result<Array, CollectiveError> {
        match &self.backing {
            Backing::Solo => Ok(x.clone()),
            Backing::Mlx(group) => group.all_gather(x),
            Backing::Carried {
                delegate: Some(delegate),
                ..
            } => delegate.run(Job::AllGather, x),
            Backing::Carried { plain, .. } => plain.all_gather(x),
        }
    }

    /// Element-wise sum of `x` over all ranks, of which each rank keeps its share of the rows:
    /// `[n * size, …]` becomes `[n, …]`. Types as for [`all_sum`](Self::all_sum).
    ///
    /// # Errors
    /// [`CollectiveError::Unsupported`] for another type or for rows that do not divide.
    pub fn sum_scatter(&self, x: &Array) -> Result<Array, CollectiveError> {
        let operation = Operation::SumScatter;
        let rows = x.shape().first().map_or(0, |&rows| rows);
        let size = rows_of(operation, self.size)?;
        if x.ndim() == 0 || rows % size != 0 {
            let why = format!("{rows} rows do not divide by {size}");
            return Err(CollectiveError::unsupported(operation, why));
        }
        let whole = match &self.backing {
            Backing::Solo => return Ok(x.clone()),
            Backing::Mlx(group) => group.all_sum(x)?,
            Backing::Carried {
                delegate: Some(delegate),
                ..
            } => {
                require_reducible(operation, x.dtype())?;
                delegate.run(Job::Reduce(Reduction::Sum), x)?
            }
            Backing::Carried { .. } => {
                require_reducible(operation, x.dtype())?;
                self.through(Task::SumScatter)?.all_sum(x)?
            }
        };
        let share = rows / size;
        let start = share * rows_of(operation, self.rank)?;
        whole
            .try_index(start..start + share)
            .map_err(|why| refused(operation, &why))
    }

    /// Sends `x` to rank `to`, whose next [`recv`](Self::recv) from us must have its shape and type.
    /// Returns `x`; the sending happens when that is evaluated. Any type.
    ///
    /// # Errors
    /// [`CollectiveError::Unsupported`] when there is no such other rank.
    pub fn send(&self, x: &Array, to: usize) -> Result<Array, CollectiveError> {
        let peer = self.other(Operation::Send, to)?;
        let sent = match &self.backing {
            Backing::Solo => return Err(no_peers(Operation::Send)),
            Backing::Carried {
                delegate: Some(delegate),
                ..
            } => return delegate.run(Job::Send { to }, x),
            Backing::Carried { plain: group, .. } | Backing::Mlx(group) => group.send(x, peer)?,
        };
        *self.last.borrow_mut() = Some(sent.clone());
        Ok(sent)
    }

    /// What rank `from` sends next: an array of `shape` and `dtype`. Any type.
    ///
    /// # Errors
    /// [`CollectiveError::Unsupported`] when there is no such other rank.
    pub fn recv(&self, shape: &[i32], dtype: Dtype, from: usize) -> Result<Array, CollectiveError> {
        let operation = Operation::Receive;
        let peer = self.other(operation, from)?;
        let received = match &self.backing {
            Backing::Solo => return Err(no_peers(operation)),
            Backing::Mlx(group) => group.recv(shape, dtype, peer)?,
            Backing::Carried {
                delegate: Some(delegate),
                ..
            } => {
                let place = zeros_dtype(shape, dtype).map_err(|why| refused(operation, &why))?;
                return delegate.run(Job::Receive { from }, &place);
            }
            Backing::Carried { .. } => {
                let stream = ffi::collective_stream();
                let place = with_stream(&stream, || zeros_dtype(shape, dtype))
                    .map_err(|why| refused(operation, &why))?;
                let place = match &*self.last.borrow() {
                    Some(last) => ffi::after(&place, last)?,
                    None => place,
                };
                self.through(Task::Receive { from })?.all_sum(&place)?
            }
        };
        *self.last.borrow_mut() = Some(received.clone());
        Ok(received)
    }

    /// The value that `x` has on rank `root`, to all ranks. `x` has the same shape and type
    /// everywhere. Any type over our transports; those of [`all_sum`](Self::all_sum) over the ring.
    ///
    /// # Errors
    /// [`CollectiveError::Unsupported`] when there is no rank `root`.
    pub fn broadcast(&self, x: &Array, root: usize) -> Result<Array, CollectiveError> {
        let operation = Operation::Broadcast;
        self.member(operation, root)?;
        match &self.backing {
            Backing::Solo => Ok(x.clone()),
            Backing::Carried {
                delegate: Some(delegate),
                ..
            } => delegate.run(Job::Broadcast { root }, x),
            Backing::Carried { .. } => self.through(Task::Broadcast { root })?.all_sum(x),
            Backing::Mlx(group) if self.rank == root => group.all_sum(x),
            Backing::Mlx(group) => {
                let zeros =
                    zeros_dtype(x.shape(), x.dtype()).map_err(|why| refused(operation, &why))?;
                group.all_sum(&ffi::after(&zeros, x)?)
            }
        }
    }

    /// All rows of all ranks to rank `root`, in rank order. `rows` says how many rows (the length of
    /// axis 0) each rank brings, by rank; they may differ and may be 0; the other axes are equal.
    /// On the root `[rows[root], …]` becomes `[rows.sum(), …]`. Any type.
    ///
    /// # Errors
    /// [`CollectiveError::Unsupported`] when there is no rank `root`, or `rows` does not fit `x`.
    pub fn gather_to(
        &self,
        x: &Array,
        rows: &[i32],
        root: usize,
    ) -> Result<Gathered, CollectiveError> {
        let operation = Operation::GatherTo;
        self.member(operation, root)?;
        let own = x.shape().first();
        if rows.len() != self.size || own != rows.get(self.rank) || rows.iter().any(|&n| n < 0) {
            let why = format!(
                "rank {} has {own:?} rows, the plan says {rows:?}",
                self.rank
            );
            return Err(CollectiveError::unsupported(operation, why));
        }
        if rows.iter().all(|&rows| rows == 0) {
            return Ok(match self.rank == root {
                true => Gathered::Root(x.clone()),
                false => Gathered::Elsewhere(x.clone()),
            });
        }
        match &self.backing {
            Backing::Solo => Ok(Gathered::Root(x.clone())),
            Backing::Carried { .. } => self.gather_in_place(x, rows, root),
            Backing::Mlx(group) => self.gather_padded(group, x, rows, root),
        }
    }

    /// On the root our rows are put where they belong among all, and the others' rows are received
    /// around them; elsewhere our rows are sent.
    fn gather_in_place(
        &self,
        x: &Array,
        rows: &[i32],
        root: usize,
    ) -> Result<Gathered, CollectiveError> {
        let row_bytes = x.shape()[1..]
            .iter()
            .fold(x.item_size(), |bytes, &n| bytes * n as usize);
        let parts = rows.iter().map(|&rows| rows as usize * row_bytes).collect();
        if let Backing::Carried {
            delegate: Some(delegate),
            ..
        } = &self.backing
        {
            let gathered = delegate.run(Job::GatherTo { root, parts }, x)?;
            return Ok(match self.rank == root {
                true => Gathered::Root(gathered),
                false => Gathered::Elsewhere(gathered),
            });
        }
        let group = self.through(Task::GatherTo { root, parts })?;
        if self.rank != root {
            return Ok(Gathered::Elsewhere(group.all_sum(x)?));
        }
        let before = rows[..root].iter().sum();
        let after = rows[root + 1..].iter().sum();
        let all = padded(x, before, after)?;
        Ok(Gathered::Root(group.all_sum(&all)?))
    }

    fn gather_padded(
        &self,
        group: &MlxGroup,
        x: &Array,
        rows: &[i32],
        root: usize,
    ) -> Result<Gathered, CollectiveError> {
        let operation = Operation::GatherTo;
        let tallest = rows.iter().copied().max().unwrap_or(0);
        let all = group.all_gather(&padded(x, 0, tallest - rows[self.rank])?)?;
        if self.rank != root {
            return Ok(Gathered::Elsewhere(all));
        }
        let parts = rows
            .iter()
            .zip(0..)
            .map(|(&rows, rank)| all.try_index(rank * tallest..rank * tallest + rows))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|why| refused(operation, &why))?;
        Ok(Gathered::Root(
            concatenate(&parts, 0).map_err(|why| refused(operation, &why))?,
        ))
    }

    fn all_reduce(
        &self,
        (operation, reduction): (Operation, Reduction),
        x: &Array,
        call: impl FnOnce(&MlxGroup, &Array) -> Result<Array, CollectiveError>,
    ) -> Result<Array, CollectiveError> {
        match &self.backing {
            Backing::Solo => Ok(x.clone()),
            Backing::Mlx(group) => call(group, x),
            Backing::Carried {
                delegate, plain, ..
            } => {
                require_reducible(operation, x.dtype())?;
                match delegate {
                    Some(delegate) => delegate.run(Job::Reduce(reduction), x),
                    None => call(plain, x),
                }
            }
        }
    }

    /// A group of MLX's whose all-sum does `task`; it lives as long as the operations built on it.
    fn through(&self, task: Task) -> Result<MlxGroup, CollectiveError> {
        match &self.backing {
            Backing::Carried { carrier, .. } => MlxGroup::of(View {
                carrier: carrier.clone(),
                task,
            }),
            Backing::Solo | Backing::Mlx(_) => unreachable!("only a transport of ours has tasks"),
        }
    }

    fn member(&self, operation: Operation, rank: usize) -> Result<i32, CollectiveError> {
        match i32::try_from(rank) {
            Ok(peer) if rank < self.size => Ok(peer),
            _ => {
                let why = format!("there is no rank {rank} of {}", self.size);
                Err(CollectiveError::unsupported(operation, why))
            }
        }
    }

    fn other(&self, operation: Operation, rank: usize) -> Result<i32, CollectiveError> {
        match self.member(operation, rank)? {
            _ if rank == self.rank => Err(CollectiveError::unsupported(
                operation,
                "a rank is not its own peer",
            )),
            peer => Ok(peer),
        }
    }
}

/// `x` with rows of zeros before and after.
fn padded(x: &Array, before: i32, after: i32) -> Result<Array, CollectiveError> {
    if before == 0 && after == 0 {
        return Ok(x.clone());
    }
    let widths: Vec<(i32, i32)> = (0..x.ndim())
        .map(|axis| if axis == 0 { (before, after) } else { (0, 0) })
        .collect();
    pad(x, &widths[..], None, None).map_err(|why| refused(Operation::GatherTo, &why))
}

fn require_reducible(operation: Operation, dtype: Dtype) -> Result<(), CollectiveError> {
    match reduces(dtype) {
        true => Ok(()),
        false => Err(CollectiveError::unsupported(
            operation,
            format!("{dtype:?} is not reduced"),
        )),
    }
}

fn rows_of(operation: Operation, ranks: usize) -> Result<i32, CollectiveError> {
    i32::try_from(ranks).map_err(|_| CollectiveError::unsupported(operation, "too many ranks"))
}

fn no_peers(operation: Operation) -> CollectiveError {
    CollectiveError::unsupported(operation, "a group of one has no peers")
}

fn refused(operation: Operation, why: &mlx_rs::error::Exception) -> CollectiveError {
    CollectiveError::Mlx {
        operation,
        why: why.what().to_owned(),
    }
}
