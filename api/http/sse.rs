//! Writing answers as server-sent events while they come.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

use axum::http::HeaderName;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::stream;
use serde_json::Value;

use super::answer::Delta;
use super::choices::Choices;

/// The objects of one kind of stream.
pub(super) trait Chunks: Send + 'static {
    /// Before anything has come.
    fn first(&mut self) -> Vec<Value>;
    /// What a token brought.
    fn delta(&mut self, choice: usize, delta: Delta) -> Vec<Value>;
    /// When all choices have come to their ends, before `[DONE]`.
    fn last(&mut self) -> Vec<Value>;
}

/// Streams the answers. After an error comes one event that says so, and neither a finish reason nor
/// `[DONE]`: nobody can take half an answer for a whole one.
pub(super) fn respond(choices: Choices, mut chunks: impl Chunks) -> Response {
    let first = chunks
        .first()
        .into_iter()
        .map(|chunk| chunk.to_string())
        .collect();
    let state = Stream {
        choices: Some(choices),
        chunks,
        ready: first,
    };
    let events = stream::unfold(state, |mut state| async move {
        let event = state.next().await?;
        Some((Ok::<_, Infallible>(Event::default().data(event)), state))
    });
    let keep_alive = KeepAlive::new().interval(KEEP_ALIVE);
    // Proxies that collect a response before they pass it on are asked not to.
    let unbuffered = [(HeaderName::from_static("x-accel-buffering"), "no")];
    (unbuffered, Sse::new(events).keep_alive(keep_alive)).into_response()
}

struct Stream<C> {
    /// None once the end was written.
    choices: Option<Choices>,
    chunks: C,
    ready: VecDeque<String>,
}

impl<C: Chunks> Stream<C> {
    async fn next(&mut self) -> Option<String> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(event);
            }
            let chunks = match self.choices.as_mut()?.next().await {
                Some(Ok((choice, delta))) => self.chunks.delta(choice, delta),
                Some(Err(error)) => {
                    self.choices = None;
                    tracing::warn!(%error, "an answer ended before its end");
                    vec![error.body()]
                }
                None => {
                    self.choices = None;
                    let last = self
                        .chunks
                        .last()
                        .into_iter()
                        .map(|chunk| chunk.to_string());
                    self.ready.extend(last.chain([DONE.to_owned()]));
                    continue;
                }
            };
            self.ready
                .extend(chunks.into_iter().map(|chunk| chunk.to_string()));
        }
    }
}

const DONE: &str = "[DONE]";
/// Shorter than any proxy's patience, and than the time to the first token of a long prompt.
const KEEP_ALIVE: Duration = Duration::from_secs(10);
