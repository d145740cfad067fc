//! Numbers that must not be mixed up, each with a type of its own.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $inner:ty) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[derive(Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl $name {
            /// The number that follows this one.
            pub fn next(self) -> Self {
                Self(self.0 + 1)
            }
        }
    };
}

id!(
    /// One formation of the group. A shard that is lost ends its epoch; what carries an older
    /// epoch is refused.
    Epoch,
    u64
);
id!(
    /// The place of a plan in the scheduler's order, counted from 1 within an epoch.
    PlanNumber,
    u64
);
id!(
    /// The place of a shard in its group, from 0.
    Rank,
    u32
);
id!(
    /// One sequence of tokens that the shards continue. Never used twice by a scheduler.
    SequenceId,
    u64
);
id!(
    /// One step of the engine, counted from 0 within an epoch.
    Step,
    u64
);

impl Rank {
    /// The rank as an index into a list of shards.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}
