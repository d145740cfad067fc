//! MLX's RDMA over Thunderbolt: which device leads to which rank, and a side channel of ours.
//!
//! JACCL asks its ranks to gather a few bytes while they meet. They travel over a transport of ours,
//! encrypted and between known keys, instead of MLX's plain TCP. JACCL has no deadlines and never tells of
//! a dead peer: a shard that is told so by the head leaves it by ending its process, as it leaves MLX's
//! ring.
//!
//! It takes Macs with Thunderbolt 5, macOS 26.2 and RDMA enabled (`rdma_ctl enable` in recovery mode). No
//! such machine was at hand: this has been compiled and its refusals tested, it has not been run.
//! deploy/README.md says how to try it.

use std::{
    io::Write,
    sync::atomic::{AtomicBool, Ordering::SeqCst},
};

use crate::{
    error::CollectiveError,
    ffi::{MlxGroup, View, jaccl_is_available, set_environment},
};

/// The RDMA devices of a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JacclSpec {
    /// For each rank, the device that leads from it to each rank, as `ibv_devices` names them; `None`
    /// towards itself.
    pub devices: Vec<Vec<Option<String>>>,
}

impl JacclSpec {
    /// Blocks until all ranks have met over `side`.
    pub(crate) fn form(&self, side: View) -> Result<MlxGroup, CollectiveError> {
        let (rank, size) = (side.carrier.rank(), side.carrier.size());
        self.check(size)?;
        if !jaccl_is_available() {
            let why = "this machine has no RDMA over Thunderbolt (it takes macOS 26.2 and `rdma_ctl \
                       enable` in recovery mode): use transport quic";
            return Err(CollectiveError::local(FORMING, why));
        }
        if FORMED.swap(true, SeqCst) {
            return Err(CollectiveError::local(
                FORMING,
                "this process has one already",
            ));
        }
        let mut devices = tempfile::NamedTempFile::new()
            .map_err(|why| CollectiveError::local("making the device file", why))?;
        devices
            .write_all(serde_json::json!(self.devices).to_string().as_bytes())
            .and_then(|()| devices.flush())
            .map_err(|why| CollectiveError::local("writing the device file", why))?;
        set_environment("MLX_IBV_DEVICES", &devices.path().to_string_lossy())?;
        set_environment("MLX_RANK", &rank.to_string())?;
        MlxGroup::of_jaccl(side)
    }

    /// Every pair needs a device at both ends.
    fn check(&self, size: usize) -> Result<(), CollectiveError> {
        let missing = |from: usize, to: usize| {
            let device = self.devices.get(from).and_then(|row| row.get(to));
            from != to && device.is_none_or(Option::is_none)
        };
        let pairs = (0..size).flat_map(|from| (0..size).map(move |to| (from, to)));
        match pairs.into_iter().find(|&(from, to)| missing(from, to)) {
            None => Ok(()),
            Some((from, to)) => {
                let why =
                    format!("no device leads from rank {from} to rank {to}: add it to `rdma`");
                Err(CollectiveError::local(FORMING, why))
            }
        }
    }
}

const FORMING: &str = "forming a JACCL group";

/// MLX caches its back-ends by name and would hand the first one out again.
static FORMED: AtomicBool = AtomicBool::new(false);

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(devices: [[Option<&str>; 2]; 2]) -> JacclSpec {
        let row = |row: [Option<&str>; 2]| row.map(|name| name.map(str::to_owned)).to_vec();
        JacclSpec {
            devices: devices.map(row).to_vec(),
        }
    }

    #[test]
    #[cfg(not(target_os = "macos"))]
    fn a_machine_without_rdma_is_told_what_it_takes() {
        use std::time::Duration;

        use crate::{Group, measure::Echo};

        let whole = spec([[None, Some("rdma_en5")], [Some("rdma_en3"), None]]);
        let formed = Group::jaccl(&whole, Box::new(Echo), Duration::from_secs(1));
        let error = formed.err().unwrap().to_string();
        assert!(
            error.contains("rdma_ctl") && error.contains("quic"),
            "{error}"
        );
    }

    #[test]
    fn a_pair_without_a_device_is_named() {
        let whole = spec([[None, Some("rdma_en5")], [Some("rdma_en3"), None]]);
        assert!(whole.check(2).is_ok());
        let error = whole.check(3).unwrap_err().to_string();
        assert!(error.contains("from rank 0 to rank 2"), "{error}");
        let half = spec([[None, Some("rdma_en5")], [None, None]]);
        let error = half.check(2).unwrap_err().to_string();
        assert!(error.contains("from rank 1 to rank 0"), "{error}");
    }
}
