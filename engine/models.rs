//! The architectures. One file per family of models; what they share lies beside them.

pub(crate) mod minimax;
pub(crate) mod attention;
pub(crate) mod experts;
pub(crate) mod rotary;
pub(crate) mod linear;
mod fused;

use mlx_rs::error::Exception;
use offbook_collectives::CollectiveError;
use thiserror::Error;

/// A step could not be built or run. Whose fault it is decides what happens next.
#[derive(Debug, Error)]
pub(crate) enum Fault {
    #[error(transparent)]
    Device(#[from] Exception),
    #[error(transparent)]
    Collective(#[from] CollectiveError),
}
