//! Admits requests, sends plans, hands tokens to the clients. Head node only.
//!
//! A plan is not a step: the shards decode by themselves, and when this actor is late they go on.
//! What is to be done next is decided in [`admission`](self::admission).

mod admission;

use std::time::Duration;

use actix::{
    Actor, ActorFutureExt, AsyncContext, Context, Handler, Message, StreamHandler, WrapFuture,
};
use offbook_protocol::{Epoch, Plan, Rank, Request, RequestEvent, SampledToken, StepOutcome};
use offbook_runtime::{
    ActorPath, ItemSender, Open, ProcessName, Remote, StreamLost, StreamMessage, System,
    TrySendError,
};
use serde::{Deserialize, Serialize};

use self::admission::{Admission, Serving};
use crate::names;
use crate::shard_worker::{ApplyPlan, WatchOutcomes};

pub use self::admission::SchedulerLimits;

/// See the module's own words.
pub struct Scheduler {
    system: System,
    admission: Admission<ItemSender<RequestEvent>>,
    /// Every shard of the epoch under way, in rank order.
    shards: Vec<Remote<ApplyPlan>>,
    /// The epoch that was begun last and not ended: what was asked for an earlier one is dropped.
    current: Option<Epoch>,
}

impl Scheduler {
    pub fn new(system: System, limits: SchedulerLimits) -> Self {
        Self {
            system,
            admission: Admission::new(limits),
            shards: Vec::new(),
            current: None,
        }
    }

    /// Sends the plan that is due to every shard at once.
    fn send_plan(&mut self) {
        if let Some(plan) = self.admission.next_plan() {
            tracing::debug!(
                epoch = %plan.epoch, plan = %plan.number,
                joins = plan.joins.len(), leaves = plan.leaves.len(),
                "a plan"
            );
            self.fan_out(&plan);
        }
    }

    fn fan_out(&self, plan: &Plan) {
        for shard in &self.shards {
            if let Err(error) = shard.try_tell(ApplyPlan(plan.clone())) {
                // The shard will miss the plan's number and end the epoch; the membership knows.
                tracing::warn!(shard = %shard.path(), error = %error.reason, "a plan was not sent");
            }
        }
    }

    /// Hands a token to its client; true when a place became free.
    fn deliver(&mut self, token: SampledToken) -> bool {
        let sequence = token.sequence;
        let finished = token.finish.is_some();
        let Some(client) = self.admission.client(sequence) else {
            return false;
        };
        match client.try_send(RequestEvent::Token(token)) {
            Ok(()) if !finished => return false,
            Ok(()) => drop(self.admission.finish(sequence)),
            Err(_) if finished => drop(self.admission.finish(sequence)),
            Err(TrySendError::Closed(_)) => self.admission.leave(sequence),
            Err(TrySendError::Full(_)) => {
                tracing::warn!(request = %sequence, "a client reads too slowly and is dropped");
                self.admission.leave(sequence);
            }
        }
        true
    }
}

impl Actor for Scheduler {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Context<Self>) {
        ctx.set_mailbox_capacity(MAILBOX_MAX);
        self.system
            .register_stream::<Submit>(names::SCHEDULER, ctx.address().recipient());
    }
}

/// A request: its events come back. Dropping the subscription cancels it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Submit(pub Request);

impl StreamMessage for Submit {
    const NAME: &'static str = "submit";
    type Item = RequestEvent;
}

impl Handler<Open<Submit>> for Scheduler {
    type Result = ();

    fn handle(&mut self, open: Open<Submit>, ctx: &mut Context<Self>) {
        let Open {
            message: Submit(request),
            items,
        } = open;
        let (prompt, max_tokens) = (request.prompt.len(), request.max_tokens);
        match self.admission.submit(request, items.clone()) {
            Ok(sequence) => {
                tracing::debug!(request = %sequence, prompt, max_tokens, "accepted");
                // The queue is empty: it takes the first event.
                let _ = items.try_send(RequestEvent::Accepted);
                let left = async move { items.closed().await }.into_actor(self);
                ctx.spawn(left.map(move |(), this, _| {
                    this.admission.leave(sequence);
                    this.send_plan();
                }));
                self.send_plan();
            }
            Err((rejection, items)) => {
                tracing::debug!(%rejection, prompt, "rejected");
                let _ = items.try_send(RequestEvent::Rejected(rejection));
            }
        }
    }
}

