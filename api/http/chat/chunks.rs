//! The events of a streamed chat completion: the role, what comes, why it ended, what it used.

use offbook_protocol::SampledToken;
use serde_json::{Value, json};

use super::super::answer::Delta;
use super::super::options::Options;
use super::super::sse::Chunks;
use super::super::{Usage, cached, call_id, logprobs};
use super::ChatAnswer;
use crate::text::Piece;

/// Writes `chat.completion.chunk` objects.
pub(super) struct ChatChunks {
    answer: ChatAnswer,
    include_usage: bool,
    /// Per choice: tokens that no chunk has told of yet, because they brought no words.
    untold: Vec<Vec<SampledToken>>,
    generated: usize,
    /// Per choice: what it found computed of the prompt.
    cached: Vec<u32>,
}

impl ChatChunks {
    pub(super) fn new(answer: ChatAnswer, choices: usize, options: &Options) -> Self {
        let include_usage = options.include_usage;
        Self {
            answer,
            include_usage,
            untold: vec![Vec::new(); choices],
            generated: 0,
            cached: vec![0; choices],
        }
    }

    fn chunk(&mut self, choice: usize, delta: Value, finish: Option<&str>) -> Value {
        let tokens = std::mem::take(&mut self.untold[choice]);
        let likely = self.answer.logprobs && !tokens.is_empty();
        let likely = likely.then(|| logprobs::for_chat(&self.answer.service, &tokens));
        let mut object = json!({
            "index": choice,
            "delta": delta,
            "logprobs": likely,
            "finish_reason": finish,
        });
        if self.answer.token_ids {
            let ids = tokens.iter().map(|token| token.token);
            object["token_ids"] = ids.collect();
        }
        self.object(vec![object])
    }

    fn part(&self, choice: usize, piece: &Piece) -> Value {
        match piece {
            Piece::Thought(text) => json!({ "reasoning_content": text }),
            Piece::Content(text) => json!({ "content": text }),
            Piece::ToolCall { index, tool } => json!({ "tool_calls": [{
                "index": index,
                "id": call_id(&self.answer.id, choice, *index),
                "type": "function",
                "function": { "name": tool, "arguments": "" },
            }]}),
            Piece::Arguments { index, json } => json!({ "tool_calls": [{
                "index": index,
                "function": { "arguments": json },
            }]}),
        }
    }

    fn object(&self, choices: Vec<Value>) -> Value {
        let mut object = self.answer.object("chat.completion.chunk", choices);
        if self.include_usage {
            object["usage"] = Value::Null;
        }
        object
    }
}

impl Chunks for ChatChunks {
    fn first(&mut self) -> Vec<Value> {
        let role = json!({ "role": "assistant", "content": "" });
        let mut chunks: Vec<Value> = (0..self.untold.len())
            .map(|choice| self.chunk(choice, role.clone(), None))
            .collect();
        if self.answer.token_ids {
            chunks[0]["prompt_token_ids"] = json!(self.answer.prompt);
        }
        chunks
    }

    fn delta(&mut self, choice: usize, delta: Delta) -> Vec<Value> {
        self.generated += 1;
        self.cached[choice] += delta.token.cached_tokens;
        self.untold[choice].push(delta.token);
        let mut chunks: Vec<Value> = delta
            .pieces
            .iter()
            .map(|piece| self.chunk(choice, self.part(choice, piece), None))
            .collect();
        if let Some(finish) = delta.finish {
            chunks.push(self.chunk(choice, json!({}), Some(finish.name())));
        }
        chunks
    }

    fn last(&mut self) -> Vec<Value> {
        if !self.include_usage {
            return Vec::new();
        }
        let mut object = self.object(Vec::new());
        let usage = Usage {
            prompt: self.answer.prompt.len(),
            cached: cached(&self.cached, self.cached.len()),
            generated: self.generated,
        };
        object["usage"] = usage.value();
        vec![object]
    }
}
