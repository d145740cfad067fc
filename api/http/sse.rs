//! Writing answers as server-sent events while they come.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

use axum::http::HeaderName;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::stream;
use serde_json::Value;

use super::answer::{Change, Delta};
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
    let ready = chunks.first().iter().map(data).collect();
    let state = Stream {
        choices: Some(choices),
        chunks,
        ready,
        paused: false,
    };
    let events = stream::unfold(state, |mut state| async move {
        let event = state.next().await?;
        Some((Ok::<_, Infallible>(event), state))
    });
    let keep_alive = KeepAlive::new().interval(KEEP_ALIVE);
    // Proxies that collect a response before they pass it on are asked not to.
    let unbuffered = [(HeaderName::from_static("x-accel-buffering"), "no")];
    (unbuffered, Sse::new(events).keep_alive(keep_alive)).into_response()
}

fn data(chunk: &Value) -> Event {
    Event::default().data(chunk.to_string())
}

struct Stream<C> {
    /// None once the end was written.
    choices: Option<Choices>,
    chunks: C,
    ready: VecDeque<Event>,
    /// A shard was lost, and no token has come since.
    paused: bool,
}

impl<C: Chunks> Stream<C> {
    async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(event);
            }
            let choices = self.choices.as_mut()?;
            let patience = if self.paused {
                PAUSED_KEEP_ALIVE
            } else {
                Duration::MAX
            };
            let Ok(change) = tokio::time::timeout(patience, choices.next()).await else {
                return Some(Event::default().comment(STILL_PAUSED));
            };
            match change {
                Some(Ok((choice, Change::Delta(delta)))) => {
                    self.paused = false;
                    let chunks = self.chunks.delta(choice, delta);
                    self.ready.extend(chunks.iter().map(data));
                }
                Some(Ok((_, Change::Paused))) => {
                    // All choices pause together: one comment says it.
                    if !std::mem::replace(&mut self.paused, true) {
                        return Some(Event::default().comment(PAUSED));
                    }
                }
                Some(Err(error)) => {
                    self.choices = None;
                    tracing::warn!(%error, "an answer ended before its end");
                    return Some(data(&error.body()));
                }
                None => {
                    self.choices = None;
                    self.ready.extend(self.chunks.last().iter().map(data));
                    self.ready.push_back(Event::default().data(DONE));
                }
            }
        }
    }
}

/// Comments, which every client of such streams passes over.
const PAUSED: &str = "a shard was lost, the answer goes on when its successor is ready";
const STILL_PAUSED: &str = "the answer is still paused";
/// Often enough that a person who watches the stream sees that it lives.
const PAUSED_KEEP_ALIVE: Duration = Duration::from_secs(3);
const DONE: &str = "[DONE]";
/// Shorter than any proxy's patience, and than the time to the first token of a long prompt.
const KEEP_ALIVE: Duration = Duration::from_secs(10);