/// The shards of an epoch are ready for plans.
#[derive(Clone, Debug, Message)]
#[rtype(result = "()")]
pub struct BeginEpoch {
    pub epoch: Epoch,
    /// In rank order.
    pub shards: Vec<ProcessName>,
    /// Who reports the tokens.
    pub sampling_rank: Rank,
    /// Positions that a sequence may reach.
    pub context_tokens: u32,
    /// Token ids are below this.
    pub vocabulary: u32,
}

impl Handler<BeginEpoch> for Scheduler {
    type Result = ();

    fn handle(&mut self, begin: BeginEpoch, ctx: &mut Context<Self>) {
        let path = |process| ActorPath::new(process, names::SHARD_WORKER);
        let Some(sampler) = begin.shards.get(begin.sampling_rank.index()) else {
            return;
        };
        let outcomes = self
            .system
            .remote_stream::<WatchOutcomes>(&path(sampler.clone()));
        let epoch = begin.epoch;
        self.current = Some(epoch);
        // Listen first, then send plans.
        let subscribe = async move {
            outcomes
                .subscribe(WatchOutcomes { epoch }, SUBSCRIBE_DEADLINE)
                .await
        };
        ctx.spawn(
            subscribe
                .into_actor(self)
                .map(move |subscribed, this, ctx| match subscribed {
                    Ok(outcomes) if this.current == Some(epoch) => {
                        ctx.add_stream(outcomes);
                        this.begin(begin);
                    }
                    Ok(_) => {}
                    Err(error) => {
                        tracing::error!(%epoch, %error, "cannot listen to the sampling rank")
                    }
                }),
        );
    }
}

impl Scheduler {
    fn begin(&mut self, begin: BeginEpoch) {
        let path = |process| ActorPath::new(process, names::SHARD_WORKER);
        self.shards = begin
            .shards
            .into_iter()
            .map(|process| self.system.remote(&path(process)))
            .collect();
        let serving = Serving {
            epoch: begin.epoch,
            context_tokens: begin.context_tokens,
            vocabulary: begin.vocabulary,
        };
        for (rejection, client) in self.admission.begin(serving) {
            // Its `Accepted` has been read or waits there: there is room for one more.
            let detail = rejection.to_string();
            let _ = client.try_send(RequestEvent::Lost { detail });
        }
        self.send_plan();
    }
}

impl StreamHandler<Result<StepOutcome, StreamLost>> for Scheduler {
    fn handle(&mut self, outcome: Result<StepOutcome, StreamLost>, _: &mut Context<Self>) {
        let outcome = match outcome {
            Ok(outcome) => outcome,
            Err(error) => {
                tracing::debug!(%error, "the outcomes ended");
                return;
            }
        };
        if self.admission.epoch() != Some(outcome.epoch) {
            return;
        }
        let mut places_freed = false;
        for token in outcome.tokens {
            places_freed |= self.deliver(token);
        }
        if places_freed {
            self.send_plan();
        }
    }

    /// An epoch's outcomes end with it; the actor goes on.
    fn finished(&mut self, _: &mut Context<Self>) {}
}

/// An epoch is over, and with it everything its shards were working on.
#[derive(Clone, Debug, Message)]
#[rtype(result = "()")]
pub struct EndEpoch {
    pub epoch: Epoch,
    pub why: String,
}

impl Handler<EndEpoch> for Scheduler {
    type Result = ();

    fn handle(&mut self, end: EndEpoch, _: &mut Context<Self>) {
        if self.current == Some(end.epoch) {
            self.current = None;
            self.shards.clear();
        }
        for client in self.admission.end(end.epoch) {
            let detail = end.why.clone();
            let _ = client.try_send(RequestEvent::Lost { detail });
        }
    }
}

/// How many requests there are now.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "RequestCounts")]
pub struct CountRequests;

/// See [`CountRequests`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, actix::MessageResponse)]
pub struct RequestCounts {
    pub running: u32,
    pub queued: u32,
}

impl Handler<CountRequests> for Scheduler {
    type Result = RequestCounts;

    fn handle(&mut self, _: CountRequests, _: &mut Context<Self>) -> RequestCounts {
        RequestCounts {
            running: self.admission.running(),
            queued: self.admission.queued(),
        }
    }
}

/// A shard that was just told to serve answers within a round trip.
const SUBSCRIBE_DEADLINE: Duration = Duration::from_secs(10);
/// Requests enter here too; those beyond it are refused by the runtime as overload.
const MAILBOX_MAX: usize = 1024;
