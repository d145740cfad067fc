//! Admits requests, sends plans, hands tokens to the clients. Head node only.
//!
//! A plan is not a step: the shards decode by themselves, and when this actor is late they go on.
//! What is to be done next is decided in [`admission`](self::admission), from what the
//! [`journal`](self::journal) knows. A lost epoch costs its clients time and nothing else: each
//! request joins the next one with its prompt and the tokens that its client has.

mod journal;
mod queue;
#[cfg(test)]
mod tests;
mod admission;

use std::time::{Duration, Instant};

use actix::{
    Actor, ActorFutureExt, AsyncContext, Context, Handler, Message, StreamHandler, WrapFuture,
};
use futures::{FutureExt, StreamExt, future, stream};
use offbook_protocol::{
    Epoch, Plan, Rank, Request, RequestEvent, RequestFailure, SampledToken, SequenceId, StepOutcome,
};
use offbook_runtime::supervise::{ActorRef, ActorSpec, Supervisor, SupervisorError, once};
use offbook_runtime::{
    ActorPath, AskError, ItemSender, Open, ProcessName, Remote, StreamMessage, Subscription,
    System, TrySendError, clock,
};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use self::admission::{Admission, Serving};
use crate::membership::StepFailed;
use crate::names;
use crate::shard_worker::{ApplyPlan, WatchOutcomes};

pub use self::admission::SchedulerLimits;

/// See the module's own words.
pub struct Scheduler {
    system: System,
    limits: SchedulerLimits,
    admission: Admission<Client>,
    /// Every shard of the epoch under way, in rank order.
    shards: Vec<Remote<ApplyPlan>>,
    /// The epoch that was begun last and not ended: what was asked for an earlier one is dropped.
    current: Option<Epoch>,
    /// When the last tokens came, if others are due after them.
    stepped: Option<Instant>,
}

/// The client's end of a request.
struct Client {
    items: ItemSender<RequestEvent>,
    /// Dropped with this value, and that ends the watch over it.
    _watch: oneshot::Sender<()>,
}

impl Client {
    /// Tells what becomes of the request. A client whose queue is full misses it, and sees the end of
    /// its events instead.
    fn tell(&self, event: RequestEvent) {
        let _ = self.items.try_send(event);
    }
}

impl Scheduler {
    pub fn new(system: System, limits: SchedulerLimits) -> Self {
        Self {
            system,
            limits,
            admission: Admission::new(limits),
            shards: Vec::new(),
            current: None,
            stepped: None,
        }
    }

    /// Starts it, and has its process reach it by its name. It is not to be restarted.
    ///
    /// # Errors
    /// When the supervisor has a scheduler already.
    pub fn supervised(self, by: &Supervisor) -> Result<ActorRef<Self>, SupervisorError> {
        let system = self.system.clone();
        let spec = ActorSpec::new(names::SCHEDULER).mailbox_max(MAILBOX_MAX);
        let scheduler = by.start_actor(spec, once(self))?;
        system.register_stream::<Submit>(names::SCHEDULER, scheduler.recipient());
        Ok(scheduler)
    }

    /// Sends the plans that are due to every shard at once.
    fn send_plans(&mut self, ctx: &mut Context<Self>) {
        while let Some(plan) = self.admission.next_plan() {
            tracing::debug!(
                epoch = %plan.epoch, plan = %plan.number,
                joins = plan.joins.len(), leaves = plan.leaves.len(),
                "a plan"
            );
            self.fan_out(&plan, ctx);
        }
    }

    /// Asked rather than told, so that a shard whose mailbox refuses a plan is known at once: it would miss
    /// the plan's number when the next one comes, and the others wait for it.
    fn fan_out(&self, plan: &Plan, ctx: &mut Context<Self>) {
        let epoch = plan.epoch;
        for (rank, shard) in (0..).map(Rank).zip(&self.shards) {
            let (shard, plan) = (shard.clone(), ApplyPlan(plan.clone()));
            let mut taken = Box::pin(async move { shard.ask(plan, PLAN_DEADLINE).await });
            // Looked at once it is on its way, before any plan that comes after it.
            let sent = taken.as_mut().now_or_never();
            let taken = async move {
                match sent {
                    Some(taken) => taken,
                    None => taken.await,
                }
            };
            ctx.spawn(taken.into_actor(self).map(move |taken, _, ctx| {
                let Err(error) = taken else { return };
                let why = format!("a plan did not reach it: {error}");
                // Whoever lost the link knows better why.
                let grace = match error {
                    AskError::LinkLost(_) => SILENCE_GRACE,
                    _ => Duration::ZERO,
                };
                ctx.run_later(grace, move |this, _| this.report_failure(epoch, rank, why));
            }));
        }
    }

    /// How long steps take is measured while they follow each other.
    fn note_step(&mut self) {
        let now = clock::now();
        if let Some(before) = self.stepped.replace(now)
            && self.admission.running() > 0
        {
            self.admission.note_step((now - before).min(STEP_MAX));
        }
    }

