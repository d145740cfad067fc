//! What can be tuned, and the TLS that comes from outside.

use std::time::Duration;

/// Mutual TLS 1.3 for the tensor plane, made by whoever knows the keys: both configurations present
/// this node's key, accept the peers' keys only, and speak [`TensorTls::ALPN`].
#[derive(Clone)]
pub struct TensorTls {
    /// For the pairs in which the peer calls.
    pub server: rustls::ServerConfig,
    /// For the pairs in which we call; names are not checked, the server is called
    /// [`TensorTls::SERVER_NAME`].
    pub client: rustls::ClientConfig,
}

impl TensorTls {
    /// The protocol to name in both configurations.
    pub const ALPN: &[u8] = b"offbook-tensor/1";
    /// The server name that the caller asks for.
    pub const SERVER_NAME: &str = "offbook";
}

/// Settings of one rank's endpoint; the defaults fit a LAN and one machine alike.
#[derive(Debug, Clone)]
pub struct QuicOptions {
    /// How long a waiting thread spins before it sleeps. Unset: 50 µs when there are two cores for
    /// each rank on this host, 2 ms when there are four, else not at all.
    pub spin: Option<Duration>,
    /// The size of UDP payloads to begin with, 1200 to [`QuicOptions::MTU_MAX`] bytes; larger ones
    /// that the path turns out to carry are found by themselves. Unset: the largest when all peers
    /// are on this machine, else what every network carries.
    pub initial_mtu: Option<u16>,
    /// Socket buffers to ask the system for, in bytes; it may give less. What peers may send ahead
    /// of us follows from what it gave.
    pub socket_buffer_bytes: usize,
    /// A peer from which nothing came for so long is lost. Generous: the message plane notices dead
    /// processes long before.
    pub idle_timeout: Duration,
    /// How often the keeper thread looks in between collectives.
    pub keeper_interval: Duration,
}

impl QuicOptions {
    /// With ten segments in one system call, anything larger would exceed 64 KiB and be dropped.
    pub const MTU_MAX: u16 = 6500;
}

impl Default for QuicOptions {
    fn default() -> Self {
        Self {
            spin: None,
            initial_mtu: None,
            socket_buffer_bytes: 4 << 20,
            idle_timeout: Duration::from_secs(10),
            keeper_interval: Duration::from_millis(10),
        }
    }
}
