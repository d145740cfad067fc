//! The answers to one request of a client, run side by side.

use std::sync::Arc;

use futures::future::try_join_all;
use futures::stream::{self, BoxStream, SelectAll};
use futures::{FutureExt, StreamExt};
use offbook_protocol::{Request, SampledToken};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::answer::{Answer, Change, Finish, Reading};
use super::error::ApiError;
use super::metrics::AnswerClock;
use super::{Api, Service};
use crate::StreamError;
use crate::text::Piece;

/// Answers under way, told apart by their places in the client's request. Dropping them cancels
/// them all.
pub(super) struct Choices {
    running: SelectAll<BoxStream<'static, (usize, Result<Change, StreamError>)>>,
    stopping: CancellationToken,
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
        let answers = try_join_all(submitted).await?.into_iter().enumerate().map(
            |(choice, (tokens, clock))| {
                let answer = Answer::new(tokens, reading(&api.service), clock);
                let next = |mut answer: Answer| async move {
                    answer.next().await.map(|change| (change, answer))
                };
                stream::unfold(answer, next)
                    .map(move |change| (choice, change))
                    .boxed()
            },
        );
        Ok(Self {
            running: answers.collect(),
            stopping: api.stopping.clone(),
        })
    }

    /// What happens next, and to which choice; `None` when all have ended.
    pub(super) async fn next(&mut self) -> Option<Result<(usize, Change), ApiError>> {
        let next = tokio::select! {
            next = self.running.next() => next,
            () = self.stopping.cancelled() => {
                let detail = "this node is being stopped".to_owned();
                return Some(Err(StreamError::Interrupted { detail }.into()));
            }
        };
        next.map(|(choice, change)| Ok((choice, change?)))
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

    pub(super) fn token_ids(&self) -> Vec<u32> {
        self.tokens.iter().map(|token| token.token).collect()
    }
}
