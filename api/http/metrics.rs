//! `GET /metrics`, in the format that Prometheus reads: what clients wait for, and where the time of
//! every shard's steps goes, what its caches and MLX hold. Figures alone: no prompt, no answer, no name of a client.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use offbook_protocol::{
    ActorReport, ClusterReport, Histogram as Counted, Phase, ShardSteps, StepHistograms,
};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::{encode_eof, encode_registry};
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};
use tokio::time::Instant;

use super::Api;
use super::error::ApiError;

/// What has become of the answers since this process began.
pub(super) struct Metrics {
    registry: Registry,
    time_to_first_token: Histogram,
    inter_token: Histogram,
    duration: Histogram,
    prompt_tokens: Counter,
    generated_tokens: Counter,
    answers: Family<[(&'static str, &'static str); 1], Counter>,
    pauses: Counter,
}

impl Metrics {
    pub(super) fn new() -> Self {
        let seconds = || Histogram::new(exponential_buckets(0.001, 2.0, 18));
        let metrics = Self {
            registry: Registry::default(),
            time_to_first_token: seconds(),
            inter_token: seconds(),
            duration: seconds(),
            prompt_tokens: Counter::default(),
            generated_tokens: Counter::default(),
            answers: Family::default(),
            pauses: Counter::default(),
        };
        let mut registry = Registry::with_prefix("offbook");
        let seconds = |registry: &mut Registry, name: &str, help: &str, metric: &Histogram| {
            registry.register_with_unit(name, help, Unit::Seconds, metric.clone());
        };
        seconds(
            &mut registry,
            "time_to_first_token",
            "From the arrival of a request to its first token",
            &metrics.time_to_first_token,
        );
        seconds(
            &mut registry,
            "inter_token_latency",
            "From one token of an answer to the next",
            &metrics.inter_token,
        );
        seconds(
            &mut registry,
            "answer_duration",
            "From the arrival of a request to its last token",
            &metrics.duration,
        );
        let counter = |registry: &mut Registry, name: &str, help: &str, metric: &Counter| {
            registry.register(name, help, metric.clone());
        };
        counter(
            &mut registry,
            "prompt_tokens",
            "Tokens of the prompts that were accepted",
            &metrics.prompt_tokens,
        );
        counter(
            &mut registry,
            "generated_tokens",
            "Tokens that were generated",
            &metrics.generated_tokens,
        );
        counter(
            &mut registry,
            "answer_pauses",
            "How often an answer waited for the group to form again after a loss",
            &metrics.pauses,
        );
        registry.register(
            "answers",
            "Answers by their end: stop, length, tool_calls, rejected, failed or cancelled",
            metrics.answers.clone(),
        );
        Self {
            registry,
            ..metrics
        }
    }

    /// A request that was not taken in.
    pub(super) fn note_rejected(&self) {
        self.end("rejected");
    }

    fn end(&self, how: &'static str) {
        self.answers.get_or_create(&[("end", how)]).inc();
    }
}

/// Times one answer. Dropped before the answer ended, it counts as cancelled.
pub(super) struct AnswerClock {
    metrics: Arc<Metrics>,
    arrived: Instant,
    last_token: Option<Instant>,
    ended: bool,
}

impl AnswerClock {
    /// Of a request that came at `arrived` and was accepted.
    pub(super) fn start(metrics: Arc<Metrics>, arrived: Instant, prompt_tokens: usize) -> Self {
        metrics.prompt_tokens.inc_by(prompt_tokens as u64);
        Self {
            metrics,
            arrived,
            last_token: None,
            ended: false,
        }
    }

    pub(super) fn token(&mut self) {
        let now = Instant::now();
        self.metrics.generated_tokens.inc();
        match self.last_token.replace(now) {
            Some(last) => self.metrics.inter_token.observe(seconds(now - last)),
            None => {
                let waited = seconds(now - self.arrived);
                self.metrics.time_to_first_token.observe(waited);
            }
        }
    }

    pub(super) fn pause(&self) {
        self.metrics.pauses.inc();
    }

    /// The answer has ended, and this is how; only the first end counts.
    pub(super) fn end(&mut self, how: &'static str) {
        if !std::mem::replace(&mut self.ended, true) {
            let took = seconds(self.arrived.elapsed());
            self.metrics.duration.observe(took);
            self.metrics.end(how);
        }
    }
}

impl Drop for AnswerClock {
    fn drop(&mut self) {
        self.end("cancelled");
    }
}

