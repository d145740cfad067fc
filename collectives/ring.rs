//! MLX's own ring over TCP: how it is told who is in it. One per process, as MLX keeps it for good.

use std::{
    io::Write,
    net::SocketAddr,
    sync::atomic::{AtomicBool, Ordering::SeqCst},
};

use crate::{
    error::CollectiveError,
    ffi::{MlxBackend, MlxGroup, set_environment},
};

/// Who is in a ring of MLX's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RingSpec {
    /// Our place, from 0.
    pub rank: usize,
    /// Where each rank listens, by rank, ours included.
    pub addresses: Vec<SocketAddr>,
}

impl RingSpec {
    /// Writes the host file, tells MLX about it, and waits until MLX has formed the ring.
    pub(crate) fn form(&self) -> Result<MlxGroup, CollectiveError> {
        if self.rank >= self.addresses.len() {
            let why = format!("there is no rank {} of {}", self.rank, self.addresses.len());
            return Err(CollectiveError::local(FORMING, why));
        }
        if FORMED.swap(true, SeqCst) {
            return Err(CollectiveError::local(
                FORMING,
                "this process has one already",
            ));
        }
        let mut hosts = tempfile::NamedTempFile::new()
            .map_err(|why| CollectiveError::local("making the host file", why))?;
        hosts
            .write_all(self.hosts().as_bytes())
            .and_then(|()| hosts.flush())
            .map_err(|why| CollectiveError::local("writing the host file", why))?;
        set_environment("MLX_HOSTFILE", &hosts.path().to_string_lossy())?;
        set_environment("MLX_RANK", &self.rank.to_string())?;
        MlxGroup::of_mlx(MlxBackend::Ring)
    }

    /// One list of addresses per rank, as MLX wants it.
    fn hosts(&self) -> String {
        let hosts: Vec<[String; 1]> = self
            .addresses
            .iter()
            .map(|host| [host.to_string()])
            .collect();
        serde_json::json!(hosts).to_string()
    }
}

const FORMING: &str = "forming MLX's ring";

/// MLX caches its back-ends by name and would hand the first ring out again.
static FORMED: AtomicBool = AtomicBool::new(false);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_file_lists_each_rank_by_itself() {
        let addresses = vec![
            "127.0.0.1:5000".parse().unwrap(),
            "[::1]:5001".parse().unwrap(),
        ];
        let hosts = RingSpec { rank: 0, addresses }.hosts();
        assert_eq!(hosts, r#"[["127.0.0.1:5000"],["[::1]:5001"]]"#);
    }
}
