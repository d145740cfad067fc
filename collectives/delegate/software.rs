//! A device made of software: a thread that plays the device's side of the protocol word for word,
//! so that proxy, numbers and deadlines are proved on machines without one.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    thread,
    time::{Duration, Instant},
};

use mlx_rs::{Array, Dtype};

use super::{
    Control, Device, Kernel, Memory,
    gave_up::{GaveUp, Reason},
    job::{Job, Shape, Traffic},
    proxy::{Order, Proxy},
    words::{self, Overrun, Sequence, Word},
};
use crate::{
    carrier::Carrier,
    error::CollectiveError,
    health::Health,
    operation::Operation,
    reduce::Reduction,
    transport::{Exchange, POISON_LATENCY_MAX, Transport, Wait},
};

struct SoftwareDevice {
    up: Vec<AtomicU64>,
    down: Vec<AtomicU64>,
    control: [AtomicU64; 3],
    dead: AtomicU64,
}

impl SoftwareDevice {
    fn new() -> Arc<Self> {
        let area = || {
            (0..words::words(AREA_BYTES))
                .map(|_| AtomicU64::new(0))
                .collect()
        };
        Arc::new(Self {
            up: area(),
            down: area(),
            control: Default::default(),
            dead: AtomicU64::new(0),
        })
    }

    /// `offbook_exchange` of kernels.cu, one thread for all of the kernel's.
    fn exchange(&self, sequence: Sequence, operand: &[u8], deadline: Duration) -> Vec<u8> {
        if self.dead.load(Relaxed) != 0 {
            return vec![0; operand.len()];
        }
        words::write(&self.up, sequence, operand);
        self.wait(sequence, operand.len(), deadline)
    }

    fn wait(&self, sequence: Sequence, bytes: usize, deadline: Duration) -> Vec<u8> {
        let begun = Instant::now();
        let mut answer = vec![0; bytes];
        let ended = words::read(&self.down, sequence, &mut answer, || -> Result<(), End> {
            if self.control(Control::Stop).load(Relaxed) != 0 {
                return Err(End::Stopped);
            }
            if begun.elapsed() > deadline {
                return Err(End::GaveUp(Reason::Late));
            }
            thread::yield_now();
            Ok(())
        });
        if let Err(end) = ended {
            if let End::GaveUp(reason) = end {
                let record = GaveUp {
                    sequence: sequence.0,
                    operation: Operation::AllSum,
                    rank: OWN_RANK,
                    reason,
                };
                self.control(Control::GaveUp)
                    .store(record.encode(), Relaxed);
            }
            self.dead.store(1, Relaxed);
            return vec![0; bytes];
        }
        answer
    }
}

enum End {
    Stopped,
    GaveUp(Reason),
}

impl From<Overrun> for End {
    fn from(_: Overrun) -> Self {
        Self::GaveUp(Reason::Overrun)
    }
}

impl Memory for SoftwareDevice {
    fn up(&self) -> &[AtomicU64] {
        &self.up
    }

    fn down(&self) -> &[AtomicU64] {
        &self.down
    }

    fn control(&self, which: Control) -> &AtomicU64 {
        &self.control[which as usize]
    }
}

impl Device for SoftwareDevice {
    fn launch(&self, _: &Kernel, _: &Array, _: &Array) -> Result<(Array, Array), CollectiveError> {
        unreachable!("the tests play the kernels themselves")
    }

    fn peer_bytes(&self) -> Option<usize> {
        None
    }
}

/// Ranks in one process, joined by channels.
struct Channels {
    rank: usize,
    to: Vec<Sender<Vec<u8>>>,
    from: Vec<Receiver<Vec<u8>>>,
}

impl Channels {
    fn between(size: usize) -> Vec<Self> {
        let mut ends: Vec<_> = (0..size)
            .map(|rank| Self {
                rank,
                to: Vec::new(),
                from: Vec::new(),
            })
            .collect();
        for a in 0..size {
            for b in 0..size {
                let (to, from) = channel();
                ends[a].to.push(to);
                ends[b].from.push(from);
            }
        }
        ends
    }
}

impl Transport for Channels {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.to.len()
    }

    fn exchange(
        &mut self,
        exchange: Exchange<'_, '_>,
        wait: Wait<'_>,
    ) -> Result<(), CollectiveError> {
        for (to, operand) in exchange.outgoing.iter().enumerate() {
            if let Some(operand) = operand {
                let _ = self.to[to].send(operand.to_vec());
            }
        }
        for (from, place) in exchange.incoming.iter_mut().enumerate() {
            let Some(place) = place else { continue };
            loop {
                if let Some(why) = (wait.interrupted)() {
                    return Err(why);
                }
                let left = wait.left(Instant::now(), 1);
                if left.is_zero() {
                    return Err(wait.late(from, exchange.operation));
                }
                match self.from[from].recv_timeout(left.min(POISON_LATENCY_MAX)) {
                    Ok(operand) => {
                        place.copy_from_slice(&operand);
                        break;
                    }
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => {
                        return Err(CollectiveError::Lost {
                            rank: from,
                            operation: exchange.operation,
                            why: "its channel is closed".to_owned(),
                        });
                    }
                }
            }
        }
        Ok(())
    }

    fn abandon(&mut self, _: &CollectiveError) {}
}

