//! The answers to one request of a client, run side by side.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use futures::future::try_join_all;
use futures::stream::{self, BoxStream, SelectAll};
use futures::{FutureExt, StreamExt, TryStreamExt};
use offbook_protocol::{Rejection, Request, SampledToken};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::task_tracker::TaskTrackerToken;

use super::answer::{Answer, Change, Finish, Reading};
use super::error::ApiError;
use super::ledger::{Listing, Standing};
use super::metrics::AnswerClock;
use super::{Api, Service};
use crate::journal::Record;
use crate::text::Piece;
use crate::{Backend, Progress, StreamError, Tokens};

/// Answers under way, told apart by their places in the client's request. Dropping them cancels
/// them all.
pub(super) struct Choices {
    running: SelectAll<BoxStream<'static, (usize, Result<Change, StreamError>)>>,
    /// What a former process of this node has told the client already.
    replayed: VecDeque<(usize, Change)>,
    /// Where the tokens are noted before the client has them.
    record: Option<Record>,
    /// Where it is noted what becomes of the answer.
    listing: Option<Listing>,
    stopping: CancellationToken,
    /// The server does not stop before these have ended, if they do so in time.
    _under_way: TaskTrackerToken,
}

impl Choices {
    /// Hands all requests on, or none: when one is rejected, the others are cancelled.
    pub(super) async fn start(
        api: &Api,
        requests: Vec<Request>,
        reading: impl Fn(&Arc<Service>) -> Reading,
    ) -> Result<Self, ApiError> {
        let backend = &api.service.backend;
        let arrived = Instant::now();
        let submitted = requests.into_iter().map(|request| async {
            let prompt_tokens = request.prompt.len();
            let tokens = backend.submit(request).await;
            let tokens = tokens.inspect_err(|_| api.metrics.note_rejected())?;
            let clock = AnswerClock::start(Arc::clone(&api.metrics), arrived, prompt_tokens);
            Ok::<_, ApiError>((tokens, clock))
        });
        let answers = try_join_all(submitted).await?;
        let answers = answers
            .into_iter()
            .map(|(tokens, clock)| Answer::new(tokens, reading(&api.service), clock));
        Ok(Self::of(api, answers.collect(), VecDeque::new(), None))
    }

    /// Goes on with answers that another process has begun: first with what it had told, in the same
    /// order; then the rest is asked for, as soon as the cluster is ready.
    pub(super) async fn resume(
        api: &Api,
        requests: Vec<Request>,
        reading: impl Fn(&Arc<Service>) -> Reading,
        tokens: Vec<(usize, SampledToken)>,
        record: Record,
    ) -> Self {
        let (count, arrived) = (requests.len(), Instant::now());
        let of = |choice| {
            let told = tokens.iter().filter(move |(of, _)| *of == choice);
            told.map(|(_, token)| token.clone()).collect::<Vec<_>>()
        };
        let mut answers: Vec<Answer> = requests
            .into_iter()
            .enumerate()
            .map(|(choice, request)| {
                let clock =
                    AnswerClock::start(Arc::clone(&api.metrics), arrived, request.prompt.len());
                let tokens = continued(Arc::clone(&api.service.backend), request, of(choice));
                Answer::new(tokens, reading(&api.service), clock)
            })
            .collect();
        let mut replayed = VecDeque::new();
        for (choice, _) in tokens.iter().filter(|(choice, _)| *choice < count) {
            if let Some(Ok(change)) = answers[*choice].next().await {
                replayed.push_back((*choice, change));
            }
        }
        Self::of(api, answers, replayed, Some(record))
    }

    fn of(
        api: &Api,
        answers: Vec<Answer>,
        replayed: VecDeque<(usize, Change)>,
        record: Option<Record>,
    ) -> Self {
        let running = answers.into_iter().enumerate().map(|(choice, answer)| {
            let next = |mut answer: Answer| async move {
                answer.next().await.map(|change| (change, answer))
            };
            stream::unfold(answer, next)
                .map(move |change| (choice, change))
                .boxed()
        });
        Self {
            running: running.collect(),
            replayed,
            record,
            listing: None,
            stopping: api.stopping.clone(),
            _under_way: api.drain.token(),
        }
    }

