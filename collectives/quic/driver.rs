//! Moves packets between one socket and the connections of one rank, on whatever thread calls.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use quinn_proto::{
    ClientConfig, ConnectError, ConnectionHandle, DatagramEvent, Endpoint, EndpointConfig,
    Incoming, ServerConfig,
};
use ring::rand::SecureRandom;

use self::hall::Verdict;
use super::{
    link::{Farewell, Link},
    options::{QuicOptions, TensorTls},
    socket::{Datagram, Inbox, Socket},
};
use crate::error::CollectiveError;

mod hall;
mod pass;

pub(super) use self::{hall::Hall, pass::Pass};

/// Everything one rank has on the network. Whoever holds it makes things happen by
/// [`turn`](Self::turn); nothing happens by itself.
pub(super) struct Driver {
    pub socket: Socket,
    pub links: Vec<Link>,
    /// Where in `links` each rank is, once all are there.
    pub by_rank: Vec<Option<usize>>,
    endpoint: Endpoint,
    inbox: Inbox,
    outbox: Vec<u8>,
    hall: Hall,
}

impl Driver {
    pub(super) fn bind(
        addr: std::net::SocketAddr,
        options: &QuicOptions,
    ) -> Result<Self, CollectiveError> {
        let doing = "setting up the tensor endpoint";
        let socket = Socket::bind(addr, options.socket_buffer_bytes)?;
        let mut key = [0; 64];
        ring::rand::SystemRandom::new()
            .fill(&mut key)
            .map_err(|_| CollectiveError::local(doing, "no randomness"))?;
        let reset_key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, &key);
        let mut config = EndpointConfig::new(Arc::new(reset_key));
        config
            .max_udp_payload_size(QuicOptions::MTU_MAX)
            .map_err(|why| CollectiveError::local(doing, why))?;
        let endpoint = Endpoint::new(Arc::new(config), None, !socket.may_fragment(), None);
        Ok(Self {
            socket,
            links: Vec::new(),
            by_rank: Vec::new(),
            endpoint,
            inbox: Inbox::new(),
            outbox: Vec::with_capacity(1 << 16),
            hall: Hall::closed(),
        })
    }

    pub(super) fn local_addr(&self) -> Result<std::net::SocketAddr, CollectiveError> {
        self.socket
            .local_addr()
            .map_err(|why| CollectiveError::local("asking for our address", why))
    }

    /// Lets callers into the hall, as `config` says.
    pub(super) fn listen(&mut self, config: ServerConfig, hall: Hall) {
        self.endpoint.set_server_config(Some(Arc::new(config)));
        self.hall = hall;
    }

    /// Everybody is here: whoever else calls is refused, and whoever still stands in the hall is sent away.
    /// From now on the links that are ready stay where they are in `links`.
    pub(super) fn close_hall(&mut self, now: Instant) {
        self.hall = Hall::closed();
        for link in self.links.iter_mut().filter(|link| link.rank.is_none()) {
            send_away(link, now, "everybody is here");
        }
        self.links.sort_by_key(|link| !link.ready);
    }

    /// Sends those away that have stood in the hall for too long without a greeting.
    pub(super) fn clear_hall(&mut self, now: Instant) {
        for link in &mut self.links {
            if link.rank.is_none() && self.hall.is_out_of_patience(link, now) {
                send_away(link, now, "it did not greet");
            }
        }
    }

    /// Calls a peer.
    pub(super) fn call(
        &mut self,
        config: ClientConfig,
        remote: std::net::SocketAddr,
        rank: usize,
    ) -> Result<(), ConnectError> {
        let (handle, connection) =
            self.endpoint
                .connect(Instant::now(), config, remote, TensorTls::SERVER_NAME)?;
        self.links.push(Link::new(handle, connection, Some(rank)));
        Ok(())
    }

    /// Receives what is there, serves the timers, sends what is due. Never blocks. Whether anything
    /// came.
    pub(super) fn turn(&mut self, now: Instant) -> bool {
        let received = self.receive(now);
        self.serve(now);
        self.flush(now);
        received
    }

    fn receive(&mut self, now: Instant) -> bool {
        let mut any = false;
        // Bounded, so that a flood cannot keep us from our own operands.
        for _ in 0..RECEIVES_MAX {
            let (filled, more) = self.inbox.fill(&self.socket);
            for index in 0..filled {
                any = true;
                for datagram in self.inbox.datagrams(index) {
                    self.outbox.clear();
                    let Datagram {
                        remote,
                        local,
                        ecn,
                        data,
                    } = datagram;
                    let event =
                        self.endpoint
                            .handle(now, remote, local, ecn, data, &mut self.outbox);
                    match event {
                        Some(DatagramEvent::ConnectionEvent(handle, event)) => {
                            if let Some(link) = find(&mut self.links, handle) {
                                link.connection.handle_event(event);
                            }
                        }
                        Some(DatagramEvent::NewConnection(incoming)) => {
                            self.admit(incoming, now);
                        }
                        Some(DatagramEvent::Response(transmit)) => {
                            self.socket.send(&transmit, &self.outbox);
                        }
                        None => {}
                    }
                }
            }
            if !more {
                break;
            }
        }
        any
    }

    /// Lets a caller into the hall, if it may; who it is shows in its certificate and its greeting.
    fn admit(&mut self, incoming: Incoming, now: Instant) {
        let response = match self.hall.verdict(&self.links, &incoming) {
            Verdict::Enter => match self.endpoint.accept(incoming, now, &mut self.outbox, None) {
                Ok((handle, connection)) => {
                    self.links.push(Link::new(handle, connection, None));
                    None
                }
                Err(refused) => refused.response,
            },
            Verdict::ProveAddress => match self.endpoint.retry(incoming, &mut self.outbox) {
                Ok(response) => Some(response),
                Err(error) => {
                    self.endpoint.ignore(error.into_incoming());
                    None
                }
            },
            Verdict::ComeAgain => {
                self.endpoint.ignore(incoming);
                None
            }
            Verdict::GoAway => Some(self.endpoint.refuse(incoming, &mut self.outbox)),
        };
        if let Some(response) = response {
            self.socket.send(&response, &self.outbox);
        }
    }

    /// Timers that are due, and what happened on the connections.
    pub(super) fn serve(&mut self, now: Instant) {
        for link in &mut self.links {
            if link.connection.poll_timeout().is_some_and(|due| due <= now) {
                link.connection.handle_timeout(now);
            }
            while let Some(event) = link.connection.poll_endpoint_events() {
                if let Some(event) = self.endpoint.handle_event(link.handle, event) {
                    link.connection.handle_event(event);
                }
            }
            while let Some(event) = link.connection.poll() {
                link.note(event);
            }
        }
        // Nobody waits for those that came, were nobody's, and are gone.
        self.links
            .retain(|link| link.rank.is_some() || !link.connection.is_drained());
    }

    /// Sends what the connections have to say.
    pub(super) fn flush(&mut self, now: Instant) {
        let segments = self.socket.segments_max();
        for link in &mut self.links {
            loop {
                self.outbox.clear();
                let Some(transmit) = link
                    .connection
                    .poll_transmit(now, segments, &mut self.outbox)
                else {
                    break;
                };
                self.socket.send(&transmit, &self.outbox);
            }
        }
    }

    /// When [`turn`](Self::turn) has something to do even if nothing comes.
    pub(super) fn next_timer(&mut self) -> Option<Instant> {
        self.links
            .iter_mut()
            .filter_map(|link| link.connection.poll_timeout())
            .min()
    }

    /// Ends every connection with `farewell`. Who leaves with its work done first sees to it that
    /// the last operands arrive.
    pub(super) fn close_all(&mut self, farewell: Farewell) {
        if farewell == Farewell::Left {
            self.linger(Instant::now() + LINGER_MAX);
        }
        let now = Instant::now();
        for link in &mut self.links {
            if link.ending.is_none() {
                link.connection
                    .close(now, farewell.code(), farewell.reason());
                link.end(Farewell::Lost("we closed it".to_owned()));
            }
        }
        self.flush(now);
    }

    fn linger(&mut self, until: Instant) {
        self.links.iter_mut().for_each(Link::finish);
        self.flush(Instant::now());
        while self
            .links
            .iter()
            .any(|link| !link.finished && link.ending.is_none())
        {
            let now = Instant::now();
            if now >= until {
                return;
            }
            self.turn(now);
            let timer = self.next_timer().map_or(until, |timer| timer.min(until));
            self.socket
                .readable(timer.saturating_duration_since(now).min(LINGER_STEP));
        }
    }
}

fn find(links: &mut [Link], handle: ConnectionHandle) -> Option<&mut Link> {
    links.iter_mut().find(|link| link.handle == handle)
}

fn send_away(link: &mut Link, now: Instant, why: &str) {
    if link.ending.is_none() {
        let farewell = Farewell::Refused(why.to_owned());
        link.connection
            .close(now, farewell.code(), farewell.reason());
        link.end(farewell);
    }
}

/// Batches per turn.
const RECEIVES_MAX: usize = 16;

/// How long a rank that leaves waits for the acknowledgement of its last operands: a few delayed
/// acknowledgements, since the peer's keeper may have to send them.
const LINGER_MAX: Duration = Duration::from_millis(200);

const LINGER_STEP: Duration = Duration::from_millis(5);
