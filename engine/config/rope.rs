//! Rotary positions as `config.json` has them: at its top, or, from newer tools, in `rope_parameters`.

use super::ConfigError;
use super::json::Keys;

/// The base of the angles. Positions that are scaled in any way are refused.
pub(super) fn theta(keys: &Keys<'_>) -> Result<f32, ConfigError> {
    let mut theta = keys.optional_number("rope_theta")?;
    for key in ["rope_scaling", "rope_parameters"] {
        let Some(nested) = keys.optional_object(key)? else {
            continue;
        };
        for kind in ["rope_type", "type"] {
            nested.only_text(kind, &["default"])?;
        }
        if let Some(found) = nested.optional_number("rope_theta")? {
            let known = *theta.get_or_insert(found);
            nested.only(
                "rope_theta",
                Some(&found.to_string()),
                &[&known.to_string()],
            )?;
        }
    }
    match theta {
        Some(theta) => Ok(theta),
        None => keys.number("rope_theta"),
    }
}
