//! A conversation in a terminal, with any server that speaks this API.

use thiserror::Error;

/// What a conversation is started with.
#[derive(Clone, Debug, Default)]
pub struct ChatOptions {
    /// Where the API is, such as `http://127.0.0.1:8080`.
    pub api: String,
    /// Which model; the first that the API lists if not given.
    pub model: Option<String>,
    /// What the model is told before the conversation.
    pub system: Option<String>,
    /// The model's own default if not given.
    pub temperature: Option<f32>,
    /// How many tokens an answer may have.
    pub max_tokens: Option<u32>,
}

/// Talks until the input ends or `/exit`.
pub async fn run(_options: ChatOptions) -> Result<(), ChatError> {
    Ok(())
}

/// Why a conversation cannot go on.
#[derive(Debug, Error)]
pub enum ChatError {
    #[error("no API answers at {api}: is the cluster up?")]
    Unreachable { api: String },
}
