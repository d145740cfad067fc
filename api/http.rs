//! The OpenAI-compatible API over HTTP: one file per endpoint, and `error.rs` alone picks status
//! codes.
//!
//! The life of a request: a body is read (`body.rs`), every parameter is honoured or refused
//! (`fields.rs`, `options.rs`), the prompt becomes tokens, one `Answer` per choice runs at the
//! backend (`answer.rs`, `choices.rs`), and what comes is written as one object or as events
//! (`sse.rs`). A client that leaves drops the answers, and that cancels them.

mod error;
mod connections;
mod drain;
mod origins;
mod caller;
mod body;
mod request_id;
mod name;
mod fields;
mod options;
mod messages;
mod answer;
mod choices;
mod ledger;
mod resumed;
mod logprobs;
mod sse;
mod chat;
mod completions;
mod models;
mod health;
mod cluster;
mod metrics;

use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::http::{Method, Uri};
use axum::routing::{get, post};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::Backend;
use crate::journal::{Asked, Journal, Record};
use crate::text::{Defaults, Text};
use connections::Bounds;
use drain::Drain;
use error::ApiError;
use ledger::{Ledger, Listing};
use metrics::Metrics;
pub use origins::Origin;
use resumed::Resumed;

/// What is served, and to whom requests are handed on.
pub struct Service {
    pub backend: Arc<dyn Backend>,
    /// None for a checkpoint without tokenizer: then only completions from token ids work.
    pub text: Option<Text>,
    pub defaults: Defaults,
    /// The name that clients call the model by.
    pub model_id: String,
    /// Positions that prompt and answer may fill together.
    pub context_tokens: u32,
    /// Token ids are below this.
    pub vocabulary: u32,
    /// Answers that one request of a client may ask for at most: each is a request to the cluster, whose
    /// queue takes so many of one client at once.
    pub answers_max: u32,
    /// When the model was made available, in seconds since 1970.
    pub created: u64,
    /// Where answers under way are kept, which a restart of this process is to survive, if anywhere.
    pub journal: Option<Journal>,
    /// Whose web pages may use it.
    pub origins: Vec<Origin>,
}

/// Serves until `shutdown` resolves. New requests are refused from then on, and answers under way may
/// take as long as `drain` to end; those that take longer end with an error.
pub async fn serve(
    listener: TcpListener,
    service: Arc<Service>,
    drain: Duration,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let stopping = CancellationToken::new();
    let closing = CancellationToken::new();
    let api = Api {
        service,
        metrics: Arc::new(Metrics::new()),
        resumed: Arc::default(),
        ledger: Arc::default(),
        drain: Drain::default(),
        stopping: stopping.clone(),
    };
    let draining = api.drain.clone();
    let journal = api.service.journal.clone();
    resumed::begin(&api);
    let origins = api.service.origins.clone();
    let router = origins::open(router(api), &origins);
    let graceful = connections::serve(listener, router, Bounds::default(), closing.clone());
    let deadline = async {
        shutdown.await;
        // Whoever comes now is still answered, with a refusal.
        draining.run(drain).await;
        // What is not answered by now is left to the next process.
        if let Some(journal) = journal {
            journal.keep_all();
        }
        stopping.cancel();
        closing.cancel();
        tokio::time::sleep(LAST_WORDS).await;
    };
    tokio::select! {
        served = graceful => served,
        () = deadline => Ok(()),
    }
}

/// What every endpoint is given.
#[derive(Clone)]
struct Api {
    service: Arc<Service>,
    metrics: Arc<Metrics>,
    resumed: Arc<Resumed>,
    ledger: Arc<Ledger>,
    drain: Drain,
    /// Cancelled when answers under way have to end.
    stopping: CancellationToken,
}

impl Api {
    /// Refuses a model that is not served. No name, or `default`, means the one that is.
    fn check_model(&self, model: Option<&str>) -> Result<(), ApiError> {
        match model {
            None | Some("default") => Ok(()),
            Some(model) if model == self.service.model_id => Ok(()),
            Some(model) => Err(ApiError::ModelNotFound {
                model: model.to_owned(),
            }),
        }
    }
}