/// One rank: a device of software, its proxy, and the carrier behind it.
struct Rank {
    device: Arc<SoftwareDevice>,
    health: Arc<Health>,
    proxy: Proxy,
    next: Sequence,
}

impl Rank {
    fn new(transport: Channels, deadline: Duration) -> Self {
        let device = SoftwareDevice::new();
        let health = Arc::<Health>::default();
        let carrier = Arc::new(Carrier::new(Box::new(transport), deadline, health.clone()));
        let proxy = Proxy::start(device.clone(), carrier).expect("a thread can be started");
        Self {
            device,
            health,
            proxy,
            next: Sequence::FIRST,
        }
    }

    fn order(&mut self, bytes: usize) -> Sequence {
        let sequence = self.next;
        self.next = sequence.next();
        self.proxy.order(Order {
            sequence,
            job: Job::Reduce(Reduction::Sum),
            dtype: Dtype::Uint32,
            traffic: Traffic {
                up_bytes: bytes,
                down_bytes: bytes,
                result: Shape::LikeOperand,
            },
        });
        sequence
    }

    /// An all-sum of whole numbers, as the engine and the device do it together.
    fn all_sum(&mut self, operand: &[u32]) -> Vec<u32> {
        let bytes: Vec<u8> = operand.iter().flat_map(|n| n.to_le_bytes()).collect();
        let sequence = self.order(bytes.len());
        numbers(&self.device.exchange(sequence, &bytes, DEVICE_DEADLINE))
    }
}

fn numbers(bytes: &[u8]) -> Vec<u32> {
    let (numbers, _) = bytes.as_chunks::<4>();
    numbers
        .iter()
        .map(|bytes| u32::from_le_bytes(*bytes))
        .collect()
}

fn ranks(size: usize, deadline: Duration) -> Vec<Rank> {
    let transports = Channels::between(size);
    transports
        .into_iter()
        .map(|transport| Rank::new(transport, deadline))
        .collect()
}

#[test]
fn thousands_of_sums_of_any_length_are_right_on_every_rank() {
    let size = 3;
    let operand = |rank: usize, round: u32| -> Vec<u32> {
        let length = (round * 37 + 1) % 900;
        (0..length)
            .map(|i| i.wrapping_mul(round + 1) ^ (rank as u32) << 20)
            .collect()
    };
    thread::scope(|scope| {
        for (index, mut rank) in ranks(size, PATIENCE).into_iter().enumerate() {
            scope.spawn(move || {
                for round in 0..2000 {
                    let sum = rank.all_sum(&operand(index, round));
                    let right: Vec<u32> = (0..operand(0, round).len())
                        .map(|i| {
                            (0..size).fold(0, |sum: u32, r| sum.wrapping_add(operand(r, round)[i]))
                        })
                        .collect();
                    assert_eq!(sum, right, "rank {index} round {round}");
                }
                assert_eq!(rank.health.first_error(), None);
            });
        }
    });
}

#[test]
fn words_may_come_late_and_in_any_order() {
    let mut pair = ranks(2, PATIENCE);
    let (mut b, mut a) = (pair.pop().expect("two"), pair.pop().expect("two"));
    thread::scope(|scope| {
        scope.spawn(move || {
            for round in 1..20 {
                assert_eq!(b.all_sum(&[round; 6]), [round + 100; 6]);
            }
        });
        for round in 1..20 {
            let sequence = a.order(24);
            let whole: Vec<u8> = [100_u32; 6].iter().flat_map(|n| n.to_le_bytes()).collect();
            let scratch: Vec<AtomicU64> = (0..6).map(|_| AtomicU64::new(0)).collect();
            words::write(&scratch, sequence, &whole);
            // The bus may deliver the last word first.
            for at in [5, 0, 3, 1, 4, 2] {
                a.device.up[at].set(scratch[at].get());
                thread::sleep(Duration::from_micros(200));
            }
            let sum = a.device.wait(sequence, 24, DEVICE_DEADLINE);
            assert_eq!(numbers(&sum), [round + 100; 6]);
        }
    });
}

