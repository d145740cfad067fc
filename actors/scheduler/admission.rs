//! Who is taken in, who waits, who goes on, and what the next plan says: pure, without IO or clock.

use std::time::Duration;

use offbook_protocol::{
    Epoch, Plan, PlanNumber, Rejection, Request, RequestFailure, SampledToken, SequenceId,
};

use super::journal::{Entry, Journal, LOSSES_PER_FAULT};
use super::queue::Queue;

/// The bounds of the scheduler.
#[derive(Clone, Copy, Debug)]
pub struct SchedulerLimits {
    /// Requests that no shard has begun at most; the next one is refused.
    pub queue_max: u32,
    /// Tokens at most that their prompts have and that may be generated for them. A single request
    /// that has more may wait alone.
    pub queue_tokens_max: u64,
    /// How long a request may wait for a shard to begin with it.
    pub queue_deadline: Duration,
    /// Sequences that the shards work on at the same time at most.
    pub sequences_max: u32,
    /// How long a request may take from its arrival to its last token.
    pub request_deadline: Duration,
    /// A request that runs while so many epochs in a row are ended by shards that fail, without a token
    /// in between, is given up; at least 1. Epochs that end otherwise count a tenth.
    pub losses_max: u32,
}

impl SchedulerLimits {
    /// So many requests of one client an empty queue takes. Who sends more at once, as the answers to
    /// one question, can only be refused, however long it waits.
    pub fn requests_at_once_max(&self) -> u32 {
        Queue::client_requests_max(self.queue_max)
    }
}

/// All requests that are not finished. `C` is the client's end of one.
///
/// There are at most `queue_max + sequences_max` of them, none longer than the context, and those that
/// an earlier process of the head had within the same bounds.
#[derive(Debug)]
pub(crate) struct Admission<C> {
    limits: SchedulerLimits,
    journal: Journal<C>,
    queue: Queue,
    leaving: Vec<SequenceId>,
    last_plan: PlanNumber,
    serving: Option<Serving>,
    /// What requests have to fit: that epoch, or while none is under way the last one that was heard of.
    latest: Option<Serving>,
    /// Why requests are refused rather than queued while no epoch is under way.
    closed: Option<String>,
}

/// The epoch under way and what its model can take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Serving {
    pub(crate) epoch: Epoch,
    pub(crate) context_tokens: u32,
    pub(crate) vocabulary: u32,
}

/// What the end of an epoch means for those that were running.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Ended<C> {
    /// They go on with the next epoch.
    pub(crate) paused: Vec<SequenceId>,
    /// They have been there too often.
    pub(crate) given_up: Vec<(C, RequestFailure)>,
}

impl<C> Admission<C> {
    pub(crate) fn new(limits: SchedulerLimits) -> Self {
        Self {
            limits,
            journal: Journal::new(),
            queue: Queue::new(limits.queue_max, limits.queue_tokens_max),
            leaving: Vec::new(),
            last_plan: PlanNumber(0),
            serving: None,
            latest: None,
            closed: Some("the model is still loading".into()),
        }
    }

    /// Takes a request into the queue, or says why not. While shards come back after a loss,
    /// requests wait; before the first epoch, and when none can come, they are refused.
    ///
    /// # Errors
    /// The reason, and the client's end back.
    pub(crate) fn submit(
        &mut self,
        request: Request,
        client: C,
    ) -> Result<SequenceId, (Rejection, C)> {
        match self.check(&request) {
            Ok(()) => {
                self.queue.arrive(request.client, &self.journal);
                Ok(self.journal.open(request, client))
            }
            Err(rejection) => Err((rejection, client)),
        }
    }

    fn check(&self, request: &Request) -> Result<(), Rejection> {
        let invalid = |detail: String| Err(Rejection::Invalid { detail });
        if let Some(detail) = &self.closed {
            return Err(Rejection::NotReady {
                detail: detail.clone(),
            });
        }
        if request.prompt.is_empty() || request.max_tokens == 0 {
            return invalid("a request needs a prompt and at least one token to generate".into());
        }
        if request.delivered.len() >= request.max_tokens as usize {
            return invalid("an answer that is complete cannot go on".into());
        }
        let priorities = Request::PRIORITY_MIN..=Request::PRIORITY_MAX;
        if !priorities.contains(&request.priority) {
            return invalid(format!("the priority must be in {priorities:?}"));
        }
        if let Err(error) = request.sampling.validate() {
            return invalid(error.to_string());
        }
        if let Some(serving) = &self.latest {
            let positions = request.prompt.len() + request.delivered.len();
            check_size(positions as u32, request, serving)?;
            check_length(request, serving.context_tokens)?;
        }
        let places = self.limits.sequences_max;
        self.queue.check(request, &self.journal, places)
    }

