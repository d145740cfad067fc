//! What one step has: its rows, and what is drawn after which of them.

use std::sync::Arc;

use offbook_protocol::{Sampling, SequenceId};

/// The rows of one step: decode rows first, then chunks of prompts, each in the order of arrival.
#[derive(Clone, Debug, PartialEq)]
pub struct StepBatch {
    /// Which of the lanes the step is of, from 0.
    pub lane: usize,
    pub segments: Vec<Segment>,
}

/// Consecutive positions of one sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct Segment {
    pub sequence: SequenceId,
    /// Position of the first row.
    pub start: usize,
    pub input: Input,
    /// Set when the last row draws a token.
    pub draw: Option<Draw>,
    /// Positions that the cache of this sequence is to have, whole blocks.
    pub reserve: usize,
}

/// Where the rows' tokens come from.
#[derive(Clone, Debug, PartialEq)]
pub enum Input {
    /// Token ids that the host knows.
    Prompt(Vec<u32>),
    /// The token that the lane's step before drew, in this place among its draws. It may still be on the
    /// device.
    Drawn(usize),
}

/// One token to draw.
#[derive(Clone, Debug, PartialEq)]
pub struct Draw {
    /// The position that the token will have in its sequence.
    pub position: usize,
    pub sampling: Arc<Sampling>,
    /// Set when the options change logits by the tokens so far, or token by token.
    pub reshape: Option<Reshape>,
}

/// What the logits of one draw are reshaped by, besides the options.
#[derive(Clone, Debug, PartialEq)]
pub struct Reshape {
    pub sequence: SequenceId,
    /// Tokens of the answer before this one.
    pub generated: usize,
    pub past: Past,
}

/// The tokens before a draw.
#[derive(Clone, Debug, PartialEq)]
pub enum Past {
    /// It is the first draw of its sequence in this epoch.
    Known {
        prompt: Vec<u32>,
        /// Those that were drawn before an epoch was lost.
        generated: Vec<u32>,
        stop_tokens: Vec<u32>,
    },
    /// Those before the draw before, and what that one drew: in this place among the draws of the
    /// lane's step before.
    Drawn(usize),
}

impl StepBatch {
    /// Rows of all segments.
    pub fn rows(&self) -> usize {
        self.segments.iter().map(Segment::rows).sum()
    }

    /// Rows that are tokens of prompts.
    pub fn prefill_tokens(&self) -> usize {
        let prompts = self.segments.iter().filter(|s| !s.is_decode());
        prompts.map(Segment::rows).sum()
    }

    /// Who draws, in row order.
    pub fn draws(&self) -> Vec<SequenceId> {
        self.segments
            .iter()
            .filter(|s| s.draw.is_some())
            .map(|s| s.sequence)
            .collect()
    }

    /// Whether a row continues a sequence by one drawn token.
    pub fn decodes(&self) -> bool {
        self.segments.iter().any(Segment::is_decode)
    }

    /// Whether every row continues a sequence by one drawn token.
    pub fn is_decode(&self) -> bool {
        self.segments.iter().all(Segment::is_decode)
    }
}

impl Segment {
    /// Positions in this segment, at least 1.
    pub fn rows(&self) -> usize {
        match &self.input {
            Input::Prompt(tokens) => tokens.len(),
            Input::Drawn(_) => 1,
        }
    }

    fn is_decode(&self) -> bool {
        matches!(self.input, Input::Drawn(_))
    }
}
