//! `offbook bench api`: what everything around the engine adds to a token. A scripted shard draws at a
//! fixed step; the real scheduler, real messages over QUIC and the real API carry its tokens to a client.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use actix::Arbiter;
use anyhow::{Context, Result, anyhow, ensure};
use futures::FutureExt;
use futures::future::BoxFuture;
use offbook_actors::{BeginEpoch, Drawn, Scheduler, ScriptedShard, Submit, names};
use offbook_api::text::{Defaults, Text};
use offbook_api::{Backend, Service, Tokens};
use offbook_protocol::{ClusterReport, Epoch, Rank, Rejection, Request, ShardSteps};
use offbook_runtime::supervise::{RestartPolicy, Supervisor};
use offbook_runtime::{
    ActorPath, Identity, ProcessName, RemoteStream, System, SystemConfig, Trust,
};
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::oneshot;

use super::serve::client::{Answer, Server};
use super::serve::figures::percentile;
use crate::cli::BenchApi;
use crate::cluster_file::Limits;
use crate::{backend, demo_model};

/// Must be called within an actix system.
pub(super) async fn run(options: BenchApi) -> Result<()> {
    let folder = tempfile::tempdir().context("cannot make a temporary folder")?;
    let model = demo_model::write_to(folder.path())?;
    let text = Text::open(&model)?;
    let token = *text
        .encode("a")?
        .first()
        .context("the demo model reads text")?;
    let key = folder.path().join("key");
    Identity::generate(NODE)?.save(&key)?;
    let head = process("head", &key).await?;
    let (shard, shards_address, drawn, _keep) = {
        let arbiter = Arbiter::new();
        let (tell, told) = oneshot::channel();
        let step = options.step;
        arbiter.spawn(async move {
            // Nobody waits for it when the command was interrupted.
            let _ = tell.send(shard(&key, step, token).await);
        });
        let (system, drawn) = told.await.context("the shard has ended")??;
        (
            system.process().clone(),
            system.local_addr(),
            drawn,
            (arbiter, system),
        )
    };
    head.learn(shard.clone(), shards_address);
    let (supervisor, _news) = Supervisor::new(RestartPolicy::default());
    let scheduler = Scheduler::new(head.clone(), Limits::default().scheduler());
    let scheduler = scheduler.supervised(&supervisor)?;
    let begin = BeginEpoch {
        epoch: EPOCH,
        shards: vec![shard],
        sampling_rank: Rank(0),
        context_tokens: CONTEXT,
        vocabulary: u32::MAX,
    };
    scheduler.ask(begin, BEGIN_DEADLINE).await?;
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("http://{}", listener.local_addr()?);
    let path = ActorPath::new(head.process().clone(), names::SCHEDULER);
    let service = Service {
        backend: Arc::new(Scripted(head.remote_stream(&path))),
        text: Some(text),
        defaults: Defaults::default(),
        model_id: "scripted".into(),
        context_tokens: CONTEXT,
        vocabulary: u32::MAX,
        answers_max: u32::MAX,
        created: 0,
        journal: None,
        origins: Vec::new(),
    };
    let never = std::future::pending();
    actix::spawn(offbook_api::serve(
        listener,
        Arc::new(service),
        Duration::ZERO,
        never,
    ));
    let added = {
        let (tell, told) = oneshot::channel();
        let options = options.clone();
        // The client is another program: it does not share the server's thread.
        thread::spawn(move || tell.send(client(&url, &options, &drawn)));
        told.await.context("the client has ended")??
    };
    print(&options, added);
    Ok(())
}

async fn process(name: &str, key: &std::path::Path) -> Result<System> {
    let identity = Identity::load(key)?;
    let trust = Trust::pinned("bench", [(NODE, identity.key())]);
    let name = ProcessName::new(format!("{NODE}/{name}"))?;
    Ok(System::start(SystemConfig::new(name, Arc::new(identity), trust)).await?)
}

async fn shard(key: &std::path::Path, step: Duration, token: u32) -> Result<(System, Drawn)> {
    let system = process("shard", key).await?;
    let (_, drawn) = ScriptedShard::start(&system, EPOCH, step, token);
    Ok((system, drawn))
}

