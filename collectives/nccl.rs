//! MLX's NCCL back-end: how it is told who is in it. One per process, as MLX keeps it for good.

use std::{
    net::SocketAddr,
    sync::atomic::{AtomicBool, Ordering::SeqCst},
};

use crate::{
    error::CollectiveError,
    ffi::{MlxBackend, MlxGroup, set_environment},
};

/// Who is in an NCCL group of MLX's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NcclSpec {
    /// Our place, from 0.
    pub rank: usize,
    /// How many ranks there are.
    pub size: usize,
    /// Where rank 0 listens while the ranks meet.
    pub meeting: SocketAddr,
}

impl NcclSpec {
    pub(crate) fn form(&self) -> Result<MlxGroup, CollectiveError> {
        if FORMED.swap(true, SeqCst) {
            let why = "this process has one already";
            return Err(CollectiveError::local("forming an NCCL group", why));
        }
        set_environment("NCCL_HOST_IP", &self.meeting.ip().to_string())?;
        set_environment("NCCL_PORT", &self.meeting.port().to_string())?;
        set_environment("MLX_RANK", &self.rank.to_string())?;
        set_environment("MLX_WORLD_SIZE", &self.size.to_string())?;
        MlxGroup::of_mlx(MlxBackend::Nccl)
    }
}

/// MLX caches its back-ends by name and would hand the first one out again.
static FORMED: AtomicBool = AtomicBool::new(false);