    /// Hands a token to its client.
    fn deliver(&mut self, epoch: Epoch, token: SampledToken) {
        let (sequence, finished) = (token.sequence, token.finish.is_some());
        let Some(client) = self.admission.note(epoch, &token) else {
            return;
        };
        let sent = client.items.try_send(RequestEvent::Token(token));
        if finished {
            self.admission.finish(sequence);
        } else if let Err(error) = sent {
            if matches!(error, TrySendError::Full(_)) {
                tracing::warn!(request = %sequence, "a client reads too slowly and is dropped");
            }
            self.admission.withdraw(sequence);
        }
    }

    /// Ends a request before its last token.
    fn give_up(client: &Client, failure: RequestFailure) {
        tracing::warn!(%failure, "a request is given up");
        client.tell(RequestEvent::Failed(failure));
    }
}

impl Actor for Scheduler {
    type Context = Context<Self>;
}

/// A request: its events come back. Dropping the subscription cancels it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Submit(pub Request);

impl StreamMessage for Submit {
    const NAME: &'static str = "submit";
    const VERSION: u16 = 6;
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
        let (_watch, over) = oneshot::channel();
        let client = Client {
            items: items.clone(),
            _watch,
        };
        match self.admission.submit(request, client) {
            Ok(sequence) => {
                tracing::debug!(request = %sequence, prompt, max_tokens, "accepted");
                // The queue is empty: it takes the first event.
                let _ = items.try_send(RequestEvent::Accepted);
                let arrived = clock::now();
                let watched = Watched {
                    sequence,
                    items,
                    over,
                    last: arrived + self.limits.request_deadline,
                };
                let begun_by = arrived + self.limits.queue_deadline;
                self.watch(watched, begun_by, ctx);
                self.send_plans(ctx);
            }
            Err((rejection, client)) => {
                tracing::debug!(%rejection, prompt, "rejected");
                client.tell(RequestEvent::Rejected(rejection));
            }
        }
    }
}

/// A request that may end before its last token.
struct Watched {
    sequence: SequenceId,
    items: ItemSender<RequestEvent>,
    over: oneshot::Receiver<()>,
    /// When it has to be complete.
    last: Instant,
}

impl Scheduler {
    /// Waits until a request is over, its client has left, or its time is up: at `deadline` a shard
    /// has to have begun with it, and at its last one it has to be complete.
    fn watch(&self, mut watched: Watched, deadline: Instant, ctx: &mut Context<Self>) {
        let deadline = deadline.min(watched.last);
        let watch = async move {
            let end = tokio::select! {
                biased;
                _ = &mut watched.over => None,
                () = watched.items.closed() => Some(Untimely::Left),
                () = tokio::time::sleep_until(deadline.into()) => Some(Untimely::Late),
            };
            (watched, end)
        };
        ctx.spawn(
            watch
                .into_actor(self)
                .map(move |(watched, end), this, ctx| match end {
                    None => {}
                    Some(Untimely::Left) => {
                        this.admission.withdraw(watched.sequence);
                        this.send_plans(ctx);
                    }
                    Some(Untimely::Late) => this.end_late(watched, deadline, ctx),
                }),
        );
    }

    fn end_late(&mut self, watched: Watched, deadline: Instant, ctx: &mut Context<Self>) {
        let failure = if deadline >= watched.last {
            let seconds = self.limits.request_deadline.as_secs();
            RequestFailure::DeadlineExceeded { seconds }
        } else if self.admission.is_unbegun(watched.sequence) {
            RequestFailure::NotBegun {
                seconds: self.limits.queue_deadline.as_secs(),
                retry_after_seconds: self.admission.retry_after_seconds(),
            }
        } else {
            let last = watched.last;
            return self.watch(watched, last, ctx);
        };
        if let Some(client) = self.admission.withdraw(watched.sequence) {
            Self::give_up(&client, failure);
            self.send_plans(ctx);
        }
    }
}

/// How a request ends that is not finished.
enum Untimely {
    Left,
    Late,
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

impl BeginEpoch {
    fn serving(&self) -> Serving {
        Serving {
            epoch: self.epoch,
            context_tokens: self.context_tokens,
            vocabulary: self.vocabulary,
        }
    }
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
        // The cluster says already that it is ready. Listen first, then send plans.
        self.admission.open(begin.serving());
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
                        ctx.add_stream(News::of(outcomes, epoch, begin.sampling_rank));
                        this.begin(begin, ctx);
                    }
                    Ok(_) => {}
                    Err(error) => {
                        let why = format!("the head cannot listen to it: {error}");
                        this.report_failure(epoch, begin.sampling_rank, why);
                    }
                }),
        );
    }
}

