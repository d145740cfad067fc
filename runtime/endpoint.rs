//! The socket and the thread that serves it: dials, accepts, and shakes hands. Everything behind
//! the handshake is `link.rs`.

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{AckFrequencyConfig, Connection, Endpoint, EndpointConfig, MtuDiscoveryConfig};
use quinn::{TransportConfig, VarInt};
use quinn_proto::HashedConnectionIdGenerator;
use ring::hmac;
use rustls::pki_types::CertificateDer;

use crate::failure::LostReason;
use crate::frame::FrameReader;
use crate::hello::{ALPN, HELLO_BYTES_MAX, HandshakeError, Hello};
use crate::identity::NodeKey;
use crate::limits::Limits;
use crate::link::Link;
use crate::name::ProcessName;
use crate::peer::Peer;
use crate::system::{Shared, StartError, SystemConfig};

/// A bound socket whose thread waits for [`run`](Self::run).
pub(crate) struct Started {
    pub(crate) addr: SocketAddr,
    pub(crate) endpoint: Endpoint,
    pub(crate) runtime: tokio::runtime::Handle,
    main: Box<dyn FnOnce(Arc<Shared>) + Send>,
}

impl Started {
    pub(crate) fn run(self, shared: Arc<Shared>) {
        (self.main)(shared);
    }

    /// An endpoint over a socket that is none of the system's, on the runtime of the caller. The same
    /// seed draws the same numbers.
    #[cfg(test)]
    pub(crate) fn over(
        config: &SystemConfig,
        socket: Arc<dyn quinn::AsyncUdpSocket>,
        seed: [u8; 32],
    ) -> Result<Self, StartError> {
        let mut parts = EndpointParts::new(config)?;
        parts.endpoint.rng_seed(Some(seed));
        let endpoint = parts.endpoint(|endpoint, server, runtime| {
            Endpoint::new_with_abstract_socket(endpoint, Some(server), socket, runtime)
        });
        let endpoint = endpoint.map_err(StartError::Thread)?;
        let serving = endpoint.clone();
        Ok(Self {
            addr: config.listen,
            endpoint,
            runtime: tokio::runtime::Handle::current(),
            main: Box::new(|shared| {
                tokio::spawn(async move {
                    let _ended = Ended(Arc::clone(&shared));
                    serve(shared, serving).await;
                });
            }),
        })
    }
}

/// Binds the socket and starts the thread. The thread makes its own runtime, which must not be
/// dropped on any other.
pub(crate) async fn start(config: &SystemConfig) -> Result<Started, StartError> {
    let bind = |source| StartError::Bind {
        addr: config.listen,
        source,
    };
    let socket = UdpSocket::bind(config.listen).map_err(bind)?;
    let addr = socket.local_addr().map_err(bind)?;
    widen(&socket);
    let parts = EndpointParts::new(config)?;
    let (main, shared) = std::sync::mpsc::channel::<Arc<Shared>>();
    let (ready, started) = tokio::sync::oneshot::channel();
    let thread = move || {
        let made = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .and_then(|runtime| {
                let endpoint = runtime.block_on(async { parts.endpoint_over(socket) })?;
                Ok((runtime, endpoint))
            });
        let (runtime, endpoint) = match made {
            Ok(made) => made,
            Err(error) => return drop(ready.send(Err(error))),
        };
        let _ = ready.send(Ok((endpoint.clone(), runtime.handle().clone())));
        if let Ok(shared) = shared.recv() {
            let _ended = Ended(Arc::clone(&shared));
            runtime.block_on(serve(shared, endpoint));
            drop(runtime);
        }
    };
    std::thread::Builder::new()
        .name("links".into())
        .spawn(thread)
        .map_err(StartError::Thread)?;
    let ended = |_| Err(std::io::Error::other("the thread ended"));
    let (endpoint, runtime) = started
        .await
        .unwrap_or_else(ended)
        .map_err(StartError::Thread)?;
    Ok(Started {
        addr,
        endpoint,
        runtime,
        // The thread only ends early when this side is gone.
        main: Box::new(move |shared| drop(main.send(shared))),
    })
}

/// Whatever ends the thread, a panic too, nobody goes on waiting for it.
struct Ended(Arc<Shared>);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.close();
        self.0.stopped.send_replace(true);
    }
}