    /// Notes a token of the shards and says whose it is. Whatever does not belong to the epoch under
    /// way is nobody's: its place in the answer is, or will be, filled by the present shards.
    pub(crate) fn note(&mut self, epoch: Epoch, token: &SampledToken) -> Option<&C> {
        if self.epoch() != Some(epoch) {
            return None;
        }
        self.queue.note(&self.journal, token.sequence);
        self.journal.note(token)
    }

    /// A step of the shards has taken so long: what a client is told to wait follows from it.
    pub(super) fn note_step(&mut self, took: Duration) {
        self.queue.note_step(took);
    }

    /// When another one has a place, by what is running.
    pub(super) fn retry_after_seconds(&self) -> u32 {
        self.queue.retry_after_seconds(&self.journal, 1)
    }

    /// No shard has begun with it.
    pub(super) fn is_unbegun(&self, sequence: SequenceId) -> bool {
        self.journal.get(sequence).is_some_and(Entry::is_new)
    }

    /// The request is over before its last token, and its client is handed out for the last time.
    /// The place among the shards is free with the next plan.
    pub(crate) fn withdraw(&mut self, sequence: SequenceId) -> Option<C> {
        let entry = self.journal.close(sequence)?;
        self.queue.forget(&self.journal);
        if entry.is_running() {
            self.leaving.push(sequence);
        }
        Some(entry.client)
    }

    /// The shards have drawn the last token of this sequence.
    pub(crate) fn finish(&mut self, sequence: SequenceId) {
        if let Some(entry) = self.journal.close(sequence) {
            self.queue.note_answer(entry.delivered());
            self.queue.forget(&self.journal);
        }
    }

    /// The plan that is due now, if anything is to change. Another one may be due after it: a plan has
    /// to fit into a message.
    pub(crate) fn next_plan(&mut self) -> Option<Plan> {
        let serving = self.serving?;
        let mut joins = Vec::new();
        let mut positions = 0;
        while let Some((sequence, more)) = self.next_to_join()
            && (joins.is_empty() || positions + more <= PLAN_POSITIONS_MAX)
        {
            positions += more;
            self.queue.join(&self.journal, sequence);
            joins.extend(self.journal.join(sequence, serving.context_tokens));
        }
        let leaves = std::mem::take(&mut self.leaving);
        if joins.is_empty() && leaves.is_empty() {
            return None;
        }
        self.last_plan = self.last_plan.next();
        Some(Plan {
            epoch: serving.epoch,
            number: self.last_plan,
            joins,
            leaves,
        })
    }

    /// Who may join now, and the positions that it fills already.
    ///
    /// Whoever the [`queue`](super::queue) has first. A request on its last chance joins only those that have drawn a token in this epoch, and nobody
    /// joins it before it has: when the epoch is lost nevertheless, no other can be the cause.
    fn next_to_join(&self) -> Option<(SequenceId, u32)> {
        let (sequence, next) = self.queue.next(&self.journal)?;
        let on_trial = |entry: &Entry<C>| self.is_suspect(entry) && !entry.is_proven();
        let is_full = self.running() >= self.limits.sequences_max;
        if is_full || self.journal.running().any(on_trial) {
            return None;
        }
        if self.is_suspect(next) && !self.journal.running().all(Entry::is_proven) {
            return None;
        }
        Some((sequence, next.positions()))
    }

    fn is_suspect(&self, entry: &Entry<C>) -> bool {
        entry.losses() > 0 && entry.suspicion() + LOSSES_PER_FAULT >= self.suspicion_max()
    }

    fn suspicion_max(&self) -> u32 {
        self.limits.losses_max.saturating_mul(LOSSES_PER_FAULT)
    }

    /// An epoch is about to begin: whoever fits it is taken from now on, and waits.
    pub(crate) fn open(&mut self, coming: Serving) {
        self.latest = Some(coming);
        self.closed = None;
    }

