//! The events of a streamed completion.

use offbook_protocol::SampledToken;
use serde_json::{Value, json};

use super::super::answer::Delta;
use super::super::logprobs;
use super::super::options::Options;
use super::super::sse::Chunks;
use super::{Completion, text};

/// Writes `text_completion` objects, each with the text that is new.
pub(super) struct CompletionChunks {
    completion: Completion,
    include_usage: bool,
    /// Without text, or where the client asked for token ids, every token is told of at once.
    every_token: bool,
    choices: Vec<Choice>,
    generated: usize,
}

#[derive(Clone, Default)]
struct Choice {
    begun: bool,
    /// Tokens that no chunk has told of yet, because they brought no text.
    untold: Vec<SampledToken>,
    /// Characters told of so far.
    offset: usize,
    /// What it found computed of its prompt.
    cached: u32,
}

impl CompletionChunks {
    pub(super) fn new(completion: Completion, choices: usize, options: &Options) -> Self {
        let every_token = options.return_token_ids || completion.service.text.is_none();
        Self {
            completion,
            include_usage: options.include_usage,
            every_token,
            choices: vec![Choice::default(); choices],
            generated: 0,
        }
    }

    fn object(&self, choices: Vec<Value>) -> Value {
        let mut object = self.completion.object(choices);
        if self.include_usage {
            object["usage"] = Value::Null;
        }
        object
    }
}

impl Chunks for CompletionChunks {
    fn first(&mut self) -> Vec<Value> {
        Vec::new()
    }

    fn delta(&mut self, index: usize, delta: Delta) -> Vec<Value> {
        self.generated += 1;
        let choice = &mut self.choices[index];
        choice.cached += delta.token.cached_tokens;
        choice.untold.push(delta.token);
        let text = text(&delta.pieces);
        if text.is_empty() && delta.finish.is_none() && !self.every_token {
            return Vec::new();
        }
        let tokens = std::mem::take(&mut choice.untold);
        let service = &self.completion.service;
        let mut likely = || logprobs::for_completion(service, &tokens, &mut choice.offset);
        let mut object = json!({
            "index": index,
            "text": text,
            "logprobs": if self.completion.logprobs { likely() } else { Value::Null },
            "finish_reason": delta.finish.map(|finish| finish.name()),
        });
        if self.completion.token_ids {
            object["token_ids"] = tokens.iter().map(|token| token.token).collect();
            if !std::mem::replace(&mut choice.begun, true) {
                object["prompt_token_ids"] = json!(self.completion.prompt_of(index));
            }
        }
        vec![self.object(vec![object])]
    }

    fn last(&mut self) -> Vec<Value> {
        if !self.include_usage {
            return Vec::new();
        }
        let mut object = self.object(Vec::new());
        let cached: Vec<u32> = self.choices.iter().map(|choice| choice.cached).collect();
        object["usage"] = self.completion.usage(&cached, self.generated);
        vec![object]
    }
}
