//! Which modules are packed, and how: MLX's affine quantisation.

use std::collections::HashMap;

use serde_json::Value;

use super::ConfigError;
use super::json::Keys;

/// How a packed matrix lies in memory: along its input axis, each group of `group_size` values has
/// one scale and one bias, and 32 values fill `bits` words of 32 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Packing {
    pub group_size: usize,
    pub bits: usize,
}

impl Packing {
    /// Words of 32 bits that hold `columns` values, a multiple of 32.
    pub fn words(&self, columns: usize) -> usize {
        columns / 32 * self.bits
    }

    /// Scales, and as many biases, that belong to `columns` values, a multiple of the group.
    pub fn groups(&self, columns: usize) -> usize {
        columns / self.group_size
    }
}

/// `quantization` (or `quantization_config`) of `config.json`, as mlx-lm reads it: a default, and
/// per module an object, `true` (the default) or `false` (not packed).
#[derive(Clone, Debug, PartialEq)]
pub struct Quantization {
    default: Packing,
    overrides: HashMap<String, Option<Packing>>,
}

impl Quantization {
    /// The packing that a module has if it is packed at all.
    pub fn packing_of(&self, module: &str) -> Option<Packing> {
        match self.overrides.get(module) {
            Some(packing) => *packing,
            None => Some(self.default),
        }
    }

    pub(super) fn parse(keys: &Keys<'_>) -> Result<Option<Self>, ConfigError> {
        let keys = match keys.optional_object("quantization")? {
            Some(keys) => keys,
            None => match keys.optional_object("quantization_config")? {
                Some(keys) => keys,
                None => return Ok(None),
            },
        };
        if let Some(method) = keys.optional_text("quant_method")? {
            return Err(ConfigError::Unsupported {
                key: "quantization_config.quant_method".to_owned(),
                found: method,
                supported: "MLX's affine quantisation (convert the model with mlx_lm.convert)"
                    .to_owned(),
            });
        }
        let default = packing(&keys, None)?;
        let mut overrides = HashMap::new();
        for (module, value) in keys.entries() {
            match value {
                Value::Bool(true) => overrides.insert(module.clone(), Some(default)),
                Value::Bool(false) => overrides.insert(module.clone(), None),
                Value::Object(_) => {
                    let keys = keys.optional_object(module)?;
                    let packing = keys.map(|keys| packing(&keys, Some(default))).transpose()?;
                    overrides.insert(module.clone(), packing)
                }
                // A setting of all modules, or of whoever made the checkpoint.
                _ if !module.contains('.') && module != "lm_head" => continue,
                _ => {
                    keys.optional_object(module)?;
                    continue;
                }
            };
        }
        Ok(Some(Self { default, overrides }))
    }
}

fn packing(keys: &Keys<'_>, default: Option<Packing>) -> Result<Packing, ConfigError> {
    keys.only("mode", keys.optional_text("mode")?.as_deref(), &["affine"])?;
    let size = |key, default: Option<usize>, known: &[&str]| {
        let size = match (keys.optional_size(key)?, default) {
            (Some(size), _) | (None, Some(size)) => size,
            (None, None) => keys.size(key)?,
        };
        keys.only(key, Some(&size.to_string()), known)?;
        Ok(size)
    };
    Ok(Packing {
        group_size: size("group_size", default.map(|d| d.group_size), GROUP_SIZES)?,
        bits: size("bits", default.map(|d| d.bits), BITS)?,
    })
}

/// What MLX's affine kernels exist for.
const GROUP_SIZES: &[&str] = &["32", "64", "128"];
const BITS: &[&str] = &["2", "3", "4", "5", "6", "8"];
