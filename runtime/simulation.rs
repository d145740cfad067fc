//! What simulations of processes are made of: a network without a machine's sockets, whose packets and cables
//! fare as a seed says, and the player of seeds. `links.rs` plays the links of this crate over it; other crates
//! play their actors, with the feature `simulation` among their development dependencies. No release has it.

#[cfg(test)]
mod links;
pub mod network;
pub mod seeds;

use std::sync::Arc;

use crate::endpoint::Started;
use crate::system::{StartError, System, SystemConfig};
use network::Socket;

/// A system over a simulated socket, on the runtime of the caller, in a process called `pid`. The same seed
/// draws the same numbers.
///
/// # Errors
/// As for [`System::start`].
pub fn start(
    config: SystemConfig,
    socket: Arc<Socket>,
    seed: [u8; 32],
    pid: u32,
) -> Result<System, StartError> {
    let started = Started::over(&config, socket, seed, pid)?;
    Ok(System::run(started, config))
}
