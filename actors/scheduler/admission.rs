//! Who is taken in, who waits, and what the next plan says: pure, without IO or clock.

use std::collections::{HashMap, VecDeque};

use offbook_protocol::{Epoch, Join, Plan, PlanNumber, Rejection, Request, SequenceId};

/// The bounds of the scheduler.
#[derive(Clone, Copy, Debug)]
pub struct SchedulerLimits {
    /// Requests that wait at most; the next one is refused.
    pub queue_max: u32,
    /// Sequences that the shards work on at the same time at most.
    pub sequences_max: u32,
}

/// All requests that are not finished. `C` is the client's end of one.
#[derive(Debug)]
pub(super) struct Admission<C> {
    limits: SchedulerLimits,
    queue: VecDeque<(SequenceId, Request)>,
    running: HashMap<SequenceId, ()>,
    leaving: Vec<SequenceId>,
    clients: HashMap<SequenceId, C>,
    last_sequence: SequenceId,
    last_plan: PlanNumber,
    serving: Option<Serving>,
    ever_served: bool,
}

/// The epoch under way and what its model can take.
#[derive(Clone, Copy, Debug)]
pub(super) struct Serving {
    pub(super) epoch: Epoch,
    pub(super) context_tokens: u32,
    pub(super) vocabulary: u32,
}

impl<C> Admission<C> {
    pub(super) fn new(limits: SchedulerLimits) -> Self {
        Self {
            limits,
            queue: VecDeque::new(),
            running: HashMap::new(),
            leaving: Vec::new(),
            clients: HashMap::new(),
            last_sequence: SequenceId(0),
            last_plan: PlanNumber(0),
            serving: None,
            ever_served: false,
        }
    }

    /// Takes a request into the queue, or says why not. While shards come back after a loss,
    /// requests wait; before the first epoch they are refused.
    ///
    /// # Errors
    /// The reason, and the client's end back.
    pub(super) fn submit(
        &mut self,
        request: Request,
        client: C,
    ) -> Result<SequenceId, (Rejection, C)> {
        if let Err(rejection) = self.check(&request) {
            return Err((rejection, client));
        }
        self.last_sequence = self.last_sequence.next();
        let sequence = self.last_sequence;
        self.queue.push_back((sequence, request));
        self.clients.insert(sequence, client);
        Ok(sequence)
    }

    fn check(&self, request: &Request) -> Result<(), Rejection> {
        let invalid = |detail: String| Err(Rejection::Invalid { detail });
        if !self.ever_served {
            return Err(Rejection::NotReady {
                detail: "the model is still loading".into(),
            });
        }
        if request.prompt.is_empty() || request.max_tokens == 0 {
            return invalid("a request needs a prompt and at least one token to generate".into());
        }
        if let Err(error) = request.sampling.validate() {
            return invalid(error.to_string());
        }
        if let Some(serving) = &self.serving {
            check_size(request, serving)?;
        }
        let queued = self.queue.len() as u32;
        if queued >= self.limits.queue_max {
            return Err(Rejection::Overloaded { queued });
        }
        Ok(())
    }

    /// The client of this sequence has left. Its place is free with the next plan.
    pub(super) fn leave(&mut self, sequence: SequenceId) {
        if self.clients.remove(&sequence).is_none() {
            return;
        }
        self.queue.retain(|(queued, _)| *queued != sequence);
        if self.running.remove(&sequence).is_some() {
            self.leaving.push(sequence);
        }
    }

    /// The shards have finished this sequence; its client is handed out for the last time.
    pub(super) fn finish(&mut self, sequence: SequenceId) -> Option<C> {
        self.running.remove(&sequence);
        self.clients.remove(&sequence)
    }

    pub(super) fn client(&self, sequence: SequenceId) -> Option<&C> {
        self.clients.get(&sequence)
    }

