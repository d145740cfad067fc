//! How the ranks of one epoch meet: everybody calls the ranks above and is called by those below.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use quinn_proto::{
    AckFrequencyConfig, ClientConfig, IdleTimeout, MtuDiscoveryConfig, ServerConfig,
    TransportConfig, VarInt,
    congestion::CubicConfig,
    crypto::rustls::{QuicClientConfig, QuicServerConfig},
};

use super::{
    JoinSpec,
    driver::{Driver, Hall},
    hello::Hello,
    is_loopback,
    link::{Farewell, Link},
    options::{QuicOptions, TensorTls},
};
use crate::{error::CollectiveError, operation::Operation};

/// Returns when `driver` has a link with every peer of `spec`, and knows which is whose.
pub(super) fn meet(
    driver: &mut Driver,
    tls: &TensorTls,
    options: &QuicOptions,
    spec: &JoinSpec,
    deadline: Duration,
) -> Result<(), CollectiveError> {
    let since = Instant::now();
    let transport = Arc::new(transport_config(driver, options, spec));
    let client = client_config(tls, &transport)?;
    driver.listen(
        server_config(tls, &transport)?,
        Hall::of_ranks_at(&spec.peers),
    );
    let mut meeting = Meeting {
        driver,
        spec,
        client,
    };
    for rank in spec.rank + 1..spec.peers.len() {
        meeting.call(rank)?;
    }
    loop {
        let now = Instant::now();
        meeting.driver.turn(now);
        meeting.greet()?;
        meeting.driver.clear_hall(now);
        meeting.driver.flush(now);
        let Some(missing) = meeting.missing() else {
            break;
        };
        let left = deadline.saturating_sub(since.elapsed());
        if left.is_zero() {
            return Err(CollectiveError::Late {
                rank: missing,
                operation: Operation::Join,
                deadline,
            });
        }
        let timer = meeting.driver.next_timer();
        let timer = timer.map_or(left, |timer| {
            timer.saturating_duration_since(Instant::now())
        });
        meeting.driver.socket.readable(timer.min(left));
    }
    driver.close_hall(Instant::now());
    driver.by_rank = (0..spec.peers.len())
        .map(|rank| {
            driver
                .links
                .iter()
                .position(|link| link.ready && link.rank == Some(rank))
        })
        .collect();
    Ok(())
}

struct Meeting<'a> {
    driver: &'a mut Driver,
    spec: &'a JoinSpec,
    client: ClientConfig,
}

impl Meeting<'_> {
    fn call(&mut self, rank: usize) -> Result<(), CollectiveError> {
        let remote = self.spec.peers[rank];
        self.driver
            .call(self.client.clone(), remote, rank)
            .map_err(|why| CollectiveError::Lost {
                rank,
                operation: Operation::Join,
                why: format!("{remote} cannot be called: {why}"),
            })
    }

    /// Our greeting to `rank`.
    fn hello(&self, rank: u32) -> Hello {
        let (from, size) = (self.spec.rank as u32, self.spec.peers.len() as u32);
        Hello {
            epoch: self.spec.epoch,
            from,
            to: rank,
            size,
        }
    }

    fn missing(&self) -> Option<usize> {
        let here = |rank| {
            self.driver
                .links
                .iter()
                .any(|link| link.ready && link.rank == Some(rank))
        };
        (0..self.spec.peers.len()).find(|&rank| rank != self.spec.rank && !here(rank))
    }

    fn greet(&mut self) -> Result<(), CollectiveError> {
        let mut unanswered = Vec::new();
        for index in 0..self.driver.links.len() {
            let link = &self.driver.links[index];
            match (link.rank, &link.ending) {
                (None, Some(_)) => {}
                (Some(rank), Some(ending)) => {
                    // A call that nobody took in time: the peer may be slow to come, call again.
                    if !link.connected && *ending == Farewell::Lost("timed out".to_owned()) {
                        unanswered.push((index, rank));
                    } else {
                        return Err(ending.error(rank, Operation::Join, self.spec.epoch));
                    }
                }
                (Some(rank), None) if !link.ready => self.greet_called(index, rank)?,
                (None, None) => self.greet_caller(index)?,
                (Some(_), None) => {}
            }
        }
        for (index, rank) in unanswered {
            self.driver.links[index].rank = None;
            self.call(rank)?;
        }
        Ok(())
    }

    /// We called: we speak first, then hear the answer.
    fn greet_called(&mut self, index: usize, rank: usize) -> Result<(), CollectiveError> {
        let ours = self.hello(rank as u32);
        let link = &mut self.driver.links[index];
        if link.connected && link.stream.is_none() {
            link.open();
            link.write(&ours.encode());
        }
        match heard(link) {
            Some(Some(theirs)) => ours.check(&theirs)?,
            Some(None) => return Err(refused(rank, "it speaks another language")),
            None => return Ok(()),
        }
        link.ready = true;
        Ok(())
    }

    /// We were called: we hear, and answer if the caller belongs.
    fn greet_caller(&mut self, index: usize) -> Result<(), CollectiveError> {
        let Some(theirs) = heard(&mut self.driver.links[index]) else {
            return Ok(());
        };
        let verdict = match theirs {
            Some(theirs) => self.judge(&theirs).map(|()| theirs),
            None => Err(refused(self.spec.rank, "it speaks another language")),
        };
        let link = &mut self.driver.links[index];
        match verdict {
            Ok(theirs) => {
                let answer = Hello {
                    from: theirs.to,
                    to: theirs.from,
                    ..theirs
                };
                link.write(&answer.encode());
                link.rank = Some(theirs.from as usize);
                link.ready = true;
                Ok(())
            }
            Err(why) => {
                let farewell = match &why {
                    CollectiveError::WrongEpoch { ours, .. } => Farewell::WrongEpoch(*ours),
                    _ => Farewell::Refused(why.to_string()),
                };
                link.connection
                    .close(Instant::now(), farewell.code(), farewell.reason());
                link.end(farewell);
                match why {
                    // The caller lives in a later epoch: ours is over, nobody will come any more.
                    CollectiveError::WrongEpoch { ours, theirs, .. } if theirs > ours => Err(why),
                    _ => Ok(()),
                }
            }
        }
    }

    fn judge(&self, theirs: &Hello) -> Result<(), CollectiveError> {
        self.hello(theirs.from).check(theirs)?;
        let rank = theirs.from as usize;
        if rank >= self.spec.rank {
            return Err(refused(rank, "the lower rank calls the higher"));
        }
        if self.driver.links.iter().any(|link| link.rank == Some(rank)) {
            return Err(refused(rank, "it is here already"));
        }
        Ok(())
    }
}

