//! One answer under way: tokens of the cluster become parts of an answer.

use futures::StreamExt;
use offbook_protocol::{FinishReason, SampledToken};

use super::metrics::AnswerClock;
use crate::text::{AnswerParser, Detokenizer, Piece, StopFinder};
use crate::{Progress, StreamError, Tokens};

/// Reads the tokens of one request. Once the answer has ended, for whatever reason, it lets go of
/// the request.
pub(super) struct Answer {
    /// None once the answer has ended.
    tokens: Option<Tokens>,
    reading: Reading,
    clock: AnswerClock,
}

/// How tokens are read.
pub(super) struct Reading {
    /// None for a model without tokenizer: its answers have no text.
    pub(super) detokenizer: Option<Detokenizer>,
    pub(super) parser: AnswerParser,
    /// For the words of the answer; thoughts and tool calls are not looked at.
    pub(super) stop: StopFinder,
    /// So many tokens more are not looked at for a stop string: `min_tokens`, as for tokens that end
    /// an answer.
    pub(super) unstoppable: u32,
}

/// What happens next to an answer.
#[derive(Debug)]
pub(super) enum Change {
    Delta(Delta),
    /// Nothing comes for a while, and nothing is lost.
    Paused,
}

/// What one token brought.
#[derive(Debug)]
pub(super) struct Delta {
    /// Often none: a token may be half a character, or the beginning of a mark.
    pub(super) pieces: Vec<Piece>,
    pub(super) token: SampledToken,
    /// Set on the last one.
    pub(super) finish: Option<Finish>,
}

/// Why an answer ended, in OpenAI's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Finish {
    Stop,
    Length,
    ToolCalls,
}

impl Finish {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::ToolCalls => "tool_calls",
        }
    }
}

impl Answer {
    pub(super) fn new(tokens: Tokens, reading: Reading, clock: AnswerClock) -> Self {
        Self {
            tokens: Some(tokens),
            reading,
            clock,
        }
    }

    /// What happens next; `None` after the last token, or after an error.
    pub(super) async fn next(&mut self) -> Option<Result<Change, StreamError>> {
        let progress = match self.tokens.as_mut()?.next().await {
            Some(progress) => progress,
            None => interrupted("it ended without a finish reason"),
        };
        let delta = match progress {
            Ok(Progress::Token(token)) => {
                self.clock.token();
                self.reading.read(token)
            }
            Ok(Progress::Paused) => {
                self.clock.pause();
                return Some(Ok(Change::Paused));
            }
            Err(error) => Err(error),
        };
        let end = match &delta {
            Ok(delta) => delta.finish.map(Finish::name),
            Err(_) => Some("failed"),
        };
        if let Some(end) = end {
            self.tokens = None;
            self.clock.end(end);
        }
        Some(delta.map(Change::Delta))
    }
}

impl Reading {
    fn read(&mut self, token: SampledToken) -> Result<Delta, StreamError> {
        if token.finish == Some(FinishReason::Cancelled) {
            return interrupted("the cluster dropped the request");
        }
        // The token that ends an answer is not part of its text.
        let text = match (&mut self.detokenizer, token.finish) {
            (Some(detokenizer), None | Some(FinishReason::Length)) => detokenizer.push(token.token),
            _ => String::new(),
        };
        let mut pieces = self.parser.push(&text);
        let mut ended = token.finish;
        if self.parser.is_done() {
            ended = Some(FinishReason::Stop);
        }
        if let Some(reason) = ended {
            let rest = self
                .detokenizer
                .as_mut()
                .map(Detokenizer::finish)
                .unwrap_or_default();
            pieces.extend(self.parser.push(&rest));
            pieces.extend(self.parser.finish(reason));
        }
        let mut pieces = match self.unstoppable {
            0 => self.before_stop(pieces),
            _ => pieces,
        };
        self.unstoppable = self.unstoppable.saturating_sub(1);
        if self.stop.found() {
            ended = Some(FinishReason::Stop);
        } else if ended.is_some() {
            say(self.stop.finish(), &mut pieces);
        }
        let finish = ended.map(|reason| self.finish(reason));
        Ok(Delta {
            pieces,
            token,
            finish,
        })
    }

    /// Leaves out what comes after a stop string.
    fn before_stop(&mut self, pieces: Vec<Piece>) -> Vec<Piece> {
        let mut before = Vec::with_capacity(pieces.len());
        for piece in pieces {
            match piece {
                Piece::Content(text) => say(self.stop.push(&text), &mut before),
                // A stop string does not reach across a tool call.
                piece => {
                    say(self.stop.finish(), &mut before);
                    before.push(piece);
                }
            }
            if self.stop.found() {
                break;
            }
        }
        before
    }

    fn finish(&self, reason: FinishReason) -> Finish {
        match reason {
            FinishReason::Length => Finish::Length,
            _ if self.parser.calls() > 0 && !self.stop.found() => Finish::ToolCalls,
            _ => Finish::Stop,
        }
    }
}

fn say(text: String, pieces: &mut Vec<Piece>) {
    if !text.is_empty() {
        pieces.push(Piece::Content(text));
    }
}

fn interrupted<T>(detail: &str) -> Result<T, StreamError> {
    Err(StreamError::Interrupted {
        detail: detail.to_owned(),
    })
}
