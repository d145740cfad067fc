//! Every request that is not finished, with the tokens that its client has been given: what another
//! epoch needs to go on where the last one ended. Pure, without IO or clock.

use std::collections::BTreeMap;

use offbook_protocol::{Epoch, Join, Request, SampledToken, SequenceId};

/// The requests in their order of arrival. `C` is the client's end of one.
#[derive(Debug)]
pub(crate) struct Journal<C> {
    /// Numbers rise with each request, so this is the order of arrival.
    entries: BTreeMap<SequenceId, Entry<C>>,
    last: SequenceId,
}

/// One request.
#[derive(Debug)]
pub(crate) struct Entry<C> {
    pub(crate) request: Request,
    pub(crate) client: C,
    /// The tokens that went to the client.
    delivered: Vec<u32>,
    standing: Standing,
    /// Epochs in a row that were lost while this request ran, without a token in between.
    losses: u32,
    /// Those among them that a shard ended by a failure of its own.
    faults: u32,
    /// The last of them, until a shard's failure is known to have ended it.
    lost_in: Option<Epoch>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    Waiting,
    /// The shards work on it, and no token of it has come in this epoch.
    Joined,
    /// A token of it has come in this epoch.
    Proven,
}

impl<C> Journal<C> {
    pub(crate) fn new() -> Self {
        Self {
            entries: BTreeMap::new(),
            last: SequenceId(0),
        }
    }

    /// A request begins its life; it waits.
    pub(crate) fn open(&mut self, mut request: Request, client: C) -> SequenceId {
        self.last = self.last.next();
        let delivered = std::mem::take(&mut request.delivered);
        let entry = Entry {
            request,
            client,
            delivered,
            standing: Standing::Waiting,
            losses: 0,
            faults: 0,
            lost_in: None,
        };
        self.entries.insert(self.last, entry);
        self.last
    }

    /// The end of it, for whatever reason.
    pub(crate) fn close(&mut self, sequence: SequenceId) -> Option<Entry<C>> {
        self.entries.remove(&sequence)
    }

    /// The end of them all, in their order of arrival.
    pub(crate) fn close_all(&mut self) -> Vec<C> {
        let entries = std::mem::take(&mut self.entries);
        entries.into_values().map(|entry| entry.client).collect()
    }

    /// The end of all those of which this is true.
    pub(crate) fn close_if(&mut self, is_over: impl Fn(&Entry<C>) -> bool) -> Vec<Entry<C>> {
        let over = self.entries.extract_if(.., |_, entry| is_over(entry));
        over.map(|(_, entry)| entry).collect()
    }

    /// Notes a token that the shards of the epoch under way have drawn, and says whose it is: nobody's
    /// if the shards were not asked for it.
    pub(crate) fn note(&mut self, token: &SampledToken) -> Option<&C> {
        let entry = self.entries.get_mut(&token.sequence)?;
        if !entry.is_running() {
            return None;
        }
        entry.delivered.push(token.token);
        entry.standing = Standing::Proven;
        (entry.losses, entry.faults, entry.lost_in) = (0, 0, None);
        Some(&entry.client)
    }

    /// What tells the shards to begin with this request, or to go on with it. `None` when they do so
    /// already.
    pub(crate) fn join(&mut self, sequence: SequenceId, context_tokens: u32) -> Option<Join> {
        let entry = self.entries.get_mut(&sequence)?;
        if entry.is_running() {
            return None;
        }
        entry.standing = Standing::Joined;
        Some(entry.join(sequence, context_tokens))
    }

    /// The epoch is lost: what was running waits. Returned in their order of arrival.
    pub(crate) fn interrupt(&mut self, epoch: Epoch) -> Vec<SequenceId> {
        let running = self.entries.iter_mut().filter(|(_, e)| e.is_running());
        let interrupted = running.map(|(sequence, entry)| {
            entry.standing = Standing::Waiting;
            entry.losses += 1;
            entry.lost_in = Some(epoch);
            *sequence
        });
        interrupted.collect()
    }

    /// A shard's own failure has ended that epoch: counted once, however many shards it took.
    pub(crate) fn blame(&mut self, epoch: Epoch) {
        let entries = self.entries.values_mut();
        for entry in entries.filter(|entry| entry.lost_in == Some(epoch)) {
            entry.lost_in = None;
            entry.faults += 1;
        }
    }

    pub(crate) fn get(&self, sequence: SequenceId) -> Option<&Entry<C>> {
        self.entries.get(&sequence)
    }

    /// Who waits, in the order of arrival.
    pub(crate) fn waiting(&self) -> impl Iterator<Item = (SequenceId, &Entry<C>)> {
        let all = self.entries_with_numbers();
        all.filter(|(_, entry)| !entry.is_running())
    }

    pub(crate) fn entries_with_numbers(&self) -> impl Iterator<Item = (SequenceId, &Entry<C>)> {
        self.entries.iter().map(|(sequence, e)| (*sequence, e))
    }

    pub(crate) fn entries(&self) -> impl Iterator<Item = &Entry<C>> {
        self.entries.values()
    }

    pub(crate) fn running(&self) -> impl Iterator<Item = &Entry<C>> {
        self.entries.values().filter(|entry| entry.is_running())
    }
}

impl<C> Entry<C> {
    pub(crate) fn is_running(&self) -> bool {
        self.standing != Standing::Waiting
    }

    pub(crate) fn is_proven(&self) -> bool {
        self.standing == Standing::Proven
    }

    /// No shard has ever worked on it.
    pub(crate) fn is_new(&self) -> bool {
        !self.is_running() && self.losses == 0 && self.delivered.is_empty()
    }

    /// Tokens that its client has.
    pub(crate) fn delivered(&self) -> u32 {
        self.delivered.len() as u32
    }

    pub(crate) fn losses(&self) -> u32 {
        self.losses
    }

    /// Those of its losses that count: shards that failed by themselves in full, others, which somebody
    /// killed or which were cut off, in part.
    pub(crate) fn suspicion(&self) -> u32 {
        self.losses + self.faults * (LOSSES_PER_FAULT - 1)
    }

    /// Positions that the prompt and the tokens so far fill.
    pub(crate) fn positions(&self) -> u32 {
        (self.request.prompt.len() + self.delivered.len()) as u32
    }

    /// A draw's noise depends on its seed and its position alone. The seed is part of the request,
    /// and the position follows from the number of tokens: the shards cannot tell a sequence that
    /// goes on from one that never stopped.
    fn join(&self, sequence: SequenceId, context_tokens: u32) -> Join {
        let Request {
            prompt,
            sampling,
            max_tokens,
            max_tokens_by_default: _,
            stop_tokens,
            priority: _,
            client: _,
            delivered: _,
        } = &self.request;
        let left = max_tokens.saturating_sub(self.delivered.len() as u32);
        let room = context_tokens.saturating_sub(self.positions());
        Join {
            sequence,
            prompt: [&prompt[..], &self.delivered].concat(),
            delivered: self.delivered.len() as u32,
            sampling: sampling.clone(),
            max_tokens: left.min(room).max(1),
            stop_tokens: stop_tokens.clone(),
        }
    }
}

/// So many shards that were killed or cut off count as one that failed by itself: a request may be what
/// the system killed a shard for, out of memory, but somebody who kills shards is nobody's fault.
pub(crate) const LOSSES_PER_FAULT: u32 = 10;
