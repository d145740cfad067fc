//! The files of a model directory that speak of text, and what can be wrong with them.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use thiserror::Error;

pub(super) const TOKENIZER: &str = "tokenizer.json";
pub(super) const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
pub(super) const GENERATION_CONFIG: &str = "generation_config.json";
pub(super) const CONFIG: &str = "config.json";
pub(super) const TEMPLATE: &str = "chat_template.jinja";
pub(super) const TEMPLATE_JSON: &str = "chat_template.json";

/// The file's text; `None` when there is no such file.
pub(super) fn text(model: &Path, name: &str) -> Result<Option<String>, TextError> {
    let path = model.join(name);
    // Whoever opens a pipe may wait for ever.
    let read = fs::metadata(&path).and_then(|found| match found.is_file() {
        true => fs::read_to_string(&path),
        false => Err(io::Error::other("it is not a regular file")),
    });
    match read {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(TextError::File {
            path,
            why: error.to_string(),
        }),
    }
}

/// The file's JSON object; an empty one when there is no such file.
pub(super) fn object(model: &Path, name: &str) -> Result<Map<String, Value>, TextError> {
    let Some(text) = text(model, name)? else {
        return Ok(Map::new());
    };
    serde_json::from_str(&text).map_err(|error| TextError::file(model, name, error))
}

/// Why a model's text files, or a text that was given for them, cannot be used.
#[derive(Debug, Error)]
pub enum TextError {
    #[error("cannot use {path}: {why}")]
    File { path: PathBuf, why: String },
    #[error("the model has no chat template; completions from plain text or token ids work")]
    NoTemplate,
    /// The template itself may have raised this, because of the roles it was given, say.
    #[error("the chat template refuses this conversation: {why}")]
    Template { why: String },
    #[error("the tokenizer cannot encode this text: {why}")]
    Encode { why: String },
}

impl TextError {
    pub(super) fn file(model: &Path, name: &str, why: impl ToString) -> Self {
        Self::File {
            path: model.join(name),
            why: why.to_string(),
        }
    }
}