    /// Has every token noted there from now on, and the end of the answer too.
    pub(super) fn record(&mut self, record: Option<Record>, listing: Listing) {
        self.record = record;
        self.listing = Some(listing);
    }

    fn note_end(&self, standing: Standing) {
        if let Some(listing) = &self.listing {
            listing.end(standing);
        }
    }

    /// What happens next, and to which choice; `None` when all have ended.
    pub(super) async fn next(&mut self) -> Option<Result<(usize, Change), ApiError>> {
        if let Some(replayed) = self.replayed.pop_front() {
            return Some(Ok(replayed));
        }
        let next = tokio::select! {
            next = self.running.next() => next,
            () = self.stopping.cancelled() => {
                self.note_end(Standing::Failed);
                let detail = "this node is being stopped".to_owned();
                return Some(Err(StreamError::Interrupted { detail }.into()));
            }
        };
        let Some((choice, change)) = next else {
            if let Some(record) = self.record.take() {
                record.finish();
            }
            self.note_end(Standing::Complete);
            return None;
        };
        if let (Ok(Change::Delta(delta)), Some(record)) = (&change, &mut self.record) {
            record.token(choice, &delta.token);
        }
        if change.is_err() {
            self.note_end(Standing::Failed);
        }
        Some(
            change
                .map(|change| (choice, change))
                .map_err(ApiError::from),
        )
    }

    /// Waits for all of them. Half an answer is none.
    pub(super) async fn collect(mut self, count: usize) -> Result<Vec<Collected>, ApiError> {
        let mut collected: Vec<Collected> = (0..count).map(|_| Collected::default()).collect();
        while let Some((choice, change)) = self.next().boxed().await.transpose()? {
            let Change::Delta(delta) = change else {
                continue;
            };
            let whole = &mut collected[choice];
            whole.pieces.extend(delta.pieces);
            whole.tokens.push(delta.token);
            whole.finish = delta.finish.or(whole.finish);
        }
        Ok(collected)
    }
}

/// An answer that has come to its end.
#[derive(Default)]
pub(super) struct Collected {
    pub(super) pieces: Vec<Piece>,
    pub(super) tokens: Vec<SampledToken>,
    pub(super) finish: Option<Finish>,
}

impl Collected {
    pub(super) fn finish_reason(&self) -> Option<&'static str> {
        self.finish.map(Finish::name)
    }

    /// How much of its prompt was found computed.
    pub(super) fn cached(&self) -> u32 {
        self.tokens.iter().map(|token| token.cached_tokens).sum()
    }

    pub(super) fn token_ids(&self) -> Vec<u32> {
        self.tokens.iter().map(|token| token.token).collect()
    }
}

/// The tokens that are there already, then those that the cluster adds to them.
fn continued(backend: Arc<dyn Backend>, request: Request, told: Vec<SampledToken>) -> Tokens {
    let request = Request {
        delivered: told.iter().map(|token| token.token).collect(),
        ..request
    };
    let rest = async move {
        loop {
            match backend.submit(request.clone()).await {
                Ok(tokens) => return Ok(tokens),
                // The group is forming, or others came first.
                Err(
                    Rejection::NotReady { .. }
                    | Rejection::Overloaded { .. }
                    | Rejection::ShareUsed { .. },
                ) => {
                    tokio::time::sleep(RESUME_PAUSE).await;
                }
                Err(rejection) => {
                    let detail = format!("it cannot go on: {rejection}");
                    return Err(StreamError::Interrupted { detail });
                }
            }
        }
    };
    let told = stream::iter(told.into_iter().map(|token| Ok(Progress::Token(token))));
    told.chain(stream::once(rest).try_flatten()).boxed()
}

/// Before a cluster that is not ready is asked again.
const RESUME_PAUSE: Duration = Duration::from_millis(200);
