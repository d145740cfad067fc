//! The small checkpoints of `tests/fixtures`, with what mlx-lm answers.

use std::fs::File;
use std::path::{Path, PathBuf};

use offbook_protocol::Join;
use serde::Deserialize;

use super::{greedy_with_logprobs, join};

/// One checkpoint and its answers.
pub(crate) struct Fixture {
    pub(crate) name: &'static str,
    pub(crate) model: PathBuf,
    pub(crate) answers: Vec<Answer>,
}

#[derive(Deserialize)]
struct Expected {
    answers: Vec<Answer>,
}

/// What mlx-lm answers to one prompt.
#[derive(Deserialize)]
pub(crate) struct Answer {
    pub(crate) prompt: Vec<u32>,
    pub(crate) steps: Vec<Expect>,
}

#[derive(Deserialize)]
pub(crate) struct Expect {
    pub(crate) token: u32,
    pub(crate) logprob: f32,
    /// The most likely tokens with their log-probabilities.
    pub(crate) top: Vec<(u32, f32)>,
}

impl Fixture {
    pub(crate) fn open(name: &'static str) -> Self {
        let all = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures");
        let model = all.join(name);
        let expected = File::open(model.join("expected.json")).unwrap();
        let expected: Expected = serde_json::from_reader(expected).unwrap();
        Self {
            name,
            model,
            answers: expected.answers,
        }
    }

    /// All prompts, greedy, with as many tokens as mlx-lm gave; sequence `i` is answer `i`.
    pub(crate) fn joins(&self) -> Vec<Join> {
        let answers = (0..).zip(&self.answers);
        answers
            .map(|(id, a)| join(id, &a.prompt, a.steps.len() as u32, greedy_with_logprobs()))
            .collect()
    }

    pub(crate) fn tokens(&self, answer: usize) -> Vec<u32> {
        self.answers[answer].steps.iter().map(|s| s.token).collect()
    }
}

/// Every kind of packing and of shape.
pub(crate) const ALL: [&str; 12] = [
    "dense-f32",
    "q4",
    "mixed-bits",
    "bf16-5bit",
    "odd-tied",
    "no-norms-3bit",
    "six-layers-8bit",
    "wide-groups-2bit",
    "qwen3-f32",
    "qwen3-4bit",
    "qwen3-moe-4bit",
    "qwen3-moe-f32",
];