    /// The plan that is due now, if anything is to change.
    pub(super) fn next_plan(&mut self) -> Option<Plan> {
        let serving = self.serving?;
        let mut joins = Vec::new();
        while self.running.len() < self.limits.sequences_max as usize
            && let Some((sequence, request)) = self.queue.pop_front()
        {
            self.running.insert(sequence, ());
            joins.push(Join {
                sequence,
                max_tokens: request
                    .max_tokens
                    .min(
                        serving
                            .context_tokens
                            .saturating_sub(request.prompt.len() as u32),
                    )
                    .max(1),
                prompt: request.prompt,
                sampling: request.sampling,
                stop_tokens: request.stop_tokens,
            });
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

    /// An epoch begins: plans count from 1 again. Requests that waited without a model to measure
    /// them by, and do not fit this one, are handed back.
    pub(super) fn begin(&mut self, serving: Serving) -> Vec<(Rejection, C)> {
        self.serving = Some(serving);
        self.ever_served = true;
        self.last_plan = PlanNumber(0);
        self.leaving.clear();
        let (fits, misfits): (VecDeque<_>, VecDeque<_>) = std::mem::take(&mut self.queue)
            .into_iter()
            .partition(|(_, request)| check_size(request, &serving).is_ok());
        self.queue = fits;
        let reject = |(sequence, request): (SequenceId, Request)| {
            let rejection = check_size(&request, &serving).err()?;
            Some((rejection, self.clients.remove(&sequence)?))
        };
        misfits.into_iter().filter_map(reject).collect()
    }

    /// The epoch is over: hands out the clients of the sequences that the shards were working on.
    pub(super) fn end(&mut self, epoch: Epoch) -> Vec<C> {
        if self.serving.is_none_or(|serving| serving.epoch != epoch) {
            return Vec::new();
        }
        self.serving = None;
        self.leaving.clear();
        let running = std::mem::take(&mut self.running);
        running
            .into_keys()
            .filter_map(|sequence| self.clients.remove(&sequence))
            .collect()
    }

    pub(super) fn epoch(&self) -> Option<Epoch> {
        self.serving.map(|serving| serving.epoch)
    }

    pub(super) fn running(&self) -> u32 {
        self.running.len() as u32
    }

    pub(super) fn queued(&self) -> u32 {
        self.queue.len() as u32
    }
}

fn check_size(request: &Request, serving: &Serving) -> Result<(), Rejection> {
    let prompt_tokens = request.prompt.len() as u32;
    if prompt_tokens >= serving.context_tokens {
        let context_tokens = serving.context_tokens;
        return Err(Rejection::TooLong {
            prompt_tokens,
            context_tokens,
        });
    }
    match request
        .prompt
        .iter()
        .find(|token| **token >= serving.vocabulary)
    {
        None => Ok(()),
        Some(token) => Err(Rejection::Invalid {
            detail: format!(
                "token {token} is not in the vocabulary of {}",
                serving.vocabulary
            ),
        }),
    }
}

#[cfg(test)]
mod tests {
    use offbook_protocol::Sampling;

    use super::*;

    const LIMITS: SchedulerLimits = SchedulerLimits {
        queue_max: 2,
        sequences_max: 2,
    };

    fn request(prompt_tokens: usize) -> Request {
        Request {
            prompt: vec![1; prompt_tokens],
            sampling: Sampling::greedy(),
            max_tokens: 100,
            stop_tokens: Vec::new(),
        }
    }

    fn serving(epoch: u64) -> Serving {
        Serving {
            epoch: Epoch(epoch),
            context_tokens: 32,
            vocabulary: 8,
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_with_the_numbers() {
        let mut admission = Admission::new(LIMITS);
        assert!(matches!(
            admission.submit(request(1), 'a'),
            Err((Rejection::NotReady { .. }, 'a'))
        ));
        admission.begin(serving(1));
        let too_long = Rejection::TooLong {
            prompt_tokens: 32,
            context_tokens: 32,
        };
        assert_eq!(admission.submit(request(32), 'a'), Err((too_long, 'a')));
        let foreign = Request {
            prompt: vec![8],
            ..request(1)
        };
        assert!(matches!(
            admission.submit(foreign, 'a'),
            Err((Rejection::Invalid { .. }, _))
        ));
        admission.submit(request(1), 'b').unwrap();
        admission.submit(request(1), 'c').unwrap();
        let overloaded = Rejection::Overloaded { queued: 2 };
        assert_eq!(admission.submit(request(1), 'd'), Err((overloaded, 'd')));
    }

    #[test]
    fn a_client_that_leaves_frees_its_place_with_the_next_plan() {
        let mut admission = Admission::new(LIMITS);
        admission.begin(serving(1));
        let first = admission.submit(request(4), 'a').unwrap();
        admission.submit(request(4), 'b').unwrap();
        let plan = admission.next_plan().unwrap();
        assert_eq!((plan.number, plan.joins.len()), (PlanNumber(1), 2));
        assert_eq!(plan.joins[0].max_tokens, 28, "no further than the context");
        let third = admission.submit(request(4), 'c').unwrap();
        assert_eq!(admission.next_plan(), None, "both places are taken");
        admission.leave(first);
        let plan = admission.next_plan().unwrap();
        assert_eq!(plan.leaves, [first]);
        assert_eq!(plan.joins[0].sequence, third);
        assert_eq!((admission.running(), admission.queued()), (2, 0));
    }

    #[test]
    fn a_lost_epoch_hands_out_who_was_running_and_keeps_who_waits() {
        let mut admission = Admission::new(SchedulerLimits {
            queue_max: 2,
            sequences_max: 1,
        });
        admission.begin(serving(1));
        let running = admission.submit(request(1), 'a').unwrap();
        admission.submit(request(9), 'b').unwrap();
        admission.next_plan().unwrap();
        assert!(admission.end(Epoch(9)).is_empty(), "another epoch");
        assert_eq!(admission.end(Epoch(1)), ['a']);
        assert!(admission.client(running).is_none());
        assert_eq!(admission.next_plan(), None);
        let smaller = Serving {
            context_tokens: 5,
            ..serving(2)
        };
        assert_eq!(
            admission.begin(smaller).len(),
            1,
            "it does not fit any more"
        );
        assert_eq!(admission.queued(), 0);
    }
}
