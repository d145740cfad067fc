//! Writing answers as server-sent events while they come.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderName, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures::{Stream, StreamExt, stream};
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
pub(super) fn respond(choices: Choices, chunks: impl Chunks) -> Response {
    let script = Script::new(choices, chunks);
    let said = stream::unfold((script, 0), |(mut script, number)| async move {
        let said = script.next().await?;
        let next = number + usize::from(matches!(said, Said::Data(_)));
        Some((said.line(number), (script, next)))
    });
    lines(said)
}

/// A response of what is said, as it comes, with a comment whenever that takes long.
pub(super) fn lines(said: impl Stream<Item = Bytes> + Send + 'static) -> Response {
    let kept_alive = stream::unfold(Box::pin(said), |mut said| async move {
        let line = match tokio::time::timeout(KEEP_ALIVE, said.next()).await {
            Ok(line) => line?,
            Err(_) => Bytes::from_static(STILL_HERE),
        };
        Some((line, said))
    });
    let headers = [
        (header::CONTENT_TYPE, "text/event-stream"),
        (header::CACHE_CONTROL, "no-cache"),
        // Proxies that collect a response before they pass it on are asked not to.
        (HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    let body = Body::from_stream(kept_alive.map(Ok::<_, Infallible>));
    (headers, body).into_response()
}

/// One thing that a client is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Said {
    /// One line.
    Data(String),
    /// Every client of such streams passes it over.
    Comment(&'static str),
}

impl Said {
    /// Events are numbered from 0, so that a client can say which one it had last. No empty line follows a
    /// comment: some clients take one for the end of an event without data, once events have numbers.
    pub(super) fn line(&self, number: usize) -> Bytes {
        match self {
            Self::Data(text) => format!("id: {number}\ndata: {text}\n\n").into(),
            Self::Comment(text) => format!(": {text}\n").into(),
        }
    }

    fn data(chunk: &Value) -> Self {
        Self::Data(chunk.to_string())
    }
}

/// All that is said in one stream. The same tokens make the same events, whichever process writes
/// them.
pub(super) struct Script<C> {
    /// None once the end was written.
    choices: Option<Choices>,
    chunks: C,
    ready: VecDeque<Said>,
    /// A shard was lost, and no token has come since.
    paused: bool,
}

impl<C: Chunks> Script<C> {
    pub(super) fn new(choices: Choices, mut chunks: C) -> Self {
        let ready = chunks.first().iter().map(Said::data).collect();
        Self {
            choices: Some(choices),
            chunks,
            ready,
            paused: false,
        }
    }

    pub(super) async fn next(&mut self) -> Option<Said> {
        loop {
            if let Some(said) = self.ready.pop_front() {
                return Some(said);
            }
            let choices = self.choices.as_mut()?;
            let patience = if self.paused {
                PAUSED_KEEP_ALIVE
            } else {
                Duration::MAX
            };
            let Ok(change) = tokio::time::timeout(patience, choices.next()).await else {
                return Some(Said::Comment(STILL_PAUSED));
            };
            match change {
                Some(Ok((choice, Change::Delta(delta)))) => {
                    self.paused = false;
                    let chunks = self.chunks.delta(choice, delta);
                    self.ready.extend(chunks.iter().map(Said::data));
                }
                Some(Ok((_, Change::Paused))) => {
                    // All choices pause together: one comment says it.
                    if !std::mem::replace(&mut self.paused, true) {
                        return Some(Said::Comment(PAUSED));
                    }
                }
                Some(Err(error)) => {
                    self.choices = None;
                    tracing::warn!(%error, "an answer ended before its end");
                    return Some(Said::data(&error.body()));
                }
                None => {
                    self.choices = None;
                    self.ready.extend(self.chunks.last().iter().map(Said::data));
                    self.ready.push_back(Said::Data(DONE.into()));
                }
            }
        }
    }
}

const PAUSED: &str = "a shard was lost, the answer goes on when its successor is ready";
const STILL_PAUSED: &str = "the answer is still paused";
/// Often enough that a person who watches the stream sees that it lives.
const PAUSED_KEEP_ALIVE: Duration = Duration::from_secs(3);
const DONE: &str = "[DONE]";
const STILL_HERE: &[u8] = b":\n";
/// Shorter than any proxy's patience, and than the time to the first token of a long prompt.
const KEEP_ALIVE: Duration = Duration::from_secs(10);