impl Api {
    /// Begins the record of an answer, where answers are recorded. A disk that refuses costs the
    /// record, not the answer.
    async fn record(&self, asked: impl FnOnce() -> Asked) -> Option<Record> {
        let journal = self.service.journal.clone()?;
        let asked = asked();
        let begun = tokio::task::spawn_blocking(move || journal.begin(&asked)).await;
        match begun.ok()? {
            Ok(record) => Some(record),
            Err(error) => {
                tracing::warn!(%error, "an answer is not recorded: is the disk full?");
                None
            }
        }
    }

    /// Notes an answer that begins, by its id and by the client's own name for it.
    fn list(&self, id: &str, request_id: Option<&str>) -> Listing {
        let names = [Some(id), request_id];
        self.ledger
            .begin(names.into_iter().flatten().map(str::to_owned).collect())
    }
}

fn router(api: Api) -> Router {
    let refuse = axum::middleware::from_fn_with_state(api.clone(), drain::refuse);
    Router::new()
        .route(
            "/v1/chat/completions",
            post(chat::create).layer(refuse.clone()),
        )
        .route("/v1/chat/completions/{id}", get(resumed::answer))
        .route("/v1/completions", post(completions::create).layer(refuse))
        .route("/v1/completions/{id}", get(resumed::answer))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::retrieve))
        .route("/v1/cluster", get(cluster::report))
        .route("/v1/cluster/shards", get(cluster::shards))
        .route("/health", get(health::health))
        .route("/metrics", get(metrics::scrape))
        .method_not_allowed_fallback(method_not_allowed)
        .fallback(not_found)
        .layer(DefaultBodyLimit::max(body::BODY_BYTES_MAX))
        .with_state(api)
}

async fn not_found(method: Method, uri: Uri) -> ApiError {
    ApiError::NotFound {
        what: format!("{method} {}", uri.path()),
    }
}

async fn method_not_allowed(method: Method, uri: Uri) -> ApiError {
    ApiError::MethodNotAllowed {
        what: format!("{method} {}", uri.path()),
    }
}

/// A request's parameters with its seed among them: asked again, it draws the same.
fn seeded(mut body: Value, seed: u64) -> Value {
    body["seed"] = json!(seed);
    body
}

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs()
}

/// An id that nobody else has.
fn id(prefix: &str) -> String {
    format!("{prefix}{:032x}", rand::random::<u128>())
}

/// The id of a tool call: the same whenever the same answer is written.
fn call_id(answer: &str, choice: usize, index: usize) -> String {
    let answer = answer.rsplit('-').next().unwrap_or(answer);
    format!("call_{answer}{choice:02}{index:02}")
}

/// What OpenAI's API calls usage, in tokens.
#[derive(Clone, Copy, Debug, Default)]
struct Usage {
    /// Of each prompt once, however many answers it has.
    prompt: usize,
    /// Those of `prompt` that did not have to be computed.
    cached: usize,
    generated: usize,
}

impl Usage {
    fn value(self) -> Value {
        json!({
            "prompt_tokens": self.prompt,
            "prompt_tokens_details": { "cached_tokens": self.cached },
            "completion_tokens": self.generated,
            "total_tokens": self.prompt + self.generated,
        })
    }
}

/// What was found computed of all prompts, from what each choice found of its own. The answers to one
/// prompt find what the first of them has computed: so of theirs it is the least.
fn cached(choices: &[u32], answers_per_prompt: usize) -> usize {
    let of_prompts = choices.chunks(answers_per_prompt);
    let least = of_prompts.map(|found| found.iter().min().copied().unwrap_or(0));
    least.map(|tokens| tokens as usize).sum()
}

/// For what is written and not read yet, and for the events that say why an answer ends.
const LAST_WORDS: Duration = Duration::from_secs(1);
