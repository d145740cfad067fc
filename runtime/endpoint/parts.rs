//! What an endpoint is made of but its socket: TLS, QUIC's parameters, and the keys with which this
//! process's next incarnation recognises what was meant for this one.

use std::net::UdpSocket;
use std::sync::Arc;
use std::time::Duration;

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{
    AckFrequencyConfig, Endpoint, EndpointConfig, MtuDiscoveryConfig, TransportConfig, VarInt,
};
use quinn_proto::HashedConnectionIdGenerator;
use ring::hmac;

use crate::hello::ALPN;
use crate::limits::Limits;
use crate::system::{StartError, SystemConfig};

/// All that an endpoint needs but its socket.
pub(super) struct EndpointParts {
    pub(super) endpoint: EndpointConfig,
    server: quinn::ServerConfig,
    client: quinn::ClientConfig,
}

impl EndpointParts {
    pub(super) fn new(config: &SystemConfig) -> Result<Self, StartError> {
        let transport = Arc::new(transport(&config.limits));

        let tls = config.identity.server_config(&config.trust, ALPN)?;
        let tls = QuicServerConfig::try_from(tls).expect("ring has TLS 1.3 with AES-128-GCM");
        let mut server = quinn::ServerConfig::with_crypto(Arc::new(tls));
        server
            .transport_config(Arc::clone(&transport))
            // A link outlives a change of its caller's address. The new one must answer a challenge, and
            // packets that somebody copies say nothing new: neither leads a link astray.
            .migration(true)
            .max_incoming(INCOMING_MAX)
            .incoming_buffer_size(INCOMING_BYTES_MAX)
            .incoming_buffer_size_total(INCOMING_MAX as u64 * INCOMING_BYTES_MAX);

        let tls = config.identity.client_config(&config.trust, ALPN)?;
        let tls = QuicClientConfig::try_from(tls).expect("ring has TLS 1.3 with AES-128-GCM");
        let mut client = quinn::ClientConfig::new(Arc::new(tls));
        client.transport_config(transport);

        // Both are the same at every start of this process: so its next incarnation recognises
        // packets for its last one, and tells the sender that the link is gone.
        let reset = config.identity.derive(&format!("reset {}", config.process));
        let ids = config
            .identity
            .derive(&format!("connection ids {}", config.process));
        let ids = u64::from_le_bytes(*ids.first_chunk().expect("32 bytes have a first 8"));
        let reset = hmac::Key::new(hmac::HMAC_SHA256, &reset);
        let mut endpoint = EndpointConfig::new(Arc::new(reset));
        endpoint
            .max_udp_payload_size(PACKET_BYTES_MAX)
            .expect("it is above QUIC's least, 1200 bytes");
        endpoint.cid_generator(move || Box::new(HashedConnectionIdGenerator::from_key(ids)));
        Ok(Self {
            endpoint,
            server,
            client,
        })
    }

    pub(super) fn endpoint_over(self, socket: UdpSocket) -> std::io::Result<Endpoint> {
        self.endpoint(|endpoint, server, runtime| {
            Endpoint::new(endpoint, Some(server), socket, runtime)
        })
    }

    /// Must be called on the runtime that is to drive it.
    pub(super) fn endpoint(
        self,
        make: impl FnOnce(
            EndpointConfig,
            quinn::ServerConfig,
            Arc<dyn quinn::Runtime>,
        ) -> std::io::Result<Endpoint>,
    ) -> std::io::Result<Endpoint> {
        let mut endpoint = make(self.endpoint, self.server, Arc::new(quinn::TokioRuntime))?;
        endpoint.set_default_client_config(self.client);
        Ok(endpoint)
    }
}

fn transport(limits: &Limits) -> TransportConfig {
    let mut transport = TransportConfig::default();
    let idle = limits.idle_timeout.try_into().ok();
    let mut mtu = MtuDiscoveryConfig::default();
    mtu.upper_bound(PACKET_BYTES_MAX);
    let mut acks = AckFrequencyConfig::default();
    acks.ack_eliciting_threshold(ACK_EVERY_PACKETS)
        .max_ack_delay(Some(ACK_DELAY_MAX));
    transport
        .mtu_discovery_config(Some(mtu))
        .ack_frequency_config(Some(acks))
        .keep_alive_interval(Some(limits.keep_alive))
        .max_idle_timeout(idle)
        .initial_rtt(INITIAL_RTT)
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        // One more: the ordered stream.
        .max_concurrent_bidi_streams(VarInt::from_u32(limits.subscriptions_max.saturating_add(1)))
        // What was written and not yet acknowledged is held for a second sending.
        .send_window(limits.outbox_bytes_max as u64)
        .stream_receive_window(VarInt::from_u32(limits.items_bytes_max))
        // Heartbeats; of more than these, none is worth keeping.
        .datagram_receive_buffer_size(Some(HEARTBEATS_BYTES_MAX));
    transport
}

/// Best effort: the system may cap it, and a smaller buffer only costs packets under load.
pub(super) fn widen(socket: &UdpSocket) {
    for result in [
        rustix::net::sockopt::set_socket_recv_buffer_size(socket, SOCKET_BUFFER_BYTES),
        rustix::net::sockopt::set_socket_send_buffer_size(socket, SOCKET_BUFFER_BYTES),
    ] {
        if let Err(error) = result {
            tracing::debug!(%error, "the socket keeps its small buffer");
        }
    }
}

/// quinn assumes 333 ms until it has measured; these are machines in one room, and with the
/// default a lost first packet costs a second.
const INITIAL_RTT: Duration = Duration::from_millis(1);

/// The longest packet that is tried: it suits loopback and jumbo frames, and a burst of ten still
/// fits into the 64 KiB that the kernel cuts up in one call.
const PACKET_BYTES_MAX: u16 = 6400;

/// A receiver that acknowledges every second packet spends as much on that as on the data.
const ACK_EVERY_PACKETS: VarInt = VarInt::from_u32(10);

/// How long the last few packets of a burst may go without an acknowledgement. A shorter delay wakes
/// both threads more often, which every ask pays for.
const ACK_DELAY_MAX: Duration = Duration::from_millis(20);

/// The kernel's default of 208 KiB loses packets at line rate.
const SOCKET_BUFFER_BYTES: usize = 4 << 20;

/// First packets that nobody has looked at yet: `door.rs` decides at once.
const INCOMING_MAX: usize = 64;

/// What may follow each of them meanwhile.
const INCOMING_BYTES_MAX: u64 = 16 * 1024;

/// What a stalled process finds in front of it: heartbeats of a few minutes, hardly a byte each.
const HEARTBEATS_BYTES_MAX: usize = 16 * 1024;
