//! The architectures, one file per family of models, and the decoder that computes them all with the
//! parts that it is made of.
//!
//! An architecture whose parts are all here is a file that reads its `config.json` into a `ModelConfig`,
//! and a line in `ARCHITECTURES`. One with a new part adds that beside the others, and what names it to
//! `ModelConfig`.

mod minimax;
mod qwen3;
pub(crate) mod decoder;
pub(crate) mod attention;
pub(crate) mod mlp;
pub(crate) mod experts;
pub(crate) mod rotary;
pub(crate) mod linear;
mod fused;

use mlx_rs::error::Exception;
use offbook_collectives::CollectiveError;
use thiserror::Error;

use crate::config::{ConfigError, Keys, ModelConfig};

/// A family of models, as `config.json` tells it.
pub(crate) struct Architecture {
    /// What `model_type` may say.
    pub(crate) model_types: &'static [&'static str],
    /// Understands the other keys, or refuses what would be computed differently. Stop tokens and bounds
    /// are checked for all alike.
    pub(crate) read: fn(&Keys<'_>) -> Result<ModelConfig, ConfigError>,
}

pub(crate) const ARCHITECTURES: [Architecture; 3] =
    [minimax::MINIMAX, qwen3::QWEN3, qwen3::QWEN3_MOE];

/// A step could not be built or run. Whose fault it is decides what happens next.
#[derive(Debug, Error)]
pub(crate) enum Fault {
    #[error(transparent)]
    Device(#[from] Exception),
    #[error(transparent)]
    Collective(#[from] CollectiveError),
}
