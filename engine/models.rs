//! What a step computes: a decoder, and the parts that it is made of.

pub(crate) mod decoder;
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