/// The figures as they are now.
pub(super) async fn scrape(State(api): State<Api>) -> Result<impl IntoResponse, ApiError> {
    let backend = &api.service.backend;
    let (report, steps) = futures::join!(backend.cluster(), backend.steps());
    let mut cluster = Registry::with_prefix("offbook");
    cluster.register_collector(Box::new(Scrape {
        report: report.ok(),
        steps,
    }));
    let mut text = String::new();
    let written = encode_registry(&mut text, &api.metrics.registry)
        .and_then(|()| encode_registry(&mut text, &cluster))
        .and_then(|()| encode_eof(&mut text));
    written.map_err(|error| ApiError::Internal {
        why: format!("the figures cannot be written: {error}"),
    })?;
    Ok(([(CONTENT_TYPE, OPEN_METRICS)], text))
}

/// What the cluster says of itself when it is asked.
#[derive(Debug)]
struct Scrape {
    /// None when nobody can tell.
    report: Option<ClusterReport>,
    steps: Vec<ShardSteps>,
}

impl Collector for Scrape {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let ready = matches!(&self.report, Some(report) if report.phase == Phase::Ready);
        one(
            &mut encoder,
            "ready",
            "1 when requests are served",
            u64::from(ready),
        )?;
        if let Some(report) = &self.report {
            cluster(report, &mut encoder)?;
        }
        steps(&self.steps, &mut encoder)?;
        holdings(&self.steps, &mut encoder)
    }
}

fn cluster(report: &ClusterReport, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
    one(
        encoder,
        "epoch",
        "The group under way, or the last one",
        report.epoch.0,
    )?;
    let running = "Requests that are worked on";
    one(
        encoder,
        "requests_running",
        running,
        report.requests_running.into(),
    )?;
    let queued = "Requests that wait";
    one(
        encoder,
        "requests_queued",
        queued,
        report.requests_queued.into(),
    )?;
    let shards = || {
        report.shards.iter().map(|shard| {
            let labels = [
                (
                    "rank",
                    shard.rank.map_or_else(String::new, |rank| rank.to_string()),
                ),
                ("node", shard.node.clone()),
            ];
            (shard, labels)
        })
    };
    let mut up = gauge(encoder, "shard_up", "1 while the shard process is there")?;
    for (shard, labels) in shards() {
        let value = ConstGauge::new(u64::from(shard.alive));
        value.encode(up.encode_family(&labels)?)?;
    }
    let help = "How often the shard process was restarted";
    let mut restarts =
        encoder.encode_descriptor("shard_restarts", help, None, MetricType::Counter)?;
    for (shard, labels) in shards() {
        let value = ConstCounter::new(u64::from(shard.restarts));
        value.encode(restarts.encode_family(&labels)?)?;
    }
    let help = "1, with the way that the shard's collectives take and what fast_synch asks for";
    let mut path = gauge(encoder, "collectives_path", help)?;
    for (shard, [rank, node]) in shards() {
        let labels = [
            rank,
            node,
            ("path", shard.collectives.clone()),
            ("fast_synch", report.fast_synch.to_string()),
            ("transport", report.transport.to_string()),
        ];
        ConstGauge::new(1u64).encode(path.encode_family(&labels)?)?;
    }
    actors(&report.actors, encoder)
}

/// What became of the actors that processes keep.
fn actors(actors: &[ActorReport], encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
    let counters: [(&str, &str, ActorFigure); 2] = [
        (
            "actor_restarts",
            "How often the actor was made anew, within its process or with it",
            |actor| actor.restarts.into(),
        ),
        (
            "actor_dead_letters",
            "So many messages made the actor's handler panic",
            |actor| actor.dead_letters,
        ),
    ];
    for (name, help, count) in counters {
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        for actor in actors {
            let labels = [("process", &*actor.process), ("actor", &*actor.name)];
            ConstCounter::new(count(actor)).encode(family.encode_family(&labels)?)?;
        }
    }
    let help = "1 when the actor's last end took its process with it";
    let mut given_up = gauge(encoder, "actor_given_up", help)?;
    for actor in actors {
        let labels = [("process", &*actor.process), ("actor", &*actor.name)];
        let value = ConstGauge::new(u64::from(actor.given_up));
        value.encode(given_up.encode_family(&labels)?)?;
    }
    Ok(())
}

/// One figure of an actor.
type ActorFigure = fn(&ActorReport) -> u64;

/// One histogram for each rank, kind of step and part of the step log.
fn steps(shards: &[ShardSteps], encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
    let help = "Where the time of a step went, by the parts of the step log";
    let seconds = Some(&Unit::Seconds);
    let mut family = encoder.encode_descriptor("step", help, seconds, MetricType::Histogram)?;
    for shard in shards {
        let kinds: [(&str, &StepHistograms); 2] =
            [("decode", &shard.decode), ("prefill", &shard.prefill)];
        for (kind, histograms) in kinds {
            for (part, histogram) in histograms.parts() {
                let labels = [
                    ("rank", shard.rank.to_string()),
                    ("node", shard.node.clone()),
                    ("kind", kind.to_owned()),
                    ("part", part.to_owned()),
                ];
                counted(histogram, &labels, &mut family)?;
            }
        }
    }
    Ok(())
}

