//! The socket and the thread that serves it: dials, accepts, and shakes hands. Everything behind
//! the handshake is `link.rs`.

mod parts;

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use quinn::{Connection, Endpoint};
use rustls::pki_types::CertificateDer;

use crate::door::{Knock, Place};
use crate::failure::LostReason;
use crate::frame::FrameReader;
use crate::hello::{HELLO_BYTES_MAX, HandshakeError, Hello};
use crate::identity::NodeKey;
use crate::link::Link;
use crate::name::ProcessName;
use crate::peer::Peer;
use crate::system::{Shared, StartError, SystemConfig};
use parts::{EndpointParts, widen};

/// A bound socket whose thread waits for [`run`](Self::run).
pub(crate) struct Started {
    pub(crate) addr: SocketAddr,
    pub(crate) endpoint: Endpoint,
    pub(crate) runtime: tokio::runtime::Handle,
    /// Of the numbers that the system draws.
    pub(crate) seed: [u8; 32],
    /// Of this process, as its peers are told.
    pub(crate) pid: u32,
    main: Box<dyn FnOnce(Arc<Shared>) + Send>,
}

impl Started {
    pub(crate) fn run(self, shared: Arc<Shared>) {
        (self.main)(shared);
    }

    /// An endpoint over a socket that is none of the system's, on the runtime of the caller. The same
    /// seed draws the same numbers.
    #[cfg(any(test, feature = "simulation"))]
    pub(crate) fn over(
        config: &SystemConfig,
        socket: Arc<dyn quinn::AsyncUdpSocket>,
        seed: [u8; 32],
        pid: u32,
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
            seed,
            pid,
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
        seed: rand::random(),
        pid: std::process::id(),
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
                Some(incoming) => admit(&shared, incoming),
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

/// Lets a handshake begin, if there is room for one.
fn admit(shared: &Arc<Shared>, incoming: quinn::Incoming) {
    let host = incoming.remote_address().ip();
    let proved = incoming.remote_address_validated();
    match shared.door.knock(host, proved) {
        Knock::Enter(place) => drop(tokio::spawn(accept(Arc::clone(shared), incoming, place))),
        Knock::ProveAddress => {
            if let Err(error) = incoming.retry() {
                error.into_incoming().ignore();
            }
        }
        Knock::ComeAgain => incoming.ignore(),
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
    let Some(failures) = peer.dial_failed(&link, error.clone(), &shared.limits, shared.chance())
    else {
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
async fn accept(shared: Arc<Shared>, incoming: quinn::Incoming, mut place: Place) {
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
    let joined = tokio::time::timeout(timeout, join(&shared, &connection, &mut place)).await;
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

async fn join(
    shared: &Arc<Shared>,
    connection: &Connection,
    place: &mut Place,
) -> Result<(), HandshakeError> {
    let addr = connection.remote_address();
    if !place.shows(key_of(connection)?) {
        let many = "this key has as many connections without a hello as it may";
        return Err(HandshakeError::Busy(many.into()));
    }
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
    let peer = shared.caller(&hello.from)?;
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

/// The key that the other side has shown.
fn key_of(connection: &Connection) -> Result<NodeKey, HandshakeError> {
    let shown = connection.peer_identity();
    let chain = shown.and_then(|any| any.downcast::<Vec<CertificateDer<'static>>>().ok());
    let key = chain
        .as_ref()
        .and_then(|chain| NodeKey::of_certificate(chain.first()?));
    key.ok_or(HandshakeError::UnknownKey)
}

/// TLS knows that the key is pinned for somebody: is it for this one?
fn check_key(
    shared: &Shared,
    connection: &Connection,
    process: &ProcessName,
) -> Result<(), HandshakeError> {
    let key = key_of(connection)?;
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

/// TLS wants a name; the key says who it is.
const SERVER_NAME: &str = "process.invalid";

/// How long a refused dial waits for the connection that the other side prefers.
const CROSSING_TIMEOUT: Duration = Duration::from_millis(200);

/// How long the thread stays to send its goodbyes.
const GOODBYE_TIMEOUT: Duration = Duration::from_millis(500);

/// A packet leaves at once.
const FAREWELLS_TIMEOUT: Duration = Duration::from_millis(50);
