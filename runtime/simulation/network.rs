//! The network of a simulated cluster: packets that are late, lost, doubled and reordered, and cables
//! that are cut in one direction or both. quinn sees sockets.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::fmt;
use std::future::Future;
use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, UdpPoller};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::time::{Instant, Sleep, sleep_until};

use crate::sync::lock;

/// How packets fare now.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Weather {
    /// The chance that a packet is lost.
    pub(super) loss: f64,
    /// The chance that it comes twice.
    pub(super) doubled: f64,
    /// The least that it takes.
    pub(super) delay: Duration,
    /// The most that it takes longer; so packets overtake one another.
    pub(super) jitter: Duration,
}

pub(super) struct Network {
    state: Mutex<State>,
}

struct State {
    rng: StdRng,
    weather: Weather,
    /// From which process to which nothing passes.
    cuts: BTreeSet<(usize, usize)>,
    sockets: BTreeMap<SocketAddr, Arc<Inbox>>,
    packets: u64,
}

/// What has been sent to one socket.
struct Inbox {
    owner: usize,
    queue: Mutex<Queue>,
}

#[derive(Default)]
struct Queue {
    packets: BinaryHeap<Reverse<Packet>>,
    alarm: Option<Pin<Box<Sleep>>>,
    reader: Option<Waker>,
}

#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Packet {
    due: Instant,
    number: u64,
    from: SocketAddr,
    bytes: Vec<u8>,
}

impl Network {
    pub(super) fn new(seed: u64, weather: Weather) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State {
                rng: StdRng::seed_from_u64(seed),
                weather,
                cuts: BTreeSet::new(),
                sockets: BTreeMap::new(),
                packets: 0,
            }),
        })
    }

    /// A socket of process `owner`; one that had the address before hears and says nothing more.
    pub(super) fn bind(self: &Arc<Self>, owner: usize, addr: SocketAddr) -> Arc<Socket> {
        let inbox = Arc::new(Inbox {
            owner,
            queue: Mutex::default(),
        });
        let bound = Arc::clone(&inbox);
        lock(&self.state).sockets.insert(addr, bound);
        Arc::new(Socket {
            network: Arc::clone(self),
            addr,
            inbox,
        })
    }

    /// The process at this socket is no more.
    pub(super) fn unplug(&self, socket: &Socket) {
        let mut state = lock(&self.state);
        if state.is_plugged(socket) {
            state.sockets.remove(&socket.addr);
        }
    }

    pub(super) fn change_weather(&self, weather: Weather) {
        lock(&self.state).weather = weather;
    }

    pub(super) fn cut(&self, from: usize, to: usize) {
        lock(&self.state).cuts.insert((from, to));
    }

    pub(super) fn mend(&self, from: usize, to: usize) {
        lock(&self.state).cuts.remove(&(from, to));
    }

    /// All packets that were sent.
    pub(super) fn packets(&self) -> u64 {
        lock(&self.state).packets
    }
}

impl State {
    fn is_plugged(&self, socket: &Socket) -> bool {
        let plugged = self.sockets.get(&socket.addr);
        plugged.is_some_and(|inbox| Arc::ptr_eq(inbox, &socket.inbox))
    }

    fn send(&mut self, from: &Socket, to: SocketAddr, bytes: &[u8]) {
        self.packets += 1;
        let Some(inbox) = self.sockets.get(&to).map(Arc::clone) else {
            return;
        };
        if self.cuts.contains(&(from.inbox.owner, inbox.owner))
            || self.rng.random_bool(self.weather.loss)
        {
            return;
        }
        let copies = 1 + u64::from(self.rng.random_bool(self.weather.doubled));
        for copy in 0..copies {
            let late = self.weather.jitter.mul_f64(self.rng.random());
            let packet = Packet {
                due: Instant::now() + self.weather.delay + late,
                number: self.packets * 2 + copy,
                from: from.addr,
                bytes: bytes.to_owned(),
            };
            inbox.put(packet);
        }
    }
}

impl Inbox {
    fn put(&self, packet: Packet) {
        let reader = {
            let mut queue = lock(&self.queue);
            queue.packets.push(Reverse(packet));
            queue.alarm = None;
            queue.reader.take()
        };
        if let Some(reader) = reader {
            reader.wake();
        }
    }

    /// The next packet that has arrived.
    fn poll_take(&self, cx: &mut Context<'_>) -> Poll<Packet> {
        let mut queue = lock(&self.queue);
        while let Some(Reverse(first)) = queue.packets.peek() {
            let due = first.due;
            if due <= Instant::now() {
                let Reverse(packet) = queue.packets.pop().expect("it was there");
                return Poll::Ready(packet);
            }
            let alarm = queue
                .alarm
                .get_or_insert_with(|| Box::pin(sleep_until(due)));
            if alarm.as_mut().poll(cx).is_pending() {
                break;
            }
            queue.alarm = None;
        }
        queue.reader = Some(cx.waker().clone());
        Poll::Pending
    }
}

/// What quinn takes for a UDP socket.
pub(super) struct Socket {
    network: Arc<Network>,
    addr: SocketAddr,
    inbox: Arc<Inbox>,
}

impl fmt::Debug for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Socket({})", self.addr)
    }
}

impl AsyncUdpSocket for Socket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(AlwaysWritable)
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let mut state = lock(&self.network.state);
        if state.is_plugged(self) {
            state.send(self, transmit.destination, transmit.contents);
        }
        Ok(())
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        self.inbox.poll_take(cx).map(|packet| {
            let len = packet.bytes.len();
            bufs[0][..len].copy_from_slice(&packet.bytes);
            meta[0] = RecvMeta::default();
            meta[0].addr = packet.from;
            meta[0].len = len;
            meta[0].stride = len;
            Ok(1)
        })
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.addr)
    }

    fn may_fragment(&self) -> bool {
        false
    }
}

#[derive(Debug)]
struct AlwaysWritable;

impl UdpPoller for AlwaysWritable {
    fn poll_writable(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
