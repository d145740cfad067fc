//! The cluster as the API sees it: a request becomes a subscription at the scheduler, and dropping
//! its tokens cancels it.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use futures::future::BoxFuture;
use futures::stream::{self, StreamExt};
use offbook_actors::{Membership, ReportCluster, ReportSteps, Submit, names};
use offbook_api::text::{Defaults, Text};
use offbook_api::{Backend, Journal, Origin, Progress, Service, StreamError, Tokens};
use offbook_engine::ModelConfig;
use offbook_protocol::{ClusterReport, Rejection, Request, RequestEvent, ShardSteps};
use offbook_runtime::supervise::ActorRef;
use offbook_runtime::{ActorPath, RemoteStream, Subscription, System};

use crate::cluster_file::ClusterFile;

/// Everything that the API serves, on the head node.
pub(crate) fn service(
    system: &System,
    membership: ActorRef<Membership>,
    cluster: &ClusterFile,
    config: &ModelConfig,
    journal: Journal,
    origins: Vec<Origin>,
) -> Result<Service> {
    let model = &cluster.model;
    let (text, defaults) = words(model)?;
    let path = ActorPath::new(system.process().clone(), names::SCHEDULER);
    let scheduler = system.remote_stream::<Submit>(&path);
    let created = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    Ok(Service {
        backend: Arc::new(ClusterBackend {
            scheduler,
            membership,
        }),
        defaults,
        text,
        model_id: model.file_name().map_or_else(
            || "model".into(),
            |name| name.to_string_lossy().into_owned(),
        ),
        context_tokens: cluster.context_tokens(config.context_tokens as u32),
        vocabulary: config.vocabulary_size as u32,
        answers_max: cluster.limits.scheduler().requests_at_once_max(),
        created: created.as_secs(),
        journal: Some(journal),
        origins,
    })
}

/// What a model's directory says about text, and how its makers draw tokens.
///
/// # Errors
/// When a file of them is broken. Whoever starts a cluster looks first: a head that is started again would
/// find the same.
pub(crate) fn words(model: &Path) -> Result<(Option<Text>, Defaults)> {
    let text = Text::find(model).with_context(|| {
        let model = model.display();
        format!("cannot read the tokenizer and the chat template in {model}")
    })?;
    Ok((text, Defaults::open(model)?))
}

struct ClusterBackend {
    scheduler: RemoteStream<Submit>,
    membership: ActorRef<Membership>,
}

impl Backend for ClusterBackend {
    fn submit(&self, request: Request) -> BoxFuture<'_, Result<Tokens, Rejection>> {
        Box::pin(submit(&self.scheduler, request))
    }

    fn cluster(&self) -> BoxFuture<'_, Result<ClusterReport, String>> {
        Box::pin(async move {
            let report = self.membership.ask(ReportCluster, REPORT_DEADLINE).await;
            report.map_err(|error| format!("the membership does not answer: {error}"))
        })
    }

    fn steps(&self) -> BoxFuture<'_, Vec<ShardSteps>> {
        Box::pin(async move {
            let steps = self.membership.ask(ReportSteps, REPORT_DEADLINE).await;
            steps.unwrap_or_default()
        })
    }
}

/// Hands a request to the scheduler, and waits until it is accepted or rejected.
pub(crate) async fn submit(
    scheduler: &RemoteStream<Submit>,
    request: Request,
) -> Result<Tokens, Rejection> {
    let not_ready = |detail: String| Rejection::NotReady { detail };
    let subscribed = scheduler.subscribe(Submit(request), SUBMIT_DEADLINE).await;
    let mut events = subscribed.map_err(|error| not_ready(error.to_string()))?;
    match events.next().await {
        Some(Ok(RequestEvent::Accepted)) => Ok(tokens(events)),
        Some(Ok(RequestEvent::Rejected(rejection))) => Err(rejection),
        Some(Ok(_)) => Err(not_ready("the scheduler spoke out of turn".into())),
        Some(Err(error)) => Err(not_ready(error.to_string())),
        None => Err(not_ready("the scheduler has ended".into())),
    }
}

/// Progress until a token carries a finish reason; then the subscription is dropped.
fn tokens(events: Subscription<RequestEvent>) -> Tokens {
    let next = |events: Option<Subscription<RequestEvent>>| async move {
        let mut events = events?;
        let progress = match events.next().await? {
            Ok(RequestEvent::Token(token)) => Ok(Progress::Token(token)),
            Ok(RequestEvent::Paused) => Ok(Progress::Paused),
            Ok(RequestEvent::Failed(failure)) => Err(StreamError::Failed(failure)),
            Ok(RequestEvent::Accepted | RequestEvent::Rejected(_)) => return None,
            Err(error) => Err(StreamError::Interrupted {
                detail: error.to_string(),
            }),
        };
        let over = match &progress {
            Ok(Progress::Token(token)) => token.finish.is_some(),
            Ok(Progress::Paused) => false,
            Err(_) => true,
        };
        Some((progress, (!over).then_some(events)))
    };
    Box::pin(stream::unfold(Some(events), next))
}

/// The membership is in this process too, and waits half a second for shards at most.
const REPORT_DEADLINE: Duration = Duration::from_secs(10);
/// The scheduler is in this process; it answers as soon as it has a moment.
const SUBMIT_DEADLINE: Duration = Duration::from_secs(10);