impl Scheduler {
    fn begin(&mut self, begin: BeginEpoch, ctx: &mut Context<Self>) {
        let serving = begin.serving();
        let path = |process| ActorPath::new(process, names::SHARD_WORKER);
        self.shards = begin
            .shards
            .into_iter()
            .map(|process| self.system.remote(&path(process)))
            .collect();
        for (client, failure) in self.admission.begin(serving) {
            Self::give_up(&client, failure);
        }
        self.send_plans(ctx);
    }

    /// Nothing comes from the rank that samples, or a plan did not go to a rank. If nobody has ended
    /// the epoch for a better reason, this ends it: it would keep its requests waiting for ever.
    fn report_failure(&self, epoch: Epoch, rank: Rank, why: String) {
        if self.current != Some(epoch) {
            return;
        }
        let membership = ActorPath::new(self.system.process().clone(), names::MEMBERSHIP);
        let failed = StepFailed { epoch, rank, why };
        if let Err(error) = self.system.remote(&membership).try_tell(failed) {
            tracing::error!(%epoch, error = %error.reason, "the membership was not told");
        }
    }
}

/// What comes of listening to an epoch.
enum News {
    Outcome(StepOutcome),
    Silence { epoch: Epoch, rank: Rank },
}

impl News {
    fn of(
        outcomes: Subscription<StepOutcome>,
        epoch: Epoch,
        rank: Rank,
    ) -> impl stream::Stream<Item = Self> {
        let outcomes = outcomes.filter_map(move |outcome| {
            let outcome = outcome.inspect_err(|error| tracing::debug!(%epoch, %error, "broke off"));
            future::ready(outcome.ok().map(Self::Outcome))
        });
        outcomes.chain(stream::once(future::ready(Self::Silence { epoch, rank })))
    }
}

impl StreamHandler<News> for Scheduler {
    fn handle(&mut self, news: News, ctx: &mut Context<Self>) {
        match news {
            News::Outcome(outcome) => {
                self.note_step();
                for token in outcome.tokens {
                    self.deliver(outcome.epoch, token);
                }
                self.send_plans(ctx);
                if self.admission.running() == 0 {
                    self.stepped = None;
                }
            }
            News::Silence { epoch, rank } => {
                ctx.run_later(SILENCE_GRACE, move |this, _| {
                    this.report_failure(epoch, rank, "its outcomes have ended".into());
                });
            }
        }
    }

    /// An epoch's outcomes end with it; the actor goes on.
    fn finished(&mut self, _: &mut Context<Self>) {}
}

/// An epoch is over. What its shards were working on goes on with the next one.
#[derive(Clone, Debug, Message)]
#[rtype(result = "()")]
pub struct EndEpoch {
    pub epoch: Epoch,
}

impl Handler<EndEpoch> for Scheduler {
    type Result = ();

    fn handle(&mut self, end: EndEpoch, _: &mut Context<Self>) {
        if self.current == Some(end.epoch) {
            self.current = None;
            self.shards.clear();
        }
        let Some(ended) = self.admission.end(end.epoch) else {
            return;
        };
        let paused = ended.paused.len();
        tracing::info!(epoch = %end.epoch, paused, "requests wait for the next epoch");
        for sequence in ended.paused {
            if let Some(client) = self.admission.client(sequence) {
                client.tell(RequestEvent::Paused);
            }
        }
        for (client, failure) in ended.given_up {
            Self::give_up(&client, failure);
        }
    }
}

/// A shard's own failure has ended this epoch: a request may be what it fails at.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "()")]
pub struct BlameEpoch {
    pub epoch: Epoch,
}

impl Handler<BlameEpoch> for Scheduler {
    type Result = ();

    fn handle(&mut self, blame: BlameEpoch, ctx: &mut Context<Self>) {
        for (client, failure) in self.admission.blame(blame.epoch) {
            Self::give_up(&client, failure);
        }
        self.send_plans(ctx);
    }
}

/// No epoch will begin before an operator has acted: nobody is kept waiting for one.
#[derive(Clone, Debug, Message)]
#[rtype(result = "()")]
pub struct GiveUp(pub RequestFailure);

impl Handler<GiveUp> for Scheduler {
    type Result = ();

    fn handle(&mut self, give_up: GiveUp, _: &mut Context<Self>) {
        let GiveUp(failure) = give_up;
        self.current = None;
        self.shards.clear();
        for client in self.admission.close(failure.to_string()) {
            Self::give_up(&client, failure.clone());
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
/// A shard's mailbox takes a plan within a round trip; a shard that stands still is lost long before.
const PLAN_DEADLINE: Duration = Duration::from_secs(10);
/// Whoever lost the rank that samples, or heard of its failure, has ended the epoch by then.
const SILENCE_GRACE: Duration = Duration::from_secs(1);
/// Longer than any step but one that waits for somebody who is lost.
const STEP_MAX: Duration = Duration::from_secs(10);
/// Requests enter here too; those beyond it are refused by the runtime as overload.
const MAILBOX_MAX: usize = 1024;