/// Accepts connections until the system is closed, then lets the goodbyes out.
async fn serve(shared: Arc<Shared>, endpoint: Endpoint) {
    if !shared.limits.spin.is_zero() {
        tokio::spawn(spin(Arc::clone(&shared)));
    }
    loop {
        tokio::select! {
            biased;
            () = shared.stop.notified() => break,
            incoming = endpoint.accept() => match incoming {
                Some(incoming) => drop(tokio::spawn(accept(Arc::clone(&shared), incoming))),
                None => break,
            },
        }
    }
    let sent = match shared.all_knew() {
        // They are gone: what is left are dials of those who do not know that we end.
        true => FAREWELLS_TIMEOUT,
        false => GOODBYE_TIMEOUT,
    };
    let _ = tokio::time::timeout(sent, endpoint.wait_idle()).await;
    if !shared.all_knew() {
        // A goodbye is one packet and may be lost: whoever missed it sends again within a
        // keep-alive, and the socket then answers that there is no such link.
        tokio::time::sleep(shared.limits.keep_alive * 3).await;
    }
}

/// Keeps the thread looking at the socket for a while after something passed, instead of sleeping:
/// a wake-up costs more than the message.
async fn spin(shared: Arc<Shared>) {
    loop {
        shared.stirring.notified().await;
        let mut until = Instant::now() + shared.limits.spin;
        while Instant::now() < until {
            // Where cores are scarce, the thread that will send next may be waiting for this one.
            std::thread::yield_now();
            tokio::task::yield_now().await;
            if shared.stirred.swap(false, Ordering::AcqRel) {
                until = Instant::now() + shared.limits.spin;
            }
        }
    }
}

/// Makes one link by dialling, and gives up after the connect timeout.
pub(crate) async fn dial(shared: Arc<Shared>, peer: Arc<Peer>, link: Arc<Link>, addr: SocketAddr) {
    let joining = Joining::new(&shared, &link);
    let timeout = shared.limits.connect_timeout;
    let dialed = tokio::time::timeout(timeout, try_dial(&shared, &peer, &link, addr)).await;
    joining.done();
    let Err(error) = dialed.unwrap_or(Err(HandshakeError::NoAnswer(addr))) else {
        return;
    };
    let Some(failures) = peer.dial_failed(&link, error.clone(), &shared.limits) else {
        return;
    };
    // Whoever ends has said so, and one warning is enough for all dials in a row.
    if failures > 1 || error == HandshakeError::Closing || shared.is_closing() {
        tracing::debug!(peer = %peer.name, %addr, %error, failures, "no link could be made");
    } else {
        tracing::warn!(peer = %peer.name, %addr, %error, "no link could be made");
    }
    link.lose(LostReason::Unreachable(error));
}

/// Ends when the link is up, over this connection or over one that the other side made.
async fn try_dial(
    shared: &Arc<Shared>,
    peer: &Arc<Peer>,
    link: &Arc<Link>,
    addr: SocketAddr,
) -> Result<(), HandshakeError> {
    loop {
        match dial_once(shared, peer, link, addr).await {
            Err(HandshakeError::Duplicate) => {}
            other => return other,
        }
        // The other side keeps another connection: it is about to arrive here, or it is one that
        // the other side has not yet seen to be dead.
        peer.hello_was_refused(link);
        if tokio::time::timeout(CROSSING_TIMEOUT, link.up())
            .await
            .is_ok()
        {
            return Ok(());
        }
    }
}

