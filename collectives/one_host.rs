//! What the ranks of one host share: a transport through memory, and memory for their devices.

use std::time::{Duration, Instant};

use crate::{
    delegate,
    error::CollectiveError,
    shared_memory::{Segment, SharedMemory, SharedMemoryOptions, SharedMemorySpec},
};

/// All ranks of a group on one host, connected.
pub struct OneHost {
    pub(crate) transport: SharedMemory,
    /// Where devices show each other their operands, if they can.
    pub(crate) devices: Option<Segment>,
}

impl OneHost {
    /// Meets all ranks. Blocks until everybody is there, at most for `deadline`.
    ///
    /// # Errors
    /// As for [`SharedMemory::join`].
    pub fn meet(
        spec: &SharedMemorySpec,
        options: &SharedMemoryOptions,
        deadline: Duration,
    ) -> Result<Self, CollectiveError> {
        let begun = Instant::now();
        let devices = match delegate::peer_memory_bytes(spec.size) {
            Some(bytes) => {
                let path = Segment::folder().join(format!("{}-devices", spec.name));
                Some(match spec.rank {
                    0 => Segment::create(&path, bytes)?,
                    _ => Segment::open(&path, bytes, deadline)?,
                })
            }
            None => None,
        };
        let left = deadline.saturating_sub(begun.elapsed());
        let transport = SharedMemory::join(spec, options, left)?;
        if let Some(devices) = &devices {
            // All have opened it before they joined; nobody who is killed leaves it behind.
            devices.unlink();
        }
        Ok(Self { transport, devices })
    }
}
