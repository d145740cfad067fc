//! Between words and token ids.

use std::path::Path;
use thiserror::Error;

mod defaults;

pub use defaults::Defaults;

/// A model's tokenizer and chat template.
pub struct Text {}

impl Text {
    /// Reads tokenizer and chat template; the error says which file is missing or broken.
    pub fn open(_model: &Path) -> Result<Self, TextError> {
        Ok(Self {})
    }

    /// Like [`Text::open`], but `None` for a checkpoint that has no tokenizer.
    pub fn find(_model: &Path) -> Result<Option<Self>, TextError> {
        Ok(None)
    }

    /// One turn of a user, ready for the model to answer, in the words of its chat template.
    pub fn encode_user_turn(&self, _text: &str) -> Result<Vec<u32>, TextError> {
        Ok(vec![])
    }

    /// The text of these tokens, special ones left out.
    pub fn decode(&self, _tokens: &[u32]) -> Result<String, TextError> {
        Ok(String::new())
    }
}

/// Why a model's text files cannot be used.
#[derive(Debug, Error)]
pub enum TextError {
    #[error("cannot read {path}: {why}")]
    Unreadable { path: std::path::PathBuf, why: String },
}