async fn dial_once(
    shared: &Arc<Shared>,
    peer: &Arc<Peer>,
    link: &Arc<Link>,
    addr: SocketAddr,
) -> Result<(), HandshakeError> {
    let lost = |error: &quinn::ConnectionError| HandshakeError::of_connection(error, addr);
    let endpoint = shared.endpoint().ok_or(HandshakeError::Closing)?;
    let connecting = endpoint
        .connect(addr, SERVER_NAME)
        .map_err(|error| HandshakeError::Transport(error.to_string()))?;
    let connection = connecting.await.map_err(|error| lost(&error))?;
    let closing = CloseOnDrop(Some(connection.clone()));
    check_key(shared, &connection, &peer.name)?;
    let welcomed = peer
        .hello_may_be_sent(link)
        .ok_or(HandshakeError::Duplicate)?;
    let number = shared.next_dial();
    let hello = our_hello(shared, &peer.name, number, welcomed);
    // Any failure from here on is the connection's, and it knows best why.
    let failed = || match connection.close_reason() {
        Some(error) => lost(&error),
        None => HandshakeError::Malformed("the stream ended early".into()),
    };
    let (mut sending, receiving) = connection.open_bi().await.map_err(|error| lost(&error))?;
    sending
        .write_all(&hello.frame())
        .await
        .map_err(|_| failed())?;
    let mut frames = FrameReader::new(receiving, shared.limits.frame_bytes_max);
    let answer = match frames.next().await {
        Ok(Some(bytes)) => Hello::parse(&bytes)?,
        _ => return Err(failed()),
    };
    answer.check(&shared.trust, &shared.process)?;
    if answer.from != peer.name {
        let found = format!("{} is at the address of {}", answer.from, peer.name);
        return Err(HandshakeError::WrongProcess(found));
    }
    peer.dial_was_welcomed(link, number, &answer)?;
    closing.keep();
    link.run(shared, connection, sending, frames);
    Ok(())
}

/// Takes a connection that another process made, or refuses it with the reason.
async fn accept(shared: Arc<Shared>, incoming: quinn::Incoming) {
    let addr = incoming.remote_address();
    let connecting = tokio::time::timeout(shared.limits.connect_timeout, incoming);
    let connection = match connecting.await {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => {
            if !shared.is_closing() {
                tracing::warn!(%addr, %error, "a connection was not accepted");
            }
            return;
        }
        Err(_) => return,
    };
    let timeout = shared.limits.connect_timeout;
    let joined = tokio::time::timeout(timeout, join(&shared, &connection)).await;
    let Err(error) = joined.unwrap_or(Err(HandshakeError::NoAnswer(addr))) else {
        return;
    };
    match error {
        HandshakeError::Duplicate => tracing::debug!(%addr, "crossing dials: one is kept"),
        HandshakeError::Closing => tracing::debug!(%addr, "a process came too late"),
        _ => tracing::warn!(%addr, %error, "a process was refused"),
    }
    connection.close(error.close_code(), error.detail().as_bytes());
}

async fn join(shared: &Arc<Shared>, connection: &Connection) -> Result<(), HandshakeError> {
    let addr = connection.remote_address();
    let (mut sending, receiving) = connection
        .accept_bi()
        .await
        .map_err(|error| HandshakeError::of_connection(&error, addr))?;
    let mut frames = FrameReader::new(receiving, HELLO_BYTES_MAX);
    let bytes = match frames.next().await {
        Ok(Some(bytes)) => bytes,
        Ok(None) => return Err(HandshakeError::Malformed("the stream ended early".into())),
        Err(error) => return Err(HandshakeError::Malformed(error.to_string())),
    };
    let hello = Hello::parse(&bytes)?;
    hello.check(&shared.trust, &shared.process)?;
    check_key(shared, connection, &hello.from)?;
    if hello.from == shared.process {
        return Err(HandshakeError::Name(format!(
            "{} is the name of this process",
            hello.from
        )));
    }
    if shared.is_closing() {
        return Err(HandshakeError::Closing);
    }
    let peer = shared.peer(&hello.from);
    let welcomed = peer.welcome(&shared.process, &hello, addr, &shared.limits)?;
    let link = welcomed.link;
    let joining = Joining::new(shared, &link);
    if let Some((old, reason)) = welcomed.replaced {
        old.lose(reason);
    }
    let answer = our_hello(shared, &hello.from, 0, hello.link);
    frames.allow(shared.limits.frame_bytes_max);
    if sending.write_all(&answer.frame()).await.is_err() {
        return Err(HandshakeError::Malformed("the stream ended early".into()));
    }
    link.run(shared, connection.clone(), sending, frames);
    joining.done();
    Ok(())
}