/// What each rank's caches and MLX hold, and the window.
fn holdings(shards: &[ShardSteps], encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
    let gauges: [(&str, &str, Figure); 8] = [
        (
            "kv_tokens_in_use",
            "Positions that running sequences have reserved in the caches: 0 when nobody is served",
            |shard| shard.kv.in_use_tokens,
        ),
        (
            "kv_tokens_retained",
            "Positions of the prefix cache: kept of sequences that are gone, for prompts that begin \
             alike, until somebody needs the room; not in use, and not a leak",
            |shard| shard.kv.retained_tokens,
        ),
        (
            "kv_tokens_capacity",
            "Positions that the caches may hold",
            |shard| shard.kv.capacity_tokens,
        ),
        (
            "memory_active_bytes",
            "Bytes of MLX's arrays: weights, caches, results of layers",
            |shard| shard.memory.active_bytes,
        ),
        (
            "memory_cache_bytes",
            "Bytes that MLX has freed and keeps",
            |shard| shard.memory.cache_bytes,
        ),
        (
            "memory_peak_bytes",
            "The most bytes that were in MLX's arrays at once",
            |shard| shard.memory.peak_bytes,
        ),
        ("memory_limit_bytes", "Bytes that MLX keeps to", |shard| {
            shard.memory.limit_bytes
        }),
        (
            "throttle_chunk_permille",
            "How much of a prompt a step reads, in thousandths of the configured chunk",
            |shard| u64::from(shard.throttle.chunk_permille),
        ),
    ];
    for (name, help, figure) in gauges {
        let mut family = gauge(encoder, name, help)?;
        for shard in shards {
            let value = ConstGauge::new(figure(shard));
            value.encode(family.encode_family(&rank_and_node(shard))?)?;
        }
    }
    let help = "Layers in flight at most, by kind of step";
    let mut window = gauge(encoder, "throttle_window", help)?;
    for shard in shards {
        let [rank, node] = rank_and_node(shard);
        for (kind, layers) in [
            ("decode", shard.throttle.decode_window),
            ("prefill", shard.throttle.prefill_window),
        ] {
            let labels = [rank.clone(), node.clone(), ("kind", kind.to_owned())];
            ConstGauge::new(u64::from(layers)).encode(window.encode_family(&labels)?)?;
        }
    }
    let counters: [(&str, &str, Figure); 3] = [
        (
            "preemptions",
            "How often a sequence gave its cache up for an older one",
            |shard| shard.kv.preemptions,
        ),
        (
            "throttle_shrinks",
            "How often the window was made smaller because memory was short",
            |shard| shard.throttle.shrinks,
        ),
        (
            "cache_clears",
            "How often MLX's cache was cleared because memory was short",
            |shard| shard.throttle.cache_clears,
        ),
    ];
    for (name, help, figure) in counters {
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        for shard in shards {
            let value = ConstCounter::new(figure(shard));
            value.encode(family.encode_family(&rank_and_node(shard))?)?;
        }
    }
    Ok(())
}

/// One figure of a shard.
type Figure = fn(&ShardSteps) -> u64;

fn rank_and_node(shard: &ShardSteps) -> [(&'static str, String); 2] {
    [
        ("rank", shard.rank.to_string()),
        ("node", shard.node.clone()),
    ]
}

fn counted(
    histogram: &Counted,
    labels: &impl EncodeLabelSet,
    family: &mut prometheus_client::encoding::MetricEncoder<'_>,
) -> fmt::Result {
    let buckets: Vec<(f64, u64)> = histogram.buckets().collect();
    family
        .encode_family(labels)?
        .encode_histogram::<NoLabelSet>(histogram.seconds(), histogram.count(), &buckets, None)
}

fn gauge<'e>(
    encoder: &'e mut DescriptorEncoder<'_>,
    name: &'e str,
    help: &str,
) -> Result<prometheus_client::encoding::MetricEncoder<'e>, fmt::Error> {
    encoder.encode_descriptor(name, help, None, MetricType::Gauge)
}

fn one(encoder: &mut DescriptorEncoder<'_>, name: &str, help: &str, value: u64) -> fmt::Result {
    ConstGauge::new(value).encode(gauge(encoder, name, help)?)
}

fn seconds(time: Duration) -> f64 {
    time.as_secs_f64()
}

const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
