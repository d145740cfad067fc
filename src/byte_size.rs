//! A number of bytes as people write it: `2GiB`, `512MiB`, `1.5GB`, `1073741824`.

use std::fmt;
use std::str::FromStr;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

/// Above 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Written", into = "String")]
pub(crate) struct ByteSize(u64);

impl ByteSize {
    pub(crate) fn bytes(self) -> u64 {
        self.0
    }
}

impl FromStr for ByteSize {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let is_unit = |letter: char| letter.is_ascii_alphabetic();
        let (number, unit) = text.split_at(text.find(is_unit).unwrap_or(text.len()));
        let known = UNITS.iter().find(|(name, _)| *name == unit);
        let Some((_, scale)) = known else {
            bail!("'{text}' is no number of bytes: write it as in 2GiB, 512MiB or 1073741824");
        };
        let number: f64 = number.trim().parse().with_context(|| {
            format!("'{text}' is no number of bytes: write it as in 2GiB or 512MiB")
        })?;
        let bytes = number * *scale as f64;
        if !(1.0..=u64::MAX as f64).contains(&bytes) {
            bail!("'{text}' must be above 0");
        }
        Ok(Self(bytes as u64))
    }
}

/// In the largest unit of which it is a whole number.
impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whole = |(_, scale): &&(&str, u64)| self.0.is_multiple_of(*scale);
        let (unit, scale) = UNITS.iter().find(whole).unwrap_or(&("", 1));
        write!(f, "{}{unit}", self.0 / scale)
    }
}

/// In a file: text, or a bare number.
#[derive(Deserialize)]
#[serde(untagged)]
enum Written {
    Number(u64),
    Text(String),
}

impl TryFrom<Written> for ByteSize {
    type Error = anyhow::Error;

    fn try_from(written: Written) -> Result<Self> {
        match written {
            Written::Number(bytes) => bytes.to_string().parse(),
            Written::Text(text) => text.parse(),
        }
    }
}

impl From<ByteSize> for String {
    fn from(size: ByteSize) -> Self {
        size.to_string()
    }
}

/// Those that `Display` prefers come first.
const UNITS: [(&str, u64); 10] = [
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("", 1),
    ("B", 1),
    ("TB", 1_000_000_000_000),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("kB", 1_000),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_spelling_is_read_and_what_is_none_is_named() {
        let read = |text: &str| text.parse::<ByteSize>().map(ByteSize::bytes);
        assert_eq!(read("2GiB").unwrap(), 2 << 30);
        assert_eq!(read("1.5KiB").unwrap(), 1536);
        assert_eq!(read("3 MB").unwrap(), 3_000_000);
        assert_eq!(read("4096").unwrap(), 4096);
        for wrong in ["", "GiB", "2 gigs", "-1GiB", "0", "nan", "1e99"] {
            let error = read(wrong).unwrap_err().to_string();
            assert!(error.contains(&format!("'{wrong}'")), "{error}");
        }
    }

    #[test]
    fn it_is_written_so_that_it_is_read_as_the_same() {
        for bytes in [1, 1023, 1536, 3 << 30, 5_000_000_000, u64::from(u32::MAX)] {
            let text = ByteSize(bytes).to_string();
            assert_eq!(text.parse::<ByteSize>().unwrap().bytes(), bytes, "{text}");
        }
        assert_eq!(ByteSize(3 << 30).to_string(), "3GiB");
    }
}