#[test]
fn a_late_peer_is_named_and_the_device_stops_waiting() {
    let deadline = Duration::from_millis(100);
    let mut three = ranks(3, deadline);
    let absent = three.pop().expect("three");
    let begun = Instant::now();
    thread::scope(|scope| {
        for mut rank in three {
            scope.spawn(move || {
                assert_eq!(rank.all_sum(&[7; 10]), [0; 10], "no result is made up");
                assert!(begun.elapsed() < deadline + Duration::from_millis(100));
                let error = rank.health.first_error().expect("it is poisoned");
                assert!(
                    matches!(error, CollectiveError::Late { rank: 2, .. }),
                    "{error}"
                );
                let again = Instant::now();
                assert_eq!(rank.all_sum(&[7; 10]), [0; 10]);
                assert!(
                    again.elapsed() < Duration::from_millis(20),
                    "later ones end at once"
                );
            });
        }
    });
    drop(absent);
}

#[test]
fn a_word_that_is_lost_on_the_way_ends_in_an_error_on_both_sides() {
    let mut pair = ranks(2, Duration::from_millis(100));
    let (mut b, mut a) = (pair.pop().expect("two"), pair.pop().expect("two"));
    thread::scope(|scope| {
        scope.spawn(move || {
            assert_eq!(b.all_sum(&[1; 8]), [0; 8]);
            let error = b.health.first_error().expect("it is poisoned");
            assert!(
                matches!(error, CollectiveError::Late { rank: 0, .. }),
                "{error}"
            );
        });
        let sequence = a.order(32);
        words::write(&a.device.up, sequence, &[1; 24]);
        let answer = a.device.wait(sequence, 32, Duration::from_millis(150));
        assert_eq!(answer, [0; 32]);
        wait_for(|| a.health.is_poisoned());
        let record = GaveUp::of(a.device.as_ref()).expect("the device left a record");
        assert_eq!((record.sequence, record.reason), (sequence.0, Reason::Late));
    });
}

#[test]
fn a_device_that_goes_on_without_its_answer_is_not_believed() {
    let mut pair = ranks(2, Duration::from_millis(200));
    let (mut b, mut a) = (pair.pop().expect("two"), pair.pop().expect("two"));
    let first = a.order(8);
    words::write(&a.device.up, first.next(), &[9; 8]);
    wait_for(|| a.health.is_poisoned());
    let error = a.health.first_error().expect("it is poisoned").to_string();
    assert!(error.contains("not in order"), "{error}");
    assert_eq!(
        b.all_sum(&[1; 2]),
        [0; 2],
        "the other rank gets no made-up operand"
    );
}

#[test]
fn an_answer_of_a_later_operation_is_not_taken() {
    let device = SoftwareDevice::new();
    words::write(&device.down, Sequence(2), &[9; 8]);
    assert_eq!(device.exchange(Sequence(1), &[1; 8], PATIENCE), [0; 8]);
    let record = GaveUp::of(device.as_ref()).expect("the device left a record");
    assert_eq!(record.reason, Reason::Overrun);
}

#[test]
fn a_corrupted_operand_of_the_right_number_is_still_only_data() {
    // What a bus does to data no number shows; that the word is whole and of this operation it does.
    let device = SoftwareDevice::new();
    words::write(&device.down, Sequence(1), &[9; 8]);
    device.down[1].set(device.down[1].get() ^ 1 << 40);
    assert_eq!(device.exchange(Sequence(1), &[1; 8], PATIENCE), [0; 8]);
    assert!(
        GaveUp::of(device.as_ref()).is_some(),
        "a number that is wrong is seen"
    );
}

#[test]
fn poison_from_outside_ends_the_device_and_a_proxy_that_waits() {
    let mut pair = ranks(2, PATIENCE);
    let _silent = pair.pop();
    let mut a = pair.pop().expect("two");
    let (health, device) = (a.health.clone(), a.device.clone());
    thread::scope(|scope| {
        scope.spawn(move || {
            thread::sleep(Duration::from_millis(50));
            health.poison(CollectiveError::Poisoned {
                why: "a test".to_owned(),
            });
            device.control(Control::Stop).store(1, Relaxed);
        });
        let begun = Instant::now();
        assert_eq!(a.all_sum(&[1; 4]), [0; 4]);
        assert!(begun.elapsed() < Duration::from_secs(1));
    });
}

#[test]
fn a_proxy_that_waits_for_a_device_that_never_comes_ends_with_its_group() {
    let mut pair = ranks(2, PATIENCE);
    let mut a = pair.pop().expect("two");
    a.order(64);
    a.device.control(Control::Stop).store(1, Relaxed);
    drop(a);
}

fn wait_for(condition: impl Fn() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < PATIENCE, "waited in vain");
        thread::sleep(Duration::from_millis(1));
    }
}

const AREA_BYTES: usize = 4096;
const OWN_RANK: usize = 0;
const PATIENCE: Duration = Duration::from_secs(30);
const DEVICE_DEADLINE: Duration = Duration::from_secs(40);