/// From the moment at which a token was drawn to that at which its client has it; and from one token to
/// the next as the client sees it. Both sorted.
struct Added {
    latency: Vec<Duration>,
    between: Vec<Duration>,
}

fn client(url: &str, options: &BenchApi, drawn: &Drawn) -> Result<Added> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let server = Server::find(url, None, ANSWER_MAX).await?;
        let mut added = Added {
            latency: Vec::new(),
            between: Vec::new(),
        };
        let body = |tokens: u32| {
            json!({"prompt": "a", "max_tokens": tokens, "stream": true, "ignore_eos": true})
        };
        // The scheduler listens to the shard first. What answers this is for the caches.
        let ready_by = Instant::now() + READY_MAX;
        while let Answer::Failed(why) = server.ask(&body(options.tokens)).await {
            ensure!(Instant::now() < ready_by, "the API does not answer: {why}");
            tokio::time::sleep(ASK_EVERY).await;
        }
        for _ in 0..options.runs {
            drawn.take();
            let asked = Instant::now();
            let answer = server.ask(&body(options.tokens)).await;
            let Answer::Complete { first, between, .. } = answer else {
                return Err(anyhow!("an answer was not complete: {answer:?}"));
            };
            let drawn = drawn.take();
            ensure!(
                drawn.len() == between.len() + 1,
                "{} tokens were drawn, {} came",
                drawn.len(),
                between.len() + 1
            );
            let mut arrived = asked + first;
            added.latency.push(arrived - drawn[0]);
            for (between, drawn) in between.iter().zip(&drawn[1..]) {
                arrived += *between;
                added
                    .latency
                    .push(arrived.saturating_duration_since(*drawn));
            }
            added.between.extend(between);
        }
        added.latency.sort_unstable();
        added.between.sort_unstable();
        Ok(added)
    })
}

fn print(options: &BenchApi, added: Added) {
    let mean = added.between.iter().sum::<Duration>() / added.between.len().max(1) as u32;
    let row = json!({
        "step_ms": options.step.as_secs_f64() * 1e3,
        "tokens": added.latency.len(),
        "latency_ms": {"p50": percentile(&added.latency, 0.5), "p99": percentile(&added.latency, 0.99)},
        "between_ms": {"mean": mean.as_secs_f64() * 1e3, "p50": percentile(&added.between, 0.5)},
    });
    if options.json {
        println!("{row}");
        return;
    }
    let ms = |value: &serde_json::Value| value.as_f64().unwrap_or(f64::NAN);
    println!(
        "{} tokens, one every {:.3} ms\nfrom drawn to the client: {:.3} ms median, {:.3} ms p99\n\
         from token to token at the client: {:.3} ms mean, {:.3} ms median",
        added.latency.len(),
        ms(&row["step_ms"]),
        ms(&row["latency_ms"]["p50"]),
        ms(&row["latency_ms"]["p99"]),
        ms(&row["between_ms"]["mean"]),
        ms(&row["between_ms"]["p50"]),
    );
}

/// The scheduler, without a membership.
struct Scripted(RemoteStream<Submit>);

impl Backend for Scripted {
    fn submit(&self, request: Request) -> BoxFuture<'_, Result<Tokens, Rejection>> {
        backend::submit(&self.0, request).boxed()
    }

    fn cluster(&self) -> BoxFuture<'_, Result<ClusterReport, String>> {
        async { Err("a scripted shard has no cluster".into()) }.boxed()
    }

    fn steps(&self) -> BoxFuture<'_, Vec<ShardSteps>> {
        async { Vec::new() }.boxed()
    }
}

const NODE: &str = "bench";
const EPOCH: Epoch = Epoch(1);
const CONTEXT: u32 = 1 << 20;
/// It begins at once.
const BEGIN_DEADLINE: Duration = Duration::from_secs(10);
/// Two processes meet within a second.
const READY_MAX: Duration = Duration::from_secs(10);
const ASK_EVERY: Duration = Duration::from_millis(20);
/// An answer takes seconds.
const ANSWER_MAX: Duration = Duration::from_secs(300);
