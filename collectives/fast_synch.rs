//! Whether collectives stay on the device's stream, and what became of that wish.

use std::{fmt, str::FromStr};

use crate::error::CollectiveError;

/// The wish. `On` falls back to the CPU stream where the device cannot do it, and says so once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FastSynch {
    /// Delegated where the device can.
    #[default]
    On,
    /// On the CPU stream, as MLX does it by itself.
    Off,
    /// Delegated, or not at all.
    Require,
}

impl FromStr for FastSynch {
    type Err = String;

    /// Reads `on`, `off`, `require`, and what MLX's own switch takes: `1` and `0`.
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "on" | "1" => Ok(Self::On),
            "off" | "0" => Ok(Self::Off),
            "require" => Ok(Self::Require),
            _ => Err(format!("'{text}' is none of on, off, require")),
        }
    }
}

impl fmt::Display for FastSynch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
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
        match self {
            Self::Require => Err(refusal),
            Self::Off => Ok(Path::CpuStream {
                why: refusal.to_string(),
            }),
            Self::On => {
                tracing::warn!(why = %refusal, "collectives go over the CPU stream");
                Ok(Path::CpuStream {
                    why: refusal.to_string(),
                })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wish_is_read_back() {
        for wish in [FastSynch::On, FastSynch::Off, FastSynch::Require] {
            assert_eq!(wish.to_string().parse(), Ok(wish));
        }
        assert_eq!("1".parse(), Ok(FastSynch::On));
        assert!("yes".parse::<FastSynch>().is_err());
    }
}
