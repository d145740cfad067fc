//! Callers that do not belong: first packets without a second, noise, and handshakes that end in silence.

use std::{
    net::{SocketAddr, UdpSocket},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::BytesMut;
use offbook_collectives::TensorTls;
use quinn_proto::{
    ClientConfig, Connection, ConnectionHandle, DatagramEvent, Endpoint, EndpointConfig, Event,
    crypto::rustls::QuicClientConfig,
};

use super::support::Identity;

/// One connection of a caller, driven by hand.
pub(crate) struct Caller {
    socket: UdpSocket,
    to: SocketAddr,
    endpoint: Endpoint,
    handle: ConnectionHandle,
    connection: Connection,
    pub(crate) connected: bool,
    pub(crate) ended: bool,
}

impl Caller {
    pub(crate) fn new(identity: &Identity, to: SocketAddr) -> Self {
        let crypto = QuicClientConfig::try_from(identity.tls().client).unwrap();
        let reset = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, &[7; 64]);
        let config = Arc::new(EndpointConfig::new(Arc::new(reset)));
        let mut endpoint = Endpoint::new(config, None, false, None);
        let client = ClientConfig::new(Arc::new(crypto));
        let (handle, connection) = endpoint
            .connect(Instant::now(), client, to, TensorTls::SERVER_NAME)
            .unwrap();
        let socket = UdpSocket::bind(("127.0.0.1", 0)).unwrap();
        let soon = Some(Duration::from_millis(1));
        socket.set_read_timeout(soon).unwrap();
        Self {
            socket,
            to,
            endpoint,
            handle,
            connection,
            connected: false,
            ended: false,
        }
    }

    /// What is due to be sent.
    pub(crate) fn packets(&mut self) -> Vec<Vec<u8>> {
        let mut packets = Vec::new();
        let mut packet = Vec::new();
        while let Some(transmit) = self
            .connection
            .poll_transmit(Instant::now(), 1, &mut packet)
        {
            packet.truncate(transmit.size);
            packets.push(std::mem::take(&mut packet));
        }
        packets
    }

    /// Sends, receives, and looks at the clock, once.
    pub(crate) fn turn(&mut self) {
        for packet in self.packets() {
            let _ = self.socket.send_to(&packet, self.to);
        }
        let (now, mut answers) = (Instant::now(), Vec::new());
        let mut buffer = [0; 65_536];
        while let Ok((bytes, from)) = self.socket.recv_from(&mut buffer) {
            let data = BytesMut::from(&buffer[..bytes]);
            let handled = self
                .endpoint
                .handle(now, from, None, None, data, &mut answers);
            if let Some(DatagramEvent::ConnectionEvent(handle, event)) = handled
                && handle == self.handle
            {
                self.connection.handle_event(event);
            }
        }
        if self.connection.poll_timeout().is_some_and(|due| due <= now) {
            self.connection.handle_timeout(now);
        }
        while let Some(event) = self.connection.poll_endpoint_events() {
            if let Some(event) = self.endpoint.handle_event(self.handle, event) {
                self.connection.handle_event(event);
            }
        }
        while let Some(event) = self.connection.poll() {
            match event {
                Event::Connected => self.connected = true,
                Event::ConnectionLost { .. } => self.ended = true,
                _ => {}
            }
        }
    }
}

/// First packets of so many connections, each from a socket of its own that never reads, and as much
/// noise between them.
pub(crate) fn pester(identity: &Identity, to: &[SocketAddr], rounds: usize) -> Vec<UdpSocket> {
    let mut sockets = Vec::new();
    let mut state = 7u64;
    for round in 0..rounds {
        for &to in to {
            let socket = UdpSocket::bind(("127.0.0.1", 0)).unwrap();
            for packet in Caller::new(identity, to).packets() {
                let _ = socket.send_to(&packet, to);
            }
            let mut noise = vec![0; 20 + round * 97 % 1300];
            for byte in &mut noise {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                *byte = (state >> 56) as u8;
            }
            if round % 2 == 0 {
                // As the first packet of a connection of QUIC's version 1 would begin.
                let begin = [0xc3, 0, 0, 0, 1, 8];
                noise[..begin.len()].copy_from_slice(&begin);
                noise.resize(1200, 0);
            }
            let _ = socket.send_to(&noise, to);
            sockets.push(socket);
        }
    }
    sockets
}
