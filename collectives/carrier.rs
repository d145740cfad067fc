//! Carries out one operation on the stream's thread: says what goes where, has the transport
//! exchange it, folds the numbers, and sees to it that a failure leaves zeros and a poisoned group.

mod call;

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError},
    time::{Duration, Instant},
};

use mlx_rs::Dtype;

use crate::{error::CollectiveError, health::Health, reduce::Reduction, transport::Transport};

use self::call::Call;

/// A transport, and what it takes to run collectives over it. Shared with every pending operation.
pub(crate) struct Carrier {
    rank: usize,
    size: usize,
    deadline: Duration,
    health: Arc<Health>,
    lane: Mutex<Lane>,
}

/// What only the thread that is in an operation touches.
struct Lane {
    transport: Box<dyn Transport>,
    /// Operands of the other ranks; kept, so that a decode step allocates nothing.
    scratch: Vec<u8>,
    told: bool,
}

/// One operation as MLX hands it over, already in terms of memory.
pub(crate) enum Work<'a> {
    /// `data` holds our operand and takes the result.
    InPlace {
        task: InPlace<'a>,
        dtype: Dtype,
        data: &'a mut [u8],
    },
    /// `output` takes the operands of all ranks in rank order.
    AllGather {
        dtype: Dtype,
        input: &'a [u8],
        output: &'a mut [u8],
    },
    /// To one rank.
    Send {
        dtype: Dtype,
        input: &'a [u8],
        to: usize,
    },
}

/// What is done to an operand in its place.
#[derive(Debug, Clone, Copy)]
pub(crate) enum InPlace<'a> {
    Reduce(Reduction),
    /// Only our share of the result is written; the rest stays as it was.
    SumScatter,
    Receive {
        from: usize,
    },
    Broadcast {
        root: usize,
    },
    /// `parts` are bytes per rank. On the root `data` is all of them, elsewhere our own part.
    GatherTo {
        root: usize,
        parts: &'a [usize],
    },
}

impl Carrier {
    pub(crate) fn new(
        transport: Box<dyn Transport>,
        deadline: Duration,
        health: Arc<Health>,
    ) -> Self {
        let (rank, size) = (transport.rank(), transport.size());
        let lane = Mutex::new(Lane {
            transport,
            scratch: Vec::new(),
            told: false,
        });
        Self {
            rank,
            size,
            deadline,
            health,
            lane,
        }
    }

    pub(crate) fn rank(&self) -> usize {
        self.rank
    }

    pub(crate) fn size(&self) -> usize {
        self.size
    }

    pub(crate) fn deadline(&self) -> Duration {
        self.deadline
    }

    pub(crate) fn health(&self) -> &Health {
        &self.health
    }

    /// Carries `work` out, or poisons the group. On an error the caller fills the output with zeros.
    pub(crate) fn run(&self, work: Work<'_>) -> Result<(), CollectiveError> {
        self.health.check()?;
        let since = Instant::now();
        let result = self.carry_out(&mut self.lane(), work, since);
        self.health.count(since.elapsed());
        if let Err(why) = result {
            self.health.poison(why);
        }
        // Somebody else may have poisoned the group while we held the lane and could not be told.
        if self.health.is_poisoned() {
            self.tell_peers();
        }
        self.health.check()
    }

    /// Passes the first error on to the peers, once. When the stream's thread is in an operation it
    /// does so itself on its way out.
    pub(crate) fn tell_peers(&self) {
        let lane = match self.lane.try_lock() {
            Ok(lane) => lane,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return,
        };
        self.tell_peers_from(lane);
    }

    fn tell_peers_from(&self, mut lane: MutexGuard<'_, Lane>) {
        if let (Some(why), false) = (self.health.first_error(), lane.told) {
            lane.told = true;
            lane.transport.abandon(&why);
        }
    }

    /// A panic under the lock has poisoned the group already (see ffi.rs), so the lane is as good.
    fn lane(&self) -> MutexGuard<'_, Lane> {
        self.lane.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A panic on the stream's thread must end like any other failure.
    pub(crate) fn panicked(&self) {
        self.health.poison(CollectiveError::local(
            "carrying out a collective",
            "it panicked",
        ));
        self.tell_peers();
    }

    fn carry_out(
        &self,
        lane: &mut Lane,
        work: Work<'_>,
        since: Instant,
    ) -> Result<(), CollectiveError> {
        let Lane {
            transport, scratch, ..
        } = lane;
        let mut call = Call::begin(self, transport.as_mut(), since);
        match work {
            Work::AllGather {
                dtype,
                input,
                output,
            } => call.all_gather(dtype, input, output),
            Work::Send { dtype, input, to } => call.send(dtype, input, to),
            Work::InPlace { task, dtype, data } => match task {
                InPlace::Reduce(reduction) => call.all_reduce(reduction, dtype, data, scratch),
                InPlace::SumScatter => call.sum_scatter(dtype, data, scratch),
                InPlace::Receive { from } => call.receive(dtype, data, from),
                InPlace::Broadcast { root } => call.broadcast(dtype, data, root),
                InPlace::GatherTo { root, parts } => call.gather_to(dtype, data, root, parts),
            },
        }
    }
}