    /// An epoch begins: plans count from 1 again. Requests that do not fit its model are handed back.
    pub(crate) fn begin(&mut self, serving: Serving) -> Vec<(C, RequestFailure)> {
        self.open(serving);
        self.serving = Some(serving);
        self.last_plan = PlanNumber(0);
        self.leaving.clear();
        let misfit =
            |entry: &Entry<C>| check_size(entry.positions(), &entry.request, &serving).err();
        let misfits = self.journal.close_if(|entry| misfit(entry).is_some());
        let given_up = misfits.into_iter().filter_map(|entry| {
            let detail = misfit(&entry)?.to_string();
            Some((entry.client, RequestFailure::ClusterFailed { detail }))
        });
        given_up.collect()
    }

    /// The epoch is over. `None` when it was not the one under way.
    pub(crate) fn end(&mut self, epoch: Epoch) -> Option<Ended<C>> {
        self.serving.take_if(|serving| serving.epoch == epoch)?;
        self.leaving.clear();
        let mut paused = self.journal.interrupt(epoch);
        let given_up = self.give_suspects_up();
        paused.retain(|sequence| self.journal.get(*sequence).is_some());
        Some(Ended { paused, given_up })
    }

    /// It has become known that a shard's own failure ended this epoch: what ran in it is suspected the
    /// more. Hands out those that were there too often.
    pub(crate) fn blame(&mut self, epoch: Epoch) -> Vec<(C, RequestFailure)> {
        self.journal.blame(epoch);
        self.give_suspects_up()
    }

    fn give_suspects_up(&mut self) -> Vec<(C, RequestFailure)> {
        let most = self.suspicion_max();
        let is_guilty = |entry: &Entry<C>| entry.losses() > 0 && entry.suspicion() >= most;
        let running = self.journal.entries_with_numbers();
        let running = running.filter(|(_, entry)| entry.is_running() && is_guilty(entry));
        self.leaving.extend(running.map(|(sequence, _)| sequence));
        let given_up = self.journal.close_if(is_guilty).into_iter();
        let given_up = given_up.map(|entry| {
            let losses = entry.losses();
            (entry.client, RequestFailure::LostRepeatedly { losses })
        });
        given_up.collect()
    }

    /// No epoch will come before an operator has acted: hands out all clients, and refuses requests
    /// until one does.
    pub(crate) fn close(&mut self, why: String) -> Vec<C> {
        self.serving = None;
        self.leaving.clear();
        self.closed = Some(why);
        self.journal.close_all()
    }

    pub(crate) fn client(&self, sequence: SequenceId) -> Option<&C> {
        self.journal.get(sequence).map(|entry| &entry.client)
    }

    pub(crate) fn epoch(&self) -> Option<Epoch> {
        self.serving.map(|serving| serving.epoch)
    }

    pub(crate) fn running(&self) -> u32 {
        self.journal.running().count() as u32
    }

    /// Those that go on with the next epoch included.
    pub(crate) fn queued(&self) -> u32 {
        self.journal.waiting().count() as u32
    }
}

/// `positions` are those that the request fills before its next token.
fn check_size(positions: u32, request: &Request, serving: &Serving) -> Result<(), Rejection> {
    if positions >= serving.context_tokens {
        return Err(Rejection::TooLong {
            prompt_tokens: positions,
            completion_tokens: None,
            context_tokens: serving.context_tokens,
        });
    }
    let vocabulary = serving.vocabulary;
    let tokens = request.prompt.iter().chain(&request.delivered);
    let biased = request.sampling.logit_bias.iter().map(|entry| &entry.token);
    let unknown = tokens.chain(biased).find(|token| **token >= vocabulary);
    match unknown {
        None => Ok(()),
        Some(token) => Err(Rejection::Invalid {
            detail: format!("token {token} is not in the vocabulary of {vocabulary}"),
        }),
    }
}

/// An answer whose length was asked for has to have room for it. One that was begun before has been taken with
/// that length, and goes on as far as it can.
fn check_length(request: &Request, context_tokens: u32) -> Result<(), Rejection> {
    let (prompt, max_tokens) = (request.prompt.len() as u64, request.max_tokens);
    let fits = prompt + u64::from(max_tokens) <= u64::from(context_tokens);
    if fits || request.max_tokens_by_default || !request.delivered.is_empty() {
        return Ok(());
    }
    Err(Rejection::TooLong {
        prompt_tokens: prompt as u32,
        completion_tokens: Some(max_tokens),
        context_tokens,
    })
}

/// Token ids in one plan, but for a single sequence that has more: at five bytes each they leave
/// room in a message of 1 MiB.
const PLAN_POSITIONS_MAX: u32 = 180_000;

#[cfg(test)]
mod tests;
