//! Whether collectives stay on the device's stream, and what became of that wish.

use std::{fmt, str::FromStr, sync::Once};

use crate::error::CollectiveError;

/// The wish.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FastSynch {
    /// Delegated where the device can, else on the CPU stream.
    #[default]
    Auto,
    /// The same, with a warning where the device cannot.
    On,
    /// On the CPU stream, as MLX does it by itself.
    Off,
    /// Delegated, or not at all.
    Require,
}

impl FromStr for FastSynch {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "on" => Ok(Self::On),
            "off" => Ok(Self::Off),
            "require" => Ok(Self::Require),
            _ => Err(format!("'{text}' is none of auto, on, off, require")),
        }
    }
}

impl fmt::Display for FastSynch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::On => "on",
            Self::Off => "off",
            Self::Require => "require",
        })
    }
}

/// The way that the operations of a group take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Path {
    /// A group of one has none.
    Alone,
    /// They stay on the device's stream.
    Delegated,
    /// They cross to the CPU stream.
    CpuStream {
        /// [`CollectiveError::NotDelegated`], in words: why not on the device's stream.
        why: String,
    },
    /// MLX carries them over a transport of its own.
    Mlx,
}

impl Path {
    /// One word for tables and metrics: `alone`, `delegated`, `cpu-stream` or `mlx`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Alone => "alone",
            Self::Delegated => "delegated",
            Self::CpuStream { .. } => "cpu-stream",
            Self::Mlx => "mlx",
        }
    }
}

impl FastSynch {
    /// What a refusal of the device means to this wish: nothing more than another path, or an error.
    pub(crate) fn settle(self, refusal: CollectiveError) -> Result<Path, CollectiveError> {
        let why = refusal.to_string();
        match self {
            Self::Require => return Err(refusal),
            Self::Off => {}
            Self::Auto => SAID.call_once(|| tracing::info!(why, "{OVER_THE_CPU}")),
            Self::On => SAID.call_once(|| tracing::warn!(why, "{OVER_THE_CPU}")),
        }
        Ok(Path::CpuStream { why })
    }
}

/// Once in the life of a process: groups come and go, the device stays.
static SAID: Once = Once::new();
const OVER_THE_CPU: &str = "collectives go over the CPU stream";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_cannot_is_an_error_only_when_it_was_required() {
        let refusal = || CollectiveError::NotDelegated {
            why: "a test".to_owned(),
        };
        for wish in [FastSynch::Auto, FastSynch::On, FastSynch::Off] {
            let path = wish.settle(refusal()).expect("there is another way");
            assert_eq!(path.name(), "cpu-stream");
        }
        assert_eq!(FastSynch::Require.settle(refusal()), Err(refusal()));
    }

    #[test]
    fn a_wish_is_read_back() {
        for wish in [
            FastSynch::Auto,
            FastSynch::On,
            FastSynch::Off,
            FastSynch::Require,
        ] {
            assert_eq!(wish.to_string().parse(), Ok(wish));
        }
        assert!("yes".parse::<FastSynch>().is_err());
    }
}
