//! In how many bits keys and values are kept: part of what every shard is told to load.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// How keys and values are kept. On the command line and in files it is a number: 8, or 0 for none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub enum KvBits {
    /// In the type that they are computed in.
    #[default]
    AsComputed,
    /// In codes of 8 bits, with a scale and a bias for every group of a head's channels.
    Eight,
}

impl TryFrom<u32> for KvBits {
    type Error = UnknownKvBits;

    fn try_from(bits: u32) -> Result<Self, UnknownKvBits> {
        match bits {
            0 => Ok(Self::AsComputed),
            8 => Ok(Self::Eight),
            _ => Err(UnknownKvBits(bits.to_string())),
        }
    }
}

impl FromStr for KvBits {
    type Err = UnknownKvBits;

    fn from_str(text: &str) -> Result<Self, UnknownKvBits> {
        let bits: u32 = text.parse().map_err(|_| UnknownKvBits(text.to_owned()))?;
        bits.try_into()
    }
}

impl From<KvBits> for u32 {
    fn from(bits: KvBits) -> Self {
        match bits {
            KvBits::AsComputed => 0,
            KvBits::Eight => 8,
        }
    }
}

impl fmt::Display for KvBits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        u32::from(*self).fmt(f)
    }
}

/// Keys and values cannot be kept in so many bits.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("keys and values are kept in 8 bits, or with 0 as they are computed, not in '{0}'")]
pub struct UnknownKvBits(String);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eight_and_none_are_numbers_and_nothing_else_is_known() {
        for (text, bits) in [("8", KvBits::Eight), ("0", KvBits::AsComputed)] {
            assert_eq!(text.parse(), Ok(bits));
            assert_eq!(bits.to_string(), text);
        }
        for text in ["4", "eight", ""] {
            let error = text.parse::<KvBits>().unwrap_err();
            assert!(error.to_string().contains(&format!("'{text}'")), "{error}");
        }
    }
}
