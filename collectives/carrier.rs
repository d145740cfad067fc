//! Carries out one operation on the stream's thread: says what goes where, has the transport
//! exchange it, folds the numbers, and sees to it that a failure leaves zeros and a poisoned group.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError},
    time::{Duration, Instant},
};

use mlx_rs::Dtype;

use crate::{
    error::CollectiveError,
    health::Health,
    operation::Operation,
    reduce::{Reduction, reduce},
    transport::{Exchange, Transport, Wait},
};

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
        let mut call = Call {
            carrier: self,
            transport: transport.as_mut(),
            since,
        };
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

/// One operation under way.
struct Call<'a> {
    carrier: &'a Carrier,
    transport: &'a mut dyn Transport,
    since: Instant,
}

impl Call<'_> {
    fn all_reduce(
        &mut self,
        reduction: Reduction,
        dtype: Dtype,
        data: &mut [u8],
        scratch: &mut Vec<u8>,
    ) -> Result<(), CollectiveError> {
        let operation = match reduction {
            Reduction::Sum => Operation::AllSum,
            Reduction::Max => Operation::AllMax,
            Reduction::Min => Operation::AllMin,
        };
        let scratch = at_least(scratch, data.len() * (self.size() - 1));
        let outgoing = self.to_others(|_| Some(&*data));
        let mut incoming = self.side_by_side(scratch, |_| data.len());
        self.exchange(operation, dtype, &outgoing, &mut incoming)?;
        let others: Vec<&[u8]> = incoming
            .iter()
            .flatten()
            .map(|operand| &**operand)
            .collect();
        reduce(reduction, dtype, data, self.rank(), &others);
        Ok(())
    }

    fn sum_scatter(
        &mut self,
        dtype: Dtype,
        data: &mut [u8],
        scratch: &mut Vec<u8>,
    ) -> Result<(), CollectiveError> {
        let share = data.len() / self.size();
        let scratch = at_least(scratch, share * (self.size() - 1));
        let outgoing = self.to_others(|to| data.get(to * share..(to + 1) * share));
        let mut incoming = self.side_by_side(scratch, |_| share);
        self.exchange(Operation::SumScatter, dtype, &outgoing, &mut incoming)?;
        let others: Vec<&[u8]> = incoming
            .iter()
            .flatten()
            .map(|operand| &**operand)
            .collect();
        let own = &mut data[self.rank() * share..][..share];
        reduce(Reduction::Sum, dtype, own, self.rank(), &others);
        Ok(())
    }

    fn all_gather(
        &mut self,
        dtype: Dtype,
        input: &[u8],
        output: &mut [u8],
    ) -> Result<(), CollectiveError> {
        output[self.rank() * input.len()..][..input.len()].copy_from_slice(input);
        let outgoing = self.to_others(|_| Some(input));
        let mut incoming = self.places(output, |_| input.len());
        self.exchange(Operation::AllGather, dtype, &outgoing, &mut incoming)
    }

    fn gather_to(
        &mut self,
        dtype: Dtype,
        data: &mut [u8],
        root: usize,
        parts: &[usize],
    ) -> Result<(), CollectiveError> {
        if self.rank() == root {
            let outgoing = self.to_others(|_| None);
            let mut incoming = self.places(data, |from| parts[from]);
            return self.exchange(Operation::GatherTo, dtype, &outgoing, &mut incoming);
        }
        let outgoing = self.to_others(|to| (to == root).then_some(&*data));
        self.exchange(Operation::GatherTo, dtype, &outgoing, &mut self.nothing())
    }

    fn broadcast(
        &mut self,
        dtype: Dtype,
        data: &mut [u8],
        root: usize,
    ) -> Result<(), CollectiveError> {
        if self.rank() != root {
            return self.receive_as(Operation::Broadcast, dtype, data, root);
        }
        let outgoing = self.to_others(|_| Some(&*data));
        self.exchange(Operation::Broadcast, dtype, &outgoing, &mut self.nothing())
    }

    fn send(&mut self, dtype: Dtype, input: &[u8], to: usize) -> Result<(), CollectiveError> {
        let outgoing = self.to_others(|other| (other == to).then_some(input));
        self.exchange(Operation::Send, dtype, &outgoing, &mut self.nothing())
    }

    fn receive(
        &mut self,
        dtype: Dtype,
        data: &mut [u8],
        from: usize,
    ) -> Result<(), CollectiveError> {
        self.receive_as(Operation::Receive, dtype, data, from)
    }

    fn receive_as(
        &mut self,
        operation: Operation,
        dtype: Dtype,
        data: &mut [u8],
        from: usize,
    ) -> Result<(), CollectiveError> {
        let outgoing = self.to_others(|_| None);
        let mut incoming = self.nothing();
        incoming[from] = Some(data);
        self.exchange(operation, dtype, &outgoing, &mut incoming)
    }

    fn exchange(
        &mut self,
        operation: Operation,
        dtype: Dtype,
        outgoing: &[Option<&[u8]>],
        incoming: &mut [Option<&mut [u8]>],
    ) -> Result<(), CollectiveError> {
        // MLX numbers its types from 0 to 13.
        let dtype = u8::try_from(u32::from(dtype)).unwrap_or(u8::MAX);
        let interrupted = || self.carrier.health.first_error();
        let wait = Wait {
            since: self.since,
            deadline: self.carrier.deadline,
            interrupted: &interrupted,
        };
        self.transport.exchange(
            Exchange {
                operation,
                dtype,
                outgoing,
                incoming,
            },
            wait,
        )
    }

    fn rank(&self) -> usize {
        self.carrier.rank
    }

    fn size(&self) -> usize {
        self.carrier.size
    }

    fn to_others<'d>(&self, operand: impl Fn(usize) -> Option<&'d [u8]>) -> Vec<Option<&'d [u8]>> {
        (0..self.size())
            .map(|to| if to == self.rank() { None } else { operand(to) })
            .collect()
    }

    /// Places for the operands of the others, side by side in `memory`.
    fn side_by_side<'d>(
        &self,
        mut memory: &'d mut [u8],
        bytes: impl Fn(usize) -> usize,
    ) -> Vec<Option<&'d mut [u8]>> {
        (0..self.size())
            .map(|from| (from != self.rank()).then(|| split_off(&mut memory, bytes(from))))
            .collect()
    }

    /// Places for the operands of the others in `memory`, which has room for ours as well.
    fn places<'d>(
        &self,
        mut memory: &'d mut [u8],
        bytes: impl Fn(usize) -> usize,
    ) -> Vec<Option<&'d mut [u8]>> {
        (0..self.size())
            .map(|from| {
                let place = split_off(&mut memory, bytes(from));
                (from != self.rank()).then_some(place)
            })
            .collect()
    }

    fn nothing<'d>(&self) -> Vec<Option<&'d mut [u8]>> {
        (0..self.size()).map(|_| None).collect()
    }
}

fn split_off<'d>(memory: &mut &'d mut [u8], bytes: usize) -> &'d mut [u8] {
    let (place, rest) = std::mem::take(memory).split_at_mut(bytes);
    *memory = rest;
    place
}

fn at_least(scratch: &mut Vec<u8>, bytes: usize) -> &mut [u8] {
    if scratch.len() < bytes {
        scratch.resize(bytes, 0);
    }
    &mut scratch[..bytes]
}
