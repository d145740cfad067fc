//! The scheduler with a shard that takes no plan: the epoch ends, rather than standing still.

use std::sync::Arc;

use actix::Recipient;
use offbook_protocol::{ClientId, Sampling};
use offbook_runtime::supervise::RestartPolicy;
use offbook_runtime::{Identity, SystemConfig, Trust};
use tokio::sync::mpsc;

use super::*;

/// Listens to no plan, as a shard whose mailbox is full; its outcomes go on.
struct Deaf {
    outcomes: Option<Open<WatchOutcomes>>,
}

impl Actor for Deaf {
    type Context = Context<Self>;
}

impl Handler<Open<WatchOutcomes>> for Deaf {
    type Result = ();

    fn handle(&mut self, open: Open<WatchOutcomes>, _: &mut Context<Self>) {
        self.outcomes = Some(open);
    }
}

/// In place of the membership.
struct Told(mpsc::UnboundedSender<StepFailed>);

impl Actor for Told {
    type Context = Context<Self>;
}

impl Handler<StepFailed> for Told {
    type Result = ();

    fn handle(&mut self, failed: StepFailed, _: &mut Context<Self>) {
        self.0.send(failed).unwrap();
    }
}

async fn process(name: &str, folder: &tempfile::TempDir) -> System {
    let key = folder.path().join("key");
    if !key.exists() {
        Identity::generate("here").unwrap().save(&key).unwrap();
    }
    let identity = Identity::load(&key).unwrap();
    let trust = Trust::pinned("test", [("here", identity.key())]);
    let name = format!("here/{name}").parse().unwrap();
    let config = SystemConfig::new(name, Arc::new(identity), trust);
    System::start(config).await.unwrap()
}

#[actix::test]
async fn a_plan_that_a_shard_does_not_take_ends_the_epoch() {
    let folder = tempfile::tempdir().unwrap();
    let head = process("head", &folder).await;
    let shard = process("shard", &folder).await;
    head.learn(shard.process().clone(), shard.local_addr());
    let deaf = Deaf { outcomes: None }.start();
    shard.register_stream::<WatchOutcomes>(names::SHARD_WORKER, deaf.recipient());
    let (tell, mut told) = mpsc::unbounded_channel();
    let membership: Recipient<StepFailed> = Told(tell).start().recipient();
    head.register(names::MEMBERSHIP, membership);
    let limits = SchedulerLimits {
        queue_max: 2,
        queue_tokens_max: 1000,
        queue_deadline: Duration::from_secs(60),
        sequences_max: 2,
        request_deadline: Duration::from_secs(60),
        losses_max: 3,
    };
    let (supervisor, _news) = Supervisor::new(RestartPolicy::default());
    let scheduler = Scheduler::new(head.clone(), limits);
    let scheduler = scheduler.supervised(&supervisor).unwrap();
    let begin = BeginEpoch {
        epoch: Epoch(1),
        shards: vec![shard.process().clone()],
        sampling_rank: Rank(0),
        context_tokens: 32,
        vocabulary: 8,
    };
    scheduler.ask(begin, Duration::from_secs(30)).await.unwrap();
    let request = Request {
        prompt: vec![1],
        sampling: Sampling::greedy(),
        max_tokens: 4,
        max_tokens_by_default: false,
        stop_tokens: Vec::new(),
        priority: 0,
        client: ClientId::default(),
        delivered: Vec::new(),
    };
    let path = ActorPath::new(head.process().clone(), names::SCHEDULER);
    let submit = head.remote_stream::<Submit>(&path);
    let _events = submit
        .subscribe(Submit(request), Duration::from_secs(60))
        .await
        .unwrap();
    let failed = tokio::time::timeout(Duration::from_secs(30), told.recv());
    let failed = failed.await.expect("the membership is told").unwrap();
    assert_eq!((failed.epoch, failed.rank), (Epoch(1), Rank(0)));
    assert!(
        failed.why.contains("a plan did not reach it"),
        "{}",
        failed.why
    );
}
