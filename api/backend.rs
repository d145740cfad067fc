//! What the API asks of the cluster: generate, and say how you are.

use std::pin::Pin;

use futures::Stream;
use futures::future::BoxFuture;
use offbook_protocol::{
    ClusterReport, Rejection, Request, RequestFailure, SampledToken, ShardSteps,
};
use thiserror::Error;

/// The cluster, as the API sees it.
pub trait Backend: Send + Sync + 'static {
    /// Resolves once the request is accepted or rejected, before its first token. A cluster that
    /// cannot be reached at all is [`Rejection::NotReady`].
    fn submit(&self, request: Request) -> BoxFuture<'_, Result<Tokens, Rejection>>;

    /// How the cluster is. The error says, for an operator, why nobody can tell.
    fn cluster(&self) -> BoxFuture<'_, Result<ClusterReport, String>>;

    /// What the steps of the shards have taken, in rank order; without those that do not answer now.
    fn steps(&self) -> BoxFuture<'_, Vec<ShardSteps>>;
}

/// What becomes of one request: its tokens in order, each of them once, the last one with a finish
/// reason. It ends after that token, or after an error. Dropping it cancels the request at once.
pub type Tokens = Pin<Box<dyn Stream<Item = Result<Progress, StreamError>> + Send>>;

/// What happens next to a request.
#[derive(Clone, Debug, PartialEq)]
pub enum Progress {
    Token(SampledToken),
    /// A shard was lost. The next token follows when the group has formed again.
    Paused,
}

/// Why an answer that had begun will not be completed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum StreamError {
    #[error(transparent)]
    Failed(#[from] RequestFailure),
    /// Nothing broke, and yet it ends: this node stops, say, or the client read too slowly.
    #[error("the answer was interrupted: {detail}")]
    Interrupted { detail: String },
}