fn our_hello(shared: &Shared, to: &ProcessName, link: u64, welcomed: u64) -> Hello {
    Hello {
        cluster: shared.trust.cluster.clone(),
        config_hash: shared.trust.config_hash,
        from: shared.process.clone(),
        to: to.clone(),
        boot: shared.boot,
        link,
        welcomed,
    }
}

/// TLS knows that the key is pinned for somebody: is it for this one?
fn check_key(
    shared: &Shared,
    connection: &Connection,
    process: &ProcessName,
) -> Result<(), HandshakeError> {
    let shown = connection.peer_identity();
    let chain = shown.and_then(|any| any.downcast::<Vec<CertificateDer<'static>>>().ok());
    let key = chain
        .as_ref()
        .and_then(|chain| NodeKey::of_certificate(chain.first()?));
    let key = key.ok_or(HandshakeError::UnknownKey)?;
    if shared.trust.is_pinned(process.node(), &key) {
        Ok(())
    } else {
        Err(HandshakeError::Name(format!(
            "key {key} is not pinned for {}",
            process.node()
        )))
    }
}

/// A link that others wait for already: should the task that sets it up end early, by a time-out or
/// with the runtime, they must learn of it.
struct Joining(Option<(Arc<Shared>, Arc<Link>)>);

impl Joining {
    fn new(shared: &Arc<Shared>, link: &Arc<Link>) -> Self {
        Self(Some((Arc::clone(shared), Arc::clone(link))))
    }

    fn done(mut self) {
        self.0 = None;
    }
}

impl Drop for Joining {
    fn drop(&mut self) {
        if let Some((shared, link)) = self.0.take() {
            let reason = if shared.is_closing() {
                LostReason::ShutDown
            } else {
                LostReason::Closed
            };
            shared.link_ended(&link, reason);
        }
    }
}

/// A connection whose handshake fails half-way must not linger until the idle timeout.
struct CloseOnDrop(Option<Connection>);

impl CloseOnDrop {
    fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        if let Some(connection) = self.0.take() {
            connection.close(HandshakeError::Duplicate.close_code(), b"");
        }
    }
}

/// All that an endpoint needs but its socket.
struct EndpointParts {
    endpoint: EndpointConfig,
    server: quinn::ServerConfig,
    client: quinn::ClientConfig,
}

impl EndpointParts {
    fn new(config: &SystemConfig) -> Result<Self, StartError> {
        let transport = Arc::new(transport(&config.limits));

        let tls = config.identity.server_config(&config.trust, ALPN)?;
        let tls = QuicServerConfig::try_from(tls).expect("ring has TLS 1.3 with AES-128-GCM");
        let mut server = quinn::ServerConfig::with_crypto(Arc::new(tls));
        server
            .transport_config(Arc::clone(&transport))
            .migration(false)
            .max_incoming(INCOMING_MAX);

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

    fn endpoint_over(self, socket: UdpSocket) -> std::io::Result<Endpoint> {
        self.endpoint(|endpoint, server, runtime| {
            Endpoint::new(endpoint, Some(server), socket, runtime)
        })
    }

    /// Must be called on the runtime that is to drive it.
    fn endpoint(
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
fn widen(socket: &UdpSocket) {
    for result in [
        rustix::net::sockopt::set_socket_recv_buffer_size(socket, SOCKET_BUFFER_BYTES),
        rustix::net::sockopt::set_socket_send_buffer_size(socket, SOCKET_BUFFER_BYTES),
    ] {
        if let Err(error) = result {
            tracing::debug!(%error, "the socket keeps its small buffer");
        }
    }
}

/// TLS wants a name; the key says who it is.
const SERVER_NAME: &str = "process.invalid";

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

/// Handshakes that nobody has looked at yet. A cluster has tens of processes.
const INCOMING_MAX: usize = 64;

/// What a stalled process finds in front of it: heartbeats of a few minutes, hardly a byte each.
const HEARTBEATS_BYTES_MAX: usize = 16 * 1024;

/// How long a refused dial waits for the connection that the other side prefers.
const CROSSING_TIMEOUT: Duration = Duration::from_millis(200);

/// How long the thread stays to send its goodbyes.
const GOODBYE_TIMEOUT: Duration = Duration::from_millis(500);
/// A packet leaves at once.
const FAREWELLS_TIMEOUT: Duration = Duration::from_millis(50);
