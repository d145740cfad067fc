//! What carries the operands of a measured group: a transport, or nobody.

use std::fmt;
use std::str::FromStr;

use offbook_collectives::measure::Echo;
use offbook_protocol::{Transport, UnknownName};
use serde::{Deserialize, Serialize};

/// See the module's own words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub(crate) enum Wire {
    Over(Transport),
    /// Each rank hears itself: what is left is the price of the way between device and host.
    Echo,
}

impl Wire {
    /// Whether a group over it is MLX's own: one in a process, and with one path.
    pub(crate) fn is_of_mlx(self) -> bool {
        matches!(self, Self::Over(transport) if transport.is_of_mlx())
    }

    /// How many ranks a group has among `ranks` processes.
    pub(crate) fn size(self, ranks: usize) -> usize {
        match self {
            Self::Over(_) => ranks,
            Self::Echo => Echo::SIZE,
        }
    }
}

impl From<Transport> for Wire {
    fn from(transport: Transport) -> Self {
        Self::Over(transport)
    }
}

impl fmt::Display for Wire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Over(transport) => transport.fmt(f),
            Self::Echo => f.pad(ECHO),
        }
    }
}

impl From<Wire> for String {
    fn from(wire: Wire) -> Self {
        wire.to_string()
    }
}

impl FromStr for Wire {
    type Err = UnknownName;

    fn from_str(name: &str) -> Result<Self, UnknownName> {
        match name {
            ECHO => Ok(Self::Echo),
            name => name.parse().map(Self::Over).map_err(|unknown| UnknownName {
                known: "quic, shm, ring, nccl, jaccl, echo",
                ..unknown
            }),
        }
    }
}

impl TryFrom<String> for Wire {
    type Error = UnknownName;

    fn try_from(name: String) -> Result<Self, UnknownName> {
        name.parse()
    }
}

const ECHO: &str = "echo";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        for name in ["quic", "shm", "ring", "nccl", "echo"] {
            assert_eq!(name.parse::<Wire>().unwrap().to_string(), name);
        }
        let unknown = "mail".parse::<Wire>().unwrap_err();
        assert!(unknown.to_string().contains("echo"), "{unknown}");
    }
}