/// The peer's greeting once all of it has come; the inner option is empty for noise.
fn heard(link: &mut Link) -> Option<Option<Hello>> {
    let mut rest = [0; Hello::BYTES];
    let room = Hello::BYTES - link.greeting.len();
    let read = link.read(&mut rest[..room]);
    link.greeting.extend_from_slice(&rest[..read]);
    let wire = link.greeting[..].try_into().ok()?;
    Some(Hello::decode(&wire))
}

fn refused(rank: usize, why: &str) -> CollectiveError {
    CollectiveError::Refused {
        rank,
        why: why.to_owned(),
    }
}

fn client_config(
    tls: &TensorTls,
    transport: &Arc<TransportConfig>,
) -> Result<ClientConfig, CollectiveError> {
    let crypto = QuicClientConfig::try_from(tls.client.clone())
        .map_err(|why| CollectiveError::local("preparing TLS for calls", why))?;
    let mut config = ClientConfig::new(Arc::new(crypto));
    config.transport_config(transport.clone());
    Ok(config)
}

fn server_config(
    tls: &TensorTls,
    transport: &Arc<TransportConfig>,
) -> Result<ServerConfig, CollectiveError> {
    let crypto = QuicServerConfig::try_from(tls.server.clone())
        .map_err(|why| CollectiveError::local("preparing TLS for callers", why))?;
    let mut config = ServerConfig::with_crypto(Arc::new(crypto));
    config.transport_config(transport.clone()).migration(false);
    Ok(config)
}

fn transport_config(driver: &Driver, options: &QuicOptions, spec: &JoinSpec) -> TransportConfig {
    let peers = spec.peers.len().saturating_sub(1).max(1);
    let window = receive_window(driver.socket.receive_buffer_bytes(), peers);
    let mut transport = TransportConfig::default();
    transport
        .max_concurrent_bidi_streams(VarInt::from_u32(1))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .datagram_receive_buffer_size(None)
        .stream_receive_window(VarInt::from_u32(window))
        .receive_window(VarInt::from_u32(window))
        .send_window(SEND_WINDOW_BYTES)
        // quinn's default of 333 ms is for the Internet: the first lost packet would cost that.
        .initial_rtt(Duration::from_millis(1))
        .initial_mtu(
            options
                .initial_mtu
                .unwrap_or_else(|| mtu_to_begin_with(&spec.peers)),
        )
        .allow_spin(false)
        .keep_alive_interval(Some(options.idle_timeout / 4))
        .max_idle_timeout(IdleTimeout::try_from(options.idle_timeout).ok())
        .ack_frequency_config(Some(AckFrequencyConfig::default()));
    let mut discovery = MtuDiscoveryConfig::default();
    discovery.upper_bound(QuicOptions::MTU_MAX);
    transport.mtu_discovery_config(Some(discovery));
    let mut congestion = CubicConfig::default();
    congestion.initial_window(INITIAL_CONGESTION_WINDOW_BYTES);
    transport.congestion_controller_factory(Arc::new(congestion));
    transport
}

/// What one peer may send ahead, so that all together do not overrun the socket's buffer while this
/// rank computes. The system counts its own bookkeeping against the buffer: about half of it.
fn receive_window(socket_buffer_bytes: usize, peers: usize) -> u32 {
    let share = socket_buffer_bytes / (3 * peers);
    u32::try_from(share)
        .unwrap_or(u32::MAX)
        .clamp(RECEIVE_WINDOW_BYTES_MIN, RECEIVE_WINDOW_BYTES_MAX)
}

fn mtu_to_begin_with(peers: &[SocketAddr]) -> u16 {
    let one_machine = peers
        .iter()
        .all(|peer| is_loopback(peer.ip()) || peer.ip() == peers[0].ip());
    if one_machine {
        QuicOptions::MTU_MAX
    } else {
        MTU_EVERYWHERE
    }
}

/// Carried by every network that carries QUIC.
const MTU_EVERYWHERE: u16 = 1200;

/// Less would make a prefill operand stop and go even on a fast LAN.
const RECEIVE_WINDOW_BYTES_MIN: u32 = 64 << 10;

/// More does not make loopback faster.
const RECEIVE_WINDOW_BYTES_MAX: u32 = 1 << 20;

/// Bytes per peer that wait for acknowledgement: above any peer's window, so that the peer decides.
const SEND_WINDOW_BYTES: u64 = 4 << 20;

/// A LAN of our own: the peers' windows bound what is in flight, and a prefill operand need not feel
/// its way up from the Internet's ten packets.
const INITIAL_CONGESTION_WINDOW_BYTES: u64 = 4 << 20;
