//! The operations in terms of exchanges: what goes where, and how the numbers fold. It knows memory
//! and ranks, nothing of MLX and nothing of how bytes travel.

use std::time::Instant;

use mlx_rs::Dtype;

use super::Carrier;
use crate::{
    error::CollectiveError,
    operation::Operation,
    reduce::{Reduction, reduce},
    transport::{Exchange, Transport, Wait},
};

/// One operation under way.
pub(super) struct Call<'a> {
    carrier: &'a Carrier,
    transport: &'a mut dyn Transport,
    since: Instant,
}

impl<'a> Call<'a> {
    pub(super) fn begin(
        carrier: &'a Carrier,
        transport: &'a mut dyn Transport,
        since: Instant,
    ) -> Self {
        Self {
            carrier,
            transport,
            since,
        }
    }
}

impl Call<'_> {
    pub(super) fn all_reduce(
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
        if self.size() > 2 && data.len() >= SHARED_BYTES_MIN {
            return self.all_reduce_in_shares((reduction, operation, dtype), data, scratch);
        }
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

    /// Each rank folds its share of the elements and passes the result on: more steps, but each rank
    /// sends 2 (n - 1) / n of the operand instead of n - 1 times the operand. The same bits come out.
    fn all_reduce_in_shares(
        &mut self,
        (reduction, operation, dtype): (Reduction, Operation, Dtype),
        data: &mut [u8],
        scratch: &mut Vec<u8>,
    ) -> Result<(), CollectiveError> {
        let (rank, size, bytes) = (self.rank(), self.size(), data.len());
        // Whole cache lines, which are whole elements of any type.
        let step = bytes.div_ceil(size).next_multiple_of(CACHE_LINE_BYTES);
        let share = |of: usize| (of * step).min(bytes)..((of + 1) * step).min(bytes);
        let own = share(rank).len();
        let scratch = at_least(scratch, own * (size - 1));
        let outgoing = self.to_others(|to| data.get(share(to)));
        let mut incoming = self.side_by_side(scratch, |_| own);
        self.exchange(operation, dtype, &outgoing, &mut incoming)?;
        let others: Vec<&[u8]> = incoming
            .iter()
            .flatten()
            .map(|operand| &**operand)
            .collect();
        reduce(reduction, dtype, &mut data[share(rank)], rank, &others);

        let mut folded: &[u8] = &[];
        let mut rest = data;
        let mut incoming: Vec<Option<&mut [u8]>> = Vec::with_capacity(size);
        for from in 0..size {
            let place = split_off(&mut rest, share(from).len());
            if from == rank {
                folded = place;
                incoming.push(None);
            } else {
                incoming.push(Some(place));
            }
        }
        let outgoing = self.to_others(|_| Some(folded));
        self.exchange(operation, dtype, &outgoing, &mut incoming)
    }

    pub(super) fn sum_scatter(
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

    pub(super) fn all_gather(
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

    pub(super) fn gather_to(
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

    pub(super) fn broadcast(
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

    pub(super) fn send(
        &mut self,
        dtype: Dtype,
        input: &[u8],
        to: usize,
    ) -> Result<(), CollectiveError> {
        let outgoing = self.to_others(|other| (other == to).then_some(input));
        self.exchange(Operation::Send, dtype, &outgoing, &mut self.nothing())
    }

    pub(super) fn receive(
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

/// From here on what a rank sends costs more than a second step does.
const SHARED_BYTES_MIN: usize = 128 << 10;

const CACHE_LINE_BYTES: usize = 64;
