//! The network of a simulated cluster: packets that are late, lost, doubled and reordered, and cables
//! that are cut in one direction or both. quinn sees sockets.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::fmt;
use std::future::Future;
use std::hash::{DefaultHasher, Hash, Hasher};
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
pub struct Weather {
    /// The chance that a packet is lost.
    pub loss: f64,
    /// The chance that it comes twice.
    pub doubled: f64,
    /// The least that it takes.
    pub delay: Duration,
    /// The most that it takes longer; so packets overtake one another.
    pub jitter: Duration,
}

/// How long packets are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packets {
    /// quinn looks for the longest that pass, as in a release.
    Sought,
    /// It takes the shortest that a network must pass, which spares a seventh of the time.
    Short,
}

/// See the module's own words.
pub struct Network {
    packets: Packets,
    state: Mutex<State>,
}

struct State {
    rng: StdRng,
    weather: Weather,
    /// From which process to which nothing passes.
    cuts: BTreeSet<(usize, usize)>,
    sockets: BTreeMap<SocketAddr, Arc<Inbox>>,
    packets: u64,
    /// Of all packets: who sent them when to whom, and how long they were.
    digest: u64,
}

/// What has been sent to one socket.
struct Inbox {
    owner: usize,
    clock: Clock,
    queue: Mutex<Queue>,
}

/// The clock of one process beside that of the network: each process may have a runtime of its own, whose
/// clock began when it liked.
#[derive(Clone, Copy)]
struct Clock {
    bound: Instant,
    /// The same moment by the network's clock.
    at: Duration,
}

impl Clock {
    fn now(self) -> Duration {
        self.at + self.bound.elapsed()
    }

    fn instant(self, due: Duration) -> Instant {
        self.bound + due.saturating_sub(self.at)
    }
}

#[derive(Default)]
struct Queue {
    packets: BinaryHeap<Reverse<Packet>>,
    alarm: Option<Pin<Box<Sleep>>>,
    reader: Option<Waker>,
}

#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Packet {
    due: Duration,
    number: u64,
    from: SocketAddr,
    bytes: Vec<u8>,
}

impl Network {
    /// A network in which nobody is yet.
    pub fn new(seed: u64, weather: Weather, packets: Packets) -> Arc<Self> {
        Arc::new(Self {
            packets,
            state: Mutex::new(State {
                rng: StdRng::seed_from_u64(seed),
                weather,
                cuts: BTreeSet::new(),
                sockets: BTreeMap::new(),
                packets: 0,
                digest: 0,
            }),
        })
    }

    /// A socket of `owner`, to be made within the runtime of the process that it is for, at `now` by the
    /// network's clock. One that had the address before hears and says nothing more.
    pub fn bind(self: &Arc<Self>, owner: usize, addr: SocketAddr, now: Duration) -> Arc<Socket> {
        let inbox = Arc::new(Inbox {
            owner,
            clock: Clock {
                bound: Instant::now(),
                at: now,
            },
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
    pub fn unplug(&self, socket: &Socket) {
        let mut state = lock(&self.state);
        if state.is_plugged(socket) {
            state.sockets.remove(&socket.addr);
        }
    }

    pub fn change_weather(&self, weather: Weather) {
        lock(&self.state).weather = weather;
    }

    pub fn cut(&self, from: usize, to: usize) {
        lock(&self.state).cuts.insert((from, to));
    }

    pub fn mend(&self, from: usize, to: usize) {
        lock(&self.state).cuts.remove(&(from, to));
    }

    /// All packets that were sent.
    pub fn packets(&self) -> u64 {
        lock(&self.state).packets
    }

    /// A number that two runs have in common only if each packet of one was sent at the same moment in the
    /// other, between the same sockets and as long.
    pub fn digest(&self) -> u64 {
        lock(&self.state).digest
    }
}

impl State {
    fn is_plugged(&self, socket: &Socket) -> bool {
        let plugged = self.sockets.get(&socket.addr);
        plugged.is_some_and(|inbox| Arc::ptr_eq(inbox, &socket.inbox))
    }

    fn send(&mut self, from: &Socket, to: SocketAddr, bytes: &[u8]) {
        let now = from.inbox.clock.now();
        self.packets += 1;
        self.note((now, from.addr, to, bytes.len()));
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
                due: now + self.weather.delay + late,
                number: self.packets * 2 + copy,
                from: from.addr,
                bytes: bytes.to_owned(),
            };
            inbox.put(packet);
        }
    }
}

impl State {
    fn note(&mut self, packet: (Duration, SocketAddr, SocketAddr, usize)) {
        let mut hasher = DefaultHasher::new();
        (self.digest, packet).hash(&mut hasher);
        self.digest = hasher.finish();
    }
}

impl Inbox {
    fn put(&self, packet: Packet) {
        let reader = {
            let mut queue = lock(&self.queue);
            let first = queue.packets.peek();
            let is_next = first.is_none_or(|Reverse(first)| packet.due < first.due);
            queue.packets.push(Reverse(packet));
            if !is_next {
                return;
            }
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
            let due = self.clock.instant(first.due);
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
pub struct Socket {
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

    /// quinn seeks no longer packets on a socket that would divide them.
    fn may_fragment(&self) -> bool {
        self.network.packets == Packets::Short
    }
}

#[derive(Debug)]
struct AlwaysWritable;

impl UdpPoller for AlwaysWritable {
    fn poll_writable(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
